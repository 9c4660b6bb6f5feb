"""Sliding-window attention with sinks (Xiao et al., 2024): softmax over the last tokens and the first ones.

A: ops/window.py, q and k rotated by RoPE at the positions of the whole sequence, as the teacher was trained;  after A v: o_proj
"""

from distill_pl.mixers.mixer import Paper, SequenceMixer
from distill_pl.ops import window


class SlidingWindow(SequenceMixer):
    """The teacher's attention to the last `student.window` and first `student.sinks` tokens; q, k, v and o can be copied."""

    op = window
    kv_heads = "grouped"
    rotates = True
    paper = Paper(kv_heads="grouped")

    def state_bytes(self, batch, length, itemsize):
        """Return the bytes of the keys and values of window and sinks, and of a bool each that it exists."""
        return self.window_bytes(batch, itemsize)

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to q, k and v; the padding mask becomes the op's key mask."""
        q, k, v = self.qkv(hidden, position)
        return window.Inputs(q, k, v, self.scale, self.window, self.sinks, mask), hidden
