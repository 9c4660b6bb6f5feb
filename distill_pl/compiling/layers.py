"""Compile the functions in which a step spends its time, one layer's worth at a time: one compilation serves all layers."""

import torch
from lightning.pytorch.callbacks import Callback

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


def compile_stage(stage: Stage, sharded: bool = False) -> list[Callback]:
    """Compile a stage's step and its teacher -> callbacks of the stage's Trainer, such as one that captures CUDA graphs.

    Stage and teacher list in `compiles`, and those that call a layer in `compiles_with_layer`, their functions that are
    replaced by compiled ones, on these objects alone. sharded: whether FSDP shards student and teacher. It gathers a layer's
    weights in hooks around the forward pass, so that this pass is compiled in place of what calls the layer, and no graph is
    captured.
    """
    configure_compiler(stage.student.config.hidden_size)
    for owner in (stage, stage.teacher):
        for name in owner.compiles if sharded else (*owner.compiles, *owner.compiles_with_layer):
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
    if not sharded:
        for module in stage.compiled_modules():
            module.compile(dynamic=False)
        return [StepGraphs()]
    for module in (*stage.called(), *stage.teacher.model.model.layers):
        for name in ("forward", "matrix_times"):
            if hasattr(module, name) and name not in vars(module):  # an earlier stage may have compiled the teacher
                setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
    return []
