"""The mathematics of sequence mixing, one file a family; no modules, no Lightning, no Hugging Face.

Every family is three pure, differentiable functions over the same inputs. Shape letters, here and everywhere:
B batch, T time, H heads, K key dim per head, V value dim per head, D hidden.

    matrix(q, k, ...)           -> A [B, H, T, T], lower-triangular: the mixing matrix itself
    mix(q, k, v, ..., state)    -> y [B, T, H, V], state: a whole sequence, the fast way
    step(q, k, v, ..., state)   -> y [B, H, V], state: one token at constant cost

and the law the tests lean on: matrix(...) @ v == mix(...) == step(...) token by token. In `matrix` and `mix` every tensor
starts [B, T, heads]; in `step` the T is gone. `state` is None at the start of a sequence, or what the last call returned.
"""

import importlib.util
from typing import Literal

import torch

Backend = Literal["auto", "torch", "fla"]
HAS_FLA = importlib.util.find_spec("fla") is not None  # asked once: torch.compile could not look into it


def use_fla(backend: Backend, device: torch.device) -> bool:
    """Whether `mix` calls fla's Triton kernel: `auto` does on a GPU where fla-core is installed.

    Kernels have been wrong on some GPUs: tests/gpu holds each against its matrix, benchmarks/README.md has what was measured.
    """
    if backend == "auto":
        return device.type == "cuda" and HAS_FLA
    return backend == "fla"


def promoted(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in fp32 (float64 stays): gates, their sums and states lose 5% to 50% of A when kept in bf16."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
