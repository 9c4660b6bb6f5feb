"""Perplexity by position: segments with a carried state are one pass, and buckets are means over powers of two."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from distill_pl.console import perplexity
from distill_pl.errors import InputError
from distill_pl.measure import long_text
from distill_pl.student.factory import StudentFactory


@pytest.mark.parametrize("mixer", ["softmax", "gla", "gated_delta_net", "swa"])
def test_segments_are_one_pass(teacher, mixer, monkeypatch):
    student = StudentFactory(mixer, **({"window": 8, "sinks": 2} if mixer == "swa" else {})).build(teacher, 0).eval()
    tokens = torch.randint(0, teacher.config.vocab_size, (3, 70), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(long_text, "SEGMENT", 16)
    found = long_text.losses(student, tokens, rows_at_once=2)
    with torch.no_grad():
        logits = student(tokens, use_cache=False).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, -1).mean(0)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


def test_positions_are_counted_in_powers_of_two():
    losses = torch.arange(1.0, 8.0) / 10
    found = long_text.summary(losses)
    assert list(found["by_position"]) == ["1", "2", "4"]
    assert list(found["by_position"].values()) == pytest.approx([perplexity(x) for x in (0.1, 0.25, 0.55)])
    assert found["perplexity"] == pytest.approx(math.exp(0.4))


def test_documents_are_packed_as_for_training(tokenizer, teacher):
    texts = ["The cat sat.", "", "A dog ran."]
    one, two = (tokenizer.encode(text) for text in (texts[0], texts[2]))
    end = tokenizer.eos_token_id
    whole = [*one, end, *two, end]
    assert long_text.rows(texts, tokenizer, teacher.config, 4, 2).tolist() == [whole[:4], whole[4:8]]
    with pytest.raises(InputError, match=f"it holds {len(whole)} tokens, fewer than the largest of lengths, 4096"):
        long_text.rows(texts, tokenizer, teacher.config, 4096, 2)


def test_a_model_that_hands_on_no_state_reads_one_segment_alone(teacher, monkeypatch):
    tokens = torch.randint(0, teacher.config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))
    whole = long_text.losses(teacher.model, tokens, rows_at_once=1)
    model = lambda ids, **options: SimpleNamespace(logits=teacher.model(ids, use_cache=False).logits)  # noqa: E731
    model.device, model.config = "cpu", SimpleNamespace(model_type="mamba")
    torch.testing.assert_close(long_text.losses(model, tokens, rows_at_once=1), whole)
    monkeypatch.setattr(long_text, "SEGMENT", 16)
    with pytest.raises(InputError, match="rows of 19 tokens: a mamba carries no cache .* at most 16"):
        long_text.losses(model, tokens, rows_at_once=1)
