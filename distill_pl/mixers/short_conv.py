"""The short causal convolution that Mamba2, MetaLA and DeltaNet put before their op."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu
from transformers import initialization

from distill_pl.mixers.mixer import SequenceMixer

if TYPE_CHECKING:
    from distill_pl.student.cache import MixerState


class ShortConv(nn.Module):
    """Depthwise causal convolution over the last `width` tokens, then silu where `activate`.

    Starts as the identity (its last tap 1, all others 0), so that a copied projection comes through unchanged.
    """

    def __init__(self, channels: int, width: int = 4, activate: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width))
        self.activate = activate

    def start(self) -> None:
        """The identity tap."""
        identity = torch.zeros_like(self.weight)
        identity[:, -1] = 1
        initialization.copy_(self.weight, identity)

    def state_bytes(self, batch: int, itemsize: int) -> int:
        """Of its tail, for an input of `itemsize` bytes a number."""
        channels, width = self.weight.shape
        return batch * channels * (width - 1) * itemsize

    def forward(self, x: Tensor, mask: Tensor | None, state: "MixerState | None", name: str) -> Tensor:
        """x [B, T, C] -> [B, T, C]. Padded tokens (mask False) count as before the start.

        While generating, `state.tails[name]` [B, width - 1, C] holds the tokens before x.
        """
        if mask is not None:
            x = x * mask[:, :, None]
        length, before = x.shape[1], self.weight.shape[1] - 1
        tail = None if state is None else state.tails.get(name)
        x = pad(x, (0, 0, before, 0)) if tail is None else torch.cat([tail, x], 1)
        if state is not None:
            rest = x[:, length:]
            state.tails[name] = rest if length == 1 else rest.clone()  # a view would keep the whole prompt alive
        # one by one: a compiler fuses that, unlike a library's convolution; each in a row, which a GPU reads faster
        taps = enumerate(self.weight.to(x.dtype).mT.contiguous())
        first, *others = (x[:, at : at + length] * tap for at, tap in taps)
        y = sum(others, first)
        return silu(y) if self.activate else y


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

    def convolved(self, hidden: Tensor, mask: Tensor | None, state: "MixerState | None") -> list[Tensor]:
        """`qkv`, without RoPE: what depends on distances alone has to be rotated last."""
        convs = {"q": self.q_conv, "k": self.k_conv, "v": self.v_conv}
        return [
            conv(x.flatten(2), mask, state, name).unflatten(-1, x.shape[2:])
            for (name, conv), x in zip(convs.items(), self.qkv(hidden), strict=True)
        ]
