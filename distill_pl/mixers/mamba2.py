"""Mamba2 (Dao and Gu, 2024): a state space model with one decay per head, dual to masked linear attention.

C, B, x = silu(conv(W_q u)), silu(conv(W_k u)), silu(conv(W_v u));  dt = softplus(W_dt u + b), g = -e^{A_log} dt
A_ij = (C_i . B_j) dt_j e^{G_i - G_j};  after A x: + D x, times silu(W_z u), RMSNorm per head, o_proj.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from transformers import initialization

from distill_pl.mixers.mixer import Paper, RMSNorm
from distill_pl.mixers.short_conv import ConvolvedMixer
from distill_pl.ops import scalar_decay


class Mamba2(ConvolvedMixer):
    """Mamba2 in the shape of the teacher's heads (state 64, one group per head, no expansion): C is q, B is k, x is v.

    In the paper's shape it expands by 2 and has a state of 16; as heads twice as wide, where the original has twice as many.
    """

    op = scalar_decay
    paper = Paper(key=1 / 4, value=2)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden = config.hidden_size
        self.dt_proj = nn.Linear(hidden, self.heads)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.gate_proj = nn.Linear(hidden, self.heads * self.value_dim, bias=False)
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps)  # the original's, per group

    def start(self, config) -> None:
        """e^{-dt} = `config.retention` at A = -1: a token is written with dt, about the share that is forgotten for it."""
        super().start(config)
        initialization.zeros_(self.A_log)
        initialization.ones_(self.D)
        initialization.constant_(self.dt_proj.bias, math.log(1 / config.retention - 1))  # softplus^-1 of -log retention

    def dt(self, hidden: Tensor) -> Tensor:
        """The step size, [B, T, H] in fp32."""
        return softplus(self.dt_proj(hidden).float())

    def log_decay(self, dt: Tensor) -> Tensor:
        """g <= 0, [B, T, H] in fp32, of step sizes."""
        return -self.A_log.float().exp() * dt

    def inputs(self, hidden, position, mask, state):
        """C, B dt, x as q, k, v; g; a padded key is zero."""
        q, k, v = map(self.repeat_kv, self.convolved(hidden, mask, state))
        q, k = self.rotated(position, q, k)
        dt = self.dt(hidden)
        k = k * dt[..., None]
        if mask is not None:
            k = k * mask[:, :, None, None]
        g = self.log_decay(dt)
        return scalar_decay.Inputs(q, k, v, g, scale=1.0, backend=self.backend), (v, hidden)

    def output(self, mixed, read_by_output):
        """D x, gate, norm, o_proj."""
        x, hidden = read_by_output
        gate = silu(self.gate_proj(hidden)).unflatten(-1, (self.heads, -1))
        return self.o_proj(self.norm((mixed + self.D.to(x.dtype)[:, None] * x) * gate).flatten(2))
