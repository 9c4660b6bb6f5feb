"""Functions and constants that several test files use; fixtures are in shared_fixtures.py."""

import io
import multiprocessing
import os
import signal
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill_pl.cli import main
from distill_pl.teacher import Teacher

STEP = 4 * 32  # tokens of one step of `fit_command`
STAGE_FOLDERS = ["1_matrix_mixing", "2_hidden_align", "3_kd"]

# A child of the fork server starts in milliseconds with these modules imported. Those after the first are imported late in a
# run, which without this took a child longer than its steps.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload([
    "distill_pl.cli", "datasets", "datasets.packaged_modules", "pandas", "scipy.io", "torch.utils.tensorboard",
    "tensorboard.compat.tensorflow_stub", "transformers.models.llama.modeling_llama", "torch.profiler._cupti_monitor",
])  # fmt: skip


def some_tokens(teacher: Teacher, rows: int = 2, length: int = 20, seed: int = 5) -> Tensor:
    """Draw token ids [rows, length] from the teacher's vocabulary, without id 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, teacher.config.vocab_size, (rows, length), generator=generator)


def fit_command(out: Path, teacher: Path, corpus: Path, cache: Path, /, **keys) -> list[str]:
    """Return the arguments of a `distill-pl fit` on the CPU with steps of STEP tokens; `keys` override or add keys."""
    defaults = {
        "out": out, "teacher": teacher, "data.dataset": corpus, "data.cache": cache, "data.sequence_length": 32,
        "data.batch_size": 4, "data.validation_tokens": 256, "trainer.accelerator": "cpu",
    }  # fmt: skip
    return ["fit", *(f"--{key}={value}" for key, value in (defaults | keys).items())]


def refused(*args: str | Path, code: int = 2) -> str:
    """Run `distill-pl` with `args`, which must end with exit code `code` and one line on stderr, and return that line."""
    with redirect_stderr(io.StringIO()) as error, pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in args])
    assert exit.value.code == code
    lines = [line for line in error.getvalue().strip().splitlines() if not line.startswith("chunks: ")]  # a progress line
    assert len(lines) == 1, lines
    return lines[0]


def die_at_replace(number: int, before: bool = False) -> None:
    """Make this process kill itself right after, or right before, it puts its `number`-th file in place by `os.replace`."""
    replace, count = os.replace, 0

    def counting_replace(*names):
        nonlocal count
        count += 1
        if before and count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counting_replace
