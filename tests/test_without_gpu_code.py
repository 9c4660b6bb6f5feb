"""Without ops/gpu, compiling and decoding everything still works on a CPU: they only make a GPU faster."""

import ast
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from block_gpu_code import ROOMS, install
from helpers import forkserver

from distill_pl.cli import main

PACKAGE = Path(__file__).parents[1] / "distill_pl"


def imports_of(file: Path) -> list[str]:
    """List what a file imports when it is itself imported, as dotted names."""
    tree, later = ast.parse(file.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            later |= set(ast.walk(node))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in later]
    return [f"{getattr(node, 'module', None) or ''}.{alias.name}".strip(".") for node in found for alias in node.names]


def test_no_other_module_imports_them_when_it_is_imported():
    for file in PACKAGE.rglob("*.py"):
        if not ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).startswith(ROOMS):
            assert not [name for name in imports_of(file) if name.startswith(ROOMS)], file


def run_without_them(commands: list[list[str]], printed: Path) -> None:
    """Run commands of `distill-pl` on the CPU where importing ROOMS fails; what they print is in a file."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    assert not [name for name in sys.modules if name.startswith(ROOMS)]
    install()
    with open(printed, "w") as output, redirect_stdout(output):
        for arguments in commands:
            main(arguments)


@pytest.mark.slow
def test_fit_evaluate_generate_and_bench_run_without_them(fitted, tmp_path):
    """Run all four in another process, in which importing them fails."""
    commands = []
    out = fitted(
        commands.append, **{"student.mixer": "mamba2", "tokens": 768, "matrix_mixing.tokens": 128, "hidden_align.tokens": 128}
    )
    commands += [
        ["evaluate", str(out)],
        ["generate", str(out), "--prompt", "Story", "--max_new_tokens", "3"],
        ["bench", str(out), "--lengths", "8", "--new_tokens", "2", "--repeats", "1", "--out", str(tmp_path / "bench")],
    ]
    child = forkserver.Process(target=run_without_them, args=(commands, tmp_path / "printed"))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert (out / "student" / "model.safetensors").is_file()
    for printed in ("done: the student is in", "perplexity", "Story", "plain"):
        assert printed in (tmp_path / "printed").read_text()
