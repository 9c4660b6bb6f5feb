"""From a teacher to an initialised student (the paper's Table 1 and section 3.1)."""

from collections.abc import Sequence
from typing import Literal

import torch

from distill_pl.errors import InputError
from distill_pl.mixers import MIXERS
from distill_pl.ops import Backend, use_fla
from distill_pl.student.modeling import DECODER_PARTS, Student, StudentConfig
from distill_pl.student.transfer import copy_weights
from distill_pl.teacher import Teacher


class StudentFactory:
    """The student: what stands in place of the teacher's attention, and what it starts from.

    Args:
        mixer: the sequence mixer, one of the paper's Table 1: softmax, mlstm (xLSTM), gla, hgrn2, retnet, mamba2, metala,
            delta_net, rebased, hedgehog.
        init: `qkv`: embeddings, norms, MLPs and head are the teacher's, and of attention the projections (q, k, v, output)
            that the mixer can take; `fresh`: the same with all of attention new; `scratch`: nothing is the teacher's.
        shape: `copyable`: heads like the teacher's, so that a mixer can take its projections; `paper`: the sizes behind the
            paper's Appendix A (`distill-pl params`), with a head that is not tied to the embeddings.
        kv_heads: `grouped`: as few k and v heads as the teacher has, each serving several query heads; `expanded`: one for
            every query head, started as copies. Default: grouped for softmax, expanded for all others; shape paper has
            its own.
        rope: whether the teacher's RoPE turns q and k. Default: where the mixer's original has it, softmax and retnet.
        softmax_layers: layers, counted from 0, that keep the teacher's attention: a hybrid, whose state grows again.
        retention: share of the state that a fresh decay gate keeps from token to token (section 3.1).
        backend: what runs the mixing: fla's Triton kernels, torch alone, or (auto) fla on a GPU that has it.
    """

    def __init__(
        self,
        mixer: str = "gla",
        init: Literal["qkv", "fresh", "scratch"] = "qkv",
        shape: Literal["copyable", "paper"] = "copyable",
        kv_heads: Literal["grouped", "expanded"] | None = None,
        rope: bool | None = None,
        softmax_layers: Sequence[int] = (),
        retention: float = 0.982,
        backend: Backend = "auto",
    ):
        if mixer not in MIXERS:
            raise InputError(f"student.mixer {mixer!r} is unknown: choose one of {', '.join(MIXERS)}")
        if not 0 < retention < 1:
            raise InputError(f"student.retention {retention} must lie between 0 and 1, e.g. 0.982")
        if backend == "fla" and not (use_fla("auto", torch.device("cuda")) and torch.cuda.is_available()):
            raise InputError("student.backend fla needs a GPU and fla-core: pip install distill_pl[gpu], or choose torch")
        paper = MIXERS[mixer].paper
        if shape == "paper":
            if kv_heads is not None:
                raise InputError(f"student.kv_heads {kv_heads} cannot be chosen in shape paper: leave it out")
            if init == "qkv" and not paper.fits:
                raise InputError(
                    f"student.shape paper: a {mixer} of that shape cannot take the teacher's projections, as student.init qkv "
                    "would have it: choose init fresh, or shape copyable"
                )
            if rope and (paper.heads, paper.key) != (None, 1):
                raise InputError(
                    f"student.rope true needs keys as wide as the teacher's, which a {mixer} of student.shape paper has not: "
                    "leave rope out, or choose shape copyable"
                )
        self.mixer, self.init, self.shape, self.rope = mixer, init, shape, rope
        self.retention, self.backend = retention, backend
        self.softmax_layers = sorted(set(softmax_layers))
        self.kv_heads = kv_heads or (paper if shape == "paper" else MIXERS[mixer]).kv_heads

    def config(self, teacher: Teacher) -> StudentConfig:
        """The student's configuration, its heads shaped like the teacher's."""
        base = teacher.config
        beyond = [layer for layer in self.softmax_layers if not 0 <= layer < base.num_hidden_layers]
        if beyond:
            raise InputError(
                f"student.softmax_layers {beyond} do not exist: the teacher's are 0 to {base.num_hidden_layers - 1}"
            )
        attention = teacher.model.model.layers[0].self_attn
        heads = base.num_attention_heads
        own = base.to_diff_dict() | {"model_type": base.model_type}
        own.pop("dtype", None)  # of the teacher's weights; the student's are its own affair
        return StudentConfig(
            teacher=own,
            mixer=self.mixer,
            softmax_layers=self.softmax_layers,
            shape=self.shape,
            rope=self.rope,
            retention=self.retention,
            backend=self.backend,
            hidden_size=base.hidden_size,
            num_hidden_layers=base.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads if self.kv_heads == "expanded" else base.num_key_value_heads,
            head_dim=attention.head_dim,
            rms_norm_eps=base.rms_norm_eps,
            qkv_bias=attention.q_proj.bias is not None,
            o_bias=attention.o_proj.bias is not None,
            qk_norm=hasattr(attention, "q_norm"),
            vocab_size=base.vocab_size,
            max_position_embeddings=base.max_position_embeddings,
            initializer_range=base.initializer_range,
            tie_word_embeddings=base.tie_word_embeddings and self.shape == "copyable",
            bos_token_id=base.bos_token_id,
            eos_token_id=base.eos_token_id,
            pad_token_id=base.pad_token_id,
        )

    def build(self, teacher: Teacher, seed: int) -> Student:
        """A student in fp32 on the CPU, the same for the same seed."""
        with torch.device("meta"):  # random numbers for what is copied anyway would take seconds
            student = Student(self.config(teacher))
        student.to_empty(device="cpu")
        student.tie_weights()
        if self.init != "scratch":
            for name in copy_weights(teacher.model, student, attention=self.init == "qkv"):
                setattr(student.get_parameter(name), "_is_hf_initialized", True)  # noqa: B010 (transformers' mark: it stays)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student.initialize_weights()
        return student

    @property
    def is_teacher(self) -> bool:
        """Whether a student fresh from this factory computes what its teacher does."""
        return self.mixer == "softmax" and self.init == "qkv" and self.rope is not False


