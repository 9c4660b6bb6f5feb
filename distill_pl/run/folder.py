"""The run folder: the only state of a run. What is in it says what is done, begun, or yet to do.

    out/config.yaml
    out/1_matrix_mixing/   last.ckpt while it runs; student.safetensors when it is done
    out/2_hidden_align/    ...
    out/3_kd/              ...
    out/student/           the Hugging Face folder

Every file is written aside and renamed, so a kill at any moment leaves the old one or the new one, whole.
"""

import contextlib
import json
import os
import platform
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from shutil import disk_usage
from typing import Any, NamedTuple

import torch
import yaml
from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel

from distill_pl.errors import InputError
from distill_pl.student.modeling import Student
from distill_pl.tokens import Tokens

# keys that may differ between a run's start and its resumption: they change where and how visibly it runs, not its result
FREE = {"out", "data.cache", "data.micro_batch_size", "student.backend", "compile", "checkpoint_every", "validate_every"}
LOCK, HOLDER = ".lock", ".locked_by"
BEGINNING = {LOCK, HOLDER, "config.yaml.new"}  # there before config.yaml is, which makes a folder a run's
BOUND_TRAINER_KEYS = {"trainer.precision", "trainer.limit_val_batches"}


class Leg(NamedTuple):
    """One stage of a run: where it lives, and which chunks it consumes."""

    name: str
    folder: Path
    first: int  # chunk
    steps: int

    @property
    def weights(self) -> Path:
        """The student as this stage left it; there when the stage is done."""
        return self.folder / "student.safetensors"

    @property
    def checkpoint(self) -> Path:
        """Lightning's checkpoint, there while the stage runs."""
        return self.folder / "last.ckpt"


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file next to `path`, then put it in its place. Raises InputError where the disk refuses."""
    aside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        aside.unlink(missing_ok=True)
        home = next(folder for folder in path.absolute().parents if folder.exists())
        raise InputError(
            f"cannot write {path} ({str(error).splitlines()[0]}; {disk_usage(home).free / 1e6:.0f} MB are free there): free "
            "some space or permit it; "
            "what was there before is intact, run the same command again to go on"
        ) from error


class AsideCheckpointIO(TorchCheckpointIO):
    """Lightning's own writes through the system's temporary folder, from where a move can be cut short."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Write the checkpoint aside, then rename it."""
        write_aside(Path(path), lambda aside: torch.save(checkpoint, aside))


def plain(config: Namespace | dict) -> dict[str, Any]:
    """A configuration as nested dicts of what YAML can hold; it reads back as `--config`."""

    def value(x: Any) -> Any:
        if isinstance(x, dict):
            return plain(x)
        return str(x) if isinstance(x, Tokens | Path) else list(x) if isinstance(x, tuple) else x

    return {key: value(x) for key, x in (config.as_dict() if isinstance(config, Namespace) else config).items()}


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys in which two configurations differ and that a result depends on."""
    before, now = flat(before), flat(now)
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return [key for key in keys if key in BOUND_TRAINER_KEYS or not (key in FREE or key.startswith("trainer."))]


def check_run_folder(config: Namespace) -> None:
    """Raise InputError unless `out` is new or belongs to this very configuration, and can be written to."""
    out = Path(config.out)
    home = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise InputError(f"out {str(out)!r} cannot be written: {home} is no folder or not permitted; choose another out")
    saved = out / "config.yaml"
    if not saved.is_file():
        if out.exists() and any(path.name not in BEGINNING for path in out.iterdir()):
            raise InputError(f"out {str(out)!r} exists and is no run folder (no config.yaml in it): choose another out")
        return
    before, now = read_config(out), plain(config)
    keys = differing(before, now)
    if keys:
        before, now = flat(before), flat(now)
        changes = ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in keys)
        raise InputError(f"out {str(out)!r} belongs to another configuration ({changes}): undo that, or choose another out")


@contextlib.contextmanager
def sole_user(out: Path, rank: int) -> Iterator[None]:
    """Hold the run folder for the run whose rank 0 this is; the system lets go of it when the process dies.

    Raises InputError if another run holds it, naming its process.
    """
    if rank:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(out / LOCK), out / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = note.read_text() if note.is_file() else "another process"
        raise InputError(f"out {str(out)!r} is in use by {holder}: wait for it, stop it, or choose another out") from None
    try:
        note.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


@rank_zero_only
def write_config(config: Namespace) -> None:
    """Record the whole configuration, every default included, when a run begins."""
    if (Path(config.out) / "config.yaml").is_file():
        return
    text = yaml.safe_dump(plain(config), sort_keys=False)
    write_aside(Path(config.out) / "config.yaml", lambda aside: aside.write_text(text))


def read_config(out: Path) -> dict[str, Any]:
    """The configuration a run was made with, nested. Raises InputError where that is not plain YAML."""
    file = out / "config.yaml"
    try:
        return yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())[:160]
        raise InputError(f"{file} is damaged or no plain YAML ({text}): mend it, or choose another folder") from error


def check_leg(leg: Leg) -> None:
    """Raise InputError, naming the file and what to delete, where weights were cut short or a checkpoint was damaged."""
    if leg.weights.is_file():
        read_metrics(leg.weights)
    elif leg.checkpoint.is_file():
        try:
            with zipfile.ZipFile(leg.checkpoint) as records:
                wrong = records.testzip()  # torch.load does not look at the checksums that torch.save writes
            if wrong:
                raise ValueError(f"checksum of {wrong}")
            torch.load(leg.checkpoint, mmap=True, weights_only=True, map_location="cpu")
        except Exception as error:  # pickle, zip and torch each have their own for a file cut short
            raise InputError(f"{leg.checkpoint} is damaged: delete it, and {leg.name} starts over") from error


@rank_zero_only
def save_student(student: Student, leg: Leg, metrics: dict[str, float]) -> None:
    """The student as a finished stage leaves it, with its held-out losses in nats a token; then drop the checkpoint."""
    note = {"metrics": json.dumps(metrics), "sha256": fingerprint(student)}
    write_aside(leg.weights, lambda aside: save_model(student, str(aside), metadata=note))
    leg.checkpoint.unlink(missing_ok=True)


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of a model's weights, as they are in memory."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_metrics(weights: Path) -> dict[str, float]:
    """The held-out losses that a finished stage ended with. Raises InputError for a damaged file."""
    try:
        with safe_open(weights, framework="pt") as file:
            return json.loads(file.metadata()["metrics"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged(weights, error) from error


def load_student(student: Student, leg: Leg) -> None:
    """The weights that a finished stage left, every tensor of them. Raises InputError where they are not what it left."""
    load_model(student, str(leg.weights), strict=True)
    with safe_open(leg.weights, framework="pt") as file:
        if file.metadata()["sha256"] != fingerprint(student):
            raise damaged(leg.weights, "its checksum is off")


def damaged(weights: Path, why: object) -> InputError:
    """What to do about a stage's weights."""
    return InputError(f"{weights} is damaged ({why}): delete {weights.parent} and the stage folders after it, then run again")
