"""Write the Hugging Face folder of a trained student, and find out before training whether it can be written.

A student of softmax attention throughout is saved as its teacher's own class.
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path

from jsonargparse import Namespace
from transformers import GenerationConfig, PreTrainedModel

from distill_pl.console import is_first_rank, say
from distill_pl.errors import InputError, one_line
from distill_pl.run.card import model_card
from distill_pl.run.folder import StageRun, disk_refused
from distill_pl.student.modeling import Student
from distill_pl.student.transfer import as_transformer
from distill_pl.teacher import Teacher
from distill_pl.tokenizer import end_of_text

# of a generation config: read only while sampling, and refused by transformers where do_sample is false
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def lacking(folder: Path) -> list[str]:
    """List the files that an exported folder should have and has not; nothing where `folder` is whole."""
    index = folder / "model.safetensors.index.json"
    weights = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", *weights]
    return [name for name in names if not (folder / name).is_file()]


def export(config: Namespace, plans: list[StageRun], student: Student, teacher: Teacher) -> None:
    """Write the Hugging Face folder beside its place and rename it, on rank 0; into a folder with holes, what it lacks.

    Raises InputError where the disk refuses.
    """
    folder = Path(config.out) / "student"
    if not is_first_rank() or (folder.is_dir() and not lacking(folder)):  # another run may have finished meanwhile
        return
    aside = folder.with_name("student.new")
    shutil.rmtree(aside, ignore_errors=True)
    student.config.backend = "auto"  # the choice was for this machine
    model = as_transformer(student)
    with disk_refused(folder):
        aside.mkdir()
        write_small_files(config, aside, plans, model, teacher)
        model.save_pretrained(aside)
        if not folder.is_dir():
            aside.rename(folder)
            return
        for file in aside.iterdir():
            if not (folder / file.name).exists():
                say(f"student  {folder / file.name} was missing and is written again")
                file.rename(folder / file.name)
        shutil.rmtree(aside)


def check_export(config: Namespace, plans: list[StageRun], student: Student, teacher: Teacher) -> None:
    """Write all of the Hugging Face folder but the weights to a temporary folder, so that a run does not fail at its end.

    Raises InputError where a file cannot be written, as for a generation config that transformers refuses.
    """
    home = Path(tempfile.gettempdir(), "student")
    try:
        with disk_refused(home), tempfile.TemporaryDirectory(prefix="distill_pl-") as name:
            write_small_files(config, Path(name), plans, student, teacher)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"teacher {config.teacher!r}: the student could not be exported at the end of the run ({one_line(error)}): mend "
            "that file of the teacher's"
        ) from error


def write_small_files(config: Namespace, folder: Path, plans: list[StageRun], model: PreTrainedModel, teacher: Teacher) -> None:
    """Write generation config, tokenizer and model card to `folder`, and give `model` the generation config."""
    model.generation_config = generation_config(teacher)
    model.generation_config.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(str(model_card(config, plans, model)))


def generation_config(teacher: Teacher) -> GenerationConfig:
    """Return the teacher's generation config; with it, generation also ends at the token that ends each packed document.

    Sampling values that have no effect are left out: transformers would not save them.
    """
    settings = copy.deepcopy(teacher.model.generation_config)
    if not settings.do_sample:
        for key in SAMPLING:
            setattr(settings, key, None)
    settings.cache_implementation = None  # a kind of cache for attention
    ends = settings.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    own = [teacher.tokenizer.eos_token_id, end_of_text(teacher.tokenizer, teacher.config)]
    settings.eos_token_id = list(dict.fromkeys([*ends, *own])) if {*own} - {*ends} else settings.eos_token_id
    return settings
