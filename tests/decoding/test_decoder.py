"""A Decoder gives the tokens of plain decoding, for every mixer, compiled or not."""

import inspect

import pytest
import torch
from helpers import some_tokens
from shared_fixtures import LAYOUTS
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves

from distill_pl.decoding import Decoder, continue_prompt, unsupported_reason
from distill_pl.decoding.backend import decode_backend
from distill_pl.decoding.decoder import FixedSoftmax
from distill_pl.decoding.row_layer import RowLayer
from distill_pl.errors import InputError
from distill_pl.measure.bench import decode, prefill
from distill_pl.mixers import MIXERS
from distill_pl.ops import softmax
from distill_pl.student.factory import StudentFactory
from distill_pl.student.transfer import as_transformer
from distill_pl.teacher import Teacher

pytestmark = pytest.mark.slow

STEPS = 8


def run_uncompiled(graph, inputs):
    """Run the graph that `decode_backend` hands to inductor's code generation."""
    return decode_backend(graph, inputs, inner_compile=lambda graph, inputs, **unused: graph)


def plain(model, prompt: torch.Tensor) -> torch.Tensor:
    token, cache = prefill(model, prompt)
    return torch.cat([token, decode(model, token, cache, STEPS - 1)], 1)


def decoded(decoder: Decoder, prompt: torch.Tensor) -> torch.Tensor:
    return torch.cat([decoder.prefill(prompt), *(decoder.step() for _ in range(STEPS - 1))], 1)


def addresses(decoder: Decoder) -> list[tuple[int, torch.Size]]:
    return [(x.data_ptr(), x.shape) for x in tree_leaves((decoder.states, decoder.token, decoder.position))]


def check_decoder(teacher, chunk: int = 0, **student) -> None:
    """Decode two prompts in the same buffers, and the first again, leaving the model alone."""
    model = StudentFactory(init="fresh", **student).build(teacher, seed=0).eval()
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    decoder = Decoder(model, max_length=40, chunk=chunk)
    first, second = some_tokens(teacher), some_tokens(teacher, length=7, seed=6)
    expected = plain(model, first)
    assert torch.equal(decoded(decoder, first), expected)
    before, size = addresses(decoder), decoder.nbytes()
    assert torch.equal(decoded(decoder, second), plain(model, second))
    assert addresses(decoder) == before and decoder.nbytes() == size
    assert torch.equal(decoded(decoder, first), expected)
    assert torch.equal(plain(model, first), expected)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())


def test_tokens_are_those_of_plain_decoding(teacher, name_and_layout):
    name, layout = name_and_layout
    check_decoder(teacher, mixer=name, **layout)


def test_tokens_of_a_hybrid_are_those_of_plain_decoding(teacher, name):
    check_decoder(teacher, mixer=name, softmax_layers=[1])


@pytest.mark.parametrize("chunk", [6, 32])
def test_prompts_read_in_chunks_are_those_read_at_once(teacher, name, chunk):
    """Prompts have 20 tokens, then 7: the first chunk is padded."""
    beside = chunk == 6 and "k" in MIXERS[name].copies and name != "softmax"
    check_decoder(teacher, chunk, mixer=name, **({"window": 4} if beside else {}))


@pytest.mark.parametrize("chunk", [6, 32])
def test_prompts_of_a_hybrid_are_read_in_chunks_too(teacher, chunk):
    check_decoder(teacher, chunk, mixer="gla", softmax_layers=[1])


# each mixer in a layout other than its usual one
@pytest.mark.parametrize("name_and_layout", [("gla", "grouped"), *LAYOUTS[1::2]], indirect=True, ids="-".join)
def test_a_step_of_one_row_is_one_graph(teacher, name_and_layout):
    """The norms are in the products: every layer is a RowLayer."""
    pytest.importorskip("triton")
    name, layout = name_and_layout
    model = StudentFactory(name, init="fresh", **layout).build(teacher, seed=0).eval()
    prompt = some_tokens(teacher, rows=1)
    decoder = Decoder(model, max_length=40, backend=run_uncompiled)
    assert torch.equal(decoded(decoder, prompt), plain(model, prompt))
    assert all(isinstance(layer, RowLayer) for layer in decoder.layers)


def test_one_compilation_serves_all_layers(teacher, save_model):
    many = Teacher(str(save_model("llama", num_hidden_layers=5)))
    for mixer, softmax_layers, kinds in [("gla", [], 1), ("metala", [1, 3], 2)]:
        model = StudentFactory(mixer, softmax_layers=softmax_layers).build(many, seed=0).eval()
        counter, prompt = CompileCounter(), some_tokens(many, rows=1)
        assert torch.equal(decoded(Decoder(model, max_length=40, backend=counter), prompt), plain(model, prompt))
        assert counter.frame_count == 2 + kinds  # with what is before and after the layers


def test_transformers_own_models(any_teacher):
    prompt = some_tokens(any_teacher)
    assert torch.equal(decoded(Decoder(any_teacher.model, 40, backend=None), prompt), plain(any_teacher.model, prompt))


