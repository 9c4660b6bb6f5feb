"""ReBased (Aksenov et al., 2024): squared dot products of normalised q and k, each row divided by its sum.

phi(x) = gamma * LayerNorm(x) + beta over a head's channels;  S_ij = (scale * phi(q_i) . phi(k_j))^2;  A = S / (sum_j S + eps).
"""

from torch import nn

from distill_pl.mixers.mixer import Paper, SequenceMixer
from distill_pl.ops import normalized

EPS = 1e-5  # of the row sum: the original layer's


class ReBased(SequenceMixer):
    """ReBased with as many channels as the teacher's heads have (the original has 16), so that q, k, v and o can be copied."""

    op = normalized
    paper = Paper(key=1 / 4)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.feature_map = nn.LayerNorm(self.key_dim)  # one for q and k of all heads, as in the original

    def state_bytes(self, batch, length, itemsize):
        """A feature for each pair of channels; the normaliser is one more column."""
        return 4 * batch * self.heads * (self.key_dim * (self.key_dim + 1) // 2) * (self.value_dim + 1)

    def inputs(self, hidden, position, mask, state):
        """phi(q), phi(k), v; a padded key is zero after phi, which makes beta of zeros."""
        q, k, v = self.qkv(hidden, position)
        q, k = self.feature_map(q), self.feature_map(k)
        if mask is not None:
            k = k * mask[:, :, None, None]
        k, v = self.repeat_kv(k), self.repeat_kv(v)
        remember = state is not None  # outside generation nobody reads the op's state, which is costly
        return normalized.Inputs(q, k, v, self.scale, EPS, 2, remember, self.backend), hidden
