"""Gated linear attention, GLA (Yang et al., 2024): a decay per key channel that depends on the token.

g = logsigmoid(W_2 W_1 x + b) / 16
A: ops/channel_decay.py;  after A v: RMSNorm per head, times silu(W_g x), o_proj
"""

import math

from torch import nn
from torch.nn.functional import silu
from transformers import initialization

from distill_pl.mixers.mixer import Paper, RMSNorm, SequenceMixer, unpadded
from distill_pl.ops import channel_decay

TEMPERATURE = 16  # divides the log gate, as in the original, so that moderate logits give slow forgetting
RANK = 16  # of the decay's projection W_2 W_1, as in the original


class GLA(SequenceMixer):
    """GLA with as many key channels as the teacher's heads have: q, k, v and o can be copied whole."""

    op = channel_decay
    decay_gate = True
    paper = Paper(key=1 / 2, kv_heads="grouped")

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden, channels = config.hidden_size, self.heads * self.key_dim
        self.decay_proj = nn.Sequential(nn.Linear(hidden, RANK, bias=False), nn.Linear(RANK, channels))
        self.gate_proj = nn.Linear(hidden, self.heads * self.value_dim, bias=False)
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps)

    def start(self, config) -> None:
        """Set the bias with which a fresh gate retains the share `config.retention` of the state per token (section 3.1)."""
        keep = config.retention**TEMPERATURE
        initialization.constant_(self.decay_proj.get_parameter("1.bias"), math.log(keep / (1 - keep)))

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to q, k, v and the decay's logits g [B, T, H, K]; the key of a padded token is zero."""
        q, k, v = self.qkv(hidden, position)
        k, v = self.repeat_kv(unpadded(k, mask)), self.repeat_kv(v)
        g = self.decay_proj(hidden).unflatten(-1, (self.heads, -1))
        return channel_decay.Inputs(q, k, v, g, self.scale, self.backend, TEMPERATURE), hidden

    def output(self, mixed, hidden):
        """Normalise each head and gate it. mixed [B, T, H, V] -> [B, T, H V]."""
        gate = silu(self.gate_proj(hidden)).unflatten(-1, (self.heads, -1))
        return (self.norm(mixed) * gate).flatten(2)
