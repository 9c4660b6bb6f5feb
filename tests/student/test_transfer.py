"""Weights are copied to the right rows: kv heads are repeated whole, and a missing or misshapen tensor is an error."""

import pytest
import torch

from distill_pl.errors import InputError
from distill_pl.mixers import GLA
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import StudentConfig, join_projections, split_joint_projections
from distill_pl.student.transfer import as_transformer, copy_weights, expand_kv

HEADS = [(4, 1), (4, 2), (4, 4), (6, 2), (15, 5)]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("rest", [(7,), ()], ids=["weight", "bias"])
@pytest.mark.parametrize("head_dim", [1, 8])
def test_query_head_reads_its_kv_head(heads, kv_heads, rest, head_dim):
    projection = torch.randn(kv_heads * head_dim, *rest, generator=torch.Generator().manual_seed(0))
    expanded = expand_kv(projection, heads, kv_heads)
    assert expanded.shape == (heads * head_dim, *rest)
    for head in range(heads):
        source = head * kv_heads // heads
        rows = slice(source * head_dim, (source + 1) * head_dim)
        assert torch.equal(expanded[head * head_dim : (head + 1) * head_dim], projection[rows])


@pytest.mark.parametrize(("heads", "kv_heads"), [shape for shape in HEADS if 1 < shape[1] < shape[0]])
def test_repeating_rows_instead_of_heads_is_something_else(heads, kv_heads):
    """Published codes repeat each row, or the whole projection, and so put most rows into other heads."""
    projection = torch.randn(kv_heads * 8, 7, generator=torch.Generator().manual_seed(0))
    expanded, times = expand_kv(projection, heads, kv_heads), heads // kv_heads
    for wrong in (projection.repeat_interleave(times, dim=0), projection.repeat(times, 1)):
        assert wrong.shape == expanded.shape
        assert (wrong == expanded).all(-1).float().mean() < 0.7


