"""Building an initialised student from a teacher (the paper's Table 1 and section 3.1)."""

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from distill_pl.console import say
from distill_pl.errors import InputError, Range, check_arguments, one_line
from distill_pl.mixers import MIXERS
from distill_pl.ops import Backend, use_fla
from distill_pl.student.modeling import (
    DECODER_PARTS,
    RETENTION,
    Student,
    StudentConfig,
    mark_as_loaded,
    split_joint_projections,
)
from distill_pl.student.transfer import copy_student, copy_weights
from distill_pl.teacher import Teacher, load_model, shallow_copy, ties_embeddings

WINDOW, SINKS = 64, 4  # tokens: defaults of student.window (mixer swa) and student.sinks
BOUNDS = ("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv")  # of values too large to occur in a comparison
TOLERANCE = 1e-4  # of the largest value: rounding in fp32 stays below 1e-5, and an attention scale off by 10% far above
CHECKED: WeakSet[PreTrainedModel] = WeakSet()  # teachers' models that passed `check_teacher`


class StudentFactory:
    """The student: the mixer in place of the teacher's attention, its sizes, and the weights it starts from.

    Args:
        mixer: sequence mixer that replaces softmax attention (the paper's Table 1).
        init: start values. `qkv` copies the teacher's embeddings, norms, MLPs and output head, and those of the q, k, v and
            output projections that the mixer can take (Table 1); `fresh` copies all but attention, which is drawn at random;
            `scratch` draws everything at random.
        shape: sizes of the mixer. `copyable` has the teacher's heads, so that the mixer can take its projections; `paper` has
            the sizes behind the paper's Appendix A (see `distill-pl params`) and an output head not tied to the embeddings.
        kv_heads: number of k and v heads. `grouped` has as many as the teacher, each shared by several query heads;
            `expanded` has one for each query head, initialised as copies. Default: grouped for softmax, also in
            softmax_layers, and for swa, expanded for the others. Leave it out with shape paper, which has numbers of its own.
        rope: whether q and k are rotated by the teacher's rotary position embedding. Default: as in the mixer's own paper,
            true for softmax, retnet and swa. With RoPE, students of other mixers have no exact counterpart for
            `distill-pl export`.
        softmax_layers: layers, counted from 0, that keep the teacher's softmax attention and its weights, which KD alone
            trains: a hybrid model, whose cache grows with the sequence.
        window: number of last tokens, the token itself included, that sliding-window attention reads. For the mixer swa the
            default is 64. For another mixer, window attention with the same projections of q, k and v is added to each head
            after norms and gates, y = g mixer + (1 - g) window with a learned g; by default there is none.
        sinks: number of first tokens that window attention reads as well. Default: 4.
        start_from: run folder of `distill-pl fit`, or folder of a student of the same teacher that it exported, to go on from.
            All weights outside attention are copied, and those of every layer with the same mixer; other layers start as init
            says, so that softmax_layers restores the teacher's attention. Step counts, optimizer and schedule begin anew. Text
            that the run folder has read is skipped where data names the same text in the same order.
        retention: share of the state that a newly initialised decay gate keeps from one token to the next (section 3.1),
            between 0 and 1; for rwkv7 more than 0.545. Other values than the default need a mixer with such a gate.
        backend: implementation of the mixing: `fla` for Triton kernels, `torch` for plain PyTorch, `auto` for fla on a GPU
            where fla-core is installed and torch elsewhere.

    Raises:
        InputError: a value that is unknown or out of range, or that does not go with another.
    """

    ranges: ClassVar[dict[str, Range]] = {
        "window": Range(1, 1e6),
        "sinks": Range(1, 1e6),
        "retention": Range(1e-6, 1 - 1e-6),  # beyond, gates that are rounded to 0 or 1 learn nothing, or are infinite
    }

    def __init__(
        self,
        mixer: str = "gla",
        init: Literal["qkv", "fresh", "scratch"] = "qkv",
        shape: Literal["copyable", "paper"] = "copyable",
        kv_heads: Literal["grouped", "expanded"] | None = None,
        rope: bool | None = None,
        softmax_layers: Sequence[int] = (),
        window: int | None = None,
        sinks: int | None = None,
        start_from: str | None = None,
        retention: float = RETENTION,
        backend: Backend = "auto",
    ):
        check_arguments("student", StudentFactory.__init__, locals(), self.ranges)
        if mixer not in MIXERS:
            raise InputError(f"student.mixer {mixer!r} is unknown: choose one of {', '.join(MIXERS)}")
        layers = softmax_layers if isinstance(softmax_layers, Iterable) else [None]
        if not all(isinstance(layer, Integral) and not isinstance(layer, bool) for layer in layers):
            raise InputError(f"student.softmax_layers {softmax_layers!r} is no list of layers: give their numbers, e.g. [3, 7]")
        if init == "scratch" and len(softmax_layers):
            raise InputError("student.init scratch keeps no attention of the teacher in student.softmax_layers: choose fresh")
        if backend == "fla" and not (use_fla("auto", torch.device("cuda")) and torch.cuda.is_available()):
            raise InputError("student.backend fla needs a GPU and fla-core: pip install -e '.[gpu]', or choose torch")
        if window is None and sinks is not None and mixer != "swa":
            raise InputError(f"student.sinks {sinks} without a window: give student.window, e.g. {WINDOW}, or choose mixer swa")
        if window is not None and mixer != "swa":
            if mixer == "softmax":
                raise InputError(f"student.window {window}: softmax attends to every token: leave it out, or choose mixer swa")
            if "k" not in MIXERS[mixer].copies:
                raise InputError(f"student.window {window}: {mixer} has no key projection for window attention: leave it out")
            if shape == "paper":
                raise InputError(f"student.window {window} needs heads like the teacher's: choose student.shape copyable")
        if retention != RETENTION and not MIXERS[mixer].decay_gate:
            raise InputError(f"student.retention {retention}: {mixer} has no decay gate, which it would start at: leave it out")
        paper = MIXERS[mixer].paper
        if shape == "paper":
            if kv_heads is not None:
                raise InputError(f"student.kv_heads {kv_heads} cannot be chosen with student.shape paper: leave it out")
            if init == "qkv" and not paper.fits:
                raise InputError(
                    f"student.shape paper: a {mixer} of that shape cannot take the teacher's projections, which student.init "
                    "qkv copies: choose init fresh, or shape copyable"
                )
            if rope and (paper.heads, paper.key) != (None, 1):
                raise InputError(
                    f"student.rope true needs keys as wide as the teacher's, unlike those of a {mixer} of student.shape paper: "
                    "leave rope out, or choose shape copyable"
                )
        self.mixer, self.init, self.shape, self.rope = mixer, init, shape, rope
        self.retention, self.backend = float(retention), backend  # numbers may be numpy's, which JSON cannot hold
        self.start_from = start_from
        self.window = int(window) if window else WINDOW if mixer == "swa" else None
        self.sinks = None if self.window is None else int(sinks or SINKS)
        self.softmax_layers = sorted(set(map(int, softmax_layers)))
        self.kv_heads = kv_heads or (paper if shape == "paper" else MIXERS[mixer]).kv_heads
        self.softmax_kv_heads = kv_heads or MIXERS["softmax"].kv_heads

    @cached_property
    def start(self) -> PreTrainedModel | None:
        """Return the student to go on from, loaded when it is first asked for. Raises InputError where there is none."""
        return None if self.start_from is None else load_start(self.start_from)

    def config(self, teacher: Teacher) -> StudentConfig:
        """Return the configuration of this factory's student of `teacher`. Raises InputError for layers or a window beyond."""
        base = teacher.config
        missing = [layer for layer in self.softmax_layers if not 0 <= layer < base.num_hidden_layers]
        if missing:
            raise InputError(
                f"student.softmax_layers {missing} do not exist: the teacher's layers are 0 to {base.num_hidden_layers - 1}"
            )
        for key, value in {"window": self.window, "sinks": self.sinks}.items():
            if value is not None and value > base.max_position_embeddings:  # time and memory would grow with it for nothing
                raise InputError(
                    f"student.{key} {value} is beyond the teacher's {base.max_position_embeddings} positions: lower it"
                )
        heads = base.num_attention_heads
        kv_counts = {"grouped": base.num_key_value_heads, "expanded": heads}
        teacher_json = base.to_diff_dict() | {"model_type": base.model_type}
        teacher_json.pop("dtype", None)  # the student's weights need not have the dtype of the teacher's
        return StudentConfig(
            teacher=teacher_json,
            mixer=self.mixer,
            softmax_layers=self.softmax_layers,
            shape=self.shape,
            rope=self.rope,
            retention=self.retention,
            window=self.window,
            sinks=self.sinks,
            backend=self.backend,
            hidden_size=base.hidden_size,
            num_hidden_layers=base.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_counts[self.kv_heads],
            softmax_kv_heads=kv_counts[self.softmax_kv_heads],
            rms_norm_eps=getattr(base, "rms_norm_eps", 1e-6),
            **attention_config(teacher.model.model.layers[0].self_attn),
            vocab_size=base.vocab_size,
            max_position_embeddings=base.max_position_embeddings,
            initializer_range=base.initializer_range,
            tie_word_embeddings=ties_embeddings(teacher.model) and self.shape == "copyable",
            bos_token_id=base.bos_token_id,
            eos_token_id=base.eos_token_id,
            pad_token_id=base.pad_token_id,
        )

    def build(self, teacher: Teacher, seed: int) -> Student:
        """Build a student of `teacher` with fp32 weights on the CPU; equal seeds draw equal weights.

        Prints which mixers are not those of `start_from`, and which of their settings differ. Raises InputError for a teacher
        that is not supported, see `check_teacher`, or no Teacher, and for a `start_from` that does not fit it.
        """
        if not isinstance(teacher, Teacher):
            raise InputError(f"build: teacher is a {type(teacher).__name__}: give a Teacher of this package, Teacher(path)")
        check_teacher(teacher)
        student = self.assemble(teacher, seed)
        if self.start is not None:
            if not isinstance(self.start, Student) and type(self.start) is not type(teacher.model):
                raise InputError(
                    f"student.start_from {self.start_from!r} is a {type(self.start).__name__}, no student of this package: "
                    "give the folder that it was exported from"
                )
            if anew := copy_student(self.start, student):
                layers = "all layers" if len(anew) == len(student.mixers) else f"layers {', '.join(map(str, anew))}"
                say(f"start    {self.start_from}, but for the mixers of {layers}, which are of another kind or size there")
            if isinstance(self.start, Student):
                pairs = [pair for pair in zip(self.start.mixers, student.mixers, strict=True) if type(pair[0]) is type(pair[1])]
                for key in ("rope", "window", "sinks"):
                    values = {(getattr(there, key), getattr(here, key)) for there, here in pairs}
                    for there, here in sorted(values - {(value, value) for value, _ in values}, key=str):
                        say(f"start    {self.start_from} has student.{key} {there}, this run {here}")
        return student

    def assemble(self, teacher: Teacher, seed: int) -> Student:
        """Build a student as `build` does, of a teacher that may not be supported."""
        with torch.device("meta"):  # drawing random numbers for weights that are then copied would take seconds
            student = Student(self.config(teacher))
        student.to_empty(device="cpu")
        student.tie_weights()
        if self.init != "scratch":
            tensors = student.state_dict(keep_vars=True)
            for name in copy_weights(teacher.model, student, attention=self.init == "qkv"):
                mark_as_loaded(tensors[name])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student.initialize_weights()
        return student

    @property
    def is_teacher(self) -> bool:
        """Return whether a student computes its teacher's logits before training."""
        return self.mixer == "softmax" and self.init == "qkv" and self.rope is not False and self.start_from is None


