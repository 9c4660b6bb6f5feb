"""`distill-pl bench`: byte counts are exact and tokens are generate's; times need only be there."""

import ast
import csv
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distill_pl.measure.bench
from distill_pl.cli import main
from distill_pl.errors import InputError
from distill_pl.exports.native import as_native
from distill_pl.measure.bench import bench, crossover, decode, is_transformer, limit, measure, prefill, prefill_chunk, theory
from distill_pl.mixers import MIXERS
from distill_pl.student.cache import state_bytes
from distill_pl.student.factory import StudentFactory
from distill_pl.student.transfer import as_transformer

pytestmark = pytest.mark.slow

QUICK = {"lengths": "8,24", "new_tokens": 2, "repeats": 2}


@pytest.fixture
def here(tmp_path, teacher, monkeypatch) -> Path:
    """Enter an empty folder, on a CPU, with mixers' names standing for students of the tiny teacher's shape.

    On a CPU the fast decoder need not even be importable.
    """
    monkeypatch.setattr(distill_pl.measure.bench, "smollm_360m", lambda: teacher)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # after each tiny model, a pass over all that the tests have imported takes up to a second
    monkeypatch.setattr(distill_pl.measure.bench, "gc", SimpleNamespace(collect=lambda: None))
    monkeypatch.setitem(sys.modules, "distill_pl.decoding", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_picture(monkeypatch) -> None:
    """Spare the drawing after every row, which takes longer than the tiny models do."""
    monkeypatch.setattr("distill_pl.measure.plots.draw_bench", lambda file, settings, rows: file.touch())


def read(folder: Path) -> dict[tuple[str, int], dict]:
    return {(row["model"], row["length"]): row for row in json.loads((folder / "bench.json").read_text())["rows"]}


def prompts(teacher, length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(teacher.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))


def test_state_has_the_size_it_has_in_theory(teacher, name, layout):
    student = StudentFactory(name, init="fresh", **layout).build(teacher, seed=0).eval()
    # shorter than a convolution; more than a chunk of the ops, read in pieces and whole
    for dtype, length, chunk in [(torch.float32, 2, 0), (torch.float32, 70, 33), (torch.bfloat16, 70, 0)]:
        _, cache = prefill(student.to(dtype), prompts(teacher, length), chunk)
        assert state_bytes(cache) == theory(student, batch=2, length=length)


def grows_as_in_theory(network, prompt) -> bool:
    sizes = [state_bytes(prefill(network, prompt[:, :length])[1]) for length in (20, 40)]
    return sizes[0] < sizes[1] and sizes == [theory(network, batch=2, length=length) for length in (20, 40)]


def test_state_of_a_hybrid(teacher, name):
    hybrid = StudentFactory(name, softmax_layers=[1]).build(teacher, seed=0).eval()
    assert grows_as_in_theory(hybrid, prompts(teacher, 40))


def test_state_of_transformers_own_models(any_teacher):
    if getattr(any_teacher.config, "sliding_window", None):
        assert theory(any_teacher.model, batch=2, length=20) is None
    else:
        assert grows_as_in_theory(any_teacher.model, prompts(any_teacher, 40))


def test_prefill_and_decode_are_generate(teacher, name):
    student = as_transformer(StudentFactory(name, init="fresh").build(teacher, seed=0)).eval()
    student.generation_config.eos_token_id = None
    prompt = prompts(teacher, 40)
    expected = student.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)[:, prompt.shape[1] :]
    for chunk in (0, 16):
        token, cache = prefill(student, prompt, chunk)
        assert torch.equal(torch.cat([token, decode(student, token, cache, steps=8)], 1), expected)
        assert cache.get_seq_length() == 48


def test_what_does_not_grow_is_read_in_chunks(teacher, name):
    network = StudentFactory(name).build(teacher, seed=0)
    assert prefill_chunk(network, None) == (0 if name == "softmax" else 2048) and prefill_chunk(network, 7) == 7
    assert prefill_chunk(teacher.model, None) == 0
    assert prefill_chunk(StudentFactory(name, softmax_layers=[1]).build(teacher, seed=0), None) == 0


def test_crossover_is_where_straight_lines_on_logarithmic_scales_meet():
    grows, constant = {length: float(length) for length in (1, 4, 16, 64)}, dict.fromkeys((4, 16, 64, 256), 8.0)
    assert crossover(constant, grows) == "about 8" and crossover(grows, constant) == "none up to 64"
    assert crossover(dict.fromkeys(grows, 0.5), grows) == "1 or less" and crossover({2: 1.0}, grows) == ""
    assert crossover(constant, grows | {16: math.inf}) == "16"  # where the Transformer runs out of memory
    assert crossover(dict.fromkeys(grows, 8.0) | {64: 100.0}, grows) == "none up to 64"  # not for good


