"""Softmax attention (paper, Eq. 1): the Llama-Llama control. Everything copied, it is its teacher."""

from distill_pl.mixers.mixer import Paper, SequenceMixer
from distill_pl.ops import softmax


class Softmax(SequenceMixer):
    """The teacher's attention, position by RoPE, as one more mixer."""

    op = softmax
    kv_heads = "grouped"
    rotates = True
    paper = Paper(kv_heads="grouped")

    def state_bytes(self, batch, length, itemsize):
        """Keys and values of every token, and a byte that says whether it is padding."""
        return batch * length * (self.kv_count * (self.key_dim + self.value_dim) * itemsize + 1)

    def inputs(self, hidden, position, mask, state):
        """q, k, v and the padding as the op's key mask."""
        q, k, v = self.qkv(hidden, position)
        return softmax.Inputs(q, k, v, self.scale, mask), hidden
