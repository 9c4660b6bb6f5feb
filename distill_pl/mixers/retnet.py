"""RetNet (Sun et al., 2023): linear attention with a fixed decay per head, and RoPE.

g = log gamma_h, gamma_h = 1 - 2^{-5-h} for head h
A: ops/scalar_decay.py;  after A v: RMSNorm per head, times silu(W_g x), o_proj
"""

import torch
from torch import nn
from torch.nn.functional import silu

from distill_pl.mixers.mixer import Paper, RMSNorm, SequenceMixer, unpadded
from distill_pl.ops import scalar_decay


class RetNet(SequenceMixer):
    """Retention in the shape of the teacher's heads: q, k, v and o can be copied.

    The decay is fixed, so `student.retention` does not apply.
    """

    op = scalar_decay
    rotates = True
    paper = Paper(value=2)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, self.heads * self.value_dim, bias=False)
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps)

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to q, k and v, with the log decay g of each head; the key of a padded token is zero."""
        q, k, v = self.qkv(hidden, position)
        k, v = self.repeat_kv(unpadded(k, mask)), self.repeat_kv(v)
        head = torch.arange(self.heads, dtype=torch.float32, device=hidden.device)
        g = torch.log1p(-torch.exp2(-5 - head)).expand(*hidden.shape[:2], -1)  # in bf16 most gammas would be 1
        return scalar_decay.Inputs(q, k, v, g, self.scale, self.backend), hidden

    def output(self, mixed, hidden):
        """Normalise each head and gate it. mixed [B, T, H, V] -> [B, T, H V]."""
        gate = silu(self.gate_proj(hidden)).unflatten(-1, (self.heads, -1))
        return (self.norm(mixed) * gate).flatten(2)
