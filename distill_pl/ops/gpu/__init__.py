"""Triton kernels of the ops in `distill_pl.ops`, which import them on first use where there is a GPU."""
