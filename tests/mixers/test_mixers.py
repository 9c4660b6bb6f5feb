"""The contract of every mixer in MIXERS: whole or token by token the same, and what its matrix depends on."""

import pytest
import torch
from helpers import some_tokens
from op_inputs import matrix, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distill_pl.mixers import MIXERS, SequenceMixer
from distill_pl.ops import channel_decay, softmax
from distill_pl.stages.matrix_mixing import mixing_parameters
from distill_pl.student.cache import StudentCache, state_bytes
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student
from distill_pl.teacher import Teacher

LENGTH = 21


def some_hidden(width: int, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(seed))


def first(student: Student) -> tuple[SequenceMixer, Tensor, tuple[Tensor, Tensor]]:
    """Return the first mixer, a hidden state for it, RoPE's tables."""
    hidden = some_hidden(student.config.hidden_size)
    return student.mixers[0], hidden, student.position(hidden)


def test_matrix_is_causal(teacher, fresh, name, layout):
    mixer, hidden, position = first(fresh(name, **layout))
    a = mixer.matrix(hidden, position)
    assert a.shape == (2, teacher.config.num_attention_heads, LENGTH, LENGTH)
    assert a.dtype == torch.float32
    assert (a.triu(1) == 0).all()
    assert a.diagonal(-1, dim1=-2, dim2=-1).abs().min() > 0


def test_rope_rotates_q_and_k(fresh, name):
    (with_rope, hidden, position), (without, *_) = (first(fresh(name, rope=rope)) for rope in (True, False))
    # shifted cyclically: a shift of all positions would change no distance
    shifted = tuple(table.roll(5, 1) for table in position)
    assert not torch.equal(with_rope.matrix(hidden, position), with_rope.matrix(hidden, shifted))
    assert torch.equal(without.matrix(hidden, position), without.matrix(hidden, shifted))
    default = first(fresh(name))[0].matrix(hidden, position)
    assert torch.equal(default, (with_rope if MIXERS[name].rotates else without).matrix(hidden, position))


def test_of_table_1_softmax_and_retnet_rotate_by_default():
    others = ["mlstm", "gla", "hgrn2", "mamba2", "metala", "delta_net", "rebased", "hedgehog"]
    assert MIXERS["softmax"].rotates and MIXERS["retnet"].rotates
    assert not any(MIXERS[name].rotates for name in others)


def test_a_token_changes_no_output_before_it(fresh, name, layout):
    mixer, hidden, position = first(fresh(name, **layout))
    changed = hidden.clone()
    changed[:, 13] += 1
    (before, _), (after, _) = mixer(hidden, position), mixer(changed, position)
    assert torch.equal(before[:, :13], after[:, :13])
    assert ((before - after)[:, 13:].abs().amax(-1) > 0).all()


def test_forward_is_the_output_of_matrix_times_v(fresh, name, layout):
    mixer, hidden, position = first(fresh(name, **layout))
    branches, read_by_output = mixer.branches(hidden, position, None, None)
    products = [torch.einsum("bhij,bjhv->bihv", matrix(op, x._asdict()), mixer.repeat_kv(x.v)) for op, x in branches]
    y = mixer.output(products[0], read_by_output)
    if "window" in layout and name != "swa":
        share = mixer.window_logit.sigmoid()[:, None]
        y = (share * y.unflatten(-1, products[1].shape[2:]) + (1 - share) * products[1]).flatten(2)
    assert relative_error(mixer(hidden, position)[0], mixer.o_proj(y)) < 1e-5


def test_the_matrix_is_that_of_probes(fresh, name, layout):
    mixer, hidden, position = first(fresh(name, **layout))
    z = some_hidden(3)[:1, :, None]
    product = torch.einsum("bhij,bjhv->bihv", mixer.matrix(hidden, position), z.expand(2, -1, mixer.heads, -1))
    assert relative_error(mixer.matrix_times(z, hidden, position), product) < 1e-5


BESIDE = [name for name, mixer in MIXERS.items() if "k" in mixer.copies and name not in ("softmax", "swa")]


