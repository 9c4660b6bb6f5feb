"""Captured decoding gives the tokens of plain decoding; tests/decoding shows on the CPU what does not need a GPU."""

import pytest
import torch

from distill_pl.decoding import Decoder
from distill_pl.measure.bench import decode, prefill
from distill_pl.measure.evaluate import generate
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 12
ways = pytest.mark.parametrize(("rows", "compiled"), [(1, True), (3, False)], ids=["compiled", "captured"])


@ways
def test_tokens_are_those_of_plain_decoding(teacher, name, rows, compiled):
    """In fp32, where no two logits are equal: bf16 rounds elsewhere when compiled."""
    check_tokens(StudentFactory(name, init="fresh", softmax_layers=[1]).build(teacher, seed=0), rows, compiled)


@ways
@pytest.mark.parametrize("mixer", ["swa", "gla", "delta_net"])
def test_tokens_with_a_window_are_those_of_plain_decoding(teacher, mixer, rows, compiled):
    check_tokens(StudentFactory(mixer, init="fresh", window=8, sinks=2).build(teacher, seed=0), rows, compiled)


def test_prompts_read_in_captured_chunks_are_those_read_at_once(teacher, name):
    student = StudentFactory(name, init="fresh").build(teacher, seed=0)
    check_tokens(student, rows=2, compiled=True, chunk=16, graphs=1 if name == "softmax" else 2)


def check_tokens(student: Student, rows: int, compiled: bool, chunk: int = 0, graphs: int = 1) -> None:
    model = student.to("cuda").eval()
    decoder = Decoder(model, max_length=80, chunk=chunk, **{} if compiled else {"backend": None})
    for length in (40, 7):
        prompt = torch.randint(1, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))
        prompt = prompt.to("cuda")
        token, cache = prefill(model, prompt)
        expected = torch.cat([token, decode(model, token, cache, STEPS - 1)], 1)
        assert torch.equal(torch.cat(list(decoder.generate(prompt, STEPS)), 1), expected)
        assert len(decoder.graphs) == graphs and decoder.pool_bytes() > 0


def test_generate_takes_the_graph(teacher_folder, monkeypatch, capsys):
    printed = []
    for captured in (True, False):
        if not captured:
            monkeypatch.setattr("distill_pl.decoding.continue_prompt", lambda *args: None)
        generate(str(teacher_folder), prompt="Story", max_new_tokens=12)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
