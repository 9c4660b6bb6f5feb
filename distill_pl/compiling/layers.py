"""Compile the functions in which a training step spends its time, layer by layer, so that one compilation serves all layers."""

import torch
from lightning.pytorch.callbacks import Callback

from distill_pl.compiling.cuda_graphs import StepGraphs
from distill_pl.compiling.joined_products import JoinProducts
from distill_pl.stages import Stage


def configure_compiler(width: int) -> None:
    """Set torch.compile's flags for models whose hidden states are `width` channels wide.

    The one place where this package changes flags of Dynamo, AOTAutograd and Inductor for training.
    """
    torch._dynamo.config.optimize_ddp = False  # it splits graphs; with one graph per layer, gradients are sent early anyway
    # recompute norms and gates for the products of the backward pass: stored, they would be a third of all activations
    torch._functorch.config.ban_recompute_materialized_backward = False
    # recompute a decay, or a convolution without a kernel, in up to a dozen readers instead of writing it to memory
    torch._inductor.config.realize_reads_threshold, torch._inductor.config.realize_opcount_threshold = 12, 100
    if width <= 1024:  # norms' gradients prefetch rows; for wider rows shared memory is too small (before torch 2.13)
        torch._inductor.config.triton.mix_order_reduction_allow_multi_stages = True
    torch._inductor.config.post_grad_custom_pre_pass = JoinProducts()


def compile_stage(stage: Stage, sharded: bool = False) -> list[Callback]:
    """Compile a stage's step and its teacher -> callbacks for the stage's Trainer: one that captures CUDA graphs, or none.

    On the given objects, functions are replaced by compiled ones: those that stage and teacher name in `compiles` and, if they
    call a layer, in `compiles_with_layer`. sharded: whether FSDP shards student and teacher. FSDP gathers a layer's weights in
    hooks around its forward pass, so the forward pass itself is compiled instead of the functions that call the layer, and no
    graph is captured.
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
            if hasattr(module, name) and name not in vars(module):  # else an earlier stage has compiled it (the teacher)
                setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
    return []
