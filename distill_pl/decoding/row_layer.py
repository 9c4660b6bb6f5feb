"""Run a decoder layer with Llama's structure on one token of a batch of one, in four kernels and the mixer's own.

    products: hidden + update, norm, the mixer's q, k, v, gates -> mixer: ProductSlices, op.step, norm, gate -> o_proj
    -> up: hidden + o_proj's result, norm, silu(gate) * up -> down: the update that the next layer adds
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from distill_pl.mixers.mixer import Position, RMSNorm

LLAMA_LAYERS = tuple(f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3"))  # all of one structure


def is_llama_layer(layer: Any) -> bool:
    """Return whether a decoder layer of transformers computes what a RowLayer does: Llama's structure and a SwiGLU MLP."""
    return type(layer).__name__ in LLAMA_LAYERS and type(layer.mlp.act_fn) is type(ACT2FN["silu"])


class RowProducts(nn.Module):
    """Linears that read the same row as one kernel, `ops.gpu.row_products`, with the residual sum and norm before them."""

    def __init__(self, linears: list[nn.Linear], norm: nn.Module | None = None, gated: bool = False, heads: int = 1):
        """Join linears. norm: RMSNorm of the row; gated: silu(first product) * second, as in MLPs; heads: those of the row."""
        super().__init__()
        import distill_pl.ops.gpu.row_products  # noqa: F401 (registers the operator; here, because it loads Triton)

        self.weights, self.biases = [x.weight for x in linears], []
        if any(x.bias is not None for x in linears):
            self.biases = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias for x in linears]
        self.gain, self.gated, self.heads = None if norm is None else norm.weight, gated, heads
        self.eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Multiply x [1, 1, D] -> all products, concatenated [1, 1, sum of N]; with a residual, also return x + residual."""
        x = x.unflatten(-1, (self.heads, -1))  # with heads as a dimension of the input, norms of heads need no extra kernel
        y, total = torch.ops.distill_pl.row_products(x, self.weights, self.biases, self.gain, self.eps, residual, self.gated)
        return y if residual is None else (y, total)


class ProductSlice(nn.Module):
    """Replacement of a linear whose product RowProducts has computed: selects its columns from all products."""

    def __init__(self, start: int, size: int):
        super().__init__()
        self.start, self.size = start, size

    def forward(self, products: Tensor) -> Tensor:
        """Select the linear's product: [1, 1, sum of N] -> [1, 1, N]."""
        return products.narrow(-1, self.start, self.size)


def realize(conv: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Make inductor write a convolution's output to memory instead of recomputing it in every reader; a forward hook."""
    return output.as_strided(output.shape, output.stride())


class RowLayer(nn.Module):
    """A decoder layer for one token of a batch of one, which uses the mixer of `layer` and replaces its linears.

    The residual sum is computed by the kernel that reads it, so a layer returns its update and the hidden state as two tensors.
    """

    def __init__(self, layer: Any):
        super().__init__()
        self.mixer, self.norm, self.products = layer.self_attn, layer.input_layernorm, None
        linears = {name: module for name, module in self.mixer.named_modules() if isinstance(module, nn.Linear)}
        o_proj = linears.pop("o_proj")
        # join linears that read the normalised row: not the second of two projections, and none after a token shift (RWKV-7)
        shifts = hasattr(self.mixer, "shifts")
        linears = {name: linear for name, linear in linears.items() if not (shifts or name.endswith((".1", ".2")))}
        start = 0
        for name, linear in linears.items():
            self.mixer.set_submodule(name, ProductSlice(start, linear.out_features))
            start += linear.out_features
        if hasattr(self.mixer, "conv"):  # the linears read the row after this convolution (MetaLA)
            products = RowProducts(list(linears.values()))
            self.mixer.conv.register_forward_hook(lambda conv, inputs, output: products(output))
        elif linears:
            self.products = RowProducts(list(linears.values()), self.norm)
        for name in ("q_conv", "k_conv", "v_conv"):
            if hasattr(self.mixer, name):
                getattr(self.mixer, name).register_forward_hook(realize)
        self.mixer.o_proj = RowProducts([o_proj], heads=self.mixer.heads)
        norm = getattr(self.mixer, "norm", None)
        only_o_proj = not self.mixer.beside_window and "gate_proj" not in linears  # reads what the mixer's norm returns
        if isinstance(norm, RMSNorm) and len(norm.weight) == o_proj.in_features and only_o_proj:
            self.mixer.norm = nn.Identity()  # a norm over all heads that only o_proj reads (HGRN2) is fused: 0.564 -> 0.517 ms
            self.mixer.o_proj = RowProducts([o_proj], norm, heads=self.mixer.heads)
        self.up = RowProducts([layer.mlp.gate_proj, layer.mlp.up_proj], layer.post_attention_layernorm, gated=True)
        self.down = RowProducts([layer.mlp.down_proj])

    def forward(self, update: Tensor, hidden: Tensor, position_embeddings: Position | None,
                **cache: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Run the layer on hidden + update, both [1, 1, D] -> this layer's update and the hidden state to which it is added.

        cache: the mixer's, under the name that transformers' layers give it.
        """
        if self.products is None:
            hidden = hidden + update
            row = self.norm(hidden)
        else:
            row, hidden = self.products(update, hidden)
        update, _ = self.mixer(row, position_embeddings=position_embeddings, **cache)
        row, hidden = self.up(update, hidden)
        return self.down(row), hidden