def check_teacher(teacher: Teacher) -> None:
    """Raise InputError, naming the architecture, unless the teacher is built like Llama.

    First its parts must have Llama's names; then the proof: the softmax student on the teacher's own tensors must give
    the teacher's logits. That refuses what differs elsewhere (scaled embeddings, layers without RoPE, soft-capped logits).
    """
    name = type(teacher.model).__name__
    refusal = f"teacher {teacher.path!r} ({name}) is not a supported decoder: its layers are not built like Llama's"
    for module, parts in [
        (teacher.model, ["model", "lm_head"]),
        (getattr(teacher.model, "model", None), DECODER_PARTS),
    ]:
        missing = [part for part in parts if not hasattr(module, part)]
        if missing:
            raise InputError(f"{refusal} (no {', '.join(missing)})")
    layer = teacher.model.model.layers[0]
    parts = ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"]
    if sorted(n for n, _ in layer.named_children()) != sorted(parts):
        raise InputError(f"{refusal} (parts {', '.join(n for n, _ in layer.named_children())})")
    missing = [part for part in ("q_proj", "k_proj", "v_proj", "o_proj") if not hasattr(layer.self_attn, part)]
    if missing:
        raise InputError(f"{refusal} (attention without {', '.join(missing)})")

    try:
        with torch.device("meta"):
            student = Student(StudentFactory("softmax").config(teacher))
        student.load_state_dict(teacher.model.state_dict(), assign=True)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{refusal} ({' '.join(str(error).split())[:160]})") from error
    student.model.rotary_emb = teacher.model.model.rotary_emb  # its tables are no part of the state
    tokens = torch.arange(16, device=teacher.model.device)[None] % teacher.config.vocab_size
    with torch.no_grad():
        expected = teacher.model(tokens, use_cache=False).logits.float()
        off = (student.eval()(tokens, use_cache=False).logits.float() - expected).abs().max() / expected.abs().max()
    if not off < (1e-3 if teacher.model.dtype == torch.float32 else 5e-2):
        raise InputError(f"{refusal} (the softmax student's logits are off by {off:.2g} of the largest)")
