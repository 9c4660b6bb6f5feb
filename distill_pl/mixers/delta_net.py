"""DeltaNet (Yang et al., 2024): linear attention that overwrites a key's value instead of adding to it.

beta = sigmoid(W x);  q, k, v each through a short convolution and silu, then q and k to unit length;
after A v: RMSNorm per head, o_proj. There is no decay: what is forgotten is what is overwritten.
"""

from torch import nn

from distill_pl.mixers.mixer import RMSNorm
from distill_pl.mixers.short_conv import ConvolvedMixer
from distill_pl.ops import delta_rule


class DeltaNet(ConvolvedMixer):
    """DeltaNet in the shape of the teacher's heads: q, k, v and o can be copied; of q and k the l2 norm keeps the direction."""

    op = delta_rule

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.beta_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps)

    def inputs(self, hidden, position, mask, state):
        """q and k of unit length, v, beta; a padded token writes nothing: its beta is zero."""
        q, k, v = self.convolved(hidden, mask, state, unit=True)
        q, k = self.rotated(position, q, k)
        beta = self.beta_proj(hidden).float().sigmoid()
        if mask is not None:
            beta = beta * mask[:, :, None]
        k, v = self.repeat_kv(k), self.repeat_kv(v)
        return delta_rule.Inputs(q, k, v, beta, self.scale, self.backend), hidden

    def output(self, mixed, hidden):
        """Head norm, o_proj."""
        return self.o_proj(self.norm(mixed).flatten(2))
