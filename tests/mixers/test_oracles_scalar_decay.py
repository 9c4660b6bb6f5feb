"""mLSTM, RetNet and Mamba2 against the torch code of transformers and fla's naive references."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from op_inputs import fla_file, relative_error
from torch import Tensor
from torch.nn.functional import linear, logsigmoid, rms_norm, silu
from transformers import Mamba2Config, xLSTMConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.xlstm import modeling_xlstm

from distill_pl.ops import mlstm, scalar_decay
from distill_pl.student.factory import StudentFactory
from distill_pl.student.transfer import expand_kv

LENGTH, EPS = 70, 1e-6


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_inputs(gates: float = 1.0) -> dict[str, Tensor]:
    """Draw q, k, v [2, T, 4, 8], log input gate i and log forget gate g [2, T, 4], float64."""
    q, k, v = (some(2, LENGTH, 4, 8, seed=seed) for seed in range(3))
    i, f = (gates * some(2, LENGTH, 4, seed=seed) for seed in (3, 4))
    return {"q": q, "k": k, "v": v, "i": i, "g": logsigmoid(f + 2)}


# ---- ops


def test_scalar_decay_is_flas_naive_simple_gla():
    naive = fla_file("ops/simple_gla/naive.py")
    inputs = {name: x.float() for name, x in random_inputs().items() if name != "i"}
    start = some(2, 4, 8, 8, seed=5).float()
    y, state = scalar_decay.mix(**inputs, scale=0.3, state=start)
    for reference in (naive.naive_recurrent_simple_gla, naive.naive_chunk_simple_gla):
        expected, final = reference(**inputs, scale=0.3, initial_state=start, output_final_state=True)
        assert relative_error(y, expected) < 1e-6
        assert relative_error(state, final) < 1e-6
    _, a = naive.naive_parallel_simple_gla(**inputs, scale=0.3)
    del inputs["v"]
    assert relative_error(scalar_decay.matrix(**inputs, scale=0.3), a) < 1e-6


@pytest.mark.parametrize("gates", [1.0, 6.0])
@pytest.mark.parametrize("carried", [False, True])
def test_mlstm_is_transformers(gates, carried):
    inputs = random_inputs(gates)
    state = mlstm.mix(**random_inputs(), scale=8**-0.5)[1] if carried else None
    q, k, v, i = (inputs[name].transpose(1, 2) for name in "qkvi")
    forget = (inputs["g"] - torch.log(-torch.expm1(inputs["g"]))).transpose(1, 2)  # the logit that g is the logsigmoid of
    start = {}
    if carried:
        cell, m = state
        start = {"c_initial": cell[..., :-2], "n_initial": cell[..., -1], "m_initial": m[..., None]}
    y, (cell, m) = mlstm.mix(**inputs, scale=8**-0.5, state=state)
    pieces = {"chunk_size": 14, "return_last_states": True, "eps": mlstm.EPS}
    for reference, options in [
        (modeling_xlstm.mlstm_recurrent_sequence_native, {"dtype_state": torch.float64}),
        (modeling_xlstm.mlstm_chunkwise_native_autograd, {}),
    ]:
        expected, (c, n, stabiliser) = reference(query=q, key=k, value=v, igate=i, fgate=forget, **start, **pieces | options)
        assert relative_error(y.transpose(1, 2), expected) < 1e-11
        assert relative_error(cell[..., :-2], c) < 1e-11
        assert relative_error(cell[..., -1], n) < 1e-11
        assert relative_error(m, stabiliser[..., 0]) < 1e-11


@pytest.mark.parametrize("gate", [-200.0, 200.0])
def test_mlstm_is_finite_at_any_input_gate(gate):
    inputs = {name: x.float() for name, x in random_inputs().items()}
    inputs["i"], inputs["g"] = torch.full_like(inputs["i"], gate), torch.full_like(inputs["g"], -200.0)
    leaves = [x.requires_grad_() for x in inputs.values()]
    y, _ = mlstm.mix(**inputs, scale=0.3)
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize("op", [scalar_decay, mlstm])
def test_the_kernel_is_called_as_its_reference(op, monkeypatch):
    """Check the kernel's arguments and results, with fla's naive function in its place."""
    naive = fla_file("ops/simple_gla/naive.py")
    calls = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor | None):
        calls.append(v.shape[-1])
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and g.dtype == torch.float32
        return naive.naive_recurrent_simple_gla(q, k, v, g, scale=scale, initial_state=state, output_final_state=True)

    kernels = SimpleNamespace(fla_kernels=SimpleNamespace(scalar_decay=kernel))
    monkeypatch.setitem(sys.modules, "distill_pl.ops.gpu", kernels)
    names = "qkvg" if op is scalar_decay else "qkvig"
    inputs = {name: x.bfloat16() if name in "qkv" else x.float() for name, x in random_inputs().items() if name in names}
    state = None
    for _ in range(2):
        expected, expected_state = op.mix(**inputs, scale=0.3, backend="torch", state=state)
        y, state = op.mix(**inputs, scale=0.3, backend="fla", state=state)
        assert y.dtype == torch.bfloat16
        assert relative_error(y.float(), expected.float()) < 2e-2
        for tensor, other in zip(state, expected_state, strict=True):
            assert tensor.dtype == torch.float32
            assert relative_error(tensor, other) < 2e-2
    assert len(calls) == 2 and all(width % 2 == 0 for width in calls)


# ---- mixers


def test_mlstm_is_transformers_layer(trained, kv_heads):
    mixer, hidden, position = trained("mlstm", kv_heads=kv_heads)
    config = xLSTMConfig(
        hidden_size=hidden.shape[-1], num_heads=mixer.heads, qk_dim_factor=1.0, norm_eps=EPS, num_hidden_layers=1,
        gate_soft_cap=1e5,  # too large to cap anything
    )  # fmt: skip
    layer = modeling_xlstm.xLSTMLayer(config).requires_grad_(False)
    kept = mixer.k_proj.out_features // mixer.key_dim
    layer.load_state_dict({
        "q.weight": mixer.q_proj.weight,
        "k.weight": expand_kv(mixer.k_proj.weight, mixer.heads, kept),
        "v.weight": expand_kv(mixer.v_proj.weight, mixer.heads, kept),
        "ogate_preact.weight": mixer.gate_proj.weight,
        "igate_preact.weight": mixer.input_proj.weight,
        "igate_preact.bias": mixer.input_proj.bias,
        "fgate_preact.weight": mixer.forget_proj.weight,
        "fgate_preact.bias": mixer.forget_proj.bias,
        "multihead_norm.weight": mixer.norm.weight.repeat(mixer.heads),
        "out_proj.weight": mixer.o_proj.weight,
    })  # fmt: skip
    assert relative_error(mixer(hidden, position)[0], layer(hidden)[0]) < 1e-5


def test_mlstm_gates_start_coupled(teacher):
    mixer = StudentFactory("mlstm", retention=0.9).build(teacher, seed=0).mixers[0]
    assert mixer.forget_proj.bias.sigmoid().tolist() == pytest.approx([0.9] * 4)
    assert torch.equal(mixer.input_proj.bias, -mixer.forget_proj.bias)


def test_open_gates_of_padding_write_nothing(trained):
    """An input gate of e^30 would leave a trace in the stabiliser even if the padded token's key were zero."""
    mixer, hidden, position = trained("mlstm", kv_heads="expanded")
    mixer.input_proj.weight *= 30
    mask = torch.arange(LENGTH).expand(2, -1) >= 20
    after_padding = tuple(table[:, 20:] for table in position)
    assert mixer.input_proj(hidden[:, :20]).max() > 30
    y, _ = mixer(hidden, position, attention_mask=mask)
    assert relative_error(y[:, 20:], mixer(hidden[:, 20:], after_padding)[0]) < 1e-5


