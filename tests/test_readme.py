"""The documentation's Python runs, its links lead somewhere, what it mentions exists, and `--help` explains every key."""

import argparse
import re
from pathlib import Path

import pytest
import torch

from distill_pl.cli import DistillCLI

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")] + sorted(ROOT.glob("docs/*.md"))
API = (ROOT / "README.md").read_text().split("## The training API in 15 lines")[1].split("\n## ")[0]
TRAIN, LOSS, GPU = re.findall(r"```python\n(.*?)```", API, re.DOTALL)
FILE = r"`([\w./]+\.(?:py|yaml|md|json|sbatch|txt)|\w[\w./]*/)`"  # or a folder, which ends in /
NAMES = r"((?:: `\w+`(?:, `\w+`)*)?)"  # what `file.py`: `name`, `name` says is defined in the file

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def replaced(code: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    return code


def test_the_training_api_has_15_lines():
    assert len([line for line in TRAIN.splitlines() if line]) <= 15


@pytest.mark.slow
def test_the_training_api_trains(teacher_folder, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text((corpus / "train.jsonl").read_text())
    names: dict = {}
    few = {"max_steps=1000": "max_steps=3"}
    exec(replaced(TRAIN, few | {"HuggingFaceTB/SmolLM-360M": str(teacher_folder), "512": "32"}), names)
    assert {file.name for file in (tmp_path / "mine").iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    for model in (names["student"], names["teacher"]):
        model.to(torch.device("cpu"))
    exec(LOSS, names)
    assert names["loss"].isfinite() and all(p.grad is not None for p in names["student"].parameters())
    if torch.cuda.is_available():
        exec(replaced(GPU, few), names)


def test_what_the_gpu_block_imports_exists():
    pytest.importorskip("distill_pl.compiling", exc_type=ImportError)  # blocked by tests/block_gpu_code.py
    exec("\n".join(line for line in GPU.splitlines() if line.startswith("from ")), {})


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], link


@each_page
def test_files_and_names_exist(page):
    for path, names in re.findall(FILE + NAMES, page.read_text()):
        if path.startswith("runs/"):
            continue
        places = [page.parent / path, ROOT / path, ROOT / "distill_pl" / path, *ROOT.glob(f"distill_pl/**/{path}")]
        file = next((place for place in places if place.exists()), None)
        assert file, path
        for name in re.findall(r"\w+", names):
            assert re.search(rf"(?:def|class) {name}\b|^{name}\b.*=", file.read_text(), re.MULTILINE), f"{path}: {name}"


def test_help_explains_every_key(monkeypatch):
    monkeypatch.setattr(DistillCLI, "_run_subcommand", lambda cli, name: None)
    parsers = DistillCLI(["params"]).parsers
    keys = {f"{name} {action.dest}": action.help for name, parser in parsers.items() for action in parser._actions}
    assert {"fit data.dataset", "fit trainer.devices", "evaluate models", "study file"} <= keys.keys()
    assert not [key for key, text in keys.items() if not text or text == argparse.SUPPRESS]
