"""Token-by-token generation from fixed buffers; on a GPU each step is compiled and captured as one CUDA graph.

In plain PyTorch, a step launches a thousand small kernels from Python: tens of milliseconds for a model of SmolLM-360M's shape,
whose weights a GPU reads in 0.3 ms. Here all layers of one kind share one compiled function, in which products of one row
include the norms and element-wise operations around them, and the whole step, from token to next token, is captured once and
replayed. If states do not grow, reading a chunk of a prompt is captured as well.
"""

import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from distill_pl.compiling.cuda_graphs import pool_bytes
from distill_pl.decoding.backend import decode_backend, unlimited_recompiles
from distill_pl.decoding.row_layer import RowLayer, RowProducts, is_llama_layer
from distill_pl.errors import InputError
from distill_pl.mixers import Softmax
from distill_pl.mixers.mixer import Position
from distill_pl.student.cache import CACHE, MixerState
from distill_pl.student.factory import StudentFactory, check_teacher
from distill_pl.student.modeling import Student

BLOCK = 256  # positions of the kv cache in one batched product: in a single product, a long cache keeps few cores busy
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # rope types whose tables Python recomputes as the sequence grows
OneLayerCache = namedtuple("OneLayerCache", "layers")  # `layers` is all that a mixer reads of a cache
State = tuple[Any, dict[str, tuple[Tensor, ...]]]  # of a layer: the op's state; by name, a convolution's last tokens [B, 1, C]


class FixedSoftmax:
    """`ops.softmax` for one token, on keys and values in buffers of fixed length, as in transformers' StaticCache.

    State: keys and values [B, kv_heads, L, K or V], L a multiple of BLOCK, updated in place, and the token's position [1].
    """

    @staticmethod
    def step(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None,
             state: Any = None) -> tuple[Tensor, Any]:  # fmt: skip
        """Attend to all tokens up to this one: q [B, H, K], k and v [B, kv_heads, K or V] -> y [B, H, V], state.

        key_mask is ignored: no token may be padded.
        """
        keys, values, position = state
        keys.index_copy_(2, position, k[:, :, None])
        values.index_copy_(2, position, v[:, :, None])
        grouped = q.unflatten(1, (k.shape[1], -1))[:, :, None]  # [B, kv_heads, 1, H / kv_heads, K]
        key_blocks, value_blocks = (x.unflatten(2, (-1, BLOCK)) for x in (keys, values))  # [B, kv_heads, blocks, BLOCK, K or V]
        scores = (grouped @ key_blocks.mT).float() * scale  # [B, kv_heads, blocks, H / kv_heads, BLOCK]
        visible = (torch.arange(keys.shape[2], device=q.device) <= position).unflatten(0, (-1, 1, BLOCK))
        scores = scores.masked_fill(~visible, -math.inf)
        weights = (scores - scores.amax((2, 4), keepdim=True)).exp()
        y = (weights.to(v.dtype) @ value_blocks).float().sum(2)  # [B, kv_heads, H / kv_heads, V]
        return (y / weights.sum((2, 4))[..., None]).flatten(1, 2).to(v.dtype), state


def unsupported_reason(model: PreTrainedModel, length: int) -> str | None:
    """Return why a Decoder's results would differ from `model`'s for sequences of `length` tokens, or None if they agree."""
    devices = sorted({str(x.device) for x in model.parameters()})
    if len(devices) > 1:
        return f"its weights lie on {' and '.join(devices)}"
    rope = (getattr(model.config, "teacher", None) or model.config.to_dict()).get("rope_parameters") or {}
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        return f"rope_type {rope['rope_type']} changes its tables with the length"
    window = getattr(model.config, "sliding_window", None)
    if window and length > window:  # Qwen2-MoE writes 0 for none
        return f"{length} tokens exceed the sliding window of {window}"
    if not isinstance(model, Student):
        try:
            check_teacher(SimpleNamespace(path=model.name_or_path, config=model.config, model=model))  # type: ignore[arg-type]
        except InputError as error:
            return str(error)
    return None