def test_retnet_is_flas_naive_retention(trained, kv_heads):
    mixer, hidden, position = trained("retnet", kv_heads=kv_heads)
    kept = mixer.k_proj.out_features // mixer.key_dim
    weights = [mixer.q_proj.weight, *(expand_kv(p.weight, mixer.heads, kept) for p in (mixer.k_proj, mixer.v_proj))]
    q, k, v = (linear(hidden, weight).unflatten(-1, (mixer.heads, -1)).transpose(1, 2) for weight in weights)
    q, k = apply_rotary_pos_emb(q, k, *position)
    mixed = fla_file("ops/retention/naive.py").naive_retention(q, k, v).transpose(1, 2)
    normed = rms_norm(mixed, mixed.shape[-1:], mixer.norm.weight, EPS).flatten(2)
    expected = linear(normed * silu(linear(hidden, mixer.gate_proj.weight)), mixer.o_proj.weight)
    assert relative_error(mixer(hidden, position)[0], expected) < 1e-5


def test_retnets_decays_are_exact_in_a_bf16_model(trained):
    mixer, hidden, position = trained("retnet", kv_heads="expanded")
    g = mixer.bfloat16().inputs(hidden.bfloat16(), position, None, None)[0].g
    assert g.shape == (2, LENGTH, 4) and g.dtype == torch.float32
    assert g[1, 7].tolist() == pytest.approx([math.log1p(-(2.0 ** -(5 + head))) for head in range(4)], rel=1e-6)


def test_mamba2_is_transformers(trained, kv_heads):
    mixer, hidden, position = trained("mamba2", kv_heads=kv_heads)
    config = Mamba2Config(
        hidden_size=hidden.shape[-1], num_heads=mixer.heads, head_dim=mixer.key_dim, state_size=mixer.key_dim, expand=1,
        n_groups=mixer.heads, use_conv_bias=False, layer_norm_epsilon=EPS, chunk_size=16, num_hidden_layers=1,
    )  # fmt: skip
    reference = Mamba2Mixer(config, layer_idx=0).eval().requires_grad_(False)
    kept = mixer.k_proj.out_features // mixer.key_dim

    def expanded(weight: Tensor) -> Tensor:
        return expand_kv(weight, mixer.heads, kept)

    x, b, c, dt = expanded(mixer.v_proj.weight), expanded(mixer.k_proj.weight), mixer.q_proj.weight, mixer.dt_proj
    convs = expanded(mixer.v_conv.weight), expanded(mixer.k_conv.weight), mixer.q_conv.weight
    reference.load_state_dict({
        "in_proj.weight": torch.cat([mixer.gate_proj.weight, x, b, c, dt.weight]),
        "conv1d.weight": torch.cat(convs)[:, None],
        "dt_bias": dt.bias,
        "A_log": mixer.A_log,
        "D": mixer.D,
        "norm.weight": mixer.norm.weight.repeat(mixer.heads),
        "out_proj.weight": mixer.o_proj.weight,
    })  # fmt: skip
    assert relative_error(mixer(hidden, position)[0], reference(hidden)) < 1e-5


@pytest.mark.parametrize("retention", [0.982, 0.9])
def test_mamba2_starts_with_steps_as_long_as_it_forgets(teacher, retention):
    mixer = StudentFactory("mamba2", retention=retention).build(teacher, seed=0).requires_grad_(False).mixers[0]
    hidden = torch.zeros(1, 2, teacher.config.hidden_size)
    assert mixer.log_decay(mixer.dt(hidden)).exp().unique().tolist() == pytest.approx([retention])
    assert mixer.dt(hidden).unique().tolist() == pytest.approx([-math.log(retention)])