def load_start(path: str) -> PreTrainedModel:
    """Load the student of a run folder, or of a folder that a run exported. Raises InputError where there is none."""
    folder = Path(path, "student") if Path(path, "student").is_dir() else Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"student.start_from {path!r} is no finished run and no model folder: give either, or leave it out")
    return load_whole(str(folder))


def load_whole(folder: str) -> PreTrainedModel:
    """Load a causal language model in fp32 from a folder. Raises InputError where a file is damaged or a weight is missing."""
    try:
        return load_model(folder, f"the model in {folder}", "restore its files", dtype=torch.float32)
    except InputError:
        raise
    except Exception as error:  # transformers has no common error for missing or damaged files
        raise InputError(f"the model in {folder} cannot be loaded ({one_line(error)}): restore its files") from error


def attention_config(attention: Any) -> dict[str, Any]:
    """Describe a teacher's attention module in the keys of StudentConfig."""
    queries = getattr(attention, "qkv_proj", None) or attention.q_proj
    norm: Any = getattr(attention, "q_norm", None)
    size = 0 if getattr(norm, "weight", None) is None else len(norm.weight)
    return {
        "head_dim": attention.head_dim,
        "qkv_bias": queries.bias is not None,
        "o_bias": attention.o_proj.bias is not None,
        "qk_norm": size > 0,
        "qk_norm_joint": size > attention.head_dim,
        "qk_norm_offset": norm_offset(norm) if size else 0.0,
        "attention_scale": None if attention.scaling == attention.head_dim**-0.5 else attention.scaling,
    }


