"""Check the values of `distill-pl`'s keys before any work: each number within its range, each precision one that trains."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace

from distill_pl.errors import InputError
from distill_pl.stages import STAGES

PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16")
STRATEGIES = ("auto", "single_device", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false", "fsdp")


class Range(NamedTuple):
    """Say which numbers a key may have."""

    least: float
    most: float = math.inf
    above: bool = False  # whether `least` itself is too small

    def __contains__(self, number: object) -> bool:
        """Return whether a number is within the range; nan never is."""
        assert isinstance(number, int | float)
        return (self.least < number if self.above else self.least <= number) and number <= self.most

    def __str__(self) -> str:
        """Format the range as the remedy of an error message."""
        lower = f"more than {self.least:g}" if self.above else f"at least {self.least:g}"
        return f"{lower} and at most {self.most:g}" if self.most < math.inf else lower


SHARE = Range(0, 1)
POSITIVE = Range(0, most=1e6, above=True)  # far beyond all sense: what is larger makes numbers that are not finite
AT_LEAST_1 = Range(1, 1e15)  # steps and chunks are counted in 64 bits
SEED = Range(0, 2**32 - 1)  # what numpy takes
BUDGET = Range(0, 1e15)
RANGES = {
    "tokens": AT_LEAST_1,
    "seed": Range(-(2**63), 2**63),  # what torch takes
    "checkpoint_every": AT_LEAST_1,
    "validate_every": AT_LEAST_1,
    "data.sequence_length": Range(2),
    "data.batch_size": AT_LEAST_1,
    "data.micro_batch_size": AT_LEAST_1,
    "data.validation_tokens": AT_LEAST_1,
    "data.shuffle": SEED,
    "trainer.num_nodes": AT_LEAST_1,
    "trainer.log_every_n_steps": AT_LEAST_1,
    "trainer.limit_val_batches": Range(0, above=True),
    "matrix_mixing.probes": Range(1, 1e4),
    "matrix_mixing.decay": SHARE,
    "hidden_align.decay": SHARE,
    "kd.alpha": Range(0, 1e6),
    "kd.ce": Range(0, 1e6),
    "kd.temperature": Range(0.01, 100),  # beyond, rounding in fp32 is larger than the divergence, or it vanishes
    "kd.top_k": AT_LEAST_1,
    "kd.other_lr": Range(0, 1e6),
    "kd.decay": SHARE,
    "kd.final_lr": SHARE,
}
for stage in STAGES:
    RANGES |= {f"{stage}.tokens": BUDGET, f"{stage}.lr": POSITIVE, f"{stage}.warmup": SHARE,
               f"{stage}.weight_decay": Range(0, 1e6), f"{stage}.clip": Range(0, above=True)}  # fmt: skip


class KeysOnce(yaml.SafeLoader):
    """Read YAML, and refuse a mapping that has a key twice, of which others silently keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping. Raises YAMLError, naming key and line, for a key that comes again."""
        mapping = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in mapping.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value} comes twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return mapping


def check_numbers(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raise InputError, naming key, value and range, for the first number outside its range; None and text pass."""
    for key, allowed in ranges.items():
        value = values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value not in allowed:
            wrong = "no number" if value != value else "too large" if value > allowed.most else "too small"
            raise InputError(f"{key} {value} is {wrong}: give {allowed}")


def parse_lengths(lengths: str) -> list[int]:
    """Parse `1024,4096` into numbers in ascending order. Raises InputError for anything else."""
    parts = [part.strip() for part in lengths.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"lengths {lengths!r} are not whole positive numbers: write e.g. 1024,4096")
    numbers = sorted({int(part) for part in parts})
    check_numbers({"length": numbers[-1]}, {"length": AT_LEAST_1})
    return numbers


def check_values(config: Namespace) -> None:
    """Raise InputError for a value of `distill-pl fit` that no run can use, before anything is read or written."""
    check_numbers({key: config.get(key) for key in RANGES}, RANGES)
    precision = config.trainer.precision
    if precision is not None and str(precision) not in PRECISIONS:
        raise InputError(
            f"trainer.precision {precision} is not supported: weights and Adam stay fp32 and gradients are not scaled; choose "
            "32-true or bf16-mixed"
        )
    if config.trainer.strategy not in STRATEGIES:  # others train in processes whose result is lost, or save other checkpoints
        raise InputError(f"trainer.strategy {config.trainer.strategy} is not supported: choose one of {', '.join(STRATEGIES)}")


def check_places(config: Namespace) -> None:
    """Raise InputError where the run or its cache would be in the folder of the text: a second start would read it as text."""
    text = Path(os.path.realpath(config.data.dataset))
    for key in ("out", "data.cache"):
        place = Path(os.path.realpath(os.path.expanduser(config[key])))
        inside = text.is_dir() and place.is_relative_to(text)
        if inside and not any(part.startswith(".") for part in place.relative_to(text).parts):  # what is hidden is not read
            raise InputError(
                f"{key} {config[key]!r} is inside data.dataset {config.data.dataset!r}, whose files are read as text: choose "
                f"another {key}"
            )


def check_validation(config: Namespace, batches: int) -> None:
    """Raise InputError where `trainer.limit_val_batches` leaves none of a rank's `batches` of held-out text."""
    limit = config.trainer.limit_val_batches
    if isinstance(limit, float) and int(batches * limit) < 1:
        raise InputError(
            f"trainer.limit_val_batches {limit} leaves none of the {batches} batches of held-out text: give a number of "
            f"batches, or a share of at least {1 / batches:.2g}"
        )
