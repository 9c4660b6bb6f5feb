"""A small index of lm-eval's tasks, and one finished run of all three stages for the tests of evaluate and report."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_pl.measure import harness

INDEXED = ("arc", "babilong", "fda", "gsm8k", "hellaswag", "humaneval", "ifeval", "lambada", "mmlu/default", "piqa", "triviaqa",
           "winogrande")  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def small_task_index() -> Iterator[None]:
    """Index the tasks that tests name, a tag, a group and tasks made in code: indexing all of lm-eval takes ten seconds."""

    @functools.cache
    def task_manager():
        import lm_eval.tasks

        home = Path(lm_eval.tasks.__file__).parent
        return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[home / folder for folder in INDEXED])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_task_manager", task_manager)
        yield


@pytest.fixture(scope="session")
def run(fitted) -> Path:
    """Fit gla_qkv_mm_h2h on a tiny scale and return its run folder."""
    return fitted(**{"tokens": 1024, "matrix_mixing.tokens": 512, "hidden_align.tokens": 256, "trainer.log_every_n_steps": 1})
