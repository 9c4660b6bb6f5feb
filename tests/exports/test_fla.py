"""A student as a class of flash-linear-attention: by the command on a GPU, else by fla's kernels in Triton's interpreter.

The package flash-linear-attention (extra `bench`) is needed for these tests.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import refused
from students import save, trained

from distill_pl.cli import main
from distill_pl.errors import InputError
from distill_pl.exports import command, fresh
from distill_pl.exports.fla import REASONS, TARGETS, as_fla
from distill_pl.exports.native import TARGETS as NATIVE
from distill_pl.mixers import MIXERS

HAS_FLA = importlib.util.find_spec("fla") is not None and importlib.util.find_spec("fla.models") is not None
SHORT = {"PROMPT": 4, "GENERATED": 2}  # of `fresh`: the interpreter takes a second a token
# the interpreter is patched before fla is imported, as `find_spec` above does
INTERPRETED = f"""
import sys
import test_interpreted_kernels as interpreter
interpreter.patch()
import fla.models
for name, module in list(sys.modules.items()):
    if name.startswith("fla."):
        module.range = interpreter.indices
from distill_pl.exports import fresh
vars(fresh).update({SHORT})
fresh.main(sys.argv[1], sys.argv[2], "fla")
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_FLA, reason="flash-linear-attention is not installed")
@pytest.mark.parametrize("mixer", TARGETS)
def test_a_class_of_fla_agrees(mixer, variant, tokenizer, tmp_path, monkeypatch):
    student = trained(variant("llama_wide_heads"), mixer)
    if torch.cuda.is_available():
        main(["export", str(save(student, tmp_path / "student", tokenizer)), "--to", "fla", "--out", str(tmp_path / "new")])
        return
    for name, value in SHORT.items():
        monkeypatch.setattr(fresh, name, value)
    command.save_file(fresh.expectation(student), tmp_path / "expected")
    as_fla(student).save_pretrained(tmp_path / "new")
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "ops"), *sys.path])
    arguments = [sys.executable, "-c", INTERPRETED, str(tmp_path / "new"), str(tmp_path / "expected")]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(arguments, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["logits"] < command.TOLERANCE and found["tokens"] == SHORT["GENERATED"], found


REFUSED = [
    *[("llama", {"mixer": mixer}, reason) for mixer, reason in REASONS.items()],
    ("llama", {"mixer": "gla", "window": 8}, "student.window"),
    ("llama", {"mixer": "gla", "rope": True}, "does not rotate"),
    ("llama", {"mixer": "retnet", "rope": False}, "class rotates"),
    ("llama", {"mixer": "kda", "softmax_layers": [0]}, "student.softmax_layers"),
    ("llama_scaled_rope", {"mixer": "retnet"}, "RoPE of base 10,000"),
    ("qwen3", {"mixer": "gla"}, "norms of q and k"),
]


@pytest.mark.parametrize("teacher_name, options, reason", REFUSED)
def test_what_has_no_place_is_refused_by_name(teacher_name, options, reason, variant):
    with pytest.raises(InputError, match=f"this {options['mixer']} student .*{reason}.*: choose"):
        as_fla(trained(variant(teacher_name), **options))


@pytest.mark.parametrize("mixer", MIXERS)
def test_docs_say_of_each_mixer_what_the_code_does(mixer):
    table = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    _, native, fla = re.search(rf"^\| `({mixer})` \| (.*) \| (.*) \|$", table, re.MULTILINE).groups()
    reason = NATIVE.get(mixer)
    assert native == f"no: {reason}" if isinstance(reason, str) else not native.startswith("no")
    assert fla == f"no: {REASONS[mixer]}" if mixer in REASONS else "ForCausalLM" in fla
    assert (mixer in REASONS) != (mixer in TARGETS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(teacher, tokenizer, tmp_path):
    student = save(trained(teacher, "gla"), tmp_path / "student", tokenizer)
    assert "need a GPU" in refused("export", student, "--to=fla", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(HAS_FLA, reason="flash-linear-attention is installed")
def test_the_package_is_asked_for_by_name(teacher):
    with pytest.raises(InputError, match="needs flash-linear-attention: pip install"):
        as_fla(trained(teacher, "gla"))
