"""`trainer.strategy fsdp`: each rank holds a slice of the student, of its optimiser and of the teacher (PyTorch's FSDP2)."""

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from distill_pl.student.modeling import Student


class FullyShardedStrategy(ModelParallelStrategy):
    """Over all ranks in one dimension; a checkpoint is one file, like any other strategy's."""

    def __init__(self):
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """The mesh of the ranks."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


def shard(student: Student, teacher: nn.Module, mesh: DeviceMesh) -> None:
    """Cut both models up, in place: a layer at a time is whole, while it computes. Collective over the mesh."""
    for layer in student.model.layers:
        for part in (layer.input_layernorm, layer.self_attn):  # matrix mixing calls them by themselves
            fully_shard(part, mesh=mesh)
        register_fsdp_forward_method(layer.self_attn, "matrix_times")
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "hidden_states")
    with torch.no_grad():  # the first to compute becomes the root, and that must be the whole, not a mixer
        student.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=mesh.device_type))
    for layer in teacher.model.layers:
        if not isinstance(layer, FSDPModule):  # not by the stage before
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)  # each its own root, which would stay whole


def whole(student: Student) -> Student:
    """An unsharded copy on the CPU; its weights are right on rank 0 alone. Collective."""
    weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    copy = Student(student.config)
    if weights:
        copy.load_state_dict(weights)
    return copy