@pytest.mark.parametrize("name", BESIDE)
def test_a_window_beside_a_mixer_is_the_teachers_attention_within_it(variant, name):
    """Whatever the mixer does to q and k, a window of the whole sequence adds the teacher's matrix to the mixer's own."""
    teacher = variant("qwen3")
    student = StudentFactory(name, window=LENGTH, kv_heads="grouped").build(teacher, seed=0).requires_grad_(False)
    layer = next(teacher.layers(some_tokens(teacher, length=LENGTH)))
    mixer, hidden = student.mixers[0], student.model.layers[0].input_layernorm(layer.input)
    attention = softmax.matrix(layer.query, layer.key, layer.scale)
    own = matrix(mixer.op, mixer.inputs(hidden, layer.position, None, None)[0]._asdict())
    assert mixer.window_logit.sigmoid().tolist() == pytest.approx([1 / 8] * mixer.heads, abs=0.01)
    mixer.window_logit.copy_(torch.tensor([-100.0, -1.0, 0.0, 100.0]))
    share = mixer.window_logit.sigmoid()[:, None, None]
    assert relative_error(mixer.matrix(hidden, layer.position), share * own + (1 - share) * attention) < 1e-5


@pytest.mark.parametrize("name", [name for name in BESIDE if name != "rwkv7"])  # which projects shifted tokens
def test_mixer_and_window_project_once(fresh, name):
    mixer, hidden, position = first(fresh(name, window=4))
    with FlopCounterMode(display=False) as counter:
        mixer.branches(hidden, position, None, None)
    found = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        mixer.inputs(hidden, position, None, None)
    assert found == counter.get_total_flops()


def test_projections_of_another_thread_are_not_taken(fresh):
    mixer, hidden, position = first(fresh("gla", window=4))
    expected = mixer.inputs(hidden, position, None, None)[0]
    mixer.projected = hidden + 1, mixer.qkv(hidden + 1)  # as another thread leaves it within `branches`
    assert torch.equal(mixer.inputs(hidden, position, None, None)[0].k, expected.k)


