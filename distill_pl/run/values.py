"""Check the values of `distill-pl`'s keys and the places that it writes to, before any work; read YAML with each key once."""

import importlib.util
import os
from fnmatch import fnmatch
from glob import escape, has_magic
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.errors import AT_LEAST_1, InputError, Range, check_numbers
from distill_pl.stages import STAGES
from distill_pl.student.factory import StudentFactory

PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16")
STRATEGIES = ("auto", "single_device", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false", "fsdp")


BUDGET = Range(0, 1e15)
RANGES = {
    "tokens": AT_LEAST_1,
    "seed": Range(-(2**63), 2**63),  # what torch takes
    "checkpoint_every": AT_LEAST_1,
    "validate_every": AT_LEAST_1,
    "data.validation_tokens": AT_LEAST_1,
    "trainer.num_nodes": AT_LEAST_1,
    "trainer.log_every_n_steps": AT_LEAST_1,
    "trainer.limit_val_batches": Range(0, above=True),
} | {f"{stage}.tokens": BUDGET for stage in STAGES}


class KeysOnce(yaml.SafeLoader):
    """Read YAML, and refuse a mapping that has a key twice, as in kd.lr and kd: {lr: ..} too, of which others keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping. Raises YAMLError, naming key and line, for a key that comes again."""
        mapping = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in mapping.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value} comes twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        for key, _ in mapping.value:
            if any(other.startswith(f"{key.value}.") for other in seen):
                problem = f"keys of {key.value} come twice, with a dot and below it"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return mapping


def parse_lengths(lengths: str) -> list[int]:
    """Parse `1024,4096` into numbers in ascending order. Raises InputError for anything else."""
    parts = [part.strip() for part in lengths.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"lengths {lengths!r} are not whole positive numbers: write e.g. 1024,4096")
    numbers = sorted({int(part) for part in parts})
    check_numbers({"length": numbers[-1]}, {"length": Range(1, 1e7)})
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
    if "wandb" in (config.trainer.logger or []) and importlib.util.find_spec("wandb") is None:
        raise InputError("trainer.logger wandb needs the wandb package: pip install wandb, or leave it out")
    StudentFactory(**config.student)
    ChunkDataModule(**config.data)
    for name, stage in STAGES.items():
        stage(None, None, **config[name])  # type: ignore[arg-type]
    check_places(config)


def check_places(config: Namespace) -> None:
    """Raise InputError where the run or its cache would be among the text's files: a second start would read it as text."""
    for key in ("out", "data.cache"):
        if is_among(config.data.dataset, os.path.realpath(os.path.expanduser(config[key]))):
            raise InputError(
                f"{key} {config[key]!r} is inside data.dataset {config.data.dataset!r}, whose files are read as text: choose "
                f"another {key}"
            )


def is_among(dataset: str, place: str) -> bool:
    """Return whether files below the folder `place` would belong to a dataset, which may be a folder or a glob."""
    text = os.path.realpath(dataset)
    pattern, names = Path(escape(text), "**").parts if os.path.isdir(text) else Path(text).parts, Path(place).parts
    for index, (name, part) in enumerate(zip(names, pattern, strict=False)):
        if part == "**":
            return not any(rest.startswith(".") for rest in names[index:])  # what is hidden is not read
        if not fnmatch(name, part) or (name.startswith(".") and not part.startswith(".")):
            return False
    return has_magic("".join(pattern[len(names) : len(names) + 1]))


def check_validation(config: Namespace, batches: int) -> None:
    """Raise InputError where `trainer.limit_val_batches` leaves none of a rank's `batches` of held-out text."""
    limit = config.trainer.limit_val_batches
    if isinstance(limit, float) and int(batches * limit) < 1:
        raise InputError(
            f"trainer.limit_val_batches {limit} leaves none of the {batches} batches of held-out text: give a number of "
            f"batches, or a share of at least {1 / batches:.2g}"
        )
