"""The teacher's taps are what transformers computes, and a folder that is no teacher is refused in one line."""

import functools
import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import STEP, some_tokens
from op_inputs import relative_error
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from distill_pl import teacher as teacher_module
from distill_pl.decoding import Decoder
from distill_pl.errors import InputError
from distill_pl.mixers import MIXERS
from distill_pl.ops import softmax
from distill_pl.student import factory as factory_module
from distill_pl.student.factory import StudentFactory, check_teacher
from distill_pl.student.transfer import as_transformer, expand_kv
from distill_pl.teacher import Teacher, shallow_copy, ties_embeddings


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


def test_a_path_or_a_dtype_of_another_kind(teacher_folder, tmp_path):
    assert Teacher(Path(teacher_folder)).path == str(teacher_folder)
    with pytest.raises(InputError, match="nowhere' is no folder with a config.json"):
        Teacher(tmp_path / "nowhere")
    with pytest.raises(InputError, match="dtype 'bf16' is no torch.dtype"):
        Teacher(str(teacher_folder), "bf16")


def test_a_student_is_no_teacher(teacher, tmp_path):
    StudentFactory("gla").build(teacher, 0).save_pretrained(tmp_path)
    assert "is a student of this package: give the teacher that it was distilled from" in refusal(tmp_path)


def test_a_folder_without_a_configuration_is_refused(folder):
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("content", ["{}", "{", '{"model_type": "no_such_model"}'])
def test_a_configuration_that_cannot_be_read_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    assert "its config.json cannot be used" in refusal(folder)


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


