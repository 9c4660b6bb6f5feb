"""The teacher's taps are what transformers computes, and a folder that is no teacher is refused in one line."""

import gc
import json
import shutil

import pytest
import torch
from helpers import some_tokens
from op_inputs import relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distill_pl.errors import InputError
from distill_pl.ops import softmax
from distill_pl.teacher import Teacher


@pytest.mark.parametrize("length", [1, 30])
def test_taps_reproduce_eager_attention(any_teacher, length):
    eager = AutoModelForCausalLM.from_pretrained(any_teacher.path, attn_implementation="eager").eval()
    tokens = some_tokens(any_teacher, length=length)
    with torch.no_grad():
        expected = eager(tokens, output_attentions=True).attentions
    layers = list(any_teacher.layers(tokens))
    assert len(layers) == len(expected) == 2
    for layer, attention in zip(layers, expected, strict=True):
        assert layer.query.shape[2] == any_teacher.config.num_attention_heads
        assert layer.key.shape[2] == any_teacher.config.num_key_value_heads
        assert (softmax.matrix(layer.query, layer.key, layer.scale) - attention).abs().max() < 1e-6
    if length > 1:
        last = expected[0][:, :, -1]
        assert last.max() > 3 * last.mean()  # far from uniform: an error in q or k would show


def test_hidden_states_are_those_of_transformers(any_teacher):
    model = AutoModelForCausalLM.from_pretrained(any_teacher.path).eval()
    tokens = some_tokens(any_teacher, length=30)
    with torch.no_grad():
        expected = model.model(tokens, output_hidden_states=True)
        logits = model(tokens).logits
    hidden = any_teacher.hidden_states(tokens)
    assert relative_error(hidden, expected.last_hidden_state) < 1e-5
    assert relative_error(any_teacher.head(hidden), logits) < 1e-5
    for layer, state in zip(any_teacher.layers(tokens), expected.hidden_states, strict=False):
        assert relative_error(layer.input, state) < 1e-5


def test_a_layer_sees_what_the_one_before_it_made(any_teacher):
    tokens = some_tokens(any_teacher, length=30)
    layers = list(any_teacher.layers(tokens))
    assert torch.equal(layers[0].input, any_teacher.model.model.embed_tokens(tokens))
    for before, layer in zip(layers, layers[1:], strict=False):
        assert torch.equal(layer.input, before.output)
    assert relative_error(any_teacher.model.model.norm(layers[-1].output), any_teacher.hidden_states(tokens)) < 1e-6


def test_position_is_ropes_table(teacher):
    layer = next(teacher.layers(some_tokens(teacher, length=30)))
    angle = torch.arange(30)[:, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    for table, expected in zip(layer.position, (angle.cos(), angle.sin()), strict=True):
        torch.testing.assert_close(table[0], torch.cat([expected, expected], -1), rtol=1e-5, atol=1e-5)


def test_nothing_requires_a_gradient(teacher):
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training
    for layer in teacher.layers(some_tokens(teacher, length=30)):
        tensors = (layer.input, layer.output, layer.query, layer.key, *layer.position)
        assert not any(tensor.requires_grad for tensor in tensors)
    assert not teacher.hidden_states(some_tokens(teacher, length=30)).requires_grad


@pytest.mark.parametrize("enabled", [True, False])
def test_the_consumers_gradient_mode_is_its_own(teacher, enabled):
    weight = torch.ones(3, requires_grad=True)
    with torch.set_grad_enabled(enabled):
        for _ in teacher.layers(some_tokens(teacher, length=30)):
            assert torch.is_grad_enabled() == enabled
            assert (weight * 2).requires_grad == enabled
        abandoned = teacher.layers(some_tokens(teacher, length=30))
        next(abandoned)
        del abandoned
        gc.collect()
        teacher.hidden_states(some_tokens(teacher, length=30))
        assert torch.is_grad_enabled() == enabled


def test_two_passes_at_once_do_not_mix(teacher):
    tokens, other = some_tokens(teacher, length=30), some_tokens(teacher, length=11)
    expected = [list(teacher.layers(batch)) for batch in (tokens, other)]
    for index, pair in enumerate(zip(teacher.layers(tokens), teacher.layers(other), strict=True)):
        for layer, alone in zip(pair, (pass_[index] for pass_ in expected), strict=True):
            assert torch.equal(layer.query, alone.query)
            assert torch.equal(layer.output, alone.output)


def test_nothing_of_a_pass_stays_with_the_model(teacher):
    list(teacher.layers(some_tokens(teacher, length=30)))
    teacher.model(some_tokens(teacher, length=30))
    for module in teacher.model.modules():
        assert getattr(module, "tapped", None) is None


def test_the_model_minds_padding_before_and_after_being_tapped(teacher_folder):
    teacher = Teacher(str(teacher_folder))
    tokens = some_tokens(teacher, length=30)
    mask = torch.arange(30).expand(2, 30) >= 4

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return teacher.model(tokens, attention_mask=mask.long()).logits[:, 4:]

    expected = logits()
    list(teacher.layers(tokens))
    assert relative_error(logits(), expected) < 1e-5


def test_bf16_teacher(teacher_folder, teacher):
    half = Teacher(str(teacher_folder), torch.bfloat16)
    tokens = some_tokens(teacher, length=30)
    assert half.hidden_states(tokens).dtype == torch.bfloat16
    assert relative_error(half.hidden_states(tokens).float(), teacher.hidden_states(tokens)) < 0.1


# ---- refusals


@pytest.fixture
def folder(teacher_folder, tmp_path):
    """Copy a teacher folder, to be broken by a test."""
    return shutil.copytree(teacher_folder, tmp_path / "teacher")


def refusal(path) -> str:
    with pytest.raises(InputError) as error:
        Teacher(str(path))
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_an_absent_folder_is_refused(tmp_path):
    refusal(tmp_path / "nowhere")


def test_a_folder_without_a_configuration_is_refused(folder):
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("content", ["{}", "{", '{"model_type": "no_such_model"}'])
def test_a_configuration_that_cannot_be_read_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    refusal(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    assert "tokenizer" in refusal(folder)


def test_a_tokenizer_without_an_end_of_text_is_refused(folder):
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("eos_token")
    file.write_text(json.dumps(settings))
    for special in folder.glob("special_tokens_map.json"):
        special.unlink()
    assert "eos_token" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refusal(folder)


def test_a_folder_without_one_of_its_weights_is_refused(folder):
    """transformers itself draws missing weights at random and goes on."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)
