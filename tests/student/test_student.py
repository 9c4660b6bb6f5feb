"""The softmax student computes its teacher's logits, and every student does what transformers asks of its models."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import some_tokens
from op_inputs import relative_error
from shared_fixtures import in_turn
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from distill_pl.errors import InputError
from distill_pl.mixers import MIXERS
from distill_pl.stages import KDStage
from distill_pl.student.cache import CACHE, StudentCache, state_bytes
from distill_pl.student.factory import StudentFactory, check_teacher
from distill_pl.student.modeling import Student, StudentConfig
from distill_pl.student.transfer import as_transformer
from distill_pl.teacher import Teacher

ATTENTION = ".self_attn."
NEW_TOKENS = 5


def build(teacher: Teacher, name: str, seed: int = 3, **options) -> Student:
    """Build a frozen student; with some other seeds, students amplify rounding beyond the bounds of these tests."""
    return StudentFactory(name, **options).build(teacher, seed).eval().requires_grad_(False)


@torch.no_grad()
def logits_of(model, tokens: Tensor, **options) -> Tensor:
    return model(tokens, **options).logits


# ---- the teacher's weights


def test_softmax_student_is_its_teacher(any_teacher, kv_heads):
    student = build(any_teacher, "softmax", kv_heads=kv_heads)
    fresh = build(any_teacher, "softmax", init="fresh", kv_heads=kv_heads)
    for length in (1, 100):
        tokens = some_tokens(any_teacher, length=length)
        expected = logits_of(any_teacher.model, tokens)
        assert relative_error(logits_of(student, tokens), expected) < 1e-5
        assert relative_error(logits_of(fresh, tokens), expected) > 0.05


def test_a_student_with_a_window_of_the_whole_sequence_is_its_teacher(any_teacher, kv_heads):
    student, tokens = build(any_teacher, "swa", window=20, kv_heads=kv_heads), some_tokens(any_teacher, length=40)
    expected, within = logits_of(any_teacher.model, tokens), logits_of(student, tokens)
    assert relative_error(within[:, :20], expected[:, :20]) < 1e-5
    assert relative_error(within[:, -1:], expected[:, -1:]) > 1e-3


def test_supported_teachers_are_accepted(any_teacher):
    check_teacher(any_teacher)


REFUSED = {  # class name -> configuration
    "GPT2LMHeadModel": {"model_type": "gpt2"},
    "GlmForCausalLM": {"model_type": "glm"},
    "Gemma3ForCausalLM": {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
}


@pytest.mark.parametrize("class_name", REFUSED)
def test_other_architectures_are_refused_by_name(save_model, class_name):
    folder = save_model(**REFUSED[class_name])
    with pytest.raises(InputError, match=class_name) as refusal:
        check_teacher(Teacher(str(folder)))
    assert "\n" not in str(refusal.value)


def test_within_a_sliding_window_attention_is_plain(save_model):
    """`fit` refuses sequences longer than the window, as attention differs from the first token beyond it."""
    teacher = Teacher(str(save_model("mistral", sliding_window=32)))
    check_teacher(teacher)
    student, tokens = build(teacher, "softmax"), some_tokens(teacher, length=33)
    within, beyond = logits_of(teacher.model, tokens[:, :32]), logits_of(teacher.model, tokens)
    assert relative_error(logits_of(student, tokens[:, :32]), within) < 1e-5
    assert relative_error(logits_of(student, tokens)[:, -1:], beyond[:, -1:]) > 1e-3
    assert relative_error(teacher.head(teacher.hidden_states(tokens[:, :32])), within) < 1e-5


def test_a_student_that_is_no_transformer_is_refused_as_teacher(teacher, tokenizer, tmp_path):
    build(teacher, "gla").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError):
        check_teacher(Teacher(str(tmp_path)))


@pytest.mark.parametrize(
    ("init", "kv_heads"), [("qkv", "grouped"), ("qkv", "expanded"), ("fresh", "expanded"), ("scratch", "grouped")]
)
def test_init_copies_what_it_says(teacher_and_name, init, kv_heads):
    any_teacher, name = teacher_and_name
    student = build(any_teacher, name, init=init, kv_heads=kv_heads)
    teacher = any_teacher.model.state_dict()
    heads, kept = any_teacher.config.num_attention_heads, any_teacher.config.num_key_value_heads
    for key, tensor in student.state_dict().items():
        expected = teacher.get(key)
        if ATTENTION in key:
            part = key.split(ATTENTION)[1].split("_")[0]
            copied = init == "qkv" and part in MIXERS[name].copies and ("_proj." in key or f"{part}_norm." in key)
        else:
            copied = init != "scratch"
        if expected is not None and expected.shape != tensor.shape:
            by_head = expected.unflatten(0, (kept, -1))
            expected = torch.cat([by_head[head * kept // heads] for head in range(heads)])
        assert (expected is not None and torch.equal(tensor, expected)) == copied, key


def test_grouped_and_expanded_kv_heads_start_as_one_model(variant, name):
    if not {"k", "v"} <= set(MIXERS[name].copies):
        pytest.skip("k or v is not the teacher's")
    teacher = variant("llama_bias")
    grouped, expanded = (build(teacher, name, kv_heads=kind) for kind in ("grouped", "expanded"))
    target = expanded.state_dict()
    for key, tensor in grouped.state_dict().items():
        if tensor.shape == target[key].shape:
            target[key].copy_(tensor)
    tokens = some_tokens(teacher)
    assert relative_error(logits_of(expanded, tokens), logits_of(grouped, tokens)) < 1e-5


@pytest.mark.parametrize(("kv_heads", "counts"), [(None, [2, 4]), ("grouped", [2, 2]), ("expanded", [4, 4])])
def test_a_kept_layer_has_the_teachers_kv_heads_unless_told_otherwise(teacher, kv_heads, counts):
    student = build(teacher, "gla", softmax_layers=[0], kv_heads=kv_heads)
    assert [mixer.kv_count for mixer in student.mixers] == counts
    student.config.softmax_kv_heads = 0  # as in a student that was saved before this key existed
    assert [mixer.kv_count for mixer in Student(student.config).mixers] == [counts[1], counts[1]]


@pytest.mark.parametrize("init", ["qkv", "fresh", "scratch"])
def test_the_seed_makes_the_student(teacher, name, init):
    start = torch.get_rng_state()
    first, again, other = (build(teacher, name, seed, init=init).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), start)
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = {key for key in first if not torch.equal(first[key], other[key])}
    if init == "scratch":
        assert {key for key in first if key.endswith("proj.weight")} <= drawn
    elif init == "fresh":
        assert {key for key in first if ATTENTION in key and key.endswith("proj.weight")} <= drawn
    all_copied = ("softmax", "rebased", "hedgehog", "swa")  # with init qkv, no weights of these are random
    assert (not drawn) == (name in all_copied and init == "qkv")


def test_bad_options_are_refused():
    for options, message in [
        ({"mixer": "gla", "shape": "paper"}, "cannot take the teacher's projections"),
        ({"mixer": "delta_net", "shape": "paper", "kv_heads": "grouped"}, "student.kv_heads grouped"),
        ({"mixer": "metala", "init": "fresh", "shape": "paper", "rope": True}, "student.rope true"),
        ({"mixer": "gla", "sinks": 4}, "student.sinks 4 without a window"),
        ({"mixer": "softmax", "window": 8}, "student.window 8: softmax attends to every token"),
        ({"mixer": "delta_net", "retention": 0.9}, "student.retention 0.9: delta_net has no decay gate"),
        ({"mixer": "metala", "window": 8}, "student.window 8: metala has no key projection"),
        ({"mixer": "retnet", "init": "fresh", "shape": "paper", "window": 8}, "student.window 8 needs heads like"),
    ]:
        with pytest.raises(InputError, match=message):
            StudentFactory(**options)
    for key, option in [("mixer", "hgrn3"), ("init", "calibrated"), ("backend", "fla")]:
        if (key, torch.cuda.is_available()) == ("backend", True):
            continue
        with pytest.raises(InputError, match=f"student.{key} {option!r}|student.{key} {option}"):
            StudentFactory(**{key: option})


@pytest.mark.parametrize(("changes", "says"), [
    ({"mixer": "hgrn3"}, "mixer 'hgrn3' is unknown: update distill_pl"),
    ({"teacher": None}, "without a teacher's is no student's"),
])  # fmt: skip
def test_a_configuration_of_no_student_is_refused(teacher, changes, says):
    config = StudentFactory("gla").config(teacher)
    with pytest.raises(InputError, match=says):
        Student(StudentConfig(**config.to_dict() | changes))


def test_a_teachers_folder_is_no_students(teacher_folder):
    with pytest.raises(InputError, match="is no student's"):
        Student.from_pretrained(teacher_folder)


# ---- transformers' interface


def test_saved_and_loaded_is_identical(variant, name_and_layout, tmp_path):
    check_saved_and_loaded(variant("qwen3"), *name_and_layout, tmp_path)


@pytest.mark.parametrize("shape", ["llama", "llama_untied", "llama_scaled_rope"])
@pytest.mark.parametrize("mixer", ["softmax", "gla"])
def test_saved_and_loaded_is_identical_for_other_teachers(variant, mixer, shape, tmp_path):
    check_saved_and_loaded(variant(shape), mixer, {"kv_heads": "grouped"}, tmp_path)


def check_saved_and_loaded(teacher: Teacher, name: str, layout: dict, tmp_path: Path) -> None:
    student, tokens = build(teacher, name, init="fresh", **layout), some_tokens(teacher, length=100)
    generator = torch.Generator().manual_seed(8)
    for parameter in student.parameters():  # else a start value could pass for a loaded one
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is Student
    assert loaded.dtype == torch.float32
    saved = student.state_dict()
    assert all(torch.equal(tensor, saved.pop(key)) for key, tensor in loaded.state_dict().items()) and not saved
    assert torch.equal(logits_of(loaded, tokens), logits_of(student, tokens))
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == (teacher.config.tie_word_embeddings and "shape" not in layout)


def test_bf16_is_fp32_to_rounding(teacher, name, tmp_path):
    student, tokens = build(teacher, name), some_tokens(teacher)
    student.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    expected = logits_of(student, tokens)
    assert relative_error(logits_of(half, tokens), expected) < 0.1
    cache, outputs = StudentCache(len(half.mixers)), []
    for token in tokens.unbind(1):
        outputs.append(logits_of(half, token[:, None], past_key_values=cache))
    assert relative_error(torch.cat(outputs, 1), expected) < 0.1


def generate(student: Student, tokens: Tensor, mask: Tensor | None = None, **options):
    return student.generate(
        tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask, do_sample=False, pad_token_id=0,
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True,
        output_scores=True, **options,
    )  # fmt: skip


def test_greedy_generation_with_a_cache_is_that_without(teacher, name_and_layout):
    name, layout = name_and_layout
    student, tokens = build(teacher, name, init="fresh", **layout), some_tokens(teacher, rows=3, length=9)
    cached, uncached = (generate(student, tokens, use_cache=use_cache) for use_cache in (True, False))
    assert isinstance(cached.past_key_values, StudentCache)
    assert cached.past_key_values.get_seq_length() == 9 + NEW_TOKENS - 1
    assert uncached.get("past_key_values") is None
    assert cached.sequences.shape == (3, 9 + NEW_TOKENS)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert relative_error(torch.stack(cached.logits), torch.stack(uncached.logits)) < 1e-5
    whole = logits_of(student, cached.sequences)[:, 8:-1]
    assert relative_error(torch.stack(cached.logits, 1), whole) < 1e-5


def test_beam_search_with_a_cache_is_that_without(teacher, name):
    check_beam_search(build(teacher, name, kv_heads="grouped"), some_tokens(teacher, rows=3, length=9))


@pytest.mark.parametrize("mixer", ["swa", "gla"])
def test_beam_search_with_a_window(teacher, mixer):
    check_beam_search(build(teacher, mixer, window=4, sinks=2), some_tokens(teacher, rows=3, length=9))


def check_beam_search(student: Student, tokens: Tensor) -> None:
    cached, uncached = (generate(student, tokens, num_beams=3, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert relative_error(cached.sequences_scores, uncached.sequences_scores) < 1e-5
    came_from = cached.beam_indices[cached.beam_indices >= 0].unique()
    assert len(came_from) > 3  # rows were reordered


@in_turn(("beams", "kv_heads"), (1, "grouped"), (3, "expanded"))
def test_left_padding_changes_nothing(teacher, name, kv_heads, beams):
    student = build(teacher, name, kv_heads=kv_heads)
    rows = [some_tokens(teacher, 1, length, seed=length)[0] for length in (3, 12, 7)]
    longest = max(len(row) for row in rows)
    batch = torch.stack([torch.cat([row.new_full((longest - len(row),), 9), row]) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    logits = logits_of(student, batch, attention_mask=mask)
    together = generate(student, batch, mask, num_beams=beams)
    for index, row in enumerate(rows):
        alone = generate(student, row[None], num_beams=beams)
        assert relative_error(logits[index, longest - len(row) :], logits_of(student, row[None])[0]) < 1e-5
        assert torch.equal(together.sequences[index, longest:], alone.sequences[0, len(row) :])
    unmasked = logits_of(student, batch)
    assert relative_error(unmasked[0, longest - 3 :], logits[0, longest - 3 :]) > 1e-2  # the mask is needed


def test_labels_give_the_shifted_cross_entropy(teacher, name):
    student, tokens = build(teacher, name), some_tokens(teacher)
    labels = tokens.clone()
    labels[0, :7] = labels[1, 12] = -100
    output = student(tokens, labels=labels)
    picked = [(row, time) for row in range(2) for time in range(19) if labels[row, time + 1] != -100]
    losses = [cross_entropy(output.logits[row, time], tokens[row, time + 1]) for row, time in picked]
    assert output.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_the_loss_is_divided_by_the_items_of_the_whole_batch(teacher):
    """Trainer gives num_items_in_batch where gradients are accumulated; 2 rows of 20 tokens have 38 labels."""
    student, tokens = build(teacher, "gla"), some_tokens(teacher)
    assert student.loss_type == "ForCausalLM"  # known, or transformers warns
    loss, share = student(tokens, labels=tokens).loss, student(tokens, labels=tokens, num_items_in_batch=76).loss
    assert share.item() == pytest.approx(loss.item() / 2, rel=1e-5)


def test_hidden_states_and_attentions_are_the_teachers(variant):
    teacher = variant("qwen3")
    model, student = AutoModelForCausalLM.from_pretrained(teacher.path, attn_implementation="eager"), build(teacher, "softmax")
    asked, tokens = {"output_hidden_states": True, "output_attentions": True}, some_tokens(teacher)
    expected, got, as_tuple = model(tokens, **asked), student(tokens, **asked), student(tokens, return_dict=False, **asked)
    student.config.output_hidden_states = True
    configured = student(tokens)
    for name, count in [("hidden_states", 3), ("attentions", 2)]:
        assert len(got[name]) == len(expected[name]) == count
        assert all(relative_error(*pair) < 1e-5 for pair in zip(got[name], expected[name], strict=True))
    assert torch.equal(configured.hidden_states[2], got.hidden_states[2]) and configured.attentions is None
    assert torch.equal(student.lm_head(got.hidden_states[-1]), got.logits)
    assert type(as_tuple) is tuple and torch.equal(as_tuple[0], got.logits) and len(as_tuple) == 4
    assert student(tokens, output_hidden_states=False).hidden_states is None


def test_attentions_are_causal_and_ignore_padding(teacher, name):
    student, row = build(teacher, name, init="fresh"), some_tokens(teacher, rows=1, length=9)
    padded, mask = torch.cat([torch.full((1, 3), 9), row], 1), (torch.arange(12) >= 3)[None]
    alone = student(row, output_attentions=True).attentions
    for got, expected in zip(student(padded, mask, output_attentions=True).attentions, alone, strict=True):
        assert expected.shape == (1, teacher.config.num_attention_heads, 9, 9)
        assert not expected.triu(1).any() and relative_error(got[..., 3:, 3:], expected) < 1e-5


def test_a_given_cache_is_used_in_training_too(teacher):
    student, tokens = build(teacher, "gla", softmax_layers=[1]).train(), some_tokens(teacher)
    cache = student(tokens[:, :6], use_cache=True).past_key_values
    output = student(tokens[:, 6:], past_key_values=cache)
    assert relative_error(output.logits, student(tokens).logits[:, 6:]) < 1e-5
    assert output.past_key_values is None and cache.get_seq_length() == 20


NOT_TAKEN = {  # what a student cannot compute rightly -> (arguments of a call, the line it is refused with)
    "mask of the new tokens": ({"attention_mask": torch.ones(2, 3), "filled": 6}, r"attention_mask \[2, 3\]: give \[2, 9\]"),
    "long mask": ({"attention_mask": torch.ones(2, 4)}, r"attention_mask \[2, 4\]: give \[2, 3\]"),
    "mask of pairs": ({"attention_mask": torch.ones(2, 1, 3, 3)}, r"attention_mask \[2, 1, 3, 3\]: give \[2, 3\]"),
    "positions": ({"position_ids": torch.arange(9)[None], "filled": 6}, r"position_ids \[1, 9\]: give \[2, 3\]"),
    "packed": ({"position_ids": torch.tensor([[0, 1, 0]])}, "position_ids start again within a row"),
    "padding inside": ({"attention_mask": torch.tensor([[1, 0, 1]] * 2)}, "attention_mask has padding between tokens"),
    "packed for flash attention": ({"cu_seq_lens_q": torch.tensor([0, 1, 3])}, "position_ids start again within a row"),
    "keys and values": ({"past_key_values": DynamicCache()}, f"{CACHE} DynamicCache: give a StudentCache"),
    "cache of more layers": ({"past_key_values": StudentCache(3)}, f"{CACHE} StudentCache: .*this model"),
    "cache of one row": ({"filled": 6, "input_ids": torch.ones(3, 1).long()}, f"{CACHE} of 2 rows for 3: .*batch_repeat"),
    "attentions of the past": ({"output_attentions": True, "filled": 6}, "output_attentions: the states of 6 earlier tokens"),
    "one dimension": ({"input_ids": torch.ones(3).long()}, r"input_ids \[3\]: give \[B, T\]"),
    "no token": ({"input_ids": torch.ones(2, 0).long()}, r"input_ids \[2, 0\] hold no new token"),
    "no inputs": ({"input_ids": None}, "input_ids and inputs_embeds: give one"),
    "both inputs": ({"inputs_embeds": torch.ones(2, 3, 32)}, "input_ids and inputs_embeds: give one"),
}


@pytest.mark.parametrize("what", NOT_TAKEN)
def test_forward_refuses_what_it_would_compute_wrongly(teacher, what):
    arguments, message = NOT_TAKEN[what]
    student, tokens = build(teacher, "gla", softmax_layers=[1]), some_tokens(teacher, length=3)
    arguments = {"input_ids": tokens} | arguments
    if filled := arguments.pop("filled", None):
        arguments["past_key_values"] = student(some_tokens(teacher, length=filled)).past_key_values
    with pytest.raises(InputError, match=message) as refusal:
        student(**arguments)
    assert "\n" not in str(refusal.value)


def test_padding_on_the_right_is_no_restart(teacher):
    student, tokens = build(teacher, "retnet"), some_tokens(teacher, length=4)
    mask, positions = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3]])
    got = logits_of(student, tokens, attention_mask=mask, position_ids=positions)
    assert relative_error(got[0, :2], logits_of(student, tokens)[0, :2]) < 1e-5


def test_positions_that_are_given_are_honoured(teacher):
    """RetNet's RoPE sees distances alone: shifted positions change nothing, positions twice as far apart do."""
    student, tokens = build(teacher, "retnet"), some_tokens(teacher, length=6)
    shifted, spread = (logits_of(student, tokens, position_ids=p[None]) for p in (torch.arange(3, 9), 2 * torch.arange(6)))
    assert relative_error(shifted, logits_of(student, tokens)) < 1e-4
    assert relative_error(spread, logits_of(student, tokens)) > 1e-3


