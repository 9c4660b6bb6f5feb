"""Compile the functions in which a step spends its time, one layer's worth at a time: one compilation serves all layers."""

from typing import Any

import torch

from distill_pl.compiling.cuda_graphs import StepGraphs, pool_bytes
from distill_pl.compiling.joined_products import JoinProducts
from distill_pl.stages import Stage
from distill_pl.teacher import Teacher


def configure_compiler(width: int) -> None:
    """Set torch.compile's flags for models whose hidden states are `width` channels wide.

    The one place where this package changes flags of Dynamo, AOTAutograd and Inductor for training.
    """
    torch._dynamo.config.optimize_ddp = False  # which cuts graphs; with a graph a layer, gradients are sent early without it
    # recompute norms and gates for the products of the backward pass: they are a third of all activations that would be kept
    torch._functorch.config.ban_recompute_materialized_backward = False
    # compute a decay, or a convolution that has no kernel, where it is read, up to a dozen times, rather than write it first
    torch._inductor.config.realize_reads_threshold, torch._inductor.config.realize_opcount_threshold = 12, 100
    if width <= 1024:  # norms' gradients fetch rows ahead; wider rows need more shared memory than there is (before torch 2.13)
        torch._inductor.config.triton.mix_order_reduction_allow_multi_stages = True
    torch._inductor.config.post_grad_custom_pre_pass = JoinProducts()


def compile_functions(owner: Any) -> None:
    """Replace the functions that a stage or a teacher lists in `compiles` by compiled ones, on this object alone."""
    for name in owner.compiles:
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))


def compile_teacher(teacher: Teacher) -> None:
    """Compile a teacher's forward pass, for all stages that use this teacher."""
    compile_functions(teacher)


def compile_stage(stage: Stage) -> StepGraphs:
    """Compile a stage's step -> the callback that launches it as CUDA graphs, for the stage's Trainer."""
    compile_functions(stage)
    for module in stage.compiled_modules():
        module.compile(dynamic=False)
    return StepGraphs()


def launches_early() -> bool:
    """Return whether kernels may start before the one before them has ended, on the GPU at hand: from Hopper on."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