def as_student(model: PreTrainedModel) -> Student:
    """Return a new Student that shares the tensors of `model`, a Student or a Llama, which becomes one with softmax mixers.

    The new Student's modules may be changed without changing `model`. Raises InputError for a model with other modules.
    """
    teacher: Any = SimpleNamespace(config=model.config, model=model)
    config = model.config if isinstance(model, Student) else StudentFactory("softmax").config(teacher)
    with torch.device("meta"):
        student = Student(config)
    try:
        student.load_state_dict(model.state_dict(), assign=True)
    except RuntimeError as error:
        raise InputError("decoder: the model's modules were changed, e.g. by LoRA: merge them, or use generate") from error
    student.model.rotary_emb = model.model.rotary_emb  # the state dict does not hold its tables
    return student.eval().requires_grad_(False)


def state_of(memory: Any) -> State:
    """Return the tensors of a layer's cache; a convolution's last tokens are split, so that each is overwritten in place."""
    if not isinstance(memory, MixerState):  # a layer of transformers' own cache
        return (memory.keys, memory.values), {}
    return memory.op, {name: tail.split(1, 1) for name, tail in memory.tails.items()}


def layer_step(layer: nn.Module, hidden: tuple[Tensor, ...], rope: Position | None, state: State,
               **mask: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """Run a layer on hidden states and overwrite its `state` -> its output.

    hidden and the output are one tensor [B, T, D], or for a RowLayer two, which the layer adds. mask: empty, or attention_mask,
    bool [B, T], which is False where padded.
    """
    memory = MixerState()
    memory.op, memory.tails = state[0], {name: torch.cat(tokens, 1) for name, tokens in state[1].items()}
    output = layer(*hidden, position_embeddings=rope, **{CACHE: OneLayerCache([memory])}, **mask)
    for buffer, new in zip(tree_leaves(state), tree_leaves(state_of(memory)), strict=True):
        if new is not buffer:
            buffer.copy_(new)
    return output if isinstance(output, tuple) else (output,)


class Decoder:
    """Generate with `model`, a Student or a Llama, one token a step for each of a batch of prompts of equal length.

        decoder = Decoder(model)
        tokens = [decoder.prefill(prompt)]
        while ...: tokens.append(decoder.step())

    A Decoder shares the model's tensors and does not change its modules. States, token and position lie in buffers that every
    step overwrites. The states have a constant size, except for softmax, whose keys and values have room for `max_length`
    tokens. On a GPU, the first `prefill` compiles and captures the step, which takes seconds, and with `chunk` the reading of a
    chunk.
    """

    def __init__(self, model: PreTrainedModel, max_length: int | None = None, temperature: float = 0.0, top_k: int = 0,
                 backend: Any = "auto", chunk: int = 0):  # fmt: skip
        """Set up decoding; buffers are allocated by the first `prefill`.

        max_length: most tokens of prompt and continuation together; required if a layer has softmax attention.
        temperature: 0 takes the likeliest token; above 0, tokens are sampled from all or, with `top_k`, from the k likeliest.
        backend: backend of torch.compile, None to compile nothing; auto: `decode_backend` on a GPU, else None.
        chunk: tokens of a prompt that are read at once; 0 reads the whole prompt at once, not compiled.

        Raises InputError for an option out of range, and for a model for which a Decoder's results would differ from its own.
        """
        if reason := unsupported_reason(model, max_length or 0):
            raise InputError(f"model: a Decoder's results would differ from model.generate's ({reason}): use model.generate")
        if not (0 <= temperature < math.inf and top_k >= 0 and chunk >= 0):
            raise InputError(f"temperature {temperature}, top_k {top_k}, chunk {chunk}: give finite numbers of at least 0")
        self.model, self.max_length, self.temperature, self.top_k, self.chunk = model, max_length, temperature, top_k, chunk
        self.states_grow = not isinstance(model, Student) or any(isinstance(x, Softmax) for x in model.mixers)
        if max_length is None and self.states_grow:
            raise InputError("softmax attention keeps keys and values of every token: give a max_length")
        self.gpu = model.device.type == "cuda"
        self.backend = (decode_backend if self.gpu else None) if backend == "auto" else backend
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.states: list[State] = []
        self.length = 0  # tokens in the states

    @torch.no_grad()
    def prefill(self, prompt: Tensor) -> Tensor:
        """Read a prompt [B, T] from an empty state -> the next token [B, 1].

        Raises InputError for an empty prompt, if T exceeds max_length, or if B differs from the first call's.
        """
        if prompt.ndim != 2 or prompt.numel() == 0:
            raise InputError(f"prompt {list(prompt.shape)}: give [B, T] of at least one token")
        batch, length = prompt.shape
        self._check_room(length)
        if self.states and batch != len(self.token):
            raise InputError(f"{batch} prompts, where this Decoder's buffers hold {len(self.token)}: create another Decoder")
        if self.chunk and not self.states_grow:
            self._read_in_chunks(prompt)
            return self.token.clone()
        cache: Any = None
        for piece in prompt.split(self.chunk or length, dim=1):
            output = self.model(piece, **{CACHE: cache}, use_cache=True, logits_to_keep=1, return_dict=True)
            cache = output[CACHE]
        if not self.states:
            self._prepare(cache, batch)
        self._load(cache, length)
        self.token.copy_(self._choose(output.logits[:, -1]))
        return self.token.clone()

    @torch.no_grad()
    def step(self) -> Tensor:
        """Decode and return the next token [B, 1]. Raises InputError beyond max_length and before any `prefill`."""
        if not self.states:
            raise InputError("step: no prompt has been read: call prefill first")
        self._check_room(self.length + 1)
        self.advance()
        self.length += 1
        return self.token.clone()

    def generate(self, prompt: Tensor, tokens: int) -> Iterator[Tensor]:
        """Yield the first `tokens` tokens [B, 1] after a prompt [B, T]."""
        for index in range(tokens):
            yield self.step() if index else self.prefill(prompt)

    def nbytes(self) -> int:
        """Return the bytes of all states."""
        return sum(x.nbytes for x in tree_leaves(self.states) if x is not self.position)

    def pool_bytes(self) -> int:
        """Return the GPU bytes that the CUDA graphs' private pools hold beyond what the allocator counts as allocated."""
        return sum(pool_bytes(graph.pool()) for graph in self.graphs)

    def _check_room(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise InputError(f"{length} tokens exceed this Decoder's max_length {self.max_length}: give a greater max_length")

    def _prepare(self, cache: Cache, batch: int) -> None:
        """Allocate buffers with the shapes of the states in a prompt's cache; compile and capture the step on them."""
        device = self.model.device
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.student = student = as_student(self.model)
        room = math.ceil((self.max_length or 0) / BLOCK) * BLOCK
        for mixer, memory in zip(student.mixers, cache.layers, strict=True):
            mixer.layer_idx = 0  # its index in a OneLayerCache; with different indices, each layer would be compiled
            state = state_of(memory)
            if isinstance(mixer, Softmax):
                mixer.op = FixedSoftmax  # type: ignore[assignment]
                keys, values = (x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in state[0][:2])
                self.states.append(((keys, values, self.position), {}))
            else:  # matrices with contiguous columns: reading a state is a sum over keys, which then fuses with the update
                self.states.append(tree_map(lambda x: x.new_zeros(x.mT.shape).mT if x.ndim > 2 else x.clone(), state))
        self.uses_rope = any(mixer.rope or mixer.beside_window for mixer in student.mixers)
        self.layers, self.head = list(student.model.layers), None
        if batch == 1 and (self.gpu or self.backend) and find_spec("triton") and all(map(is_llama_layer, self.layers)):
            self.layers = [RowLayer(layer) for layer in self.layers]
            self.head = RowProducts([student.lm_head], student.model.norm)
        parts: list[Any] = [self._embed, layer_step, self._predict]
        if self.backend:
            parts = [torch.compile(part, backend=self.backend, fullgraph=True, dynamic=False) for part in parts]
        self.parts = parts
        self.advance = self._captured(self._step)

    def _read_in_chunks(self, prompt: Tensor) -> None:
        """Read a prompt [B, T] into the buffers, padded on the left to whole chunks."""
        length = prompt.shape[1]
        if not self.states:  # a padded token changes no state, so the states after it are the initial ones
            padded = {"attention_mask": torch.zeros_like(prompt[:, :1]), "use_cache": True, "return_dict": True}
            cache = self.model(prompt[:, :1], **padded)[CACHE]
            self._prepare(cache, len(prompt))
            self.beginning = [state_of(memory) for memory in cache.layers]
            self._prepare_reading()
        tree_map(Tensor.copy_, self.states, self.beginning)  # for every prompt, and after capturing, which changes the states
        missing = -length % self.chunk
        tokens, positions = pad(prompt, (missing, 0)), torch.arange(-missing, length, device=prompt.device)[None]
        for piece, places in zip(tokens.split(self.chunk, 1), positions.split(self.chunk, 1), strict=True):
            self.piece.copy_(piece)
            self.positions.copy_(places)
            self.read()
        self.length = length
        self.position.fill_(length)

    def _prepare_reading(self) -> None:
        """Allocate buffers for a chunk of a prompt; compile and capture its reading, by plain layers instead of RowLayers."""
        self.reader = as_student(self.model)
        for mixer in self.reader.mixers:
            mixer.layer_idx = 0
        self.piece = self.token.expand(-1, self.chunk).clone()
        self.positions = torch.zeros(1, self.chunk, dtype=torch.long, device=self.token.device)
        self.read_layer = torch.compile(layer_step, fullgraph=True, dynamic=False) if self.backend else layer_step
        self.read = self._captured(self._read)

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture `run` as a CUDA graph -> a function that replays it; on a CPU, `run` itself.

        Before, it runs `run` twice, which changes states, token and position: callers must set them afterwards.
        """
        if self.gpu or self.backend:
            with unlimited_recompiles():
                for _ in range(2):  # kernels are compiled and tuned when they first run, which cannot be captured
                    run()
        if not self.gpu:
            return run
        self.graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(self.graphs[-1]):
            run()
        return self.graphs[-1].replay

    def _load(self, cache: Cache, length: int) -> None:
        """Copy the states after a prompt of `length` tokens from `cache` into the buffers, freeing `cache` layer by layer."""
        for index, (mixer, state) in enumerate(zip(self.student.mixers, self.states, strict=True)):
            read, cache.layers[index] = state_of(cache.layers[index]), None  # type: ignore[call-overload]
            if isinstance(mixer, Softmax):
                for buffer, x in zip(state[0][:2], read[0], strict=False):  # without the mask that a StudentCache keeps
                    buffer[:, :, :length].copy_(x)
            else:
                tree_map(Tensor.copy_, state, read)
        self.length = length
        self.position.fill_(length)

    def _step(self) -> None:
        embed, run_layer, predict = self.parts
        hidden, rope = embed(self.token, self.position)
        for layer, state in zip(self.layers, self.states, strict=True):
            hidden = run_layer(layer, hidden, rope, state)
        predict(hidden)

    def _read(self) -> None:
        """Read the tokens `piece` [B, chunk] at `positions` [1, chunk]; negative positions are padding."""
        mask = (self.positions >= 0).expand(len(self.piece), -1)
        embedded = self.reader.model.embed_tokens(self.piece)
        rope = self.reader.position(embedded, self.positions.clamp(min=0)) if self.uses_rope else None
        hidden: tuple[Tensor, ...] = (embedded,)
        for layer, state in zip(self.reader.model.layers, self.states, strict=True):
            hidden = self.read_layer(layer, hidden, rope, state, attention_mask=mask)
        logits = self.reader.lm_head(self.reader.model.norm(hidden[0][:, -1:]))
        self.token.copy_(self._choose(logits[:, -1]))

    def _embed(self, token: Tensor, position: Tensor) -> tuple[tuple[Tensor, ...], Position | None]:
        """Embed token [B, 1] at position [1] -> the first layer's input, and RoPE's (cos, sin) if any mixer uses it."""
        hidden = self.student.model.embed_tokens(token)
        rope = self.student.position(hidden, position[None]) if self.uses_rope else None
        # RowLayer adds its two inputs; halves are exact in floating point
        return (hidden,) if self.head is None else (hidden / 2, hidden / 2), rope

    def _predict(self, hidden: tuple[Tensor, ...]) -> None:
        """Write the next token, chosen from the logits of the last layer's output, and its position to the buffers."""
        if self.head is None:
            logits = self.student.lm_head(self.student.model.norm(*hidden))
        else:
            logits, _ = self.head(*hidden)
        self.token.copy_(self._choose(logits[:, -1]))
        self.position.add_(1)

    def _choose(self, logits: Tensor) -> Tensor:
        """Choose the likeliest token or sample one. logits [B, vocab] -> [B, 1]."""
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        logits, tokens = logits.float().topk(min(self.top_k or logits.shape[-1], logits.shape[-1]))
        # exponential variables with the probabilities as rates: the least one is a sample. multinomial would wait for the GPU
        clocks = torch.empty_like(logits).exponential_() / (logits / self.temperature).softmax(-1)
        return tokens.gather(-1, clocks.argmin(-1, keepdim=True))
