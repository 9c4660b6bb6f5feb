"""Copy a tensor from the GPU without waiting, so that the CPU can read it a step later, when it has long arrived."""

import torch
from torch import Tensor


class AsyncCopy:
    """Start copying a tensor to the CPU without waiting; `get` waits for the copy and returns it."""

    def __init__(self, x: Tensor):
        # pinned: into other memory, the CPU would wait for the copy
        self.copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)
        self.arrived = torch.cuda.Event() if x.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def get(self) -> Tensor:
        """Wait until the copy is complete and return it, a tensor on the CPU."""
        if self.arrived:
            self.arrived.synchronize()
        return self.copy
