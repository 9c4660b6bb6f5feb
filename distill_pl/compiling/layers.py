"""Compile the functions in which a step spends its time, one layer's worth at a time: one compilation serves all layers."""

import torch

from distill_pl.compiling.cuda_graphs import StepGraphs
from distill_pl.compiling.joined_products import JoinProducts
from distill_pl.stages import Stage


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


def compile_stage(stage: Stage) -> StepGraphs:
    """Compile a stage's step and its teacher -> the callback that launches the step as CUDA graphs, for the stage's Trainer.

    Stage and teacher list in `compiles` the functions of one layer that are replaced by compiled ones, on these objects alone.
    """
    configure_compiler(stage.student.config.hidden_size)
    for owner in (stage, stage.teacher):
        for name in owner.compiles:
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
    for module in stage.compiled_modules():
        module.compile(dynamic=False)
    return StepGraphs()
