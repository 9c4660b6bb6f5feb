"""Softmax attention (the paper's Eq. 1): the Llama-Llama control, which equals its teacher if everything is copied.

A_ij = softmax_{j <= i}(scale * q_i . k_j)  (ops/softmax.py), q and k rotated by RoPE;  after A v: o_proj
"""

from distill_pl.mixers.mixer import Paper, SequenceMixer
from distill_pl.ops import softmax


class Softmax(SequenceMixer):
    """The teacher's attention as one more mixer: q, k, v and o can be copied."""

    op = softmax
    kv_heads = "grouped"
    rotates = True
    paper = Paper(kv_heads="grouped")

    def state_bytes(self, batch, length, itemsize):
        """Return the bytes of the key and value of every token, and of a bool that marks it as padding or not."""
        return batch * length * (self.kv_count * (self.key_dim + self.value_dim) * itemsize + 1)

    def inputs(self, hidden, position, mask, state):
        """Project hidden [B, T, D] to q, k and v; the padding mask becomes the op's key mask."""
        q, k, v = self.qkv(hidden, position)
        return softmax.Inputs(q, k, v, self.scale, mask), hidden
