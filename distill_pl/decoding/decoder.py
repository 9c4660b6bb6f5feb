"""Generation a token at a time out of buffers that never move: on a GPU compiled, and captured whole in a CUDA graph.

A plain step is a thousand small kernels, each of which Python has to launch: tens of milliseconds for one of SmolLM-360M's
shape, whose weights a GPU reads in 0.3. Here one layer is compiled for all layers, with the norms and the element-wise work
inside the products; and the whole step, from the token that goes in to the one that comes out, is captured once and replayed.
"""

import math
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from distill_pl.compiling.layers import launches_early, pool_bytes
from distill_pl.errors import InputError
from distill_pl.mixers import Softmax
from distill_pl.mixers.mixer import Position, RMSNorm
from distill_pl.student.cache import MixerState
from distill_pl.student.factory import StudentFactory, check_teacher
from distill_pl.student.modeling import Student

BLOCK = 256  # positions of a kv cache that are attended to together: many blocks, or a long cache keeps few cores busy
HEEDED = {  # of a generation config
    "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "use_cache",
    "max_length", "max_new_tokens",
}  # fmt: skip
ROW_LAYERS = tuple(f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3"))  # all of one wiring
MOVING_ROPE = ("dynamic", "longrope")  # tables that change with the length, which Python looks at


class FixedSoftmax:
    """`ops.softmax.step` on keys and values of a fixed length, as transformers' StaticCache has them.

    State: keys and values [B, kv_heads, L, K or V], L a multiple of BLOCK, and the position [1] of the token, written in place.
    """

    @staticmethod
    def step(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: None, state: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        """q [B, H, K], k and v [B, kv_heads, K or V] -> y [B, H, V], state."""
        keys, values, position = state
        keys.index_copy_(2, position, k[:, :, None])
        values.index_copy_(2, position, v[:, :, None])
        grouped = q.unflatten(1, (k.shape[1], -1))[:, :, None]  # [B, kv_heads, 1, H / kv_heads, K]
        key_blocks, value_blocks = (x.unflatten(2, (-1, BLOCK)) for x in (keys, values))  # [B, kv_heads, blocks, BLOCK, K or V]
        scores = (grouped @ key_blocks.mT).float() * scale  # [B, kv_heads, blocks, H / kv_heads, BLOCK]
        seen = (torch.arange(keys.shape[2], device=q.device) <= position).unflatten(0, (-1, 1, BLOCK))
        scores = scores.masked_fill(~seen, -math.inf)
        weights = (scores - scores.amax((2, 4), keepdim=True)).exp()
        sums = (weights.to(v.dtype) @ value_blocks).float().sum(2)  # [B, kv_heads, H / kv_heads, V]
        return (sums / weights.sum((2, 4))[..., None]).flatten(1, 2).to(v.dtype), state


class Products(nn.Module):
    """Linears that read the same row, the sum of residuals and norm before or the MLP's gate after them: `row_products`."""

    def __init__(self, linears: list[nn.Linear], norm: nn.Module | None = None, gated: bool = False, heads: int = 1):
        super().__init__()
        import distill_pl.ops.gpu.row_products  # noqa: F401 (which loads Triton)

        self.weights, self.biases = [x.weight for x in linears], []
        if any(x.bias is not None for x in linears):
            self.biases = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias for x in linears]
        self.gain, self.gated, self.heads = None if norm is None else norm.weight, gated, heads
        self.eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x [1, 1, D] -> the products beside each other [1, 1, sum of N], gated one; and x + residual, if there is one."""
        x = x.unflatten(-1, (self.heads, -1))  # whose shape must show the heads, or their norms are kernels of their own
        y, total = torch.ops.distill_pl.row_products(x, self.weights, self.biases, self.gain, self.eps, residual, self.gated)
        return y if residual is None else (y, total)


class Part(nn.Module):
    """Stands for a linear whose product is at hand: it is given all of `Products` and takes its own."""

    def __init__(self, start: int, size: int):
        super().__init__()
        self.start, self.size = start, size

    def forward(self, made: Tensor) -> Tensor:
        """[1, 1, sum of N] -> [1, 1, N]."""
        return made.narrow(-1, self.start, self.size)


class Convolved(nn.Module):
    """In place of a short convolution: what it makes, or `Products` of that, written once instead of made where it is read."""

    def __init__(self, conv: nn.Module, products: Products | None = None):
        super().__init__()
        self.conv, self.products = conv, products

    def forward(self, x: Tensor, state: MixerState, name: str) -> Tensor | tuple[Tensor, Tensor]:
        """[1, 1, D] -> [1, 1, D] or [1, 1, sum of N]."""
        made = self.conv(x, state, name)
        return made.as_strided(made.shape, made.stride()) if self.products is None else self.products(made)


class RowLayer(nn.Module):
    """One token of one row through a layer of Llama's wiring, in as few kernels as can be.

    It hands on what it adds to the hidden state apart from it: the next kernel adds them up.
    """

    def __init__(self, layer: Any):
        super().__init__()
        self.mixer, self.norm = layer.self_attn, layer.input_layernorm
        mlp, self.enter, start = layer.mlp, None, 0
        linears = {name: x for name, x in self.mixer.named_modules() if isinstance(x, nn.Linear)}
        o_proj, second = linears.pop("o_proj"), linears.pop("decay_proj.1", None)  # which read what others make
        for name, linear in linears.items():
            parent, _, own = name.rpartition(".")
            setattr(self.mixer.get_submodule(parent), own, Part(start, linear.out_features))
            start += linear.out_features
        if hasattr(self.mixer, "conv"):  # which reads what is normed before any linear does
            self.mixer.conv = Convolved(self.mixer.conv, Products(list(linears.values())))
        else:
            self.enter = Products(list(linears.values()), self.norm)
        for name in ("q_conv", "k_conv", "v_conv"):
            if hasattr(self.mixer, name):
                setattr(self.mixer, name, Convolved(getattr(self.mixer, name)))
        if second is not None:  # what one token's gates read of the weights lies side by side
            second.weight = nn.Parameter(second.weight.mT.contiguous().mT, requires_grad=False)
        norm = getattr(self.mixer, "norm", None)
        if isinstance(norm, RMSNorm) and len(norm.weight) == o_proj.in_features and "gate_proj" not in linears:
            self.mixer.norm = nn.Identity()  # it is of all heads, and o reads nothing else
        else:
            norm = None
        self.mixer.o_proj = Products([o_proj], norm, heads=self.mixer.heads)
        self.up = Products([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm, gated=True)
        self.down = Products([mlp.down_proj])

    def forward(self, hidden: Tensor, change: Tensor, position_embeddings: Position | None,
                past_key_values: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        """[1, 1, D] and what the layer before adds to it -> the same of this layer."""
        if self.enter is None:
            hidden = hidden + change
            made = self.norm(hidden)
        else:
            made, hidden = self.enter(change, hidden)
        change, _ = self.mixer(made, position_embeddings=position_embeddings, past_key_values=past_key_values)
        made, hidden = self.up(change, hidden)
        return hidden, self.down(made)


def is_sum(a: Tensor, b: Tensor) -> bool:
    """Whether to take [.., M, K] @ [.., K, N] apart.

    What has one term does; of one row, what reads a state, in fp32, and else if K <= N: each sum makes all its terms anew.
    """
    terms, sums = b.shape[-2:]
    return terms == 1 or (a.shape[-2] == 1 and (b.ndim == 3 and b.dtype == torch.float32 or terms <= sums))


def product(a: Tensor, b: Tensor) -> Tensor:
    """[.., M, K] @ [.., K, N] as a sum, which the compiler fuses with what is around it; NotImplemented for others."""
    if not is_sum(a, b):
        return NotImplemented
    return a * b if b.shape[-2] == 1 else (a.float().mT * b.float()).sum(-2, keepdim=True).to(a.dtype)


def product_and_bias(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta bias [N] + alpha a @ b, likewise."""
    return beta * bias + alpha * product(a, b) if is_sum(a, b) else NotImplemented


def products() -> dict[Any, Any]:
    """How a compiler is to take the products apart."""
    aten = torch.ops.aten
    return {aten.mm.default: product, aten.bmm.default: product, aten.addmm.default: product_and_bias}


def inductor(graph, inputs):
    """torch.compile's own backend, but that a product with one row is a sum over its columns."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    # what is made of few numbers is made anew wherever it is read: for one row, a kernel fewer is worth any arithmetic
    options = {"unroll_reductions_threshold": 17} | {f"realize_{x}_threshold": 400 for x in ("reads", "acc_reads", "opcount")}
    # deterministic: a kernel timed by itself, a few microseconds, is not the fastest one beside others
    with config.patch(options | {"triton.enable_pdl": launches_early(), "deterministic": True, "combo_kernels": True}):
        return compile_fx(graph, inputs, decompositions=dict(select_decomp_table()) | products())


def dressed(model: PreTrainedModel) -> Student:
    """A model's tensors as a Student of our own, whose modules may be changed; a Llama's as one of softmax throughout."""
    if isinstance(model, Student):
        config, rotary = model.config, model.model.rotary_emb
    else:
        teacher: Any = SimpleNamespace(config=model.config, model=model)
        config, rotary = StudentFactory("softmax").config(teacher), model.model.rotary_emb
    with torch.device("meta"):
        student = Student(config)
    student.load_state_dict(model.state_dict(), assign=True)
    student.model.rotary_emb = rotary  # its tables are no part of the state
    return student.eval().requires_grad_(False)


def by_rows(layer: Any) -> bool:
    """Whether a RowLayer does what this layer does."""
    return type(layer).__name__ in ROW_LAYERS and type(layer.mlp.act_fn) is type(ACT2FN["silu"])


class OneLayer(NamedTuple):
    """The memory of a model of one layer."""

    layers: list[MixerState]


def apart(tails: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Each token [B, 1, C] by itself: within one tensor, none could move up a place where another is still read."""
    return {name: tail.split(1, 1) for name, tail in tails.items()}


def layer_step(layer: nn.Module, hidden: tuple[Tensor, ...], position: Position | None, op: Any,
               tails: dict[str, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:  # fmt: skip
    """One token through one layer, which takes and gives one or two [B, 1, D]; its state, `op` and `tails`, is overwritten."""
    memory = MixerState()
    memory.op, memory.tails = op, {name: torch.cat(tokens, 1) for name, tokens in tails.items()}
    found = layer(*hidden, position_embeddings=position, past_key_values=OneLayer([memory]))
    for buffer, new in zip(tree_leaves((op, tails)), tree_leaves((memory.op, apart(memory.tails))), strict=True):
        if new is not buffer:
            buffer.copy_(new)
    return found if isinstance(found, tuple) else (found,)


class Decoder:
    """Generates with `model`, a Student or a Llama, for prompts of equal length, one token of each row a step.

        decoder = Decoder(model)
        tokens = [decoder.prefill(prompt)]
        while ...: tokens.append(decoder.step())

    It shares the model's tensors and leaves its modules alone. States, token and position lie in buffers of its own, which
    every step overwrites: of constant size for every mixer but softmax, whose keys and values have room for `max_length`
    tokens. On a GPU `prefill` compiles and captures the step when it is first called, which takes seconds.
    """

    def __init__(self, model: PreTrainedModel, max_length: int | None = None, temperature: float = 0.0, top_k: int = 0,
                 backend: Any = "auto"):  # fmt: skip
        """temperature: 0 takes the likeliest token, more samples, from the `top_k` likeliest if not 0.

        backend: of torch.compile, None for none; auto: our `inductor` on a GPU.
        """
        self.model, self.max_length, self.temperature, self.top_k = model, max_length, temperature, top_k
        self.gpu = model.device.type == "cuda"
        self.backend = (inductor if self.gpu else None) if backend == "auto" else backend
        self.graph: torch.cuda.CUDAGraph | None = None  # once there is one
        self.states: list[tuple[Any, dict[str, tuple[Tensor, ...]]]] = []  # of each layer, op and tails
        self.seen = 0

    @torch.no_grad()
    def prefill(self, prompt: Tensor, chunk: int = 0) -> Tensor:
        """Read a prompt [B, T], in pieces of `chunk` tokens or (0) at once -> the next token [B, 1]. Starts anew."""
        self._check_room(prompt.shape[1])
        cache: Any = None
        for piece in prompt.split(chunk or prompt.shape[1], dim=1):
            found = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = found.past_key_values
        if self.states and len(prompt) != len(self.token):
            raise ValueError(f"{len(prompt)} prompts, where the first time there were {len(self.token)}: make another Decoder")
        if not self.states:
            self._prepare(cache, len(prompt))
        self._load(cache, prompt.shape[1])
        self.token.copy_(self._choose(found.logits[:, -1]))
        return self.token.clone()

    @torch.no_grad()
    def step(self) -> Tensor:
        """The token [B, 1] after the last one."""
        self._check_room(self.seen + 1)
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        self.seen += 1
        return self.token.clone()

    def generate(self, prompt: Tensor, tokens: int) -> Iterator[Tensor]:
        """The first so many tokens [B, 1] after a prompt [B, T]."""
        yield self.prefill(prompt)
        for _ in range(tokens - 1):
            yield self.step()

    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(x.nbytes for x in tree_leaves(self.states) if x is not self.position)

    def pool_bytes(self) -> int:
        """What the graph keeps."""
        return 0 if self.graph is None else pool_bytes(self.graph.pool())

    def _check_room(self, tokens: int) -> None:
        if self.max_length is not None and tokens > self.max_length:
            raise ValueError(f"there is room for {self.max_length} tokens only: give a greater max_length")

    def _prepare(self, cache: Cache, batch: int) -> None:
        """Buffers like the states of a prompt; then the step on these, compiled and captured."""
        device = self.model.device
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.student = student = dressed(self.model)
        for mixer, held in zip(student.mixers, cache.layers, strict=True):
            mixer.layer_idx = 0  # each is called with a cache of one layer: they compile as one
            if isinstance(mixer, Softmax):
                if self.max_length is None:
                    raise ValueError("softmax attention remembers every token: give a max_length")
                mixer.op = FixedSoftmax  # type: ignore[assignment]
                keys, values = (
                    x.new_zeros(*x.shape[:2], -(-self.max_length // BLOCK) * BLOCK, x.shape[3]) for x in _keys_and_values(held)
                )
                self.states.append(((keys, values, self.position), {}))
            else:
                self.states.append(tree_map(_zeros, (held.op, apart(held.tails))))
        self.turns = any(mixer.rope for mixer in student.mixers)
        self.layers, self.head = list(student.model.layers), None
        if batch == 1 and (self.gpu or self.backend is not None) and find_spec("triton") and all(map(by_rows, self.layers)):
            self.layers = [RowLayer(layer) for layer in self.layers]
            self.head = Products([student.lm_head], student.model.norm)
        parts: list[Any] = [self._enter, layer_step, self._leave]
        if self.backend is not None:
            parts = [torch.compile(part, backend=self.backend, fullgraph=True, dynamic=False) for part in parts]
        self._first, self._layer, self._last = parts
        # each Decoder adds versions of the same functions, more than the compiler holds to be sane
        with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
            if self.gpu:
                self._capture()
            elif self.backend is not None:
                self._step()

    def _capture(self) -> None:
        """The step as one CUDA graph, after it ran twice: what is compiled or tuned in a first run cannot be captured."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph

    def _load(self, cache: Cache, length: int) -> None:
        """The states of a prompt of `length` tokens into the buffers; `cache` is left empty, a layer at a time."""
        for index, (op, tails) in enumerate(self.states):
            held, cache.layers[index] = cache.layers[index], None  # type: ignore[call-overload]
            if isinstance(self.student.mixers[index], Softmax):
                for buffer, x in zip(op, _keys_and_values(held), strict=False):
                    buffer[:, :, :length].copy_(x)
            else:
                tree_map(lambda buffer, x: buffer.copy_(x), (op, tails), (held.op, apart(held.tails)))
        self.seen = length
        self.position.fill_(length)

    def _step(self) -> None:
        hidden, position = self._first(self.token, self.position)
        for layer, (op, tails) in zip(self.layers, self.states, strict=True):
            hidden = self._layer(layer, hidden, position, op, tails)
        self._last(hidden)

    def _enter(self, token: Tensor, at: Tensor) -> tuple[tuple[Tensor, ...], Position | None]:
        """Token [B, 1] at position [1] -> what the first layer takes, RoPE's (cos, sin) if any mixer reads it."""
        hidden = self.student.model.embed_tokens(token)
        position = self.student.position(hidden, at[None]) if self.turns else None
        return (hidden,) if self.head is None else (hidden / 2, hidden / 2), position  # which the first RowLayer adds up

    def _leave(self, hidden: tuple[Tensor, ...]) -> None:
        """What the last layer gives -> the next token and its position."""
        if self.head is None:
            logits = self.student.lm_head(self.student.model.norm(*hidden))
        else:
            total, change = hidden
            logits, _ = self.head(change, total)
        self.token.copy_(self._choose(logits[:, -1]))
        self.position.add_(1)

    def _choose(self, logits: Tensor) -> Tensor:
        """[B, vocab] -> [B, 1]: the likeliest, or a draw."""
        if self.temperature == 0:  # in two steps, or one program reads a whole row
            columns = math.gcd(logits.shape[-1], 256)
            highest, column = logits.unflatten(-1, (-1, columns)).max(-1)
            row = highest.argmax(-1, keepdim=True)
            return row * columns + column.gather(-1, row)
        likeliest, tokens = logits.float().topk(min(self.top_k or logits.shape[-1], logits.shape[-1]))
        # the first of exponential clocks that run at these speeds: a draw that, unlike multinomial, never waits for the GPU
        clocks = torch.empty_like(likeliest).exponential_() / (likeliest / self.temperature).softmax(-1)
        return tokens.gather(-1, clocks.argmin(-1, keepdim=True))


def _keys_and_values(held: Any) -> tuple[Tensor, Tensor]:
    """[B, kv_heads, S, K or V] of a layer, in our own cache or in transformers'."""
    return held.op[:2] if isinstance(held, MixerState) else (held.keys, held.values)


def _zeros(x: Tensor) -> Tensor:
    """Like x, but its columns whole in memory: a matrix is read by sums over its keys, fused with its update if they agree."""
    return x.new_zeros(x.mT.shape).mT if x.ndim > 2 else torch.zeros_like(x)


def why_not(model: PreTrainedModel, length: int) -> str | None:
    """Why a Decoder would not do what the model does for `length` tokens, if so."""
    rope = (getattr(model.config, "teacher", None) or model.config.to_dict()).get("rope_parameters") or {}
    if rope.get("rope_type") in MOVING_ROPE:
        return f"rope_type {rope['rope_type']} changes its tables with the length"
    window = getattr(model.config, "sliding_window", None)
    if window is not None and length > window:
        return f"beyond the sliding window of {window}, not all tokens are seen"
    if not isinstance(model, Student):
        try:
            check_teacher(SimpleNamespace(path=model.name_or_path, config=model.config, model=model))  # type: ignore[arg-type]
        except InputError as error:
            return str(error)
    return None


def continued(model: PreTrainedModel, prompt: Tensor, max_new_tokens: int, temperature: float) -> Tensor | None:
    """A prompt [1, T] and what follows [1, T + n], as `model.generate` continues it; None where only that can.

    Captured but not compiled: compiling takes longer than a text of some thousand tokens.
    """
    options = model.generation_config
    found = {key: value for key, value in options.to_diff_dict().items() if value is not None and value is not False}
    asked = {key for key, value in found.items() if not key.startswith("_") and not (isinstance(value, float) and value == 1)}
    total = prompt.shape[1] + max_new_tokens
    if not asked <= HEEDED or why_not(model, total):
        return None
    ends = options.eos_token_id if isinstance(options.eos_token_id, list) else [options.eos_token_id]
    top_k = 50 if options.top_k is None else options.top_k  # transformers' own default
    tokens = [prompt]
    for token in Decoder(model, total, temperature, top_k, backend=None).generate(prompt, max_new_tokens):
        tokens.append(token)
        if token.item() in ends:
            break
    return torch.cat(tokens, 1)
