"""Without ops/gpu, compiling and decoding everything still works on a CPU: they only make a GPU faster."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from block_gpu_code import ROOMS

PACKAGE = Path(__file__).parents[1] / "distill_pl"
OTHERS = [
    file
    for file in sorted(PACKAGE.rglob("*.py"))
    if not ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).startswith(ROOMS)
]


@pytest.mark.parametrize("file", OTHERS, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_other_module_imports_them_when_it_is_imported(file):
    tree = ast.parse(file.read_text())
    in_functions = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in in_functions:
            module = getattr(node, "module", "") or ""
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            assert not any(name.startswith(ROOMS) for name in names), ast.unparse(node)


def test_fit_evaluate_generate_and_bench_run_without_them(fitted, tmp_path):
    """In a process of its own, in which importing them fails."""

    def run(*arguments: str) -> str:
        code = "import block_gpu_code; block_gpu_code.install(); from distill_pl.cli import main; main()"
        path = os.pathsep.join([str(Path(__file__).parent), str(PACKAGE.parent)])
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = fitted(
        lambda arguments: run(*arguments),
        **{"student.mixer": "mamba2", "tokens": 6 * 128, "matrix_mixing.tokens": 128, "hidden_align.tokens": 128},
    )
    assert (out / "student" / "model.safetensors").is_file()
    assert "perplexity" in run("evaluate", out)
    assert run("generate", out, "--prompt", "Story", "--max_new_tokens", "3").startswith("Story")
    assert "plain" in run("bench", out, "--lengths", "8", "--new_tokens", "2", "--repeats", "1", "--out", tmp_path / "bench")
