"""DeltaNet, ReBased and Hedgehog against the implementations of fla-core, loaded by their paths."""

import sys
from types import ModuleType

import pytest
import torch
from op_inputs import fla_file, matrix, matrix_times_v, mixed, relative_error, stepped
from torch import Tensor
from torch.nn.functional import conv1d, layer_norm, normalize, pad, silu

from distill_pl.mixers.hedgehog import FeatureMap, Hedgehog
from distill_pl.ops import gated_delta, normalized
from distill_pl.student.factory import StudentFactory

BATCH, LENGTH, HEADS, KEY, VALUE = 2, 192, 3, 16, 10


@pytest.fixture
def feature_map(monkeypatch) -> ModuleType:
    """Load fla.modules.feature_map; what it imports is never called, or a kernel of what torch has, and is replaced."""
    replacements = {
        "fla.modules": {},
        "fla.modules.activations": dict.fromkeys(["fast_gelu_impl", "sigmoid", "sqrelu", "swish"]),
        "fla.modules.layernorm": {"layer_norm": lambda x, weight, bias: layer_norm(x, weight.shape, weight, bias, 1e-5)},
        "fla.utils": {"checkpoint": lambda function: function},
    }
    for name, contents in replacements.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return fla_file("modules/feature_map.py")


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def qkv(key: int = KEY, length: int = LENGTH) -> list[Tensor]:
    return draw((BATCH, length, HEADS, key), (BATCH, length, HEADS, key), (BATCH, length, HEADS, VALUE))


def all_ways(op: ModuleType, inputs: dict) -> list[Tensor]:
    return [run(op, inputs) for run in (matrix_times_v, mixed, stepped)]


# ---- the delta rule


def delta_inputs() -> dict:
    q, k, v = qkv()
    (beta,) = draw((BATCH, LENGTH, HEADS), seed=1)
    return {"q": normalize(q, dim=-1), "k": normalize(k, dim=-1), "v": v, "beta": beta.sigmoid(), "scale": KEY**-0.5}


@pytest.mark.parametrize("carried", [False, True])
def test_delta_rule_is_flas_recurrence(carried):
    naive, inputs = fla_file("ops/delta_rule/naive.py"), delta_inputs()
    heads_first = [inputs[name].transpose(1, 2) for name in ("q", "k", "v", "beta")]
    start = draw((BATCH, HEADS, KEY, VALUE), seed=2)[0] if carried else None
    expected, final = naive.delta_rule_recurrence(*heads_first, initial_state=start)
    y, state = gated_delta.mix(**inputs, state=start)
    assert relative_error(y, expected.transpose(1, 2)) < 2e-6
    assert relative_error(state, final) < 2e-6
    if not carried:
        for way in all_ways(gated_delta, inputs):
            assert relative_error(way, expected.transpose(1, 2)) < 2e-6


def test_delta_rule_matrix_is_flas():
    naive, inputs = fla_file("ops/delta_rule/naive.py"), delta_inputs()
    heads_first = [inputs[name].transpose(1, 2) for name in ("q", "k", "v", "beta")]
    y, a = naive.delta_rule_parallel(*heads_first, BM=64, BN=32)
    # fla's matrix multiplies beta v, this one v
    assert relative_error(matrix(gated_delta, inputs), a * heads_first[3][..., None, :]) < 2e-6
    assert relative_error(gated_delta.mix(**inputs)[0], y.transpose(1, 2)) < 2e-6


def test_delta_rule_gradients_are_flas():
    naive, inputs = fla_file("ops/delta_rule/naive.py"), delta_inputs()
    leaves = [inputs[name].requires_grad_(True) for name in ("q", "k", "v", "beta")]
    expected, _ = naive.delta_rule_recurrence(*(x.transpose(1, 2) for x in leaves))
    expected = torch.autograd.grad(expected.square().sum(), leaves)
    for way in all_ways(gated_delta, inputs):
        for gradient, other in zip(torch.autograd.grad(way.square().sum(), leaves), expected, strict=True):
            assert relative_error(gradient, other) < 5e-6


# ---- normalised rows


