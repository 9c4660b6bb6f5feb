"""What makes inner loops fast on a GPU: torch.compile, which fuses the many small passes between products, and CUDA graphs."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from distill_pl.compiling.joined_products import JoinProducts


def compiled_on_gpu(function: Callable) -> Callable:
    """`function`, compiled for each shape it is called with where its arguments lie on a GPU; as it is elsewhere.

    One compilation serves all layers that are alike: their weights are inputs to it.
    """
    compiled = functools.cache(lambda: torch.compile(function, dynamic=False))  # on first use: a CPU need not load the compiler

    @functools.wraps(function)
    def run(*args, **kwargs):
        on_gpu = any(x.is_cuda for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return (compiled() if on_gpu else function)(*args, **kwargs)

    return run


def switch(on: bool, width: int) -> None:
    """Whether whatever asks to be compiled is, from now on; width: of the models' hidden states."""
    torch._dynamo.config.optimize_ddp = False  # which would cut graphs; a layer a graph lets gradients travel early as it is
    # norms and gates are made again for the products of the backward pass: a third of all that is kept for it
    torch._functorch.config.ban_recompute_materialized_backward = False
    # what a decay reads, or a convolution that has no kernel, is made where it is read, up to a dozen times, not written first
    torch._inductor.config.realize_reads_threshold, torch._inductor.config.realize_opcount_threshold = 12, 100
    if width <= 1024:  # norms' gradients fetch rows ahead; of longer ones, before torch 2.13, more than shared memory holds
        torch._inductor.config.triton.mix_order_reduction_allow_multi_stages = True
    torch._inductor.config.post_grad_custom_pre_pass = JoinProducts()
    torch.compiler.set_stance("default" if on else "force_eager")


def launches_early() -> bool:
    """Whether a kernel may start before the last one has ended, on the GPU at hand: from Hopper on."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def plainly(device: torch.device) -> AbstractContextManager:
    """A context in which nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if device.type == "cuda" else nullcontext()


class Captured:
    """Losses of a student's parameters as two CUDA graphs, forward and backward: a step is launched at once, not by kernel.

    Whoever keeps a gradient beyond the next backward pass must copy it: each pass writes to the same place.
    """

    def __init__(self, losses: Callable[..., tuple[Tensor, Tensor]], student: nn.Module, inputs: tuple[Tensor, ...]):
        """For inputs of these shapes. What is compiled or tuned in a first run cannot be captured: it runs once before."""
        pool = torch.cuda.graph_pool_handle()
        self.run: Any = torch.cuda.make_graphed_callables(
            _Losses(losses, student), tuple(x.clone() for x in inputs), num_warmup_iters=1, allow_unused_input=True, pool=pool
        )
        torch.cuda.reset_peak_memory_stats()  # what lives within a step lies in the pool from now on
        self.pool_bytes = pool_bytes(pool)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What `losses` gives; the next call overwrites it."""
        return self.run(*inputs)


class _Losses(nn.Module):
    """A function as a module that has the parameters it depends on."""

    def __init__(self, losses: Callable, student: nn.Module):
        super().__init__()
        self.losses, self.student = losses, student

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.losses(*inputs)


def pool_bytes(pool: tuple[int, int]) -> int:
    """GPU memory that graphs keep for what lives within a step, which the allocator does not count as allocated."""
    mine = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(pool)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in mine)
