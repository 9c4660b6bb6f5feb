"""Mamba2 (Dao and Gu, 2024): a state space model with one decay per head, dual to masked linear attention.

C, B, x = silu(conv(W_q u)), silu(conv(W_k u)), silu(conv(W_v u));  dt = softplus(W_dt u + b), g = -e^{A_log} dt
A_ij = (C_i . B_j) dt_j e^{G_i - G_j}  (ops/scalar_decay.py);  after A x: + D x, times silu(W_z u), RMSNorm per head, o_proj
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from transformers import initialization

from distill_pl.mixers.mixer import Paper, RMSNorm, unpadded
from distill_pl.mixers.short_conv import ConvolvedMixer
from distill_pl.ops import scalar_decay


class Mamba2(ConvolvedMixer):
    """Mamba2 in the shape of the teacher's heads: one group per head, no expansion; C takes q, B takes k, x takes v.

    In the paper's shape it expands by 2 and has a state of 16 (a quarter of SmolLM's head_dim). Here the expansion makes heads
    twice as wide; in the original there are twice as many.
    """

    op = scalar_decay
    decay_gate = True
    paper = Paper(key=1 / 4, value=2)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden = config.hidden_size
        self.dt_proj = nn.Linear(hidden, self.heads)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.gate_proj = nn.Linear(hidden, self.heads * self.value_dim, bias=False)
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps)  # the original's is per group; here a group is a head

    def start(self, config) -> None:
        """Set A_log = 0, D = 1 and the bias of dt for which e^{-dt} is `config.retention` (section 3.1).

        dt, here -log(retention), is also the weight with which a token is written, close to the share 1 - retention forgotten.
        """
        super().start(config)
        initialization.zeros_(self.A_log)
        initialization.ones_(self.D)
        initialization.constant_(self.dt_proj.bias, math.log(1 / config.retention - 1))  # softplus of it is -log(retention)

    def dt(self, hidden: Tensor) -> Tensor:
        """Compute the step size dt [B, T, H] in fp32 from hidden [B, T, D]."""
        return softplus(self.dt_proj(hidden).float())

    def log_decay(self, dt: Tensor) -> Tensor:
        """Compute the log decay g <= 0 [B, T, H] in fp32 from step sizes dt [B, T, H]."""
        return -self.A_log.float().exp() * dt

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to C, B dt and x as q, k and v, and g; the key of a padded token is zero."""
        q, k, v = map(self.repeat_kv, self.convolved(hidden, mask, state))
        q, k = self.rotated(position, q, k)
        dt = self.dt(hidden)
        k = unpadded(k * dt[..., None], mask)
        g = self.log_decay(dt)
        return scalar_decay.Inputs(q, k, v, g, scale=1.0, backend=self.backend), (v, hidden)

    def output(self, mixed, read_by_output):
        """Add D x, gate and normalise each head. mixed [B, T, H, V] -> [B, T, H V]."""
        x, hidden = read_by_output
        gate = silu(self.gate_proj(hidden)).unflatten(-1, (self.heads, -1))
        return self.norm((mixed + self.D.to(x.dtype)[:, None] * x) * gate).flatten(2)
