"""Read a value from the GPU one step late, so that the CPU does not wait for the current step to finish."""

import torch
from torch import Tensor


class AsyncCopy:
    """Start copying a tensor to the CPU without waiting; `get` waits for the copy and returns it."""

    def __init__(self, x: Tensor):
        self.copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)
        self.arrived = torch.cuda.Event() if x.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def get(self) -> Tensor:
        """Wait until the copy is complete and return it, a tensor on the CPU."""
        if self.arrived:
            self.arrived.synchronize()
        return self.copy
