"""HGRN2 (Qin et al., 2024): a gated linear RNN whose key is one minus its forget gate.

    q = silu(W_q x);  f = sigmoid(W_f x + b), g = log f, k = 1 - f
    A: ops/channel_decay.py;  after A v: RMSNorm over all heads, o_proj

The original has no bias b: its learned lower bounds of f, a softmax over all layers, keep the upper layers from forgetting.
Here b makes every layer start at `student.retention` (section 3.1), and f has no lower bound. A bound would exclude lower
retentions, and learned bounds would couple layers that stages 1 and 2 align one by one.
"""

import math

from torch import nn
from torch.nn.functional import sigmoid, silu
from transformers import initialization

from distill_pl.mixers.mixer import Paper, RMSNorm, SequenceMixer, unpadded
from distill_pl.ops import channel_decay, promoted

TEMPERATURE = 1  # the log gate is not divided


class HGRN2(SequenceMixer):
    """HGRN2 with as many key channels as the teacher's heads have: q (before its silu), v and o can be copied whole."""

    op = channel_decay
    decay_gate = True
    copies = ("q", "v", "o")
    paper = Paper(kv_heads="grouped")

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.decay_proj = nn.Linear(config.hidden_size, self.kv_count * self.key_dim)
        self.norm = RMSNorm(self.heads * self.value_dim, config.rms_norm_eps)

    def start(self, config) -> None:
        """Set the bias with which a fresh gate retains the share `config.retention` of the state per token (section 3.1)."""
        initialization.constant_(self.decay_proj.bias, math.log(config.retention / (1 - config.retention)))

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to q, k = 1 - f, v and the decay's logits g; the key of a padded token is zero."""
        q, v = self.qv(hidden)
        g = self.decay_proj(hidden).unflatten(-1, (self.kv_count, -1))
        k = sigmoid(-promoted(g)[0])
        k, v, g = (self.repeat_kv(x) for x in (k, v, g))
        q, k = self.rotated(position, silu(q), k)
        return channel_decay.Inputs(q, unpadded(k, mask), v, g, self.scale, self.backend, TEMPERATURE), hidden

    def output(self, mixed, hidden):
        """Normalise over all heads. mixed [B, T, H, V] -> [B, T, H V]."""
        return self.norm(mixed.flatten(2))