@torch.no_grad()
def norm_offset(norm: Any) -> float:
    """Return what an RMS norm adds to its weight: 1 for those of Gemma, whose output is not 0 if their weight is, else 0."""
    ones = torch.ones_like(norm.weight)
    return float(functional_call(norm, {"weight": 0 * ones}, ones).any())


def check_teacher(teacher: Teacher) -> None:
    """Raise InputError, naming the architecture, unless a softmax student computes what the teacher does.

    The teacher's weights must be finite, its modules must have the names of Llama's, and in fp32 a softmax student must agree
    with its own forward pass: in the logits, with eager attention, and layer by layer in what the stages align to. The
    comparison refuses layers without RoPE and soft-capped logits, for example. It takes a copy of the first layers, at least
    one of each kind, with other norm weights and biases, since one that is 1 or 0 could be left out unseen. A model that has
    passed is not compared again.
    """
    if teacher.model in CHECKED:
        return
    name = type(teacher.model).__name__
    for key, tensor in teacher.model.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"teacher {teacher.path!r}: its weight {key} is not finite everywhere: get the weights again")
    message = f"teacher {teacher.path!r} ({name}) is not a supported decoder"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reason = _obstacle(teacher.model) or _difference(shallow_copy(teacher))
    except Exception as error:  # architectures fail in ways of their own
        raise InputError(f"{message}: {one_line(error)}") from error
    if reason:
        raise InputError(f"{message}: {reason}")
    CHECKED.add(teacher.model)


