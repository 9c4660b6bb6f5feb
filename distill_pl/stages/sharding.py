"""Shard student, optimizer and teacher over the ranks by PyTorch's FSDP2 (`trainer.strategy fsdp`)."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from distill_pl.student.modeling import Student


class FullyShardedStrategy(ModelParallelStrategy):
    """Shard over all ranks in one dimension; a checkpoint is a single file, as with other strategies."""

    def __init__(self):
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Make all ranks shard data: Lightning's default is tensor parallelism within a node."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


def shard(student: Student, called: Sequence[nn.Module], teacher: nn.Module, mesh: DeviceMesh) -> None:
    """Shard both models in place over the mesh of ranks; a layer's weights are gathered only while it computes.

    All ranks must call this, since it runs the student once, which gathers weights.

    called: the student's layers or, if a stage calls only mixers and the norms before them, its mixers. The teacher may have
    been sharded by an earlier stage.
    """
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # harmless: nothing here changes the view in place
    for layer in student.model.layers:
        if layer.self_attn in called:
            fully_shard(layer.input_layernorm, mesh=mesh)
            fully_shard(layer.self_attn, mesh=mesh)
            # FSDP gathers weights around `forward` only, and around methods that are named to it
            register_fsdp_forward_method(layer.self_attn, "matrix_times")
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "hidden_states")
    with torch.no_grad(), eagerly(mesh.device_type):  # the first module to compute becomes FSDP's root: it must be the student
        student.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=mesh.device_type))
    for layer in teacher.model.layers:
        if not isinstance(layer, FSDPModule):
            # each layer is an FSDP root, and by default FSDP does not reshard a root after its forward pass
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def eagerly(device_type: str) -> AbstractContextManager:
    """Return a context in which torch.compile runs functions eagerly; on a CPU an empty one, which imports no compiler."""
    return torch.compiler.set_stance("force_eager") if device_type == "cuda" else nullcontext()


def unsharded(student: Student) -> Student:
    """Return an unsharded copy on the CPU, with valid weights on rank 0 only, or the student itself if it is not sharded.

    All ranks must call this.
    """
    if not isinstance(student, FSDPModule):
        return student
    weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    copy = Student(student.config)
    if weights:
        copy.load_state_dict(weights)
    return copy
