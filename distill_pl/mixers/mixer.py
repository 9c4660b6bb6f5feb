"""The contract of a mixer: the projections around one op, standing where a Transformer layer has its attention.

A mixer owns everything about attention that has weights: the projections before the op and, after A v, head norm, gate and
output projection. It is called as transformers' decoder layers call their `self_attn`, so the layer around it is the
teacher's own code.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

if TYPE_CHECKING:
    from distill_pl.student.cache import MixerState

Position = tuple[Tensor, Tensor]  # cos and sin of RoPE, [B, T, K]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], in the dtype of x."""
        return rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotate(x: Tensor, position: Position) -> Tensor:
    """RoPE as in Llama: x [B, T, H, K], position (cos, sin) [B, T, K]."""
    cos, sin = (p.unsqueeze(2).to(x.dtype) for p in position)
    half = x.shape[-1] // 2
    first = torch.arange(x.shape[-1], device=x.device) < half
    return x * cos + x.roll(half, -1) * torch.where(first, -sin, sin)  # halves put together would be copies, even compiled


class Paper(NamedTuple):
    """The sizes behind a count of Appendix A, where they are not those of the teacher's heads."""

    heads: int | None = None
    key: float = 1  # width of all heads' keys together, in that of the teacher's
    value: float = 1
    kv_heads: str = "expanded"

    @property
    def fits(self) -> bool:
        """Whether the teacher's projections do all the same."""
        return (self.heads, self.key, self.value) == (None, 1, 1)


class SequenceMixer(nn.Module):
    """Base of all mixers: q, k, v and o projections around `op`, in the shape of the teacher's heads or in the paper's.

    A subclass names its `op`, says in `copies` which of q, k, v, o it takes from a teacher (Table 1), adds what weights it
    needs in `__init__` and `start` and implements `inputs` and, where more than o_proj follows A v, `output`. Without k in
    `copies` there is no k projection: the key is the mixer's own affair.
    """

    op: ClassVar[ModuleType]
    copies: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o")
    kv_heads: ClassVar[str] = "expanded"  # default of student.kv_heads
    rotates: ClassVar[bool] = False  # default of student.rope: whether the original has it
    paper: ClassVar[Paper] = Paper()

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        sizes = self.paper if config.shape == "paper" else Paper()
        width = config.num_attention_heads * config.head_dim
        self.heads = sizes.heads or config.num_attention_heads
        self.kv_count = config.num_key_value_heads if sizes.heads is None else self.heads
        self.key_dim, self.value_dim = (int(share * width) // self.heads for share in (sizes.key, sizes.value))
        self.scale = self.key_dim**-0.5
        self.rope = self.rotates if config.rope is None else config.rope
        self.backend = config.backend
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.q_proj = nn.Linear(hidden, self.heads * self.key_dim, bias=config.qkv_bias)
        if "k" in self.copies:
            self.k_proj = nn.Linear(hidden, self.kv_count * self.key_dim, bias=config.qkv_bias)
            self.k_norm = RMSNorm(self.key_dim, eps) if config.qk_norm else nn.Identity()
        self.v_proj = nn.Linear(hidden, self.kv_count * self.value_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.value_dim, hidden, bias=config.o_bias)
        self.q_norm = RMSNorm(self.key_dim, eps) if config.qk_norm else nn.Identity()  # Qwen3 has these

    def start(self, config) -> None:
        """Set the start values that are this mixer's own (section 3.1: decay gates); the linears are random already.

        By `transformers.initialization`, which leaves loaded weights alone.
        """

    def inputs(self, hidden: Tensor, position: Position, mask: Tensor | None, state: "MixerState | None") -> dict[str, Any]:
        """The op's keyword arguments, v among them; tensors [B, T, heads, ...].

        hidden [B, T, D] (after the layer's norm); mask bool [B, T], False where padded: such a token must leave no trace
        in what follows; state: this layer's memory while generating, for mixers that keep more than the op's state.
        One entry may be none of the op's: `bypass`, what `output` reads in place of hidden.
        """
        raise NotImplementedError

    def output(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        """What follows A v. mixed [B, T, H, V], hidden [B, T, D] or `bypass` -> [B, T, D]."""
        return self.o_proj(mixed.flatten(2))

    def state_bytes(self, batch: int, length: int, itemsize: int) -> int:
        """In theory, what this layer keeps after `length` tokens of `batch` rows while generating, in bytes.

        itemsize: of the weights' dtype, in bytes; an op's own state is fp32 whatever that is. Here: one K x V matrix a head.
        """
        return 4 * batch * self.heads * self.key_dim * self.value_dim

    def qkv(self, hidden: Tensor, position: Position | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K], k and v [B, T, kv_heads, K or V] as the teacher makes them; `rotated` where position is given."""
        q, v = self.qv(hidden)
        k = self.k_norm(self.k_proj(hidden).unflatten(-1, (-1, self.key_dim)))
        return (q, k, v) if position is None else (*self.rotated(position, q, k), v)

    def qv(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of `qkv`, what a mixer has that makes its key otherwise."""
        q = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.key_dim)))
        return q, self.v_proj(hidden).unflatten(-1, (-1, self.value_dim))

    def rotated(self, position: Position, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k [B, T, heads, K] with RoPE, if this mixer has it (`student.rope`)."""
        return (rotate(q, position), rotate(k, position)) if self.rope else (q, k)

    def repeat_kv(self, x: Tensor) -> Tensor:
        """[B, T, kv_heads, X] -> [B, T, H, X]: each kv head serves consecutive query heads, as in the teacher."""
        repeats = self.heads // x.shape[2]
        return x if repeats == 1 else x.repeat_interleave(repeats, dim=2)

    def matrix(self, hidden: Tensor, position: Position) -> Tensor:
        """The mixing matrix A [B, H, T, T] of Eq. 7."""
        inputs = self.inputs(hidden, position, None, None)
        return self.op.matrix(**{name: x for name, x in inputs.items() if name not in ("v", "bypass")})

    def matrix_times(self, z: Tensor, hidden: Tensor, position: Position) -> Tensor:
        """A z [B, T, H, P] for z [1, T, 1, P], the same for every sequence and head; A is never built."""
        inputs = self.inputs(hidden, position, None, None)
        inputs.pop("bypass", None)
        v = inputs["v"]
        return self.op.mix(**inputs | {"v": z.to(v.dtype).expand(*v.shape[:3], -1)})[0]

    def forward(self, hidden_states: Tensor, position_embeddings: Position, attention_mask: Tensor | None = None,
                past_key_values=None, **unused) -> tuple[Tensor, None]:  # fmt: skip
        """[B, T, D] -> [B, T, D], None: the signature of a transformers attention module.

        attention_mask bool [B, T]; past_key_values a StudentCache, read and updated.
        """
        memory = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        inputs = self.inputs(hidden_states, position_embeddings, attention_mask, memory)
        bypass = inputs.pop("bypass", hidden_states)
        if memory is None:
            mixed, _ = self.op.mix(**inputs)
        elif hidden_states.shape[1] == 1:
            inputs = {name: x[:, 0] if isinstance(x, Tensor) else x for name, x in inputs.items()}
            mixed, state = self.op.step(**inputs, state=memory.op)
            mixed = mixed[:, None]
            memory.update(state, tokens=1)
        else:
            mixed, state = self.op.mix(**inputs, state=memory.op)
            memory.update(state, tokens=hidden_states.shape[1])
        return self.output(mixed, bypass), None
