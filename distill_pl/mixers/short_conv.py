"""The short causal convolution that Mamba2, MetaLA and DeltaNet put before their op."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu
from transformers import initialization

from distill_pl.mixers.mixer import SequenceMixer
from distill_pl.ops import Backend, use_fla

if TYPE_CHECKING:
    from distill_pl.student.cache import MixerState


WIDTH = 4  # tokens that a convolution reads, its own the last
EPS = 1e-6  # of the l2 norm, under the root: a padded key, zero, stays zero


class ShortConv(nn.Module):
    """Depthwise causal convolution over the last WIDTH tokens, then silu.

    Starts as the identity (its last tap 1, all others 0), so that a copied projection comes through unchanged.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, WIDTH))

    def start(self) -> None:
        """The identity tap."""
        identity = torch.zeros_like(self.weight)
        identity[:, -1] = 1
        initialization.copy_(self.weight, identity)

    def state_bytes(self, batch: int, itemsize: int) -> int:
        """Of its tail, for an input of `itemsize` bytes a number."""
        return batch * len(self.weight) * (WIDTH - 1) * itemsize

    def forward(self, x: Tensor, state: "MixerState | None", name: str) -> Tensor:
        """x [B, T, C] -> [B, T, C]. While generating, `state.tails[name]` [B, WIDTH - 1, C] holds the tokens before x."""
        length = x.shape[1]
        tail = None if state is None else state.tails.get(name)
        x = pad(x, (0, 0, WIDTH - 1, 0)) if tail is None else torch.cat([tail, x], 1)
        if state is not None:
            rest = x[:, length:]
            state.tails[name] = rest if length == 1 else rest.clone()  # a view would keep the whole prompt alive
        taps = enumerate(self.weight.to(x.dtype).unbind(1))  # one by one: a compiler fuses that, unlike a library's convolution
        first, *others = (x[:, at : at + length] * tap for at, tap in taps)
        return silu(sum(others, first))


def l2_norm(x: Tensor) -> Tensor:
    """[..., K] -> [..., K] of unit length, computed in fp32, in the dtype of x."""
    wide = x.float()
    return (wide * (wide.square().sum(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def convolve(convs: dict[str, ShortConv], inputs: Sequence[Tensor], mask: Tensor | None, state: "MixerState | None",
             backend: Backend, unit: Sequence[bool]) -> list[Tensor]:  # fmt: skip
    """inputs [B, T, heads, X], each through a convolution and, where `unit`, to unit length per head.

    Padded tokens (mask False) count as before the start. On a GPU all of it is one operator.
    """
    if mask is not None:
        inputs = [x * mask[:, :, None, None] for x in inputs]
    if state is None and use_fla(backend, inputs[0].device):
        from distill_pl.ops.gpu.short_conv import short_convs

        return short_convs(inputs, [conv.weight for conv in convs.values()], unit, EPS)
    named = zip(convs.items(), inputs, strict=True)
    outputs = (conv(x.flatten(2), state, name).unflatten(-1, (x.shape[2], -1)) for (name, conv), x in named)
    return [l2_norm(y) if so else y for y, so in zip(outputs, unit, strict=True)]


class ConvolvedMixer(SequenceMixer):
    """Base of Mamba2 and DeltaNet: q, k and v each go through a short convolution and silu."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_conv = ShortConv(self.q_proj.out_features)
        self.k_conv = ShortConv(self.k_proj.out_features)
        self.v_conv = ShortConv(self.v_proj.out_features)

    def start(self, config) -> None:
        """The convolutions pass their projections through."""
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            conv.start()

    def state_bytes(self, batch, length, itemsize):
        """The matrices, and the convolutions' last tokens."""
        tails = sum(conv.state_bytes(batch, itemsize) for conv in (self.q_conv, self.k_conv, self.v_conv))
        return super().state_bytes(batch, length, itemsize) + tails

    def convolved(self, hidden: Tensor, mask: Tensor | None, state: "MixerState | None", unit: bool = False) -> list[Tensor]:
        """`qkv`, without RoPE: what depends on distances alone has to be rotated last. q and k of unit length if asked."""
        convs = {"q": self.q_conv, "k": self.k_conv, "v": self.v_conv}
        return convolve(convs, self.qkv(hidden), mask, state, self.backend, (unit, unit, False))
