"""The short causal convolution before the op of Mamba2, MetaLA, DeltaNet, Gated DeltaNet and KDA."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu
from transformers import initialization

from distill_pl.mixers.mixer import SequenceMixer, unpadded
from distill_pl.ops import Backend, use_fla
from distill_pl.student.cache import MixerState

WIDTH = 4  # taps; the last one is the current token's
EPS = 1e-6  # under the root of the l2 norm, so that the zero key of a padded token stays zero


class ShortConv(nn.Module):
    """Depthwise causal convolution over the last WIDTH tokens, then silu.

    It starts as the identity (last tap 1, all others 0), so that a copied projection passes through it unchanged.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, WIDTH))

    def start(self) -> None:
        """Set the last tap to 1 and all others to 0."""
        identity = torch.zeros_like(self.weight)
        identity[:, -1] = 1
        initialization.copy_(self.weight, identity)

    def state_bytes(self, batch: int, itemsize: int) -> int:
        """Return the bytes of the last WIDTH - 1 tokens, which generation keeps: `batch` rows, `itemsize` bytes a number."""
        return batch * len(self.weight) * (WIDTH - 1) * itemsize

    def forward(self, x: Tensor, state: MixerState | None, name: str) -> Tensor:
        """Convolve x [B, T, C], with C channels, over time and apply silu -> [B, T, C] in the dtype of x.

        In generation, `state.tails[name]` [B, WIDTH - 1, C] holds the tokens before x; it is read and replaced.
        """
        length = x.shape[1]
        tail = None if state is None else state.tails.get(name)
        x = pad(x, (0, 0, WIDTH - 1, 0)) if tail is None else torch.cat([tail, x], 1)
        if state is not None:
            tail = x[:, length:]
            state.tails[name] = tail if length == 1 else tail.clone()  # a view would keep the whole prompt in memory
        # tap by tap: torch.compile fuses these products, but not a library's convolution
        taps = enumerate(self.weight.to(x.dtype).unbind(1))
        first, *others = (x[:, shift : shift + length] * tap for shift, tap in taps)
        return silu(sum(others, first))


def l2_norm(x: Tensor) -> Tensor:
    """Scale the vectors x [..., K] to unit length, in fp32 -> [..., K] in the dtype of x."""
    full = x.float()
    return (full * (full.square().sum(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def convolve(convs: dict[str, ShortConv], inputs: Sequence[Tensor], mask: Tensor | None, state: MixerState | None,
             backend: Backend, unit: Sequence[bool]) -> list[Tensor]:  # fmt: skip
    """Apply to each of `inputs` [B, T, heads, X] its convolution, then scale each head to unit length where `unit` is True.

    The results have the shapes and dtypes of the inputs. Padded tokens (mask [B, T] False) count as zeros, like those before
    the start. On a GPU, each convolution is one kernel, except in generation.
    """
    inputs = [unpadded(x, mask) for x in inputs]
    if state is None and use_fla(backend, inputs[0].device):
        from distill_pl.ops.gpu.short_conv import short_conv

        outputs = [short_conv(x.flatten(2), conv.weight) for x, conv in zip(inputs, convs.values(), strict=True)]
    else:
        outputs = [conv(x.flatten(2), state, name) for x, (name, conv) in zip(inputs, convs.items(), strict=True)]
    outputs = [y.unflatten(-1, (x.shape[2], -1)) for x, y in zip(inputs, outputs, strict=True)]
    return [l2_norm(y) if normalise else y for y, normalise in zip(outputs, unit, strict=True)]


class ConvolvedMixer(SequenceMixer):
    """Base of Mamba2, DeltaNet, Gated DeltaNet and KDA, whose q, k and v each pass through a short convolution and silu."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_conv = ShortConv(self.q_proj.out_features)
        self.k_conv = ShortConv(self.k_proj.out_features)
        self.v_conv = ShortConv(self.v_proj.out_features)

    def start(self, config) -> None:
        """Set the three convolutions to the identity."""
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            conv.start()

    def state_bytes(self, batch, length, itemsize):
        """Return the bytes of the K x V states and of the convolutions' last tokens."""
        tails = sum(conv.state_bytes(batch, itemsize) for conv in (self.q_conv, self.k_conv, self.v_conv))
        return super().state_bytes(batch, length, itemsize) + tails

    def convolved(self, hidden: Tensor, mask: Tensor | None, state: MixerState | None, unit: bool = False) -> list[Tensor]:
        """Project and convolve hidden [B, T, D] -> q [B, T, H, K], k and v [B, T, kv_heads, K or V].

        With `unit`, q and k are scaled to unit length. RoPE is left to the caller: it must follow the convolution, or
        A would not depend on distances alone.
        """
        convs = {"q": self.q_conv, "k": self.k_conv, "v": self.v_conv}
        return convolve(convs, self.qkv(hidden), mask, state, self.backend, (unit, unit, False))
