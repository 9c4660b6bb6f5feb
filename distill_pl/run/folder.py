"""Read and write the run folder, the only state of a run: its files say which stages are done, begun, or yet to do.

    out/fingerprints.json  hashes of teacher, tokenizer, text and start, of each of which a run has one; how much text was read
    out/config.yaml
    out/1_matrix_mixing/   last.ckpt while it runs; student.safetensors when it is done
    out/2_hidden_align/    ...
    out/3_kd/              ...
    out/student/           the Hugging Face folder

Every file is written beside its place and renamed, so a kill at any moment leaves either the old file or the new one, whole.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from transformers import AutoConfig, PreTrainedModel

from distill_pl.console import is_first_rank
from distill_pl.data.datamodule import seed_of_order
from distill_pl.data.sources import TextSource
from distill_pl.errors import InputError, first_line, one_line
from distill_pl.student.modeling import Student
from distill_pl.teacher import Teacher
from distill_pl.tokens import Tokens

# keys that may change between a run's start and its resumption: where and how visibly it runs, not what comes out
CHANGEABLE_KEYS = {
    "out", "data.cache", "data.micro_batch_size", "student.backend", "compile", "checkpoint_every", "validate_every",
}  # fmt: skip
# keys of data that say what is read, and in which order
WHAT_IS_READ = ("dataset", "name", "revision", "text_column", "validation_tokens", "shuffle", "skip_bad_rows")
LOCK, HOLDER = ".lock", ".locked_by"
FINGERPRINTS = "fingerprints.json"
# of config.yaml: keys that other commands read, and their kinds
CONFIG_KINDS: dict[str, Any] = {
    "teacher": str, "student": dict, "student.init": str, "kd": dict, "data": dict, "data.dataset": str,
    "data.sequence_length": int, "data.validation_tokens": (str, int),
}  # fmt: skip
# files of a run folder that appear before config.yaml does
BEFORE_CONFIG = {LOCK, HOLDER, FINGERPRINTS, f"{FINGERPRINTS}.new", "config.yaml.new"}
FIXED_TRAINER_KEYS = {"trainer.precision", "trainer.limit_val_batches"}  # all other trainer keys may change


class StageRun(NamedTuple):
    """Say where a stage of a run keeps its files, and which chunks of the text it consumes."""

    name: str
    folder: Path
    first: int  # number of its first chunk
    steps: int  # optimizer steps

    @property
    def weights(self) -> Path:
        """Return the file of the student's weights after this stage; it exists once the stage is done."""
        return self.folder / "student.safetensors"

    @property
    def checkpoint(self) -> Path:
        """Return the file of Lightning's checkpoint; it exists while the stage runs."""
        return self.folder / "last.ckpt"


@contextlib.contextmanager
def disk_refused(path: Path) -> Iterator[None]:
    """Turn errors of writing `path`, as on a full or read-only disk, into an InputError that says how much space is free."""
    try:
        yield
    except Exception as error:
        # torch and safetensors raise their own errors on a full disk, tokenizers one without a type
        if not isinstance(error, OSError | RuntimeError | SafetensorError) and type(error) is not Exception:
            raise
        home = existing_folder(path.parent)
        raise InputError(
            f"cannot write {path} ({first_line(error)}; {disk_usage(home).free / 1e6:.0f} MB are free there): free "
            "some space or permit writing; what was there before is intact, run the same command again to go on"
        ) from error


