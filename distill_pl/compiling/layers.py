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
    # it splits functions so that DDP can send gradients early; here a function is one layer, and with CUDA graphs gradients are
    # sent after the backward pass anyway
    torch._dynamo.config.optimize_ddp = False
    # recompute norms and gates for the products of the backward pass: stored, they would be a third of all activations
    torch._functorch.config.ban_recompute_materialized_backward = False
    # recompute a decay, or a convolution without a kernel, in up to a dozen readers instead of writing it (defaults: 4, 30)
    torch._inductor.config.realize_reads_threshold, torch._inductor.config.realize_opcount_threshold = 12, 100
    if width <= 1024:  # norms' gradients prefetch rows; for wider rows shared memory is too small (before torch 2.13)
        torch._inductor.config.triton.mix_order_reduction_allow_multi_stages = True
    torch._inductor.config.post_grad_custom_pre_pass = JoinProducts()


def compile_stage(stage: Stage, sharded: bool = False) -> list[Callback]:
    """Compile a stage's step and its teacher in place; return callbacks for the stage's Trainer.

    Replaces the functions that stage and teacher name in `compiles` and `compiles_with_layer`, and compiles the modules of
    `stage.compiled_modules()`. The only callback captures CUDA graphs at the first step.

    sharded: whether FSDP shards student and teacher. It gathers a layer's weights in hooks around the forward pass. Therefore
    forward passes are compiled instead of the functions that call them, no graph is captured, and there is no callback.
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
