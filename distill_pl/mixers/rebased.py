"""ReBased (Aksenov et al., 2024): squared dot products of normalised q and k, each row divided by its sum.

phi(x) = gamma * LayerNorm(x) + beta over a head's channels;  S_ij = (scale * phi(q_i) . phi(k_j))^2
A_ij = S_ij / (sum_j S_ij + eps)  (ops/normalized.py);  after A v: o_proj
"""

from torch import nn

from distill_pl.mixers.mixer import Paper, SequenceMixer, unpadded
from distill_pl.ops import normalized

EPS = 1e-5  # added to the row sum, as in the original


class ReBased(SequenceMixer):
    """ReBased with as many channels as the teacher's heads have, where the original has 16: q, k, v and o can be copied."""

    op = normalized
    paper = Paper(key=1 / 4)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.feature_map = nn.LayerNorm(self.key_dim)  # one for q and k of all heads, as in the original

    def state_bytes(self, batch, length, itemsize):
        """Return the bytes of the state: K (K + 1) / 2 features x (V + 1) per head in fp32, the normaliser as a column."""
        return 4 * batch * self.heads * (self.key_dim * (self.key_dim + 1) // 2) * (self.value_dim + 1)

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to phi(q), phi(k) and v; a padded key is zeroed after phi, because phi(0) = beta."""
        q, k, v = self.qkv(hidden, position)
        q, k = self.feature_map(q), self.feature_map(k)
        k, v = self.repeat_kv(unpadded(k, mask)), self.repeat_kv(v)
        remember = state is not None  # the op's state is costly, and read only in generation
        return normalized.Inputs(q, k, v, self.scale, EPS, 2, remember, self.backend), hidden
