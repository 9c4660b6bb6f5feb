"""Decoding out of fixed buffers is decoding: token by token, for every mixer, compiled or not."""

import pytest
import torch
from functorch.compile import make_boxed_compiler
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves

from distill_pl.decoding.decoder import Decoder, RowLayer, continued, products, why_not
from distill_pl.measure.bench import decode, prefill
from distill_pl.student.factory import StudentFactory
from distill_pl.student.transfer import as_transformer
from distill_pl.teacher import Teacher

STEPS = 12


def taken_apart(graph, inputs):
    """A backend that runs what our `inductor` would compile."""
    run = make_boxed_compiler(lambda graph, inputs: graph.forward)
    return aot_autograd(fw_compiler=run, decompositions=products())(graph, inputs)


def some_tokens(teacher, rows: int = 2, length: int = 20, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, teacher.config.vocab_size, (rows, length), generator=generator)


def plain(model, prompt: torch.Tensor) -> torch.Tensor:
    token, cache = prefill(model, prompt)
    return torch.cat([token, decode(model, token, cache, STEPS - 1)], 1)


def decoded(decoder: Decoder, prompt: torch.Tensor, chunk: int = 0) -> torch.Tensor:
    return torch.cat([decoder.prefill(prompt, chunk), *(decoder.step() for _ in range(STEPS - 1))], 1)


def addresses(decoder: Decoder) -> list[tuple[int, torch.Size]]:
    return [(x.data_ptr(), x.shape) for x in tree_leaves((decoder.states, decoder.token, decoder.position))]


@pytest.mark.parametrize("softmax_layers", [[], [1]], ids=["pure", "hybrid"])
def test_tokens_are_those_of_the_plain_way(teacher, name, layout, softmax_layers):
    model = StudentFactory(name, init="fresh", softmax_layers=softmax_layers, **layout).build(teacher, seed=0).eval()
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    decoder = Decoder(model, max_length=40)
    first, second = some_tokens(teacher), some_tokens(teacher, length=7, seed=6)
    assert torch.equal(decoded(decoder, first), plain(model, first))
    before, size = addresses(decoder), decoder.nbytes()
    assert torch.equal(decoded(decoder, second, chunk=5), plain(model, second))  # a prompt starts clean, at the same place
    assert addresses(decoder) == before and decoder.nbytes() == size
    assert torch.equal(plain(model, first), decoded(decoder, first))
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())


def test_a_step_of_one_row_is_one_graph(teacher, name):
    """And its norms are in its products."""
    pytest.importorskip("triton")
    model = StudentFactory(name, init="fresh", softmax_layers=[1]).build(teacher, seed=0).eval()
    prompt = some_tokens(teacher, rows=1)
    decoder = Decoder(model, max_length=40, backend=taken_apart)
    assert torch.equal(decoded(decoder, prompt), plain(model, prompt))
    assert all(isinstance(layer, RowLayer) for layer in decoder.layers)


def test_one_compilation_serves_all_layers(teacher, save_model):
    many = Teacher(str(save_model("llama", num_hidden_layers=5)))
    for softmax_layers, kinds in [([], 1), ([1, 3], 2)]:
        model = StudentFactory("gla", softmax_layers=softmax_layers).build(many, seed=0).eval()
        counter = CompileCounter()
        decoded(Decoder(model, max_length=40, backend=counter), some_tokens(many, rows=1))
        assert counter.frame_count == 2 + kinds  # with what is before and after the layers


def test_transformers_own_models(any_teacher):
    prompt = some_tokens(any_teacher)
    for backend, rows in [(None, 2), (taken_apart, 1)]:
        decoder = Decoder(any_teacher.model, max_length=40, backend=backend)
        assert torch.equal(decoded(decoder, prompt[:rows]), plain(any_teacher.model, prompt[:rows]))


def test_softmax_has_room_for_so_many_tokens(teacher):
    model = as_transformer(StudentFactory("softmax").build(teacher, seed=0)).eval()
    with pytest.raises(ValueError, match="give a max_length"):
        Decoder(model).prefill(some_tokens(teacher))
    decoder = Decoder(model, max_length=21)
    decoder.prefill(some_tokens(teacher))
    decoder.step()
    with pytest.raises(ValueError, match="room for 21"):
        decoder.step()
    with pytest.raises(ValueError, match="room for 21"):
        decoder.prefill(some_tokens(teacher, length=22))


def test_prompts_are_always_as_many(teacher):
    decoder = Decoder(StudentFactory("gla").build(teacher, seed=0).eval())
    decoder.prefill(some_tokens(teacher))
    with pytest.raises(ValueError, match="1 prompts, where the first time there were 2"):
        decoder.prefill(some_tokens(teacher, rows=1))


def test_what_a_decoder_cannot_do_is_said(teacher, save_model):
    assert why_not(teacher.model, 10**6) is None
    assert why_not(StudentFactory("gla").build(teacher, seed=0), 10**6) is None
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for changes, reason in [
        ({"model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding window of 32"),
        ({"model_type": "llama", "rope_parameters": dynamic}, "rope_type dynamic"),
    ]:
        assert reason in why_not(Teacher(str(save_model(**changes))).model, 33)


def test_draws_follow_the_temperature(teacher):
    model, prompt = StudentFactory("gla").build(teacher, seed=0).eval(), some_tokens(teacher)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hot, again = (decoded(Decoder(model, temperature=5.0), prompt) for _ in range(2))
        cold = decoded(Decoder(model, temperature=1e-4), prompt)
        narrow = decoded(Decoder(model, temperature=5.0, top_k=1), prompt)
    assert not torch.equal(hot, again)
    assert torch.equal(cold, plain(model, prompt)) and torch.equal(narrow, cold)


@pytest.mark.parametrize("mixer", ["gla", "softmax"])
def test_continued_is_generate(teacher, mixer):
    model = as_transformer(StudentFactory(mixer).build(teacher, seed=0)).eval()
    prompt = some_tokens(teacher, rows=1)
    for ends in (None, [3, int(plain(model, prompt)[0, 5])]):
        model.generation_config.eos_token_id = ends
        expected = model.generate(prompt, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
        assert torch.equal(continued(model, prompt, STEPS, temperature=0.0), expected)
        assert (expected.shape[1] == 20 + STEPS) == (ends is None)
    model.generation_config.repetition_penalty = 1.5
    assert continued(model, prompt, STEPS, temperature=0.0) is None