@pytest.mark.parametrize("length", [1, 64, 192])
def test_squared_is_flas_rebased(length):
    naive, (q, k, v) = fla_file("ops/rebased/naive.py"), qkv(length=length)
    inputs = {"q": q, "k": k, "v": v, "scale": KEY**-0.5, "eps": 1e-6, "power": 2}
    expected = naive.naive_parallel_rebased(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    for way in all_ways(normalized, inputs):
        assert relative_error(way, expected) < 2e-6


def test_squared_is_linear_attention_with_flas_features(feature_map):
    """fla's features are those of the state in another order; its naive linear attention adds eps = 1e-10."""
    naive, (q, k, v) = fla_file("ops/linear_attn/naive.py"), qkv()
    fla_map = feature_map.RebasedFeatureMap(KEY)
    fla_map.gamma.data, fla_map.beta.data = draw((KEY,), (KEY,), seed=3)
    expected, (_, normaliser) = naive.naive_recurrent_linear_attn(
        fla_map(q), fla_map(k), v, scale=1.0, normalize=True, output_final_state=True
    )
    phi_q, phi_k = (layer_norm(x, (KEY,), fla_map.gamma, fla_map.beta) for x in (q, k))
    inputs = {"q": phi_q, "k": phi_k, "v": v, "scale": KEY**-0.5, "eps": 1e-10, "power": 2}
    for way in all_ways(normalized, inputs):
        assert relative_error(way, expected) < 1e-5
    state = normalized.mix(**inputs)[1]
    assert state.shape == (BATCH, HEADS, KEY * (KEY + 1) // 2, VALUE + 1)
    assert state.shape[2] == normaliser.shape[-1]


@pytest.mark.parametrize("run", ["recurrent", "chunk"])
def test_normalised_is_flas_linear_attention(run):
    naive = fla_file("ops/linear_attn/naive.py")
    q, k, v = qkv(2 * KEY)
    q, k = q.softmax(-1), k.softmax(-1)
    inputs = {"q": q, "k": k, "v": v, "scale": 1.0, "eps": 1e-10}
    if run == "chunk":
        expected = naive.naive_chunk_linear_attn(q, k, v, scale=1.0, normalize=True)
    else:
        expected, (sums, normaliser) = naive.naive_recurrent_linear_attn(
            q, k, v, scale=1.0, normalize=True, output_final_state=True
        )
        state = normalized.mix(**inputs)[1]
        assert relative_error(state, torch.cat([sums, normaliser[:, 0, :, :, None]], -1)) < 2e-6
    for way in all_ways(normalized, inputs):
        assert relative_error(way, expected) < 2e-6


@pytest.mark.parametrize("key", [1, 2, 3, 8, 9])
def test_features_of_any_width_give_the_square(key):
    q, k, v = (x.double() for x in qkv(key))
    inputs = {"q": q, "k": k, "v": v, "scale": 0.7, "eps": 0.1, "power": 2}
    squares = torch.einsum("bihk,bjhk->bhij", 0.7 * q, k).square().tril()
    expected = torch.einsum("bhij,bjhv->bihv", squares / (squares.sum(-1, keepdim=True) + 0.1), v)
    for way in all_ways(normalized, inputs):
        assert relative_error(way, expected) < 1e-11
    assert normalized.mix(**inputs)[1].shape[2] == key * (key + 1) // 2


@pytest.mark.parametrize("power", [1, 2])
def test_without_the_state_the_output_is_the_same(power):
    q, k, v = qkv(8)
    inputs = {"q": q.abs(), "k": k.abs(), "v": v, "scale": 1.0, "eps": 1e-5, "power": power}
    (y, state), (again, nothing) = normalized.mix(**inputs), normalized.mix(**inputs, remember=False)
    assert state is not None and nothing is None
    assert torch.equal(y, again)


# ---- the mixers


def test_hedgehog_features_are_flas(feature_map):
    fla_maps = [feature_map.HedgehogFeatureMap(KEY) for _ in range(HEADS)]
    (x,) = draw((BATCH, LENGTH, HEADS, KEY))
    phi = FeatureMap(HEADS, KEY)
    phi.start()
    for head, fla_map in enumerate(fla_maps):
        assert torch.equal(phi.weight[head], fla_map.layer.weight) and torch.equal(phi.bias[head], fla_map.layer.bias)
    for head, fla_map in enumerate(fla_maps):
        fla_map.layer.weight.data, fla_map.layer.bias.data = draw((KEY, KEY), (KEY,), seed=head)
        phi.weight.data[head], phi.bias.data[head] = fla_map.layer.weight.data, fla_map.layer.bias.data
    expected = torch.stack([fla_map(x[:, :, head]) for head, fla_map in enumerate(fla_maps)], 2)
    assert relative_error(phi(x), expected) < 2e-6
    assert phi(x).shape == (BATCH, LENGTH, HEADS, 2 * KEY)


def test_rebased_is_flas_features_and_formula(trained, feature_map):
    mixer, hidden, _ = trained("rebased")
    fla_map = feature_map.RebasedFeatureMap(mixer.key_dim)
    assert (fla_map.gamma == 1).all() and (fla_map.beta == 0).all()
    fla_map.gamma.data, fla_map.beta.data = mixer.feature_map.weight.data, mixer.feature_map.bias.data
    q, k, v = (
        x.repeat_interleave(mixer.heads // x.shape[2], dim=2)
        for x in (proj(hidden).unflatten(-1, (-1, mixer.key_dim)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    )
    q, k, v = (x.transpose(1, 2) for x in (fla_map(q), fla_map(k), v))  # [B, H, T, F]: flattened, the scale in them
    scores = (q @ k.mT).tril()
    expected = mixer.o_proj((scores @ v / (scores.sum(-1, keepdim=True) + 1e-5)).transpose(1, 2).flatten(2))
    assert relative_error(mixer(hidden, None)[0], expected) < 1e-5


def test_hedgehog_starts_as_attention_of_the_teachers_own_q_and_k(teacher, feature_map):
    naive = fla_file("ops/linear_attn/naive.py")
    mixer: Hedgehog = StudentFactory("hedgehog").build(teacher, seed=0).requires_grad_(False).mixers[0]
    hidden = draw((BATCH, 64, teacher.config.hidden_size), seed=4)[0]
    attention = teacher.model.model.layers[0].self_attn
    q, k, v = (
        x.repeat_interleave(mixer.heads // x.shape[2], dim=2)
        for x in (proj(hidden).unflatten(-1, (-1, 8)) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    )
    fla_map = feature_map.HedgehogFeatureMap(8)
    expected, _ = naive.naive_recurrent_linear_attn(fla_map(q), fla_map(k), v, scale=1.0, normalize=True)
    assert relative_error(mixer(hidden, None)[0], attention.o_proj(expected.flatten(2))) < 1e-5


def test_delta_net_is_the_layer_written_out(trained):
    """Write out the DeltaNet of fla.layers in plain torch around fla's own delta rule."""
    naive = fla_file("ops/delta_rule/naive.py")
    mixer, hidden, _ = trained("delta_net")

    def branch(proj, conv) -> Tensor:
        x = pad(proj(hidden).mT, (3, 0))
        x = silu(conv1d(x, conv.weight[:, None], groups=x.shape[1])).mT.unflatten(-1, (-1, mixer.key_dim))
        return x.repeat_interleave(mixer.heads // x.shape[2], dim=2).transpose(1, 2)

    q, k, v = (branch(getattr(mixer, f"{n}_proj"), getattr(mixer, f"{n}_conv")) for n in "qkv")
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    beta = mixer.beta_proj(hidden).sigmoid().transpose(1, 2)
    y = naive.delta_rule_recurrence(q, k, v, beta)[0].transpose(1, 2)
    y = y / (y.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt() * mixer.norm.weight
    assert relative_error(mixer(hidden, None)[0], mixer.o_proj(y.flatten(2))) < 1e-5


@pytest.mark.parametrize("name", ["delta_net", "rebased", "hedgehog"])
def test_padding_in_the_middle_and_at_the_end_leaves_no_trace_in_the_matrix(trained, name):
    """A masked token's column is zero wherever the token is, not only in padding on the left."""
    mixer, hidden, _ = trained(name)
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
    mask[:, 30:40] = mask[:, -5:] = False
    inputs, _ = mixer.inputs(hidden, None, mask, None)
    a = matrix(mixer.op, inputs._asdict())
    assert (a[..., ~mask[0]] == 0).all()
    assert (a[..., 40:65, 29] != 0).all()