@pytest.mark.slow
def test_bench_of_a_mixer_and_a_folder(here, teacher_folder, capsys):
    main(["bench", "gla", str(teacher_folder), "--lengths=24,8,160", "--new_tokens=2", "--repeats=2"])
    printed = capsys.readouterr().out
    rows = read(here / "bench")
    assert set(rows) == {(model, length) for model in ("gla", str(teacher_folder)) for length in (8, 24, 160)}
    for row in rows.values():
        assert len(row["prefill_seconds"]) == len(row["decode_seconds"]) == 2
        assert row["decode_ms_min"] <= row["decode_ms"] <= row["decode_ms_max"] and row["prefill_tokens_per_second"] > 0
        assert row["first_token_ms"] == pytest.approx(1000 * row["length"] / row["prefill_tokens_per_second"])
        assert row["state_bytes"] == row["state_in_theory"] and row["decode_peak_bytes"] is None
        assert f"{row['state_bytes']:,}" in printed
    assert re.search(rf"gla against {teacher_folder} .* (about \d+|8 or less|none up to 160)$", printed, re.MULTILINE)
    sizes = {model: [rows[model, length]["state_bytes"] for length in (8, 24, 160)] for model, _ in rows}
    assert len(set(sizes["gla"])) == 1
    softmax = sizes[str(teacher_folder)]
    assert softmax[1:] == [3 * softmax[0], 20 * softmax[0]]
    assert printed.count("made for 128 positions") == 1  # of the teacher: its student has no RoPE
    with open(here / "bench" / "bench.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["model"], int(row["length"])) for row in table] == list(rows)
    assert [float(row["decode_ms"]) for row in table] == [row["decode_ms"] for row in rows.values()]
    assert (here / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((here / "bench" / "bench.json").read_text())["settings"]
    assert settings["decode"] == "plain" and {row["decode"] for row in rows.values()} == {"plain"}
    assert settings["torch"] == torch.__version__ and settings["dtype"] == "float32" and settings["device"].startswith("CPU")


@pytest.mark.slow
def test_what_was_measured_is_kept(here, monkeypatch, capsys, no_picture):
    measured = []
    measure = distill_pl.measure.bench.measure

    def counted(network, length, *args, **kwargs):
        if length == 24 and len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(length)
        return measure(network, length, *args, **kwargs)

    monkeypatch.setattr(distill_pl.measure.bench, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        bench(["gla"], **QUICK)
    first = read(here / "bench")
    assert list(first) == [("gla", 8)] and (here / "bench" / "bench.png").is_file()
    measured += [0]
    bench(["gla", "softmax", "gla"], **QUICK)
    assert measured == [8, 0, 24, 8, 24]
    assert read(here / "bench")["gla", 8] == first["gla", 8] and capsys.readouterr().out.count("measured before") == 1
    before = (here / "bench" / "bench.json").read_bytes()
    with pytest.raises(InputError, match=r"other settings \(new_tokens 2, now 3; seed 0, now 1\): give another --out"):
        bench(["gla"], **QUICK | {"new_tokens": 3, "seed": 1})
    assert (here / "bench" / "bench.json").read_bytes() == before


def test_another_model_in_the_same_place_is_measured_anew(here, teacher_folder, save_model, no_picture, capsys):
    for folder, known in [(teacher_folder, 0), (teacher_folder, 1), (save_model("llama", mlp_bias=True), 0)]:
        shutil.copytree(folder, here / "model", dirs_exist_ok=True)
        bench([str(here / "model")], **QUICK | {"lengths": "8"})
        assert capsys.readouterr().out.count("measured before") == known


def test_rows_of_either_way_to_decode(teacher, name):
    """With decode=graph states are fixed buffers, in which softmax has room for all tokens, in whole blocks."""
    pytest.importorskip("distill_pl.decoding", exc_type=ImportError)
    student = StudentFactory(name).build(teacher, seed=0).eval()
    settings = {"new_tokens": 2, "repeats": 2, "batch_size": 2, "prefill_chunk": 0, "seed": 0}
    rows = {way: measure(student, 300, settings | {"decode": way}, warm_up=1) for way in ("graph", "plain")}
    assert rows["graph"].keys() == rows["plain"].keys()
    assert rows["plain"]["state_bytes"] == rows["plain"]["state_in_theory"] == theory(student, 2, 300)
    room = theory(student, 2, 512) - 2 * 2 * 512 if name == "softmax" else theory(student, 2, 300)  # without the key mask
    assert rows["graph"]["state_bytes"] == room


def test_limit_reads_weights_and_state_once(teacher):
    student = StudentFactory("gla").build(teacher, seed=0)
    for tied in (True, False):
        if not tied:
            student.lm_head = torch.nn.Linear(*student.lm_head.weight.T.shape, bias=False)
        embedding = student.model.embed_tokens.weight.nbytes
        row = {"weights_bytes": student.get_memory_footprint(), "state_bytes": 1000, "bandwidth": 1e6, "decode_ms": 10.0}
        read = sum(p.nbytes for p in student.parameters()) - (0 if tied else embedding) + 1000
        read += student.get_memory_footprint() - sum(p.nbytes for p in student.parameters())  # RoPE's table
        assert limit(student, row) == {"limit_ms": read / 1000, "decode_of_limit": read / 10000}
    assert limit(student, {"bandwidth": None}) == {}


@pytest.mark.slow
def test_out_of_memory_ends_a_model_not_the_bench(here, monkeypatch, capsys, no_picture):
    measure = distill_pl.measure.bench.measure

    def small(network, length, *args, **kwargs):
        if length > 8 and isinstance(network, distill_pl.measure.bench.Student):
            raise torch.OutOfMemoryError
        return measure(network, length, *args, **kwargs)

    monkeypatch.setattr(distill_pl.measure.bench, "measure", small)
    for _ in range(2):  # the second time nothing is tried again
        bench(["gla", "softmax"], **QUICK | {"lengths": "8,24,32"})
        printed = capsys.readouterr().out
        assert printed.count("out of memory") == 1 and "gla: lengths beyond 24 are skipped" in printed
        assert list(read(here / "bench")) == [("gla", 8), ("gla", 24), *(("softmax", length) for length in (8, 24, 32))]


def test_a_student_as_another_class_is_no_transformer(teacher):
    student = StudentFactory("kda").build(teacher, seed=0)
    assert not is_transformer(student) and not is_transformer(as_native(student)) and is_transformer(teacher.model)


def test_a_folder_comes_before_a_mixer(here, teacher_folder, no_picture):
    (here / "gla").symlink_to(teacher_folder)
    bench(["gla"], **QUICK)
    assert read(here / "bench")["gla", 8]["softmax"]
    (here / "runs").mkdir()
    (here / "runs" / "config.yaml").touch()
    with pytest.raises(InputError, match="not finished"):
        bench(["runs"], **QUICK)


@pytest.mark.parametrize("changes, message", [
    ({"lengths": "8,x"}, "lengths '8,x' are not whole positive numbers"),
    ({"lengths": "0"}, "lengths '0' are not"),
    ({"lengths": "1.5"}, "lengths '1.5' are not"),
    ({"lengths": ""}, "lengths '' are not"),
    ({"new_tokens": 0}, "new_tokens 0 is too small: give at least 1"),
    ({"repeats": 0}, "repeats 0 is too small"),
    ({"batch_size": 0}, "batch_size 0 is too small"),
    ({"prefill_chunk": -1}, "prefill_chunk -1 is too small"),
    ({"decode": "graph"}, "decode 'graph' needs a GPU: choose plain or auto"),
    ({"decode": "grpah"}, "decode 'grpah': choose from auto, graph, plain"),
    ({"models": ["gla", "gla2"]}, "neither a folder nor a mixer: did you mean gla?"),
    ({"models": ["gla", "/nowhere"]}, r"'/nowhere' cannot be read \(no such folder\): give .* a mixer: softmax, "),
])  # fmt: skip
def test_refusals_come_before_any_work(here, changes, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        bench(**{"models": ["gla"]} | QUICK | changes)
    assert not list(here.iterdir())


@pytest.mark.parametrize(("text", "says"), [
    ('{"settings"', "bench.json is damaged: delete it"), ("[]", "bench.json is damaged"),
    ('{"rows": []}', "bench.json is no result of distill-pl bench"), (None, "cannot write bench"),
])  # fmt: skip
def test_a_folder_that_takes_no_results_is_refused_before_any_work(here, monkeypatch, text, says):
    monkeypatch.setattr("distill_pl.measure.bench.model_rows", lambda *args: pytest.fail("measured"))
    if text is None:
        Path("bench").write_text("a file")
    else:
        Path("bench").mkdir()
        Path("bench/bench.json").write_text(text)
    with pytest.raises(InputError, match=says):
        bench(["gla"], **QUICK)


def test_a_table_of_positions_is_not_left(here, save_model, no_picture):
    folder = str(save_model("gpt2", max_position_embeddings=64))
    with pytest.raises(InputError, match="a table of 64 positions, 66 are asked for"):
        bench([folder], lengths="64", new_tokens=2)
    bench([folder], **QUICK)
    assert read(here / "bench")[folder, 8]["state_in_theory"] is None


@pytest.mark.slow
def test_every_mixer_has_a_name_of_its_own_on_the_command_line(here, capsys, no_picture):
    main(["bench", *MIXERS, "--lengths=8", "--new_tokens=1", "--repeats=1"])
    assert [model for model, _ in read(here / "bench")] == list(MIXERS)
    assert "default lengths and repeats are small" in capsys.readouterr().out


def test_measuring_imports_neither_lightning_nor_the_chain_of_stages():
    for file in Path(distill_pl.measure.bench.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in getattr(node, "names", ())]
            kept_out = ("lightning", "distill_pl.run.fit", "distill_pl.run.monitor", "distill_pl.stages")
            assert not [name for name in names if name.startswith(kept_out)], file
