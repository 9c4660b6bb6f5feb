"""The base class of mixers: projections around one op, in the place of a Transformer layer's attention.

A mixer owns all weights of attention: the projections before the op and, after A v, head norm, gate and output projection. A
decoder layer of transformers calls a mixer as it calls its own `self_attn`, so the layer around a mixer is the teacher's own
code.
"""

from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import initialization

from distill_pl.ops import promoted, window
from distill_pl.student.cache import MixerState

Tables = tuple[Tensor, Tensor]  # cos and sin of RoPE, [B or 1, T, K], or narrower where RoPE rotates only the first channels
Position = Tables | dict[str, Tables]  # a dict by type of layer where types differ in RoPE
# Initial logit of the op's share of a head beside window attention: about 1/8, the largest share that hardly raised the loss at
# the start. The window, with the teacher's own q, k and v, is the better start, but the share also scales the op's gradients.
SHARE_LOGIT = -2.0


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, in fp32, and scale each channel by its weight + `offset`."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size] -> [..., size], in the dtype of x."""
        weight = self.weight.float() + self.offset if self.offset else self.weight.float()
        return rms_norm(x.float(), self.weight.shape, weight, self.eps).to(x.dtype)


class JointRMSNorm(RMSNorm):
    """Normalise all heads together by one RMSNorm (OLMo 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., heads, K] -> [..., heads, K], in the dtype of x; the size is heads * K."""
        return super().forward(x.flatten(-2)).unflatten(-1, x.shape[-2:])


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """Rotate queries or keys x [B, T, H, K] by RoPE as Llama does; tables are cos and sin [B or 1, T, K].

    Where the tables have fewer channels than x, the others stay as they are (StableLM).
    """
    cos, sin = (table.unsqueeze(2).to(x.dtype) for table in tables)
    if cos.shape[-1] < x.shape[-1]:
        first, rest = x.tensor_split([cos.shape[-1]], dim=-1)
        return torch.cat([rotate(first, tables), rest], -1)
    half = x.shape[-1] // 2
    first = torch.arange(x.shape[-1], device=x.device) < half
    return x * cos + x.roll(half, -1) * torch.where(first, -sin, sin)  # torch.cat of halves would copy, even compiled


class Paper(NamedTuple):
    """Hold the sizes of a mixer with `student.shape paper`, which give the parameter counts of Appendix A."""

    heads: int | None = None  # None: the teacher's number
    key: float = 1  # width of all heads' keys together, as a share of the teacher's
    value: float = 1  # width of all heads' values together, as a share of the teacher's
    kv_heads: str = "expanded"

    @property
    def fits(self) -> bool:
        """Return whether these are the sizes of the teacher's q, k, v and o projections, which can then be copied."""
        return (self.heads, self.key, self.value) == (None, 1, 1)


