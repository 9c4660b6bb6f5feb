"""`distill-pl layers`: a layer put back is the teacher's, and only for the time of a measurement."""

import json

import pytest
import torch

from distill_pl.errors import InputError
from distill_pl.measure import recall
from distill_pl.measure.layers import choices, held_out_divergence, layers, put_back
from distill_pl.student.factory import StudentFactory
from distill_pl.teacher import Teacher


@pytest.fixture
def student_and_original(teacher):
    return StudentFactory("gla").build(teacher, seed=0).eval(), StudentFactory("softmax").build(teacher, seed=0).eval()


def test_all_layers_put_back_are_the_teacher(student_and_original):
    student, original = student_and_original
    tokens = torch.arange(24)[None] + 1
    before, expected = student(tokens).logits, original(tokens).logits
    with put_back(student, original, 0), put_back(student, original, 1):
        torch.testing.assert_close(student(tokens).logits, expected)
    assert torch.equal(student(tokens).logits, before)
    assert not torch.allclose(before, expected)


def test_the_only_other_layer_put_back_leaves_no_divergence(teacher):
    student = StudentFactory("gla", softmax_layers=[0]).build(teacher, seed=0).eval()
    original = StudentFactory("softmax").build(teacher, seed=0).eval()
    chunks = torch.arange(96).view(4, 24) % teacher.config.vocab_size
    assert held_out_divergence(student, original, chunks, batch_size=3) > 1e-3
    with put_back(student, original, 1):
        assert abs(held_out_divergence(student, original, chunks, batch_size=3)) < 1e-5


def test_choices():
    measured = [(None, 0.5, 0.1), (0, 0.4, 0.12), (1, 0.3, 0.5), (2, 0.2, 0.0), (4, 0.1, 0.1)]
    rows = [{"layer": layer, "kl": kl, "recall": share, "recall_stderr": 0.01} for layer, kl, share in measured]
    assert choices(rows, 2) == {"by KL": [2, 4], "by recall": [1, 4], "evenly spaced": [1, 3]}  # 0.12 may be chance
    rows[1]["recall"] = 0.13
    assert choices(rows, 2)["by recall"] == [0, 1]
    assert choices([{"layer": None, "kl": 0.5}, {"layer": 1, "kl": 0.4}], 1) == {"by KL": [1], "evenly spaced": [0]}
    kept = {"by KL": [3, 4, 5], "by recall": [1, 3, 5], "evenly spaced": [1, 3, 5]}
    assert choices(rows, 3, before=[3, 5]) == kept  # layers of a hybrid stay, and count


def test_layers_of_a_run(run, capsys, monkeypatch):
    monkeypatch.setattr(recall, "COPIED", 1)  # the tokenizer has few words
    layers(str(run), keep=1, tasks="niah_single_1", lengths="256", limit=2)
    printed = capsys.readouterr().out
    found = json.loads((run / "eval" / "layers.json").read_text())["rows"]
    assert [row["layer"] for row in found] == [None, 0, 1]
    assert f"             0  {found[1]['kl']:.4f}  " in printed
    assert "evenly spaced" in printed
    assert (run / "eval" / "layers.png").stat().st_size > 1000
    monkeypatch.setattr(Teacher, "longest", 64)
    with pytest.raises(InputError, match="lengths 256: no layer put back has the teacher's sliding window: give up to 64"):
        layers(str(run), keep=1, tasks="niah_single_1", lengths="256", limit=2)
    with pytest.raises(InputError, match=r"layers.json holds results of other settings \(limit 2, now 1\): move it"):
        layers(str(run), keep=1, tasks="niah_single_1", lengths="256", limit=1)


@pytest.mark.parametrize(
    ("given", "says"),
    [({"run": "nowhere"}, "'nowhere' is no run folder"), ({"tasks": "piqa"}, "tasks=piqa is no recall task"),
     ({"keep": 0}, "keep 0: give a number of layers from 1 to 2"), ({"keep": 3}, "keep 3"), ({"limit": 0}, "limit")],
)  # fmt: skip
def test_bad_input_is_one_line(run, given, says):
    with pytest.raises(InputError, match=says) as caught:
        layers(**{"run": str(run), "tasks": "induction"} | given)
    assert "\n" not in str(caught.value)
