"""Gated DeltaNet and KDA against transformers' layers, RWKV-7 against its formula, their op against fla's naive recurrences."""

import math
from types import ModuleType

import pytest
import torch
from op_inputs import FAMILIES, fla_file, make, relative_error
from torch import nn
from torch.nn.functional import group_norm

from distill_pl.errors import InputError
from distill_pl.mixers import SequenceMixer
from distill_pl.ops import gated_delta
from distill_pl.student.factory import StudentFactory
from distill_pl.student.transfer import expand_kv

LENGTH, EPS = 70, 1e-6


def load(layer: nn.Module, mixer: SequenceMixer, names: dict[str, str]) -> nn.Module:
    """Give a layer of transformers the projections, convolutions and, by their names there, other weights of a mixer."""
    weights, others = {}, dict(mixer.named_parameters())
    for part in "qkv":
        pair = (others[f"{part}_proj.weight"], others[f"{part}_conv.weight"])
        weights[part] = [expand_kv(x, mixer.heads, len(x) // mixer.key_dim) for x in pair]
    state = {f"{part}_proj.weight": projection for part, (projection, _) in weights.items()}
    state["conv1d.weight"] = torch.cat([conv for _, conv in weights.values()])[:, None]
    state |= {name: others[ours].view_as(layer.get_parameter(name)) for name, ours in names.items()}
    layer.load_state_dict(state)
    return layer.eval().requires_grad_(False)


def without_kernels(monkeypatch, module: ModuleType, name: str) -> None:
    """Call transformers' function of torch operations, also where fla-core is installed, whose kernels need a GPU."""
    monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)


NAMES = {"o_proj.weight": "o_proj.weight", "b_proj.weight": "beta_proj.weight", "o_norm.weight": "norm.weight"}


def test_gated_delta_net_is_transformers(trained, kv_heads, monkeypatch):
    olmo = pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    without_kernels(monkeypatch, olmo, "torch_chunk_gated_delta_rule")
    mixer, hidden, position = trained("gated_delta_net", kv_heads=kv_heads)
    config = olmo.OlmoHybridConfig(
        hidden_size=hidden.shape[-1], num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
        linear_allow_neg_eigval=False,
        **{f"linear_num_{part}_heads": mixer.heads for part in ("key", "value")},
        **{f"linear_{part}_head_dim": mixer.key_dim for part in ("key", "value")},
    )  # fmt: skip
    layer = olmo.OlmoHybridGatedDeltaNet(config, 0)
    layer.o_norm.variance_epsilon = EPS
    own = {"a_proj.weight": "decay_proj.weight", "g_proj.weight": "gate_proj.weight", "A_log": "A_log", "dt_bias": "dt_bias"}
    assert relative_error(mixer(hidden, position)[0], load(layer, mixer, NAMES | own)(hidden)) < 1e-5


def test_kda_is_transformers(trained, kv_heads, monkeypatch):
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    without_kernels(monkeypatch, kimi, "chunk_kimi_delta_attention")
    mixer, hidden, position = trained("kda", kv_heads=kv_heads)
    config = kimi.KimiLinearConfig(
        hidden_size=hidden.shape[-1], num_hidden_layers=1, layer_types=["linear_attention"], rms_norm_eps=EPS,
        linear_num_heads=mixer.heads, linear_head_dim=mixer.key_dim,
    )  # fmt: skip
    own = {f"forget_gate.{name}": name for name in ("A_log", "dt_bias")}
    for index, letter in enumerate("ab"):
        own |= {f"forget_gate.f_{letter}_proj.weight": f"decay_proj.{index}.weight"}
        own |= {f"g_{letter}_proj.weight": f"gate_proj.{index}.weight"}
    layer = load(kimi.KimiLinearDeltaAttention(config, 0), mixer, NAMES | own)
    assert relative_error(mixer(hidden, position)[0], layer(hidden)) < 1e-5


def test_rwkv7_is_its_formula(trained, kv_heads):
    """Write out the time mixing of the paper in float64, with S [V, K] as there."""
    mixer, hidden, position = trained("rwkv7", kv_heads=kv_heads)
    w = {name: x.double() for name, x in mixer.state_dict().items()}
    x, heads, kept = hidden.double(), mixer.heads, mixer.k_proj.out_features // 8
    shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    x = {name: x + w[f"shifts.{name}"] * (shifted - x) for name in ("q", "k", "v", "decay", "rate", "gate")}
    r, k, v = (x[part] @ expand_kv(w[f"{part}_proj.weight"], heads, heads if part == "q" else kept).T for part in "qkv")
    decay = torch.tanh(x["decay"] @ w["decay_proj.0.weight"].T) @ w["decay_proj.2.weight"].T + w["decay_proj.2.bias"]
    decay = torch.exp(-(math.e**-0.5) * decay.sigmoid())
    a = (x["rate"] @ w["rate_proj.0.weight"].T @ w["rate_proj.1.weight"].T + w["rate_proj.1.bias"]).sigmoid()
    gate = (x["gate"] @ w["gate_proj.0.weight"].T).sigmoid() @ w["gate_proj.2.weight"].T
    u, k = k * w["k_k"], k * (1 + (a - 1) * w["k_a"])
    r, decay, k, v, u, a = (x.unflatten(-1, (heads, 8)) for x in (r, decay, k, v, u, a))
    u = u / u.norm(dim=-1, keepdim=True)
    state, outputs = x["q"].new_zeros(len(hidden), heads, 8, 8), []
    for t in range(LENGTH):
        transition = torch.diag_embed(decay[:, t]) - u[:, t, :, :, None] * (a * u)[:, t, :, None]
        state = state @ transition + v[:, t, :, :, None] * k[:, t, :, None]
        outputs.append((state @ r[:, t, :, :, None])[..., 0] / 8**0.5)
    y = group_norm(torch.stack(outputs, 1).flatten(2).flatten(0, 1), heads, w["norm.weight"], w["norm.bias"], 8 * EPS)
    bonus = (r * k * w["r_k"].unflatten(0, (heads, 8))).sum(-1, keepdim=True) * v
    expected = ((y.view_as(gate) + bonus.flatten(2)) * gate) @ w["o_proj.weight"].T
    assert relative_error(mixer(hidden, position)[0], expected) < 1e-5


def test_rwkv7_refuses_a_retention_that_it_does_not_have(teacher):
    with pytest.raises(InputError, match=r"student.retention 0.5: rwkv7 retains at least 0.545: give more"):
        StudentFactory("rwkv7", retention=0.5).build(teacher, seed=0)


@pytest.mark.parametrize("name", ["gated_delta_net", "kda", "rwkv7"])
def test_padding_in_the_middle_and_at_the_end_leaves_no_trace_in_the_matrix(trained, name):
    """A masked token writes and erases nothing wherever it is, not only in padding on the left; it decays the state."""
    mixer, hidden, _ = trained(name)
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
    mask[:, 30:40] = mask[:, -5:] = False
    arguments = mixer.inputs(hidden, None, mask, None)[0]._asdict()
    del arguments["v"]
    a = gated_delta.matrix(**arguments)
    assert (a[..., ~mask[0]] == 0).all()
    assert (a[..., 40:65, 29] != 0).all()


# ---- the op


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("family", [name for name, (op, _) in FAMILIES.items() if op is gated_delta])
def test_op_is_flas_recurrence(family, strong):
    inputs = make(family, LENGTH, torch.float32, strong=strong) | {"scale": 8**-0.5}  # which fla's naive DPLR takes for granted
    q, k, v, beta, g, r, b = (inputs.get(name) for name in ("q", "k", "v", "beta", "g", "r", "b"))
    start = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(2))
    options = {"scale": 8**-0.5, "initial_state": start, "output_final_state": True}
    if family == "gated_delta":
        naive = fla_file("ops/gated_delta_rule/naive.py").naive_recurrent_gated_delta_rule
        expected, final = naive(q, k, v, beta, g[..., 0], **options)
    elif family == "gated_delta, channels":
        expected, final = fla_file("ops/kda/naive.py").naive_recurrent_kda(q, k, v, g, beta, **options)
    else:
        if family == "delta_rule":
            naive, arguments = fla_file("ops/delta_rule/naive.py").delta_rule_recurrence, (q, k, v, beta)
        else:  # fla's reads the state before it decays
            naive, weight = fla_file("ops/generalized_delta_rule/dplr/naive.py").dplr_recurrence, beta[..., None]
            arguments = (q, k * weight, v, r * g.exp(), -b * weight, g)
        expected, final = naive(*(x.transpose(1, 2) for x in arguments), initial_state=start)
        expected = expected.transpose(1, 2)
    y, state = gated_delta.mix(**inputs, state=start)
    assert relative_error(y, expected) < 2e-6
    assert relative_error(state, final) < 2e-6
