"""RWKV-7 (Peng et al., 2025): a delta rule that reads and erases along other vectors than the key it writes.

    x_n = x + mu_n (x' - x) for each projection n, with x' the token before ("token shift")
    q, k, v = W x_q, W x_k, W x_v;  g = -e^{-1/2} sigmoid(W_2 tanh(W_1 x_w) + b);  a = sigmoid(W_4 W_3 x_a + c)
    S_t = (diag(e^{g_t}) - (a_t * u_t) u_t^T) S_{t-1} + (k_t * (1 + k_a * (a_t - 1))) v_t^T with u = k_k * k at unit length
    A: ops/gated_delta.py;  after A v: group norm, + (q . (r_k * k)) v, times W_6 sigmoid(W_5 x_g), o_proj
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import initialization

from distill_pl.errors import InputError
from distill_pl.mixers.mixer import SequenceMixer
from distill_pl.mixers.short_conv import l2_norm
from distill_pl.ops import gated_delta
from distill_pl.student.cache import MixerState

FASTEST = -math.exp(-0.5)  # log decay: a token keeps at least 0.545 of each channel


class RWKV7(SequenceMixer):
    """RWKV-7's time mixing in the shape of the teacher's heads: q (the original's r), k, v and o can be copied.

    Every mu starts at 0, so that copied projections read what the teacher's read; the original's mu start as fixed functions of
    layer and channel. Scores are scaled as in the teacher, which the group norm cancels. The original's value residual, which
    mixes v with the first layer's v, is left out, because a layer does not see the others. Ranks (K for decay and a, 2 K for
    the gate) are those of the original's models of 768 and 1024 channels.
    """

    op = gated_delta
    decay_gate = True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden, width, rank = config.hidden_size, self.heads * self.key_dim, self.key_dim
        self.shifts = nn.ParameterDict({name: torch.zeros(hidden) for name in ("q", "k", "v", "decay", "rate", "gate")})
        self.decay_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Tanh(), nn.Linear(rank, width))
        self.rate_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, width))
        self.gate_proj = nn.Sequential(
            nn.Linear(hidden, 2 * rank, bias=False), nn.Sigmoid(), nn.Linear(2 * rank, self.heads * self.value_dim, bias=False)
        )
        self.k_k, self.k_a, self.r_k = (nn.Parameter(torch.zeros(width)) for _ in range(3))
        self.norm = nn.GroupNorm(self.heads, self.heads * self.value_dim, eps=self.value_dim * config.rms_norm_eps)

    def start(self, config) -> None:
        """Set mu = 0, k_k = k_a = 1, r_k = 0 and the decay's bias with which a token retains `config.retention` of the state.

        Raises InputError for a retention of 0.545 or less, which RWKV-7's bounded decay cannot reach.
        """
        share = math.log(config.retention) / FASTEST
        if share >= 1:
            raise InputError(f"student.retention {config.retention}: rwkv7 retains at least {math.exp(FASTEST):.3f}: give more")
        for shift in self.shifts.values():
            initialization.zeros_(shift)
        initialization.ones_(self.k_k)
        initialization.ones_(self.k_a)
        initialization.zeros_(self.r_k)
        initialization.constant_(self.decay_proj.get_parameter("2.bias"), math.log(share / (1 - share)))

    def state_bytes(self, batch, length, itemsize):
        """Return the bytes of the K x V states and of the last token's hidden state."""
        return super().state_bytes(batch, length, itemsize) + batch * self.q_proj.in_features * itemsize

    def by_head(self, x: Tensor) -> Tensor:
        """Split [..., H K] -> [..., H, K]."""
        return x.unflatten(-1, (self.heads, -1))

    def log_decay(self, hidden: Tensor) -> Tensor:
        """Compute the log decay g [B, T, H, K] in fp32, between FASTEST and 0, from the shifted hidden state [B, T, D]."""
        return FASTEST * self.by_head(self.decay_proj(hidden).float().sigmoid())

    def shifted(self, hidden: Tensor, state: MixerState | None) -> dict[str, Tensor]:
        """Mix each token of hidden [B, T, D] with the one before it -> the input of each projection [B, T, D], by name.

        In generation, `state.tails["shift"]` [B, 1, D] holds the token before hidden; it is read and replaced.
        """
        tail = None if state is None else state.tails.get("shift")
        before = pad(hidden[:, :-1], (0, 0, 1, 0)) if tail is None else torch.cat([tail, hidden[:, :-1]], 1)
        if state is not None:
            state.tails["shift"] = hidden[:, -1:].clone()  # a view would keep the whole prompt in memory
        return {name: hidden + mu.to(hidden.dtype) * (before - hidden) for name, mu in self.shifts.items()}

    def inputs(self, hidden, position, mask, state):
        """Project the shifted hidden [B, T, D] to q, k, v, g and the op's r and b; a padded token has beta 0."""
        beta = hidden.new_ones(*hidden.shape[:2], self.heads, dtype=torch.float32)
        if mask is not None:
            hidden, beta = hidden * mask[..., None], beta * mask[..., None]
        x = self.shifted(hidden, state)
        q = self.q_norm(self.q_proj(x["q"]).unflatten(-1, (-1, self.key_dim)))
        k = self.k_norm(self.k_proj(x["k"]).unflatten(-1, (-1, self.key_dim)))
        q, k = self.rotated(position, q, k)
        k, v = self.repeat_kv(k), self.repeat_kv(self.v_proj(x["v"]).unflatten(-1, (-1, self.value_dim)))
        g, a = self.log_decay(x["decay"]), self.by_head(self.rate_proj(x["rate"]).sigmoid())
        u = l2_norm(k * self.by_head(self.k_k).to(k.dtype))
        k = k * (1 + self.by_head(self.k_a).to(k.dtype) * (a - 1))
        r = u * (-g).exp()  # the op reads the state after its decay, RWKV-7 before it
        return gated_delta.Inputs(q, k, v, beta, self.scale, self.backend, g, r, b=u * a), (q, k, v, x["gate"])

    def output(self, mixed, read_by_output):
        """Normalise each head, add the token's own value and gate it. mixed [B, T, H, V] -> [B, T, H V]."""
        q, k, v, hidden = read_by_output
        bonus = (q * k * self.by_head(self.r_k).to(k.dtype)).sum(-1, keepdim=True) * v
        normed = self.norm(mixed.flatten(2).flatten(0, 1)).view_as(mixed)
        return (normed + bonus).flatten(2) * self.gate_proj(hidden)
