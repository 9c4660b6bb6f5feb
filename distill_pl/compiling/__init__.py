"""Make training steps fast on a GPU with torch.compile and CUDA graphs. Nothing here changes what a step computes."""

from distill_pl.compiling.layers import compile_stage

__all__ = ["compile_stage"]
