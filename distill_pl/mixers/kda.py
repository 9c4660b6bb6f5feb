"""Kimi delta attention, KDA (Kimi Linear, 2025): Gated DeltaNet with a decay per key channel.

    q, k, v = silu(conv(W x)) each, q and k then scaled to unit length;  beta = sigmoid(W_beta x)
    g = -e^{A_log} softplus(W_2 W_1 x + dt_bias)
    A: ops/gated_delta.py;  after A v: RMSNorm per head, times sigmoid(W_4 W_3 x), o_proj
"""

import torch
from torch import nn

from distill_pl.mixers.gated_delta_net import GatedDeltaNet


class KDA(GatedDeltaNet):
    """KDA in the shape of the teacher's heads: q, k, v and o can be copied, but the l2 norm removes q's and k's length.

    As in the original, the projections of decay and gate have the rank of a head's width, and A_log is per head. The original
    draws A_log and dt_bias at random, and alternates with layers of softmax attention (here: `student.softmax_layers`).
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden = config.hidden_size

        def low_rank(head: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(hidden, head, bias=False), nn.Linear(head, self.heads * head, bias=False))

        self.decay_proj, self.gate_proj = low_rank(self.key_dim), low_rank(self.value_dim)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads * self.key_dim))

    def gate(self, hidden):
        """Compute the output gate [B, T, H V] from hidden [B, T, D]."""
        return self.gate_proj(hidden).sigmoid()