def existing_folder(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`. Raises InputError where the disk refuses."""
    aside = path.with_name(path.name + ".new")
    with disk_refused(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(aside)
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        except (OSError, RuntimeError, SafetensorError):
            aside.unlink(missing_ok=True)
            raise


def plain(config: Namespace | dict) -> dict[str, Any]:
    """Convert a configuration to nested dicts of what YAML can hold, which `--config` reads back."""

    def value(x: Any) -> Any:
        if isinstance(x, dict):
            return plain(x)
        return str(x) if isinstance(x, Tokens | Path) else list(x) if isinstance(x, tuple) else x

    return {key: value(x) for key, x in (config.as_dict() if isinstance(config, Namespace) else config).items()}


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one dict with dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def alike(before: Any, now: Any) -> bool:
    """Return whether two values of a key are equal or name one file or folder: completion adds a slash to a folder's name."""
    both_text = isinstance(before, str) and isinstance(now, str)
    return before == now or (both_text and os.path.exists(now) and os.path.realpath(before) == os.path.realpath(now))


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the dotted keys in which two configurations differ and that the result of a run depends on."""
    before, now = flat(before), flat(now)
    keys = [key for key in sorted(before.keys() | now.keys()) if not alike(before.get(key), now.get(key))]
    return [key for key in keys if key in FIXED_TRAINER_KEYS or not (key in CHANGEABLE_KEYS or key.startswith("trainer."))]


def check_run_folder(config: Namespace) -> None:
    """Raise InputError unless `out` can be written to and is new or was begun with this configuration."""
    out = Path(config.out)
    home = existing_folder(out)
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise InputError(f"out {str(out)!r} cannot be written: {home} is no folder or not permitted; choose another out")
    if out.is_symlink() and not out.exists():
        raise InputError(f"out {str(out)!r} is a link to nothing: make the folder that it leads to, or choose another out")
    saved = out / "config.yaml"
    if not saved.is_file():
        if out.exists() and any(path.name not in BEFORE_CONFIG for path in out.iterdir()):
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
    """Lock the run folder on rank 0 for the time of a run; the operating system unlocks it when the process dies.

    Raises InputError, naming the process, if another run holds the folder.
    """
    if rank:
        yield
        return
    with disk_refused(out):
        out.mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(out / LOCK), out / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = note.read_text() if note.is_file() else "another process"
        raise InputError(f"out {str(out)!r} is in use by {holder}: wait for it, stop it, or choose another out") from None
    try:
        with disk_refused(note):
            note.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def write_config(config: Namespace) -> None:
    """Record the whole configuration, every default included, when a run begins; on rank 0."""
    if not is_first_rank() or (Path(config.out) / "config.yaml").is_file():
        return
    text = yaml.safe_dump(plain(config), sort_keys=False)
    write_aside(Path(config.out) / "config.yaml", lambda aside: aside.write_text(text))


def read_config(out: Path) -> dict[str, Any]:
    """Read the configuration of a run folder as nested dicts. Raises InputError where the file is not one that `fit` wrote."""
    file = out / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged or no YAML ({one_line(error)}): mend it, or choose another folder") from error
    found = config | flat(config) if isinstance(config, dict) else {}
    if wrong := [key for key, kind in CONFIG_KINDS.items() if not isinstance(found.get(key), kind)]:
        value = found.get(wrong[0])
        raise InputError(
            f"{file} is damaged or not of distill-pl fit ({wrong[0]} is {value!r}): mend it, or choose another folder"
        )
    return config


def teacher_of(out: Path) -> str:
    """Return the teacher of a run. Raises InputError for a folder that is no longer there, and for no id of the hub either."""
    teacher = read_config(out)["teacher"]
    try:
        if not Path(teacher, "config.json").is_file():
            if teacher.startswith((".", "/")):
                raise OSError("no such folder")
            AutoConfig.from_pretrained(teacher, trust_remote_code=False)
    except OSError as error:
        raise InputError(
            f"{out} was distilled from {teacher!r}, where no model is, seen from the current folder "
            f"({first_line(error)}): put it back, or write its new place into {out / 'config.yaml'}"
        ) from error
    return teacher


def next_stage(stages: list[StageRun]) -> int:
    """Return the index of the stage to run next: the one that was begun, or the one after the last that is done.

    Weights of stages before it are not needed: they may have been deleted.
    """
    done = [index + 1 for index, stage in enumerate(stages) if stage.weights.is_file()]
    begun = [index for index, stage in enumerate(stages) if stage.checkpoint.is_file()]
    return max([0, *done, *begun])


def steps_done(stage: StageRun) -> int:
    """Return the optimizer step at which the checkpoint of a stage that was begun was saved."""
    return torch.load(stage.checkpoint, mmap=True, weights_only=True)["global_step"]


def room_needed(stages: list[StageRun], parameters: int) -> int:
    """Return the bytes that the stages that are left and the export may take on disk, for a student of fp32 parameters.

    A checkpoint also has two numbers of Adam's for each parameter, and is written before the one before it is deleted.
    """
    left = len(stages) - next_stage(stages)
    there = sum(stage.checkpoint.stat().st_size for stage in stages if stage.checkpoint.is_file())
    return 4 * parameters * (left - 1 + 2 * 3 if left else 1) - there  # the largest sum is in the last stage


def check_room(out: Path, stages: list[StageRun], parameters: int) -> None:
    """Raise InputError where the disk has less room than a run with a student of so many parameters needs."""
    need, free = room_needed(stages, parameters), disk_usage(existing_folder(out)).free
    if free < need:
        raise InputError(
            f"out {str(out)!r} is on a disk with {free / 1e9:.3g} GB free, and checkpoints and weights take up to "
            f"{need / 1e9:.3g} GB more: free some space, or choose another out"
        )


def check_stage_files(stage: StageRun) -> None:
    """Raise InputError, naming the file and what to delete, where a stage's weights or checkpoint are damaged."""
    if stage.weights.is_file():
        read_metrics(stage.weights)
    elif stage.checkpoint.is_file():
        try:
            with zipfile.ZipFile(stage.checkpoint) as records:
                wrong = records.testzip()  # torch.load ignores the checksums that torch.save writes
            if wrong:
                raise ValueError(f"checksum of {wrong}")
            torch.load(stage.checkpoint, mmap=True, weights_only=True, map_location="cpu")
        except Exception as error:  # pickle, zip and torch each raise their own errors for a file cut short
            raise InputError(f"{stage.checkpoint} is damaged: delete it, and {stage.name} starts over") from error


def save_student(student: Student, stage: StageRun, metrics: dict[str, float]) -> None:
    """Save the weights of a finished stage with its held-out losses (nats a token), then delete the checkpoint; on rank 0."""
    if not is_first_rank():
        return
    note = {"metrics": json.dumps(metrics), "sha256": fingerprint(student)}
    write_aside(stage.weights, lambda aside: save_model(student, str(aside), metadata=note))
    stage.checkpoint.unlink(missing_ok=True)


def fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 of a model's weights, names included, as they are in memory or rounded to `dtype`."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def teacher_fingerprints(teacher: Teacher) -> dict[str, str]:
    """Return the fingerprints of a teacher's weights and tokenizer.

    Weights are rounded to bf16, as a GPU with bf16 holds them, so that a run may go on on another kind of machine.
    """
    tokenizer: Any = teacher.tokenizer
    rules = f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.eos_token_id}"
    return {"teacher": fingerprint(teacher.model, torch.bfloat16), "tokenizer": sha256(rules.encode()).hexdigest()}


def check_fingerprints(config: Namespace, found: dict[str, str]) -> None:
    """Raise InputError where the run was begun with another teacher, tokenizer or text, whose fingerprints are `found`."""
    out = Path(config.out)
    file = out / FINGERPRINTS
    if not (out / "config.yaml").is_file():
        return
    try:
        recorded = json.loads(file.read_text())
        differing = [key for key, value in found.items() if recorded[key] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}, which says what teacher and text the run was begun with, cannot be read ({one_line(error)}): restore it, "
            "or choose another out"
        ) from error
    if differing:
        key = differing[0]
        owner = {"text": "data.dataset", "start": "student.start_from"}.get(key, "teacher")
        raise InputError(
            f"out {str(out)!r} was begun with another {key} than {owner} {config[owner]!r} has now: put the "
            "former back, or choose another out"
        )


def read_fingerprints(out: Path) -> dict[str, Any]:
    """Read what a run was about when it began; {} where that is not recorded. Raises InputError for a damaged file."""
    file = out / FINGERPRINTS
    if not file.is_file():
        return {}
    try:
        recorded = json.loads(file.read_text())
        if not isinstance(recorded["teacher"], str):
            raise TypeError("it names no teacher")
        return recorded
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is damaged ({one_line(error)}): restore it, or delete it to trust that the run's teacher and text are "
            "still the same"
        ) from error


def check_teacher_of(out: Path, path: str, found: str) -> None:
    """Raise InputError unless the run in `out`, as far as that is recorded, is of the teacher with the fingerprint `found`.

    path: of that teacher.
    """
    if read_fingerprints(out).get("teacher", found) != found:
        raise InputError(f"teacher {path!r} is not the one that {out} was distilled from: give that one")


def tokens_read(config: Namespace) -> int:
    """Return how many tokens of its text the run in `student.start_from` has read, with all that it went on from itself.

    0 where that is no run folder, or of another text or order of it. The run that goes on from it begins after them. Raises
    InputError where the start's fingerprints.json does not say how much was read.
    """
    start = Path(config.student.start_from or "")
    if not config.student.start_from or not (start / "config.yaml").is_file():
        return 0
    before, now = read_config(start)["data"], plain(config)["data"]
    if not alike(before["dataset"], now["dataset"]):
        return 0
    is_local = TextSource(now["dataset"]).is_local
    for data in (before, now):
        data["shuffle"] = seed_of_order(data.get("shuffle"), is_local)
    without_effect = ("name", "revision") if is_local else ()
    if not all(alike(before.get(key), now[key]) for key in WHAT_IS_READ if key not in without_effect):
        return 0
    try:
        return int(json.loads((start / FINGERPRINTS).read_text())["tokens_read"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"student.start_from {str(start)!r}: its {FINGERPRINTS} does not say how much of the text it has read "
            f"({one_line(error)}): give {start / 'student'}, to begin with the head of the text"
        ) from error


def write_fingerprints(out: Path, found: dict[str, str | int]) -> None:
    """Record what a run is about when it begins; on rank 0."""
    file, text = out / FINGERPRINTS, json.dumps(found, indent=1)
    if not is_first_rank() or (out / "config.yaml").is_file() or (file.is_file() and file.read_text() == text):
        return
    write_aside(file, lambda aside: aside.write_text(text))


def read_metrics(weights: Path) -> dict[str, float]:
    """Read the held-out losses, nats a token, that a finished stage ended with. Raises InputError for a damaged file."""
    try:
        with safe_open(weights, framework="pt") as file:
            return json.loads(file.metadata()["metrics"])
    except (SafetensorError, FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise damaged(weights, error) from error


def load_student(student: Student, stage: StageRun) -> None:
    """Load the weights that a finished stage left. Raises InputError unless every tensor is there and the checksum holds."""
    try:
        load_model(student, str(stage.weights), strict=True)
    except (RuntimeError, SafetensorError) as error:
        check_sizes(stage.weights, error)
        raise damaged(stage.weights, one_line(error)) from error
    with safe_open(stage.weights, framework="pt") as file:
        if file.metadata()["sha256"] != fingerprint(student):
            raise damaged(stage.weights, "its checksum is off")


def check_sizes(weights: Path, error: Exception) -> None:
    """Raise InputError where `weights` could not be loaded because they are a student's of other sizes."""
    if "size mismatch" in str(error):
        raise InputError(
            f"{weights} is of a student of other sizes ({one_line(error)}): go on with the version of distill_pl that began "
            "this run, or, if layers in student.softmax_layers differ, give student.kv_heads expanded, also in the run's "
            "config.yaml"
        ) from error


def damaged(weights: Path, why: object) -> InputError:
    """Build the error that says what to do about damaged weights of a stage."""
    return InputError(f"{weights} is damaged ({why}): delete {weights.parent} and the stage folders after it, then run again")
