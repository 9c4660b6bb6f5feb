"""`distill-pl params`: Appendix A of the paper, its parameter counts beside ours."""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill_pl.console import aligned, say
from distill_pl.measure import study
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student


def smollm_360m() -> Any:
    """What a StudentFactory reads of the study's teacher, its weights on the meta device: nothing is downloaded."""
    config = LlamaConfig(
        hidden_size=960, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5, head_dim=64,
        intermediate_size=2560, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        return SimpleNamespace(config=config, model=LlamaForCausalLM(config))


def count(factory: StudentFactory, teacher: Any) -> int:
    """Parameters of the student that a factory makes of a teacher."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Student(factory.config(teacher)).parameters())


def appendix_a() -> list[list[str]]:
    """Table 4 as rows of cells, a header first: the paper's count, ours in either `student.shape`."""
    teacher = smollm_360m()
    rows = [["million parameters", "paper", "shape paper", "difference", "shape copyable"]]
    for mixer, published in study.APPENDIX_A.items():
        ours = [count(StudentFactory(mixer, "fresh", shape), teacher) / 1e6 for shape in ("paper", "copyable")]
        rows.append([mixer, str(published), f"{ours[0]:.2f}", f"{ours[0] - published:+.2f}", f"{ours[1]:.2f}"])
    return rows


def params() -> None:
    """Print Appendix A of the paper: how many parameters SmolLM-360M's students have, in either `student.shape`."""
    say(aligned(appendix_a()))
    say("Shape paper has a head of its own, 47.19M, where copyable ties it to the embeddings, as SmolLM-360M does (the 350).")
