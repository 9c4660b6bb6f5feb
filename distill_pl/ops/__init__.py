"""The mathematics of sequence mixing, one file for each family; no modules, no Lightning, no Hugging Face.

Shape letters, here and everywhere: B batch, T time, H heads, K key dim per head, V value dim per head, D hidden. In shapes,
X is K or V, S the number of keys, P of probes, F of features, C of a chunk's tokens or of a convolution's channels.
Every file has a NamedTuple `Inputs`, the arguments of its `mix`, and three pure, differentiable functions:

    matrix(q, k, ...)          -> the mixing matrix A [B, H, T, T], lower-triangular, in fp32 or float64
    mix(q, k, v, ..., state)   -> y = A v [B, T, H, V] in the dtype of v, without building A, and the state after the sequence
    step(q, k, v, ..., state)  -> y [B, H, V] of one token, in the dtype of v, and the state after it

`matrix` and `mix` take tensors [B, T, heads, ...], `step` the same without T. `matrix` takes all of `Inputs` but v. `state` is
None at the start of a sequence and otherwise what the previous call returned. Tests hold every family to one law:
matrix(...) @ v == mix(...) == step(...) token by token.

`backend` matters to `mix` alone. `fla` means a Triton kernel, by fla or of this package, if there is one for dtype and shape;
`torch` means plain PyTorch.
"""

import importlib.util
from typing import Literal

import torch

Backend = Literal["auto", "torch", "fla"]
HAS_FLA = importlib.util.find_spec("fla") is not None  # a constant because torch.compile cannot trace find_spec


def use_fla(backend: Backend, device: torch.device) -> bool:
    """Return whether `mix` calls a Triton kernel on `device`: `auto` does on a GPU where fla-core is installed.

    Kernels have been wrong on some GPUs: tests/gpu compares each with its matrix, and docs/gpu.md lists their errors.
    """
    if backend == "auto":
        return device.type == "cuda" and HAS_FLA
    return backend == "fla"


def promoted(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Cast tensors to fp32 unless they are float64: gates, their sums and states in bf16 change A by 5% to 50% at T = 512."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
