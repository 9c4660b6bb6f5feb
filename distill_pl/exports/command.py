"""`distill-pl export`: write a student for programs that do not know this package, and check that they compute the same."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from distill_pl.console import quiet, say
from distill_pl.errors import InputError
from distill_pl.exports import fresh
from distill_pl.exports.fla import as_fla
from distill_pl.exports.native import as_native
from distill_pl.measure.evaluate import weights_path
from distill_pl.run.card import IMPORT, LOAD
from distill_pl.run.export import lacking
from distill_pl.run.folder import disk_refused, existing_folder
from distill_pl.student.factory import load_whole
from distill_pl.student.modeling import Student

TOLERANCE, ROUNDINGS = 1e-5, 10  # of the largest logit, in fp32; or so many times what rounding changes in the student itself


def export(run: str, to: Literal["transformers", "fla", "remote"] = "transformers", out: str | None = None) -> None:
    """Write a student as a folder that programs without this package load, with the same logits; refuse what is not exact.

    The folder is loaded again in fp32, in a process that cannot import this package, unless `to` is `remote`: its logits of a
    prompt must be the student's to 1e-5 of the largest, or to ten times the student's own rounding, and 50 greedily generated
    tokens must be the same. docs/serving.md lists what has an exact counterpart.

    Args:
        run: run folder of `distill-pl fit`, or folder of a student that it exported.
        to: `transformers` rewrites the weights for a class of transformers, which vLLM may know as well; `fla` for a class of
            flash-linear-attention, and compares on a GPU; `remote` adds a module with which transformers loads the student as
            it is, given trust_remote_code=True, where distill_pl is installed.
        out: folder to write, with weights in fp32, which must not exist yet, or be empty. Required.

    Raises:
        InputError: an option, model, run or text that cannot be used.
    """
    quiet()
    warnings.filterwarnings("ignore", module=r"fla\.")  # which says on a CPU that it has no GPU
    if out is None:
        raise InputError("out: give --out FOLDER, a folder to write that does not exist yet")
    source, target = Path(weights_path(run)), Path(out)
    if not (source / "config.json").is_file():
        raise InputError(f"run {run!r} is no finished run and no model folder: give either")
    if target.exists() and target.samefile("."):
        raise InputError(f"out {out!r} is the current folder: give a folder in it")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"out {out!r} exists already: give a folder that does not, or delete it")
    if to == "fla" and not torch.cuda.is_available():
        raise InputError("to fla: its kernels, with which the result is compared, need a GPU: export where there is one")
    home = existing_folder(target.absolute().parent)
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise InputError(f"out {out!r} cannot be written: {home} is no folder or not permitted; choose another out")
    if missing := [name for name in lacking(source) if name != "README.md"]:
        raise InputError(f"run {run!r}: {source} lacks {', '.join(missing)}: restore it, or run distill-pl fit again")
    student = load_whole(str(source))
    if not isinstance(student, Student):
        raise InputError(
            f"run {run!r}: its student is a {type(student).__name__} of transformers already and needs no export: use {source}"
        )
    model = {"transformers": as_native, "fla": as_fla}.get(to, lambda student: student)(student)
    model.generation_config = student.generation_config
    expected = fresh.expectation(student)
    with disk_refused(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
            folder = Path(name) / "model"
            write(model, source, folder, to)
            del student, model
            gc.collect()  # the other process needs the memory
            save_file(expected, Path(name) / "expected.safetensors")
            found = check(folder, Path(name) / "expected.safetensors", to)
            folder.rename(target)
    say(
        f"{target} is a {found['model']}: loaded in a process of its own, its logits differ from the student's by "
        f"{found['logits']:.1e} of the largest (rounding in the student: {found['rounding']:.1e}), and {fresh.GENERATED} "
        "greedily generated tokens are the same"
    )


def write(model: PreTrainedModel, source: Path, folder: Path, to: str) -> None:
    """Write a model to a new folder, with tokenizer, generation config and card of the student's folder `source`."""
    others = shutil.ignore_patterns(".*", "config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.py")
    shutil.copytree(source, folder, ignore=others)
    if to == "remote":
        module = Path(__file__).with_name("modeling_distill_pl.py")  # not imported: it registers its classes
        shutil.copy(module, folder)
        classes = {"AutoConfig": "StudentConfig", "AutoModelForCausalLM": "Student"}
        model.config.auto_map = {auto: f"{module.stem}.{name}" for auto, name in classes.items()}
    model.save_pretrained(folder)
    card = folder / "README.md"
    if card.is_file():
        first, load = ("# distill_pl must be installed\n", f"{LOAD}, trust_remote_code=True") if to == "remote" else ("", LOAD)
        card.write_text(card.read_text().replace(IMPORT, first).replace(LOAD, load))


def check(folder: Path, expected: Path, to: str) -> dict:
    """Compare a folder with what its student computes, in a fresh process -> what `fresh.main` prints.

    Raises InputError where the folder cannot be loaded or computes something else.
    """
    arguments = [sys.executable, fresh.__file__, str(folder), str(expected), to]
    with tempfile.TemporaryDirectory() as cache:  # in which transformers keeps the modules that it ran
        environment = os.environ | {"HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise InputError(
            f"export: a fresh process cannot load what was written ({lines[-1][:200]}), which is deleted: choose another --to"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    limit = max(TOLERANCE, ROUNDINGS * found["rounding"])
    if not (found["logits"] <= limit and found["tokens"] == fresh.GENERATED):  # also true of nan
        raise InputError(
            f"export: as a {found['model']}, the student's logits differ by {found['logits']:.1e} of the largest, by rounding "
            f"in the student {found['rounding']:.1e}, and {found['tokens']} of {fresh.GENERATED} tokens are the same: there is "
            "no exact counterpart, nothing is kept of it"
        )
    return found