@pytest.mark.parametrize("changes", [
    {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
], ids=lambda changes: changes["model_type"])  # fmt: skip
def test_a_window_beside_a_mixer_has_the_rope_of_each_layer(save_model, changes):
    teacher = Teacher(str(save_model(**changes)))
    student = StudentFactory("gla", window=LENGTH).build(teacher, seed=0).requires_grad_(False)
    layers = zip(teacher.layers(some_tokens(teacher, length=LENGTH)), student.model.layers, strict=True)
    for layer, student_layer in layers:
        student_layer.self_attn.window_logit.fill_(-100)
        a = student_layer.self_attn.matrix(student_layer.input_layernorm(layer.input), layer.position)
        assert relative_error(a, softmax.matrix(layer.query, layer.key, layer.scale)) < 1e-5


@pytest.mark.parametrize("pieces", [[1, 1, 8, 1, 4, 6], [8, 7, 1, 1, 1, 3]], ids=str)
def test_with_a_cache_pieces_are_the_whole(fresh, name, layout, pieces):
    """A sequence begins with a token or with a piece, and of the two either follows either."""
    student = fresh(name, **layout)
    mixer, hidden, position = first(student)
    cache, outputs = StudentCache(len(student.mixers)), []
    for times in torch.arange(LENGTH).split(pieces):
        part = tuple(table[:, times] for table in position)
        outputs.append(mixer(hidden[:, times], part, past_key_values=cache)[0])
    assert cache.get_seq_length() == LENGTH
    assert relative_error(torch.cat(outputs, 1), mixer(hidden, position)[0]) < 1e-5


def test_padding_on_the_left_leaves_no_trace(fresh, name, layout):
    student, padding = fresh(name, **layout), 6
    mixer, hidden, position = first(student)
    position = tuple(table.expand(2, -1, -1) for table in position)
    padded = torch.cat([some_hidden(hidden.shape[-1], padding, seed=2), hidden], 1)
    shifted = tuple(torch.cat([table[:, :1].expand(-1, padding, -1), table], 1) for table in position)
    mask = torch.arange(padding + LENGTH).expand(2, -1) >= padding
    expected, _ = mixer(hidden, position)
    output, _ = mixer(padded, shifted, attention_mask=mask)
    assert relative_error(output[:, padding:], expected) < 1e-5

    cache = StudentCache(len(student.mixers))
    for times in torch.arange(padding + LENGTH).split([padding + 3, LENGTH - 7, 1, 1, 1, 1]):
        part = tuple(table[:, times] for table in shifted)
        output, _ = mixer(padded[:, times], part, attention_mask=mask[:, times], past_key_values=cache)
    assert relative_error(output[:, 0], expected[:, -1]) < 1e-5


@pytest.mark.parametrize("name", MIXERS)
def test_retention_applies_to_mixers_with_a_decay_gate(teacher, name):
    factories = [StudentFactory(name), StudentFactory(name)]
    factories[1].retention = 0.9
    ours, others = (factory.build(teacher, seed=0).state_dict() for factory in factories)
    assert any(not torch.equal(x, others[key]) for key, x in ours.items()) == MIXERS[name].decay_gate


@pytest.mark.parametrize("retention", [0.982, 0.9])
@pytest.mark.parametrize("name", [n for n, m in MIXERS.items() if hasattr(m, "log_decay") or m.op is channel_decay])
def test_fresh_decay_gates_retain_what_was_asked(teacher, name, retention):
    student = StudentFactory(name, init="fresh", retention=retention).build(teacher, seed=0).requires_grad_(False)
    hidden = 0.01 * some_hidden(student.config.hidden_size)

    def log_decay_of(mixer: SequenceMixer, hidden: Tensor) -> Tensor:
        inputs, _ = mixer.inputs(hidden, student.position(hidden), None, None)
        return channel_decay.log_decay(inputs.g, inputs.temperature) if mixer.op is channel_decay else inputs.g

    for mixer in student.mixers:
        log_decay = log_decay_of(mixer, hidden)
        assert log_decay.dtype == torch.float32
        assert (log_decay <= 0).all()
        assert log_decay.exp().mean().item() == pytest.approx(retention, abs=0.005)
        # 0.982 and its neighbours in bf16 are 4e-3 apart
        half = log_decay_of(mixer.bfloat16(), hidden.bfloat16())
        assert half.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert log_decay_of(mixer.float(), hidden).dtype == torch.float32


# every layout, and each teacher's biases and norms of q and k in two of them: not each with each
@pytest.mark.parametrize(
    ("shape", "layout"),
    [("llama_bias", "grouped"), ("llama_bias", "rope"), ("qwen3", "expanded"), ("qwen3", "paper"), ("qwen3", "window")],
    indirect=["layout"],
)  # fmt: skip
def test_mixing_parameters_are_those_that_change_the_matrix(variant, shape, name, layout):
    student = StudentFactory(name, init="fresh", **layout).build(variant(shape), seed=0)
    mixer, hidden, position = first(student)
    mixing = {id(parameter) for parameter in mixing_parameters(mixer)}
    mixer.requires_grad_(False)
    before = mixer.matrix(hidden, position)
    changing = set()
    for parameter_name, parameter in mixer.named_parameters():
        start = parameter.clone()
        parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        changes = not torch.equal(mixer.matrix(hidden, position), before)
        parameter.copy_(start)
        assert changes == (id(parameter) in mixing), parameter_name
        changing |= {parameter_name} if changes else set()
    assert changing >= {f"{part}_proj.weight" for part in mixer.copies if part in "qk"}
    assert not any(parameter_name.startswith(("v_proj.", "o_proj.")) for parameter_name in changing)


def test_state_size_is_independent_of_length(teacher, fresh, name, layout):
    student = fresh(name, **layout)
    tokens = torch.randint(0, teacher.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(4))
    cache = StudentCache(len(student.mixers))
    sizes = {}
    for time, token in enumerate(tokens.unbind(1), start=1):
        student(token[:, None], past_key_values=cache)
        sizes[time] = state_bytes(cache)
    assert sizes[1] > 0
    if name == "softmax":
        assert sizes[12] == 4 * sizes[3]
    else:
        assert len(set(sizes.values())) == 1