@pytest.mark.parametrize("options", [
    {"prefill_chunk_size": 4},
    {"use_cache": False},
    {"do_sample": True, "num_return_sequences": 3},
    {"num_beams": 4, "do_sample": True, "num_return_sequences": 2, "prefill_chunk_size": 5},
    {"guidance_scale": 1.5, "repetition_penalty": 1.3},
], ids=str)  # fmt: skip
def test_options_of_generate_give_the_tokens_of_whole_passes(teacher, options):
    """A hybrid's tokens from a cache, from tokens or embeddings, are those from the whole sequence anew for each token."""
    student, tokens = build(teacher, "mamba2", softmax_layers=[1]), some_tokens(teacher, length=9)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    whole = options | {"use_cache": False, "prefill_chunk_size": None}
    given = [{"inputs": tokens}]
    if not {"guidance_scale", "prefill_chunk_size"} & options.keys():  # which read input_ids
        given.append({"inputs_embeds": student.get_input_embeddings()(tokens)})
    results = []
    for arguments in ({"inputs": tokens} | whole, *(inputs | options for inputs in given)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            results.append(student.generate(**arguments)[:, -6:])
    assert all(torch.equal(result, results[0]) for result in results)


def test_generate_goes_on_from_a_cache(teacher):
    student, tokens = build(teacher, "delta_net", softmax_layers=[0]), some_tokens(teacher, length=12)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = student.generate(tokens, **options)
    for inputs, mask in [(tokens, None), (tokens[:, 7:], torch.ones_like(tokens))]:
        cache = student(tokens[:, :7]).past_key_values
        got = student.generate(inputs, attention_mask=mask, past_key_values=cache, **options)
        assert torch.equal(got[:, -4:], expected[:, -4:])


@pytest.mark.parametrize(("options", "message"), [
    ({"prompt_lookup_num_tokens": 2}, "no assisted_generation"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "no contrastive_search"),
    ({"num_beams": 4, "num_beam_groups": 2}, "no group_beam_search"),
    ({"dola_layers": "high"}, "no dola_generation"),
    ({"cache_implementation": "static"}, "cache_implementation 'static'"),
    ({"cache_implementation": "paged"}, "cache_implementation 'paged'"),
    ({"inputs": torch.ones(2, 0).long()}, r"input_ids \[2, 0\] hold no token"),
    ({"prefill_chunk_size": 4, "inputs_embeds": torch.ones(2, 9, 32)}, "prefill_chunk_size 4: .* inputs_embeds"),
], ids=str)  # fmt: skip
def test_generate_refuses_what_a_state_cannot_do(teacher, options, message):
    student = build(teacher, "gla")
    with pytest.raises(InputError, match=message):
        student.generate(**{"inputs": some_tokens(teacher), "max_new_tokens": 2} | options)
    if not {"inputs", "inputs_embeds"} & options.keys():  # nor where the model's own configuration asks for it
        vars(student.generation_config).update(options)
        with pytest.raises(InputError, match=message):
            student.generate(some_tokens(teacher), max_new_tokens=2)


def test_a_student_assists_no_model_and_takes_no_continuous_batches(teacher):
    student, tokens = build(teacher, "gla"), some_tokens(teacher, rows=1)
    with pytest.raises(InputError, match="assistant_model: a student cannot be one"):
        teacher.model.generate(tokens, assistant_model=student, max_new_tokens=4)
    with pytest.raises(InputError, match="no assisted_generation"):
        student.generate(tokens, assistant_model=teacher.model, max_new_tokens=4)
    with pytest.raises(InputError, match="continuous batching"):
        student.generate_batch(tokens.tolist())


def test_logits_to_keep(teacher, name):
    student, tokens = build(teacher, name), some_tokens(teacher)
    whole = logits_of(student, tokens)
    last, chosen = (logits_of(student, tokens, logits_to_keep=keep) for keep in (3, torch.tensor([2, 11])))
    torch.testing.assert_close(last, whole[:, -3:])
    torch.testing.assert_close(chosen, whole[:, [2, 11]])


def test_embeddings_may_stand_for_tokens(teacher, name):
    student, tokens = build(teacher, name), some_tokens(teacher)
    embeddings = student.get_input_embeddings()(tokens)
    assert torch.equal(student(inputs_embeds=embeddings).logits, logits_of(student, tokens))


def test_cache_is_made_for_inference_only(teacher, name):
    student, tokens = build(teacher, name), some_tokens(teacher)
    assert student(tokens).past_key_values.get_seq_length() == 20
    assert student(tokens, use_cache=False).past_key_values is None
    assert student.train()(tokens).past_key_values is None


def reloaded(student: Student, folder: Path, save: dict | None = None, **load) -> Student:
    student.save_pretrained(folder, **save or {})
    return AutoModelForCausalLM.from_pretrained(folder, **load).eval()


def from_its_config(student: Student, folder: Path) -> Student:
    student.config.save_pretrained(folder)
    copied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    torch.save(student.state_dict(), folder / "weights.pt")
    copied.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return copied


def with_merged_adapter(student: Student, folder: Path) -> Student:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(student, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    return adapted.merge_and_unload()  # a new adapter adds nothing


def partly_on_disk(student: Student, folder: Path) -> Student:
    pytest.importorskip("accelerate")
    places = dict.fromkeys(["model.embed_tokens", "lm_head", "model.layers.0", "model.norm", "model.rotary_emb"], "cpu")
    return reloaded(student, folder, device_map=places | {"model.layers.1": "disk"}, offload_folder=folder / "offloaded")


def through_public_setters(student: Student, folder: Path) -> Student:
    student.set_input_embeddings(student.get_input_embeddings())
    student.set_output_embeddings(student.get_output_embeddings())
    student.set_attn_implementation("eager")
    student.tie_weights()
    student.gradient_checkpointing_disable()
    student.resize_token_embeddings(student.config.vocab_size)
    return student


SAME_MODEL = {  # ways from a student to an equal one
    "sharded": lambda student, folder: reloaded(student, folder, {"max_shard_size": "40KB"}),
    "dtype auto": lambda student, folder: reloaded(student, folder, dtype="auto"),
    "fp64 and back": lambda student, folder: student.double().float(),
    "deepcopy": lambda student, folder: copy.deepcopy(student),
    "pickle": lambda student, folder: pickle.loads(pickle.dumps(student)),
    "config and state dict": from_its_config,
    "adapter": with_merged_adapter,
    "offloaded": partly_on_disk,
    "setters": through_public_setters,
}


@pytest.mark.parametrize("way", SAME_MODEL)
def test_the_student_is_the_same(variant, tmp_path, way):
    for shape in ("llama", "llama_untied"):
        student, tokens = build(variant(shape), "mamba2", softmax_layers=[1]), some_tokens(variant(shape))
        expected, size = logits_of(student, tokens), sum(x.numel() for x in student.parameters())
        same = SAME_MODEL[way](student, tmp_path / shape)
        assert type(same) is Student and torch.equal(logits_of(same, tokens), expected)
        assert same.num_parameters() == size


@pytest.mark.parametrize("shape", ["llama", "llama_untied"])
@pytest.mark.parametrize("size", [260, 310])
def test_another_vocabulary_is_saved_and_loaded(variant, tmp_path, shape, size):
    student, tokens = build(variant(shape), "gla"), some_tokens(variant(shape)) % 260
    expected = logits_of(student, tokens)
    student.resize_token_embeddings(size)
    loaded = reloaded(student, tmp_path)
    assert loaded.config.vocab_size == size and loaded.lm_head.out_features == size
    assert relative_error(logits_of(loaded, tokens)[..., :260], expected[..., :260]) < 1e-6
    assert torch.equal(logits_of(loaded, tokens), logits_of(student, tokens))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (shape == "llama")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(teacher, name, reentrant):
    student, tokens = build(teacher, name, softmax_layers=[1]).train().requires_grad_(True), some_tokens(teacher)
    student(tokens, labels=tokens).loss.backward()
    expected = {key: x.grad.clone() for key, x in student.named_parameters()}
    student.zero_grad()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with pytest.raises(InputError, match="gradient checkpointing would drop the states"):
        student(some_tokens(teacher), use_cache=True)
    recomputed = []
    student.mixers[0].register_forward_hook(lambda *unused: recomputed.append(True))
    student(tokens, labels=tokens).loss.backward()
    assert len(recomputed) == 2
    assert all(relative_error(x.grad, expected[key]) < 1e-5 for key, x in student.named_parameters())
    with pytest.raises(InputError, match=f"{CACHE}: gradient checkpointing"):
        student(tokens, past_key_values=StudentCache(2))


def test_other_implementations_of_attention_are_refused(teacher, tmp_path):
    student = build(teacher, "gla")
    student.save_pretrained(tmp_path)
    for change in (student.set_attn_implementation, lambda x: reloaded(student, tmp_path, attn_implementation=x)):
        with pytest.raises(ValueError, match="attn_implementation 'sdpa': a student attends by its mixers"):
            change("sdpa")


def test_a_layer_is_not_split_over_devices(teacher):
    assert build(teacher, "gla")._no_split_modules == {"LlamaDecoderLayer"}


@pytest.mark.parametrize(
    ("shape", "layout"), [("llama_bias", "grouped"), ("qwen3", "expanded"), ("llama", "window")], indirect=["layout"]
)
def test_distillation_reaches_every_parameter(variant, name, layout, shape):
    teacher = variant(shape)
    student = build(teacher, name, init="fresh", **layout).train()
    stage = KDStage(student, teacher)
    stage.configure_model()
    loss, _ = stage.losses(some_tokens(teacher), seed=0)
    loss.backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
        assert parameter.grad.isfinite().all(), key


def test_cache_rows_follow_the_beams(teacher, name):
    student, tokens = build(teacher, name), some_tokens(teacher, rows=3)
    following = some_tokens(teacher, rows=3, length=1, seed=6)

    def continued(change, rows: list[int]) -> tuple[Tensor, Tensor]:
        cache = student(tokens).past_key_values
        change(cache)
        got = logits_of(student, following[rows], past_key_values=cache)
        return got, logits_of(student, torch.cat([tokens, following], 1))[rows][:, -1:]

    for change, rows in [
        (lambda cache: None, [0, 1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([0, 1, 2])), [0, 1, 2]),
    ]:
        got, expected = continued(change, rows)
        assert relative_error(got, expected) < 1e-5
    cache = student(tokens).past_key_values
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    got = logits_of(student, following[:1].expand(3, 1), cache=cache)
    history = torch.cat([tokens[[2, 2, 0]], following[:1].expand(3, 1)], 1)
    assert relative_error(got, logits_of(student, history)[:, -1:]) < 1e-5
    cache.reset()
    assert cache.get_seq_length() == 0 and state_bytes(cache) == 0


# ---- a student that is softmax throughout


def test_softmax_student_becomes_its_teachers_class(any_teacher, kv_heads):
    student = build(any_teacher, "softmax", init="fresh", kv_heads=kv_heads)
    tokens = some_tokens(any_teacher, length=100)
    model = as_transformer(student).eval()
    assert type(model) is type(any_teacher.model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == any_teacher.config.tie_word_embeddings
    assert relative_error(logits_of(model, tokens), logits_of(student, tokens)) < 1e-5


@pytest.mark.parametrize("shape", ["llama", "llama_untied"])
def test_softmax_student_is_exported_as_a_llama(variant, kv_heads, shape, tmp_path):
    teacher = variant(shape)
    student = build(teacher, "softmax", init="fresh", kv_heads=kv_heads)
    tokens = some_tokens(teacher, length=100)
    as_transformer(student).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert relative_error(logits_of(loaded, tokens), logits_of(student, tokens)) < 1e-5


def test_any_other_student_stays_what_it_is(teacher, name):
    student = build(teacher, name)
    assert (as_transformer(student) is student) == (name != "softmax")


# ---- hybrids


def test_a_hybrid_keeps_the_layers_it_names(teacher_and_name, tmp_path):
    """A layer in `softmax_layers` is the teacher's although all other attention is new; with all layers, so is the student."""
    any_teacher, name = teacher_and_name
    hybrid = build(any_teacher, name, init="fresh", softmax_layers=[1])
    assert [type(mixer) for mixer in hybrid.mixers] == [MIXERS[name], MIXERS["softmax"]]
    tokens = some_tokens(any_teacher)
    *_, last = any_teacher.layers(tokens)
    with torch.no_grad():
        output = hybrid.model.layers[1](last.input, position_embeddings=last.position)
    assert relative_error(output, last.output) < 1e-5
    whole = build(any_teacher, name, init="fresh", softmax_layers=[0, 1])
    assert relative_error(logits_of(whole, tokens), logits_of(any_teacher.model, tokens)) < 1e-5
    hybrid.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits_of(hybrid, tokens))


def test_a_hybrid_generates_with_a_cache_as_without(teacher, name):
    hybrid, tokens = build(teacher, name, softmax_layers=[0]), some_tokens(teacher, length=9)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(hybrid.generate(tokens, **options), hybrid.generate(tokens, use_cache=False, **options))


def test_a_hybrid_from_scratch_has_no_attention_to_keep():
    with pytest.raises(InputError, match="scratch keeps no attention of the teacher"):
        StudentFactory("gla", "scratch", softmax_layers=[0])


def test_numbers_may_be_numpys_and_truths_are_no_texts(teacher, tmp_path):
    layers = np.arange(1)
    factory = StudentFactory("gla", softmax_layers=layers, window=np.int64(4), sinks=np.int64(2), retention=np.float32(0.9))
    factory.build(teacher, seed=0).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.softmax_layers, config.window, config.sinks) == ([0], 4, 2)
    with pytest.raises(InputError, match="rope 'false' is neither True nor False"):
        StudentFactory("gla", rope="false")


def test_a_hybrid_of_layers_that_do_not_exist_is_refused(teacher):
    with pytest.raises(InputError, match=r"softmax_layers \[2\] do not exist.*0 to 1"):
        build(teacher, "gla", softmax_layers=[0, 2])
    for wrong in ("0", ["0"], [0.5], [True], 0, None):
        with pytest.raises(InputError, match=r"softmax_layers .* is no list of layers"):
            build(teacher, "gla", softmax_layers=wrong)
    for model in (teacher.path, teacher.model):
        with pytest.raises(InputError, match=f"build: teacher is a {type(model).__name__}: give a Teacher of this package"):
            StudentFactory("gla").build(model, 0)
