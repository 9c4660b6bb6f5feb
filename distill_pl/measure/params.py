"""`distill-pl params`: count the parameters of SmolLM-360M's students, beside the paper's Appendix A."""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill_pl.console import aligned, say
from distill_pl.measure import paper
from distill_pl.mixers import MIXERS
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student


def smollm_360m() -> Any:
    """Build what a StudentFactory reads of the paper's teacher, with weights on the meta device: nothing is downloaded."""
    config = LlamaConfig(
        hidden_size=960, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5, head_dim=64,
        intermediate_size=2560, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        return SimpleNamespace(config=config, model=LlamaForCausalLM(config))


def count(factory: StudentFactory, teacher: Any) -> int:
    """Count the parameters of the student that a factory makes from a teacher, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Student(factory.config(teacher)).parameters())


def appendix_a() -> list[list[str]]:
    """Build Appendix A's table, a row of cells for each mixer after the header; mixers beyond the paper have no paper count."""
    teacher = smollm_360m()
    rows = [["million parameters", "paper", "shape paper", "difference", "shape copyable"]]
    for mixer in MIXERS:
        own, copyable = (count(StudentFactory(mixer, "fresh", shape), teacher) / 1e6 for shape in ("paper", "copyable"))
        published = paper.APPENDIX_A.get(mixer)
        beside = ("", "") if published is None else (str(published), f"{own - published:+.2f}")
        rows.append([mixer, beside[0], f"{own:.2f}", beside[1], f"{copyable:.2f}"])
    return rows


def params() -> None:
    """Print the parameter counts of SmolLM-360M's students in both values of `student.shape`, beside the paper's Appendix A."""
    say(aligned(appendix_a()))
    say("Shape paper adds a head of 47.19M; shape copyable ties the head to the embeddings, as SmolLM-360M does (the 350).")