class SequenceMixer(nn.Module):
    """Project the hidden state to the inputs of `op`, mix over time, and project back; base of all mixers.

        hidden [B, T, D] -> inputs: q, k, v, decay -> op.mix: A v [B, T, H, V] -> output: norm, gate -> o_proj: [B, T, D]

    A subclass names its `op`, says in `copies` which of the q, k, v, o projections it can take from a teacher (Table 1), adds
    its own weights in `__init__` and their start values in `start`, and implements `inputs` and, where a norm or a gate
    follows A v, `output`. A subclass without k in `copies` has no k_proj and makes its key in another way.

    With `student.window`, y = share * output(A v) + (1 - share) * window attention, with a learned share for each head, and
    the mixing matrix is share * A + (1 - share) * A_window.
    """

    op: ClassVar[ModuleType]
    copies: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o")
    kv_heads: ClassVar[str] = "expanded"  # default of student.kv_heads
    decay_gate: ClassVar[bool] = False  # whether the state decays by a learned share, so that student.retention applies
    rotates: ClassVar[bool] = False  # default of student.rope: whether the original rotates q and k
    paper: ClassVar[Paper] = Paper()

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        sizes = self.paper if config.shape == "paper" else Paper()
        width = config.num_attention_heads * config.head_dim
        self.heads = sizes.heads or config.num_attention_heads
        self.kv_count = config.num_key_value_heads if sizes.heads is None else self.heads
        self.key_dim, self.value_dim = (int(share * width) // self.heads for share in (sizes.key, sizes.value))
        scale = config.attention_scale if self.key_dim == config.head_dim else None
        self.scale = self.key_dim**-0.5 if scale is None else scale
        self.rope = self.rotates if config.rope is None else config.rope
        self.backend = config.backend
        self.window, self.sinks = config.window, config.sinks
        self.teacher_rotates, self.layer_type = True, ""  # whether the teacher's layer has RoPE; its key in a dict `Position`
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.key_dim, bias=config.qkv_bias)
        if "k" in self.copies:
            self.k_proj = nn.Linear(hidden, self.kv_count * self.key_dim, bias=config.qkv_bias)
            self.k_norm = self.head_norm(self.kv_count, config)
        self.v_proj = nn.Linear(hidden, self.kv_count * self.value_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.value_dim, hidden, bias=config.o_bias)
        self.q_norm = self.head_norm(self.heads, config)
        self.beside_window = self.window is not None and self.op is not window
        self.projected: tuple[Tensor, tuple[Tensor, ...]] | None = None  # hidden and its q, k and v, while two ops read them
        if self.beside_window:
            self.window_logit = nn.Parameter(torch.zeros(self.heads))

    def head_norm(self, heads: int, config) -> nn.Module:
        """Build the norm of q or k that the teacher has: of each head (Qwen 3), of all heads together (OLMo 2), or none."""
        if not config.qk_norm:
            return nn.Identity()
        if config.qk_norm_joint:
            return JointRMSNorm(heads * self.key_dim, config.rms_norm_eps, config.qk_norm_offset)
        return RMSNorm(self.key_dim, config.rms_norm_eps, config.qk_norm_offset)

    def start(self, config) -> None:
        """Set this mixer's own start values, such as decay biases (section 3.1); linears have been drawn at random before.

        Use `transformers.initialization`, which leaves loaded weights as they are.
        """

    def start_window(self) -> None:
        """Set the op's initial share of each head beside window attention, if there is any (`student.window`)."""
        if self.beside_window:
            initialization.constant_(self.window_logit, SHARE_LOGIT)

    def inputs(self, hidden: Tensor, position: Position, mask: Tensor | None,
               state: MixerState | None) -> tuple[Any, Any]:  # fmt: skip
        """Project a hidden state -> the op's `Inputs`, tensors [B, T, heads, ...], and what `output` reads besides A v.

        hidden [B, T, D] comes from the layer's norm. mask bool [B, T] is False where padded: a padded token must not change
        later outputs. state, None unless generating, is for mixers that keep more than the op's state, such as convolutions.
        """
        raise NotImplementedError

    def output(self, mixed: Tensor, read_by_output: Any) -> Tensor:
        """Turn mixed = A v [B, T, H, V] and the second result of `inputs` into the input of o_proj [B, T, H V]."""
        return mixed.flatten(2)

    def state_bytes(self, batch: int, length: int, itemsize: int) -> int:
        """Return the theoretical bytes of the op's state and of convolutions after `length` tokens of `batch` rows.

        itemsize: bytes of a number in the weights' dtype; recurrent states are fp32 whatever the weights are. The base class
        counts one K x V matrix per head.
        """
        return 4 * batch * self.heads * self.key_dim * self.value_dim

    def cache_bytes(self, batch: int, length: int, itemsize: int) -> int:
        """Return the theoretical bytes of this layer's state: `state_bytes`, and those of window attention beside the op."""
        return self.state_bytes(batch, length, itemsize) + (self.window_bytes(batch, itemsize) if self.beside_window else 0)

    def window_bytes(self, batch: int, itemsize: int) -> int:
        """Return the bytes of `ops.window`'s state: keys and values of window and sinks, and a bool each that it exists."""
        return batch * (self.window + self.sinks - 1) * (self.kv_count * (self.key_dim + self.value_dim) * itemsize + 1)

    def qkv(self, hidden: Tensor, position: Position | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Project to q [B, T, H, K], k and v [B, T, kv_heads, K or V] as the teacher does, with RoPE if given `position`."""
        projected = self.projected
        if projected is not None and projected[0] is hidden:  # else of another thread, which runs the same model
            q, k, v = projected[1]
        else:
            q, v = self.qv(hidden)
            k = self.k_norm(self.k_proj(hidden).unflatten(-1, (-1, self.key_dim)))
        return (q, k, v) if position is None else (*self.rotated(position, q, k), v)

    def qv(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Project to q [B, T, H, K] and v [B, T, kv_heads, V], for mixers that make their key in another way."""
        q = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.key_dim)))
        return q, self.v_proj(hidden).unflatten(-1, (-1, self.value_dim))

    def rotated(self, position: Position, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q and k [B, T, heads, K] by RoPE if this mixer uses it (`student.rope`), else return them unchanged."""
        return self.rotated_as_teacher(position, q, k) if self.rope else (q, k)

    def rotated_as_teacher(self, position: Position, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q and k [B, T, heads, K] by the RoPE of the teacher's layer, or return them unchanged if it has none."""
        if not self.teacher_rotates:
            return q, k
        tables = position[self.layer_type] if isinstance(position, dict) else position
        return rotate(q, tables), rotate(k, tables)

    def repeat_kv(self, x: Tensor) -> Tensor:
        """Repeat [B, T, kv_heads, X] -> [B, T, H, X]: each kv head serves consecutive query heads, as in the teacher."""
        repeats = self.heads // x.shape[2]
        return x if repeats == 1 else x.repeat_interleave(repeats, dim=2)

    def branches(self, hidden: Tensor, position: Position, mask: Tensor | None,
                 state: MixerState | None) -> tuple[list[tuple[ModuleType, Any]], Any]:  # fmt: skip
        """Return the op and, with `student.window`, window attention, each with its `Inputs`, and what `output` reads.

        Arguments are those of `inputs`. Window attention reads the mixer's q, k and v projections as the teacher's attention
        does: with RoPE and without convolution.
        """
        if not self.beside_window:
            inputs, read_by_output = self.inputs(hidden, position, mask, state)
            return [(self.op, inputs)], read_by_output
        q, k, v = self.qkv(hidden)  # once, or the compiled backward pass would have each product twice
        self.projected = hidden, (q, k, v)  # read by the `qkv` that `inputs` calls
        try:
            inputs, read_by_output = self.inputs(hidden, position, mask, state)
        finally:
            self.projected = None
        window_inputs = window.Inputs(*self.rotated_as_teacher(position, q, k), v, self.scale, self.window, self.sinks, mask)
        return [(self.op, inputs), (window, window_inputs)], read_by_output

    def combined(self, parts: list[Tensor], dims: int) -> Tensor:
        """Combine the results of `branches`, share * op + (1 - share) * window, in their shape; return a single one unchanged.

        dims: number of dimensions after the heads: 1 for [B, T, H, V], 2 for [B, H, T, T]. The result has the first's dtype.
        """
        if len(parts) == 1:
            return parts[0]
        share = promoted(self.window_logit)[0].sigmoid()[(..., *[None] * dims)]
        return (share * parts[0] + (1 - share) * parts[1]).to(parts[0].dtype)

    def matrix(self, hidden: Tensor, position: Position, mask: Tensor | None = None) -> Tensor:
        """Build the mixing matrix A [B, H, T, T] of Eq. 7 for hidden [B, T, D]; mask bool [B, T] is False where padded."""
        matrices = []
        for op, inputs in self.branches(hidden, position, mask, None)[0]:
            arguments = inputs._asdict()
            del arguments["v"]  # A does not depend on v
            matrices.append(op.matrix(**arguments))
        return self.combined(matrices, dims=2)

    def matrix_times(self, z: Tensor, hidden: Tensor, position: Position) -> Tensor:
        """Compute A z [B, T, H, P] without building A, by mixing z [1, T, 1, P] in place of v.

        z holds P random vectors (probes), the same for all sequences and heads. hidden [B, T, D] comes from the layer's norm.
        """
        products = []
        for op, inputs in self.branches(hidden, position, None, None)[0]:
            values = z.to(inputs.v.dtype).expand(*inputs.v.shape[:3], -1)
            products.append(op.mix(**inputs._replace(v=values)._asdict())[0])
        return self.combined(products, dims=1)

    def forward(self, hidden_states: Tensor, position_embeddings: Position, attention_mask: Tensor | None = None,
                past_key_values=None, cache=None, **unused) -> tuple[Tensor, None]:  # fmt: skip
        """Mix hidden_states [B, T, D] -> [B, T, D] and None: the interface of an attention module in transformers.

        attention_mask bool [B, T] is False where padded; cache, or past_key_values before transformers 5.24, is a StudentCache,
        which is read and updated.
        """
        cache = past_key_values if cache is None else cache
        memory = None if cache is None else cache.layers[self.layer_idx]
        branches, read_by_output = self.branches(hidden_states, position_embeddings, attention_mask, memory)
        if memory is None:
            parts = [op.mix(**inputs._asdict())[0] for op, inputs in branches]
        else:
            before = memory.op if len(branches) > 1 and memory.op else [memory.op] * len(branches)
            after = [advance(*branch, state) for branch, state in zip(branches, before, strict=True)]
            parts, states = [y for y, _ in after], tuple(state for _, state in after)
            memory.update(states if len(states) > 1 else states[0], tokens=hidden_states.shape[1])
        y = self.output(parts[0], read_by_output)
        if self.beside_window:
            y = self.combined([y.unflatten(-1, (self.heads, -1)), parts[1]], dims=1).flatten(2)
        return self.o_proj(y), None


def unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set x [B, T, heads, X] to zero in padded tokens, where mask, bool [B, T], is False; None for no padding."""
    return x if mask is None else x * mask[:, :, None, None]


def advance(op: ModuleType, inputs: Any, state: Any) -> tuple[Tensor, Any]:
    """Mix the tokens that follow `state`, by `op.mix` or, for T = 1, `op.step` -> y [B, T, H, V] and the state after them."""
    if inputs.v.shape[1] > 1:
        return op.mix(**inputs._asdict(), state=state)
    token = {name: x[:, 0] if isinstance(x, Tensor) else x for name, x in inputs._asdict().items()}
    y, state = op.step(**token, state=state)
    return y[:, None], state