@pytest.mark.parametrize("shape", ["llama_bias", "llama_scaled_rope", "qwen3"])
def test_one_row_of_transformers_own_models(variant, shape):
    pytest.importorskip("triton")
    model, prompt = variant(shape).model, some_tokens(variant(shape), rows=1)
    decoder = Decoder(model, max_length=40, backend=run_uncompiled)
    assert torch.equal(decoded(decoder, prompt), plain(model, prompt))


def test_fixed_softmax_is_called_as_softmax():
    fixed, growing = (list(inspect.signature(step).parameters) for step in (FixedSoftmax.step, softmax.step))
    assert fixed == growing


def test_softmax_has_room_for_max_length_tokens(teacher):
    model = as_transformer(StudentFactory("softmax").build(teacher, seed=0)).eval()
    hybrid = StudentFactory("gla", softmax_layers=[1]).build(teacher, seed=0).eval()
    for attends in (model, hybrid):
        with pytest.raises(InputError, match="give a max_length"):
            Decoder(attends)
    decoder = Decoder(model, max_length=21)
    decoder.prefill(some_tokens(teacher))
    decoder.step()
    for too_long in (decoder.step, lambda: decoder.prefill(some_tokens(teacher, length=22))):
        with pytest.raises(InputError, match="22 tokens exceed this Decoder's max_length 21"):
            too_long()


def test_another_batch_size_is_refused(teacher):
    decoder = Decoder(StudentFactory("gla").build(teacher, seed=0).eval())
    decoder.prefill(some_tokens(teacher))
    with pytest.raises(InputError, match="1 prompts, where this Decoder's buffers hold 2"):
        decoder.prefill(some_tokens(teacher, rows=1))


def test_what_a_decoder_does_not_take_is_one_line(teacher, save_model):
    model, prompt = StudentFactory("gla").build(teacher, seed=0).eval(), some_tokens(teacher)
    for wrong, message in [
        (lambda: Decoder(model, temperature=-1.0), "temperature -1.0"),
        (lambda: Decoder(model, temperature=float("nan")), "temperature nan"),
        (lambda: Decoder(model, top_k=-1), "top_k -1"),
        (lambda: Decoder(model).step(), "step: no prompt has been read"),
        (lambda: Decoder(model, chunk=-1), "chunk -1"),
        (lambda: Decoder(model).prefill(prompt[:, :0]), r"prompt \[2, 0\]"),
        (lambda: Decoder(model).prefill(prompt[0]), r"prompt \[20\]"),
        (lambda: Decoder(Teacher(str(save_model("gpt2"))).model, max_length=9), "a Decoder's results would differ .*GPT2"),
    ]:
        with pytest.raises(InputError, match=message) as refusal:
            wrong()
        assert "\n" not in str(refusal.value)
    assert not list(Decoder(model).generate(prompt, 0)) and len(list(Decoder(model).generate(prompt, 2))) == 2


def test_unsupported_reason_names_what_is_unsupported(teacher, save_model):
    assert unsupported_reason(teacher.model, 10**6) is None
    assert unsupported_reason(StudentFactory("gla").build(teacher, seed=0), 10**6) is None
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for changes, reason in [
        ({"model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding window of 32"),
        ({"model_type": "llama", "rope_parameters": dynamic}, "rope_type dynamic"),
    ]:
        assert reason in unsupported_reason(Teacher(str(save_model(**changes))).model, 33)
    changed = StudentFactory("gla").build(teacher, seed=0)
    changed.model.layers[0].self_attn.q_proj = torch.nn.Sequential(changed.model.layers[0].self_attn.q_proj)  # as LoRA does
    with pytest.raises(InputError, match="modules were changed, e.g. by LoRA"):
        Decoder(changed).prefill(some_tokens(teacher))
    split = StudentFactory("gla").build(teacher, seed=0)
    split.model.layers[1].to("meta")
    assert unsupported_reason(split, 33) == "its weights lie on cpu and meta"


def test_samples_follow_the_temperature(teacher):
    model, prompt = StudentFactory("gla").build(teacher, seed=0).eval(), some_tokens(teacher)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hot, again = (decoded(Decoder(model, temperature=5.0), prompt) for _ in range(2))
        cold = decoded(Decoder(model, temperature=1e-4), prompt)
        narrow = decoded(Decoder(model, temperature=5.0, top_k=1), prompt)
    assert not torch.equal(hot, again)
    assert torch.equal(cold, plain(model, prompt)) and torch.equal(narrow, cold)


@pytest.mark.parametrize("mixer", ["gla", "softmax"])
def test_continue_prompt_is_generate(teacher, mixer):
    model = as_transformer(StudentFactory(mixer).build(teacher, seed=0)).eval()
    prompt = some_tokens(teacher, rows=1)
    for end_tokens in (None, [3, int(plain(model, prompt)[0, 5])]):
        model.generation_config.eos_token_id = end_tokens
        expected = model.generate(prompt, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
        assert torch.equal(continue_prompt(model, prompt, STEPS, temperature=0.0), expected)
        assert (expected.shape[1] == 20 + STEPS) == (end_tokens is None)
    model.generation_config.repetition_penalty = 1.5
    assert continue_prompt(model, prompt, STEPS, temperature=0.0) is None
