"""DeltaNet (Yang et al., 2025): linear attention that overwrites a key's value instead of adding to it.

    q, k, v = silu(conv(W x)) each, q and k then scaled to unit length;  beta = sigmoid(W_beta x)
    A: ops/gated_delta.py;  after A v: RMSNorm per head, o_proj

There is no decay: the state forgets only what it overwrites.
"""

from torch import nn

from distill_pl.mixers.mixer import RMSNorm
from distill_pl.mixers.short_conv import ConvolvedMixer
from distill_pl.ops import gated_delta


class DeltaNet(ConvolvedMixer):
    """DeltaNet in the shape of the teacher's heads: q, k, v and o can be copied, but the l2 norm removes q's and k's length."""

    op = gated_delta

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.beta_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps)

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to q and k of unit length, v and beta; a padded token has beta 0 and writes nothing."""
        q, k, v = self.convolved(hidden, mask, state, unit=True)
        q, k = self.rotated(position, q, k)
        beta = self.beta_proj(hidden).float().sigmoid()
        if mask is not None:
            beta = beta * mask[:, :, None]
        k, v = self.repeat_kv(k), self.repeat_kv(v)
        return gated_delta.Inputs(q, k, v, beta, self.scale, self.backend), hidden

    def output(self, mixed, hidden):
        """Normalise each head. mixed [B, T, H, V] -> [B, T, H V]."""
        return self.norm(mixed).flatten(2)
