"""What torch.compile does to the inner loops: on a GPU, where it fuses the many small passes between matrix products."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from distill_pl.joined_products import JoinProducts


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