def test_expanding_nothing_is_a_copy():
    projection = torch.randn(32, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(expand_kv(projection, 4, 4), projection)


@pytest.mark.parametrize("rest", [(7,), ()], ids=["weight", "bias"])
def test_projections_in_one_are_taken_apart_and_joined_again(rest):
    """Phi 3 has the rows of q, then those of k, then those of v."""
    config = StudentConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    joint = torch.arange(64.0)[(...,) + (None,) * len(rest)].expand(64, *rest)
    tensors = {"a.qkv_proj.x": joint, "other": joint}
    split_joint_projections(tensors, config)
    assert [len(tensors[f"a.{part}_proj.x"]) for part in "qkv"] == [32, 16, 16]
    assert tensors["a.k_proj.x"].flatten()[0] == 32 and tensors["a.v_proj.x"].flatten()[0] == 48
    join_projections(tensors, ["a.qkv_proj.x", "other"])
    assert tensors.keys() == {"a.qkv_proj.x", "other"}
    assert torch.equal(tensors["a.qkv_proj.x"], joint)


@pytest.mark.parametrize("attention", [True, False])
def test_names_returned_are_the_tensors_that_changed(teacher_and_name, attention):
    any_teacher, name = teacher_and_name
    student = StudentFactory(name, init="scratch").build(any_teacher, seed=3)
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    copied = copy_weights(any_teacher.model, student, attention)
    changed = {key for key, tensor in student.state_dict().items() if not torch.equal(tensor, before[key])}
    assert set(copied) == changed
    assert len(copied) == len(set(copied))
    assert any(".self_attn." in key for key in changed) == attention


def test_a_tensor_of_another_shape_is_an_error(variant):
    student = StudentFactory("gla").build(variant("llama_mha"), seed=0)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        copy_weights(variant("llama_wide_heads").model, student, attention=True)


def test_a_tensor_that_is_missing_is_an_error(variant):
    student = StudentFactory("gla").build(variant("llama_bias"), seed=0)
    with pytest.raises((KeyError, ValueError), match=r"model\.layers\.0\.[a-z_.]+\.bias"):
        copy_weights(variant("llama").model, student, attention=True)


def test_a_mixer_gets_only_what_it_says_it_can_take(teacher, monkeypatch):
    monkeypatch.setattr(GLA, "copies", ("q", "v"))
    student = StudentFactory("gla", init="scratch").build(teacher, seed=0)
    copied = {key.split(".self_attn.")[1] for key in copy_weights(teacher.model, student, True) if "self_attn" in key}
    assert copied == {"q_proj.weight", "v_proj.weight"}


def exported(student, folder) -> str:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1
    student.save_pretrained(folder)
    return str(folder)


def test_a_student_goes_on_from_another(teacher, tmp_path):
    source = StudentFactory("gla").build(teacher, 0)
    path = exported(source, tmp_path / "gla")
    again = StudentFactory("gla", start_from=path).build(teacher, 1)
    for name, tensor in source.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name

    plain = StudentFactory("gla", softmax_layers=[1]).build(teacher, 1).state_dict()
    for factory, kept in [
        (StudentFactory("gla", softmax_layers=[1], start_from=path), "model.layers.0.self_attn."),
        (StudentFactory("retnet", start_from=path), "no mixer"),
    ]:
        student = factory.build(teacher, 1)
        begun = plain if factory.mixer == "gla" else StudentFactory("retnet").build(teacher, 1).state_dict()
        for name, tensor in student.state_dict().items():
            copied = name.startswith(kept) or ".self_attn." not in name
            assert torch.equal(tensor, source.state_dict()[name] if copied else begun[name]), name


def test_a_softmax_student_goes_on_from_its_export(teacher, tmp_path):
    source = StudentFactory("softmax").build(teacher, 0)
    path = exported(as_transformer(source), tmp_path / "softmax")
    again = StudentFactory("softmax", start_from=path).build(teacher, 1)
    assert torch.equal(again.mixers[1].q_proj.weight, source.mixers[1].q_proj.weight + 0.1)


def test_a_start_with_a_head_of_its_own_is_refused_where_the_student_has_none(teacher, tmp_path):
    source = StudentFactory("gla", "fresh", shape="paper").build(teacher, 0)
    torch.nn.init.ones_(source.lm_head.weight)
    path = exported(source, tmp_path / "paper")
    StudentFactory("gla", "fresh", shape="paper", start_from=path).build(teacher, 0)
    with pytest.raises(InputError, match="its head is not tied"):
        StudentFactory("gla", start_from=path).build(teacher, 0)


def test_a_start_that_is_no_student_of_this_teacher_is_refused(teacher, variant, save_model, tmp_path):
    with pytest.raises(InputError, match="start_from '/nowhere' is no finished run"):
        StudentFactory("gla", start_from="/nowhere").build(teacher, 0)
    wide = save_model("llama", intermediate_size=80)
    with pytest.raises(InputError, match=r"start_from: its model.layers.0.mlp.gate_proj.weight is of shape \(80, 32\)"):
        StudentFactory("gla", start_from=str(wide)).build(teacher, 0)
    deep = save_model("llama", num_hidden_layers=3)
    with pytest.raises(InputError, match="start_from: it has 3 layers, the teacher 2"):
        StudentFactory("gla", start_from=str(deep)).build(teacher, 0)
    other = save_model("qwen3")  # also has a norm of q, for which a student of a Llama has no place
    with pytest.raises(InputError, match="is a Qwen3ForCausalLM, no student of this package"):
        StudentFactory("gla", start_from=str(other)).build(teacher, 0)


def test_a_start_names_the_layers_that_begin_anew(teacher, tmp_path, capsys):
    path = exported(StudentFactory("gla", softmax_layers=[1]).build(teacher, 0), tmp_path / "gla")
    for mixer, layers, says in [("gla", [1], ""), ("gla", [], "mixers of layers 1,"), ("retnet", [], "mixers of all layers,")]:
        StudentFactory(mixer, softmax_layers=layers, start_from=path).build(teacher, 0)
        printed = capsys.readouterr().out
        assert says in printed and bool(says) == bool(printed)


def test_a_start_names_the_settings_that_differ(teacher, tmp_path, capsys):
    path = exported(StudentFactory("gla", rope=True, window=8, softmax_layers=[1]).build(teacher, 0), tmp_path / "gla")
    StudentFactory("gla", window=4, softmax_layers=[1], start_from=path).build(teacher, 0)
    said = [f"start    {path} has student.{there}" for there in ("rope True, this run False", "window 8, this run 4")]
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "a weight"])
def test_a_start_with_holes_is_refused(teacher, tmp_path, damage):
    student = StudentFactory("gla").build(teacher, 0)
    path = exported(student, tmp_path / "gla")
    if damage == "a weight":
        state = {name: x.contiguous() for name, x in student.state_dict().items() if "layers.1.mlp.up" not in name}
        student.save_pretrained(path, state_dict=state)
    else:
        (tmp_path / "gla" / damage).unlink() if damage.startswith("model") else (tmp_path / "gla" / damage).write_text("{")
    with pytest.raises(InputError, match="the model in .* (cannot be loaded|lacks 1 of its weights)"):
        StudentFactory("gla", start_from=path).build(teacher, 0)