def _obstacle(model: Any) -> str:
    """Say what in a model's structure no student can have; an empty string for nothing."""
    if bounds := [key for key in BOUNDS if getattr(model.config, key, None) is not None]:
        return f"its config.json sets {bounds[0]}, which a student does not compute"
    for module, parts in [(model, ["model", "lm_head"]), (getattr(model, "model", None), DECODER_PARTS)]:
        if missing := [part for part in parts if not hasattr(module, part)]:
            return f"it has no {', '.join(missing)}"
    for layer in model.model.layers:
        if not hasattr(layer, "self_attn"):
            return f"a layer has no self_attn, but {', '.join(name for name, _ in layer.named_children())}"
        wanted = ("qkv_proj", "o_proj") if hasattr(layer.self_attn, "qkv_proj") else ("q_proj", "k_proj", "v_proj", "o_proj")
        if missing := [part for part in wanted if not hasattr(layer.self_attn, part)]:
            return f"its attention has no {', '.join(missing)}"
    return ""


@torch.no_grad()
def _difference(teacher: Teacher) -> str:
    """Say where the teacher's own forward pass differs from a softmax student or `Teacher.layers`; empty if nowhere."""
    student = StudentFactory("softmax").assemble(teacher, seed=0).eval()
    tensors = teacher.model.state_dict()
    split_joint_projections(tensors, student.config)
    if left := sorted(tensors.keys() - student.state_dict().keys()):
        return f"a student has no place for {left[0]}"
    tokens = torch.arange(16)[None] % teacher.config.vocab_size
    errors: dict[str, float] = {}

    def compare(what: str, expected: Tensor, *others: Tensor) -> None:
        for other in others:
            size = ((other - expected).abs().max() / expected.abs().max()).item() if other.shape == expected.shape else math.inf
            errors[what] = size if math.isnan(size) else max(errors.get(what, 0.0), size)

    own_layers = teacher.own_layers(tokens)
    for own, layer, student_layer in zip(own_layers, teacher.layers(tokens), student.model.layers, strict=True):
        mixer = student_layer.self_attn
        q, k, _ = mixer.qkv(student_layer.input_layernorm(layer.input), layer.position)
        compare("attention scales", *(torch.tensor(scale) for scale in (own.scale, layer.scale, mixer.scale)))
        compare("queries", own.query, layer.query, q)
        compare("keys", own.key, layer.key, k)
        compare("layer outputs", own.output, layer.output, student_layer(layer.input, position_embeddings=layer.position))
    teacher.model.set_attn_implementation("eager")  # sdpa leaves out what it cannot do, such as soft caps
    logits = teacher.model(tokens, use_cache=False).logits
    compare("logits", logits, student(tokens, use_cache=False).logits, teacher.head(teacher.hidden_states(tokens)))
    for what, size in errors.items():
        if not size < TOLERANCE:  # also true of nan
            return f"its {what} and a softmax student's differ by {size:.2g} of the largest"
    return ""