def test_weights_that_the_architecture_has_no_place_for_are_refused(folder):
    """transformers itself leaves them out."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # older versions of transformers saved these
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Teacher(str(folder))
    change_config(folder, num_hidden_layers=1)
    line = refusal(folder)
    assert "has 9 weights that are none of the model of its config.json (model.layers.1." in line and "mend config.json" in line


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_a_quantised_teacher_is_refused_with_or_without_its_library(folder, method):
    change_config(folder, quantization_config={"quant_method": method})
    assert method in refusal(folder)


@pytest.mark.parametrize(("changes", "says"), [
    ({"num_attention_heads": 0}, "mend it"), ({"hidden_act": "none"}, "none"), ({"rope_parameters": 3}, "rope_parameters"),
    ({"num_hidden_layers": "two"}, "'num_hidden_layers' expected int, got str (value: 'two')): mend it"),
], ids=str)  # fmt: skip
def test_wrong_values_in_a_configuration_are_refused(folder, changes, says):
    change_config(folder, **changes)
    assert says in refusal(folder)


def test_token_ids_beyond_the_embedding_are_refused(folder, teacher):
    """The largest id counts, as ids may have gaps."""
    rows = teacher.config.vocab_size
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["added_tokens"].append(settings["added_tokens"][0] | {"id": rows + 5, "content": "<|far|>"})
    settings["model"]["vocab"]["<|far|>"] = rows + 5
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    message = refusal(folder)
    assert f"ids up to {rows + 5}" in message and f"{rows} rows" in message


def change_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- the check that a softmax student computes what its teacher does


MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 4.0}
HALF_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
EXACT = {  # model type -> configuration
    "olmo2": {},  # norms after attention and MLP, q and k norms of all heads together
    "olmo3": TWO_KINDS,
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},  # with a window, the others have no RoPE
    "gemma": {},  # scaled embeddings, norms that add 1 to their weight
    "gemma3_text": TWO_KINDS | {"query_pre_attn_scalar": 16},  # two kinds of RoPE
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": MULTIPLIERS,
    "phi3": HALF_ROPE,  # q, k and v in one projection
    "stablelm": {"use_qkv_bias": True} | HALF_ROPE,
    "starcoder2": {"residual_dropout": 0.5},
    "ministral": {},
    "mixtral": MOE | {"router_jitter_noise": 0.5},
    "phimoe": MOE,  # draws experts at random in training
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},  # its sliding_window is 0 where it has none
    "qwen3_moe": MOE,
    "olmoe": MOE,
    "granitemoe": MOE | MULTIPLIERS,
    "exaone_moe": MOE
    | {"mlp_layer_types": ["dense", "sparse"], "sliding_window": 64, "layer_types": ["sliding_attention"] * 2},
}
TRAINED = ["olmo2", "gemma", "gemma3_text", "smollm3", "granite", "phi3", "stablelm", "mixtral", "qwen2_moe"]
REFUSED = {
    "bloom": {},
    "cohere": {},
    "deepseek_v3": {"n_group": 1, "topk_group": 1},
    "exaone4": TWO_KINDS,
    "falcon_mamba": {},
    "gemma2": {},
    "gemma3_text": {"final_logit_softcapping": 30.0},
    "glm": {},
    "gpt_neox": {},
    "helium": {},
    "ministral3": {},
    "olmo": {"clip_qkv": 8.0},
    "opt": {},
    "phi": {},
}


@pytest.fixture(scope="session")
def exact(save_model):
    """Return `exact(model_type)`, which makes a teacher of EXACT with random biases and norm weights, once each."""
    return functools.cache(lambda model_type: Teacher(str(save_model(model_type, 1, True, **EXACT[model_type]))))


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


@pytest.mark.parametrize("model_type", EXACT)
def test_architectures_whose_softmax_student_is_exact(exact, model_type, tmp_path):
    teacher = exact(model_type)
    tokens = some_tokens(teacher, length=60)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(teacher.path, attn_implementation="eager").eval(), tokens)
    check_teacher(Teacher(teacher.path, torch.bfloat16))
    assert relative_error(teacher.head(teacher.hidden_states(tokens)), expected) < 1e-5
    for kv_heads in ("grouped", "expanded"):
        student = StudentFactory("softmax", kv_heads=kv_heads).build(teacher, 0)
        for ready in (student, student.eval(), student.train()):  # in training, too, without dropout and noise
            assert relative_error(logits_of(ready, tokens), expected) < 1e-5
    as_transformer(student).save_pretrained(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(exported) is type(teacher.model)
    assert relative_error(logits_of(exported, tokens), expected) < 1e-5
    if model_type in TRAINED:
        assert_decoded_as_generated(exported, tokens[:1, :20])


def assert_decoded_as_generated(model, prompt: torch.Tensor) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    decoded = Decoder(model, prompt.shape[1] + 8, backend=None).generate(prompt, 8)
    assert torch.equal(torch.cat([prompt, *decoded], 1), model.generate(prompt, **options))


@pytest.mark.parametrize("model_type", EXACT)
def test_their_other_students_get_their_projections(exact, model_type, tmp_path):
    teacher = exact(model_type)
    student = StudentFactory("gla").build(teacher, 0).eval()
    heads, groups = teacher.config.num_attention_heads, teacher.config.num_key_value_heads
    for mixer, layer in zip(student.mixers, teacher.model.model.layers, strict=True):
        if hasattr(layer.self_attn, "qkv_proj"):
            rows = [heads * mixer.key_dim, groups * mixer.key_dim, groups * mixer.key_dim]
            q, k, v = layer.self_attn.qkv_proj.weight.split(rows)
        else:
            q, k, v = (getattr(layer.self_attn, f"{part}_proj").weight for part in "qkv")
        assert torch.equal(mixer.q_proj.weight, q)
        assert torch.equal(mixer.k_proj.weight, expand_kv(k, heads, groups))
        assert torch.equal(mixer.v_proj.weight, expand_kv(v, heads, groups))
        assert torch.equal(mixer.o_proj.weight, layer.self_attn.o_proj.weight)
    student.save_pretrained(tmp_path)
    loaded, tokens = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), some_tokens(teacher)
    assert torch.equal(logits_of(loaded, tokens), logits_of(student, tokens))


@pytest.mark.parametrize("model_type", EXACT)
def test_their_students_from_scratch_are_drawn_as_the_teachers_class_draws(exact, model_type):
    teacher = exact(model_type)
    student = StudentFactory("gla", init="scratch").build(teacher, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = dict(AutoModelForCausalLM.from_config(teacher.config).named_parameters())
    for name, parameter in student.named_parameters():
        if ".self_attn." not in name:
            mean, std = drawn[name].mean().item(), drawn[name].std().item()
            assert parameter.mean().item() == pytest.approx(mean, abs=0.05), name
            assert parameter.std().item() == pytest.approx(std, rel=0.3, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "mixer"), [*((model_type, "gla") for model_type in TRAINED), ("phi3", "softmax")])
def test_they_are_distilled_in_all_stages(exact, fitted, model_type, mixer):
    keys = {"tokens": 6 * STEP, "matrix_mixing.tokens": 2 * STEP, "hidden_align.tokens": 2 * STEP, "student.mixer": mixer}
    run = fitted(**keys, teacher=exact(model_type).path)
    model, prompt = AutoModelForCausalLM.from_pretrained(run / "student").eval(), some_tokens(exact(model_type), rows=1)
    assert logits_of(model, prompt).isfinite().all()
    assert_decoded_as_generated(model, prompt)


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_architectures_are_refused_by_name(save_model, model_type):
    folder = save_model(model_type, **REFUSED[model_type])
    with pytest.raises(InputError) as error:
        StudentFactory("gla").build(Teacher(str(folder)), 0)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    assert "\n" not in str(error.value) and architecture in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_leaves_the_teacher_as_it_was(teacher_folder, dtype):
    teacher = Teacher(str(teacher_folder), dtype)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    config, layers = teacher.model.config.to_dict(), list(teacher.model.model.layers)
    check_teacher(teacher)
    assert all(torch.equal(tensor, before.pop(name)) for name, tensor in teacher.model.state_dict().items()) and not before
    assert teacher.model.config.to_dict() == config and teacher.config.num_hidden_layers == 2
    assert list(teacher.model.model.layers) == layers
    assert teacher.model.dtype == dtype and teacher.model.config._attn_implementation == "sdpa"


def test_a_check_sees_every_kind_of_layer(save_model):
    teacher = Teacher(str(save_model("qwen2", num_hidden_layers=6)))
    assert len(shallow_copy(teacher).model.model.layers) == 2
    teacher.model.model.layers[3].self_attn.scaling *= 1.1
    shallow = shallow_copy(teacher)
    assert len(shallow.model.model.layers) == shallow.config.num_hidden_layers == len(shallow.config.layer_types) == 4
    with pytest.raises(InputError, match="attention scales"):
        check_teacher(teacher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_scale_that_differs_in_one_layer_is_refused(teacher_folder, dtype):
    teacher = Teacher(str(teacher_folder), dtype)
    teacher.model.model.layers[1].self_attn.scaling *= 1.1
    with pytest.raises(InputError, match="LlamaForCausalLM.*attention scales"):
        check_teacher(teacher)


def test_weights_without_a_place_are_refused(teacher_folder):
    teacher = Teacher(str(teacher_folder))
    teacher.model.model.layers[1].self_attn.indexer = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"no place for model\.layers\.1\.self_attn\.indexer"):
        check_teacher(teacher)


def test_a_bias_of_zero_cannot_hide(teacher_folder):
    teacher = Teacher(str(teacher_folder))
    teacher.model.lm_head.bias = nn.Parameter(torch.zeros(teacher.config.vocab_size))
    with pytest.raises(InputError, match=r"lm_head\.bias"):
        check_teacher(teacher)


def test_a_norm_of_one_cannot_hide(teacher_folder, monkeypatch):
    copy_weights = factory_module.copy_weights
    monkeypatch.setattr(factory_module, "copy_weights", lambda *args, **options: [
        name for name in copy_weights(*args, **options) if "post_attention_layernorm" not in name
    ])  # fmt: skip
    with pytest.raises(InputError, match="layer outputs"):
        check_teacher(Teacher(str(teacher_folder)))


def test_taps_that_are_not_the_models_own_are_refused(teacher_folder, monkeypatch):
    run_layer = teacher_module.run_layer

    def wrong(layer, hidden, position, with_mixed):
        output, query, key, scale, mixed = run_layer(layer, hidden, position, with_mixed)
        return output, query, 1.01 * key, scale, mixed

    monkeypatch.setattr(teacher_module, "run_layer", wrong)
    with pytest.raises(InputError, match="keys"):
        check_teacher(Teacher(str(teacher_folder)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        check_teacher(Teacher(str(folder)))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_head_of_its_own_is_not_tied_whatever_the_configuration_says(folder, mixer):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    teacher = Teacher(str(folder))
    assert teacher.config.tie_word_embeddings and not ties_embeddings(teacher.model)
    student = StudentFactory(mixer).build(teacher, 0)
    assert not student.config.tie_word_embeddings
    assert torch.equal(student.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert torch.equal(student.lm_head.weight, weights["lm_head.weight"])
