"""Mamba2 (Dao and Gu, 2024): a state space model with one decay per head, dual to masked linear attention.

C, B, x = silu(conv(W_q u)), silu(conv(W_k u)), silu(conv(W_v u));  dt = softplus(W_dt u + b), g = -e^{A_log} dt
A_ij = (C_i . B_j) dt_j e^{G_i - G_j};  after A x: + D x, times silu(W_z u), RMSNorm per head, o_proj.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from transformers import initialization

from distill_pl.mixers.mixer import RMSNorm, SequenceMixer
from distill_pl.mixers.short_conv import ShortConv
from distill_pl.ops import scalar_decay


class Mamba2(SequenceMixer):
    """Mamba2 in the shape of the teacher's heads (state 64, one group per head, no expansion): C is q, B is k, x is v."""

    op = scalar_decay

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden = config.hidden_size
        self.q_conv = ShortConv(self.q_proj.out_features)
        self.k_conv = ShortConv(self.k_proj.out_features)
        self.v_conv = ShortConv(self.v_proj.out_features)
        self.dt_proj = nn.Linear(hidden, self.heads)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.gate_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.norm = RMSNorm(self.head_dim, config.rms_norm_eps)  # the original's, per group

    def start(self, config) -> None:
        """e^{-dt} = `config.retention` at A = -1: a token is written with dt, about the share that is forgotten for it."""
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            conv.start()
        initialization.zeros_(self.A_log)
        initialization.ones_(self.D)
        initialization.constant_(self.dt_proj.bias, math.log(1 / config.retention - 1))  # softplus^-1 of -log retention

    def dt(self, hidden: Tensor) -> Tensor:
        """The step size, [B, T, H] in fp32."""
        return softplus(self.dt_proj(hidden).float())

    def log_decay(self, hidden: Tensor) -> Tensor:
        """g <= 0, [B, T, H] in fp32."""
        return -self.A_log.float().exp() * self.dt(hidden)

    def inputs(self, hidden, position, mask, state):
        """C, B dt, x without RoPE as q, k, v; g; a padded key is zero."""
        convs = {"q": self.q_conv, "k": self.k_conv, "v": self.v_conv}
        q, k, v = (
            self.repeat_kv(conv(x.flatten(2), mask, state, name).unflatten(-1, (-1, self.head_dim)))
            for (name, conv), x in zip(convs.items(), self.qkv(hidden), strict=True)
        )
        k = k * self.dt(hidden)[..., None]
        if mask is not None:
            k = k * mask[:, :, None, None]
        g = self.log_decay(hidden)
        return {"q": q, "k": k, "v": v, "g": g, "scale": 1.0, "backend": self.backend, "bypass": (v, hidden)}

    def output(self, mixed, bypass):
        """D x, gate, norm, o_proj."""
        x, hidden = bypass
        gate = silu(self.gate_proj(hidden)).unflatten(-1, (self.heads, -1))
        return self.o_proj(self.norm((mixed + self.D.to(x.dtype)[:, None] * x) * gate).flatten(2))
