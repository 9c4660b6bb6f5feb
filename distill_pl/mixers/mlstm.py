"""mLSTM, the matrix memory of xLSTM (Beck et al., 2024): scalar input and forget gates per head, a normalised state.

log f = logsigmoid(W_f x + b_f), log i = W_i x + b_i
A: ops/mlstm.py;  after A v: LayerNorm per head, times sigmoid(W_o x), o_proj
"""

import math

from torch import Tensor, nn
from torch.nn.functional import logsigmoid, sigmoid
from transformers import initialization

from distill_pl.mixers.mixer import Paper, SequenceMixer
from distill_pl.ops import mlstm


class MLSTM(SequenceMixer):
    """mLSTM with as many key channels as the teacher's heads have: q, k, v and o can be copied whole."""

    op = mlstm
    decay_gate = True
    paper = Paper(heads=4, key=1 / 2)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden = config.hidden_size
        self.forget_proj = nn.Linear(hidden, self.heads)
        self.input_proj = nn.Linear(hidden, self.heads)
        self.gate_proj = nn.Linear(hidden, self.heads * self.value_dim, bias=False)
        self.norm = nn.LayerNorm(self.value_dim, config.rms_norm_eps, bias=False)

    def start(self, config) -> None:
        """Set the forget gate's bias to retain `config.retention` and couple the input gate: b_i = -b_f (section 3.1)."""
        bias = math.log(config.retention / (1 - config.retention))
        initialization.constant_(self.forget_proj.bias, bias)
        initialization.constant_(self.input_proj.bias, -bias)

    def state_bytes(self, batch, length, itemsize):
        """Return the bytes of C with two columns for n, and of m, for each head, in fp32."""
        return 4 * batch * self.heads * (self.key_dim * (self.value_dim + 2) + 1)

    def log_decay(self, hidden: Tensor) -> Tensor:
        """Compute log f <= 0 [B, T, H] in fp32 from hidden [B, T, D]."""
        return logsigmoid(self.forget_proj(hidden).float())

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to q, k, v, log gates i and g; a padded token writes nothing and forgets nothing."""
        q, k, v = self.qkv(hidden, position)
        i, g = self.input_proj(hidden).float(), self.log_decay(hidden)
        if mask is not None:
            i, g = i.masked_fill(~mask[:, :, None], -math.inf), g * mask[:, :, None]
        k, v = self.repeat_kv(k), self.repeat_kv(v)
        return mlstm.Inputs(q, k, v, i, g, self.scale, self.backend), hidden

    def output(self, mixed, hidden):
        """Normalise each head and gate it. mixed [B, T, H, V] -> [B, T, H V]."""
        gate = sigmoid(self.gate_proj(hidden)).unflatten(-1, (self.heads, -1))
        return (self.norm(mixed) * gate).flatten(2)
