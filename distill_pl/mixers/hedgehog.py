"""Hedgehog (Zhang et al., 2024b): linear attention with a learned feature map, spiky and monotonic like softmax.

phi(x) = softmax([2 (W x + b), -2 (W x + b)]), with separate W and b for q and k of each head
A_ij = phi(q_i) . phi(k_j) / (sum_j phi(q_i) . phi(k_j) + eps)  (ops/normalized.py);  after A v: o_proj
"""

import torch
from torch import Tensor, nn
from transformers import initialization

from distill_pl.mixers.mixer import Paper, SequenceMixer, unpadded
from distill_pl.ops import normalized, promoted

EPS = 1e-10  # added to the row sum, as in fla: a row of spiky features can sum to 1e-8


class FeatureMap(nn.Module):
    """The feature map phi of every head; it starts from W = I and b = 0."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def start(self) -> None:
        """Set W = I and b = 0."""
        initialization.copy_(self.weight, torch.eye(self.weight.shape[-1], device=self.weight.device).expand_as(self.weight))
        initialization.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute phi(x): [B, T, H, K] -> [B, T, H, 2 K] in the dtype of x, the softmax in fp32."""
        (y,) = promoted(2 * (torch.einsum("bthk,hjk->bthj", x, self.weight) + self.bias))
        # not torch.softmax of the concatenation: as two halves, both gradients are computed by one GPU kernel
        largest = y.detach().abs().amax(-1, keepdim=True)
        positive, negative = (y - largest).exp(), (-y - largest).exp()
        total = (positive + negative).sum(-1, keepdim=True)
        return torch.cat([positive / total, negative / total], -1).to(x.dtype)


class Hedgehog(SequenceMixer):
    """Hedgehog in the shape of the teacher's heads: q, k, v and o can be copied."""

    op = normalized
    paper = Paper(key=1 / 4)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_map, self.k_map = (FeatureMap(self.heads, self.key_dim) for _ in range(2))

    def start(self, config) -> None:
        """Set both feature maps to W = I and b = 0."""
        self.q_map.start()
        self.k_map.start()

    def state_bytes(self, batch, length, itemsize):
        """Return the bytes of a 2 K x (V + 1) state per head in fp32: two features per channel, the normaliser as a column."""
        return 4 * batch * self.heads * 2 * self.key_dim * (self.value_dim + 1)

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to phi(q), phi(k) and v; a padded key is zeroed after phi, which is never zero itself."""
        q, k, v = self.qkv(hidden, position)
        q, k = self.q_map(q), unpadded(self.k_map(self.repeat_kv(k)), mask)
        return normalized.Inputs(q, k, self.repeat_kv(v), scale=1.0, eps=EPS, backend=self.backend), hidden
