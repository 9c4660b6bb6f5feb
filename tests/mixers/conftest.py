"""Fixtures: students whose mixers a test looks at one by one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill_pl.mixers import SequenceMixer
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student


@pytest.fixture(scope="module")
def fresh(teacher) -> Callable[..., Student]:
    """Return `fresh(name, **options)`: a student with all of attention new. Tests share it and must not change it."""
    built: dict[str, Student] = {}

    def build(name: str, **options) -> Student:
        key = f"{name} {sorted(options.items())}"
        if key not in built:
            built[key] = StudentFactory(name, init="fresh", **options).build(teacher, seed=0).eval().requires_grad_(False)
        return built[key]

    return build


@pytest.fixture
def trained(teacher) -> Callable[..., tuple[SequenceMixer, Tensor, tuple[Tensor, Tensor]]]:
    """Return `trained(name, **options)`: a mixer with no weight at its start value, a hidden state for it, RoPE's tables."""

    def build(name: str, **options) -> tuple[SequenceMixer, Tensor, tuple[Tensor, Tensor]]:
        # at seed 0, rounding alone is 1.5e-5 of mLSTM's output
        student = StudentFactory(name, **options).build(teacher, seed=3).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        for parameter in student.mixers[1].parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        hidden = torch.randn(2, 70, teacher.config.hidden_size, generator=generator)
        return student.mixers[1], hidden, student.position(hidden)

    return build
