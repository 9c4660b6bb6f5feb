"""Hedgehog (Zhang et al., 2024): linear attention whose learned features are as spiky as softmax, and as monotonic.

phi(x) = softmax([2 (W x + b), -2 (W x + b)]), W and b for q and for k of each head;  A = phi(q) phi(k)^T / (sum + eps).
"""

import torch
from torch import Tensor, nn
from transformers import initialization

from distill_pl.mixers.mixer import Paper, SequenceMixer
from distill_pl.ops import normalized, promoted

EPS = 1e-10  # of the row sum: fla's; a row of spiky features can sum to 1e-8


class FeatureMap(nn.Module):
    """phi of every head. Starts from W = I and b = 0."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def start(self) -> None:
        """The identity."""
        initialization.copy_(self.weight, torch.eye(self.weight.shape[-1], device=self.weight.device).expand_as(self.weight))
        initialization.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, K] -> [B, T, H, 2 K], in the dtype of x; a softmax over them is the features' own."""
        (y,) = promoted(2 * (torch.einsum("bthk,hjk->bthj", x, self.weight) + self.bias))
        most = y.detach().abs().amax(-1, keepdim=True)
        positive, negative = (y - most).exp(), (-y - most).exp()  # not one softmax: gradients of halves are one pass on a GPU
        total = (positive + negative).sum(-1, keepdim=True)
        return torch.cat([positive / total, negative / total], -1).to(x.dtype)


class Hedgehog(SequenceMixer):
    """Hedgehog on the teacher's heads: q, k, v and o can be copied."""

    op = normalized
    paper = Paper(key=1 / 4)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_map, self.k_map = (FeatureMap(self.heads, self.key_dim) for _ in range(2))

    def start(self, config) -> None:
        """Features of q and k as they are."""
        self.q_map.start()
        self.k_map.start()

    def state_bytes(self, batch, length, itemsize):
        """Two features a channel; the normaliser is one more column."""
        return 4 * batch * self.heads * 2 * self.key_dim * (self.value_dim + 1)

    def inputs(self, hidden, position, mask, state):
        """phi(q), phi(k), v; a padded key is zero after phi, which is never zero itself."""
        q, k, v = self.qkv(hidden, position)
        q, k = self.q_map(q), self.k_map(self.repeat_kv(k))
        if mask is not None:
            k = k * mask[:, :, None, None]
        return normalized.Inputs(q, k, self.repeat_kv(v), scale=1.0, eps=EPS, backend=self.backend), hidden
