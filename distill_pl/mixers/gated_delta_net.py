"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2024): DeltaNet whose state decays, by one gate per head.

    q, k, v = silu(conv(W x)) each, q and k then scaled to unit length;  beta = sigmoid(W_beta x)
    g = -e^{A_log} softplus(W_a x + dt_bias)
    A: ops/gated_delta.py;  after A v: RMSNorm per head, times silu(W_g x), o_proj
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from transformers import initialization

from distill_pl.mixers.delta_net import DeltaNet


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet in the shape of the teacher's heads: q, k, v, o can be copied, but the l2 norm removes q's and k's length.

    The original has fewer heads, whose values are twice as wide as their keys, and draws A_log and dt_bias at random, so that
    heads forget at different speeds from the start.
    """

    decay_gate = True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.decay_proj: nn.Module = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.gate_proj: nn.Module = nn.Linear(config.hidden_size, self.heads * self.value_dim, bias=False)

    def start(self, config) -> None:
        """Set A_log = 0 and the dt_bias with which a fresh gate retains `config.retention` of the state per token."""
        super().start(config)
        initialization.zeros_(self.A_log)
        initialization.constant_(self.dt_bias, math.log(1 / config.retention - 1))  # softplus of it is -log(retention)

    def log_decay(self, hidden: Tensor) -> Tensor:
        """Compute the log decay g <= 0 [B, T, H, 1] in fp32 from hidden [B, T, D]."""
        step = softplus(self.decay_proj(hidden).float() + self.dt_bias.float())
        return -self.A_log.float().exp()[:, None] * step.unflatten(-1, (self.heads, -1))

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to q and k of unit length, v, beta and g; a padded token has beta 0 and writes nothing."""
        inputs, read_by_output = super().inputs(hidden, position, mask, state)
        return inputs._replace(g=self.log_decay(hidden)), read_by_output

    def gate(self, hidden: Tensor) -> Tensor:
        """Compute the output gate [B, T, H V] from hidden [B, T, D]."""
        return silu(self.gate_proj(hidden))

    def output(self, mixed, hidden):
        """Normalise each head and gate it. mixed [B, T, H, V] -> [B, T, H V]."""
        return self.norm(mixed).flatten(2) * self.gate(hidden)
