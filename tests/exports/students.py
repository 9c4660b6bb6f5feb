"""Students as tests of exports need them."""

from pathlib import Path

import torch

from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student
from distill_pl.teacher import Teacher


@torch.no_grad()
def trained(teacher: Teacher, mixer: str, **options) -> Student:
    """Build a student all of whose weights differ from their start values, as if it had been trained."""
    student = StudentFactory(mixer, **options).build(teacher, 0).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in student.named_parameters():
        if ".self_attn." in name or parameter.ndim == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return student


def save(student: Student, folder: Path, tokenizer) -> Path:
    """Write a student and a tokenizer as `distill-pl fit` does, without a card."""
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
