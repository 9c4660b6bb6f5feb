"""HGRN2 and MetaLA against fla's naive recurrences and against their papers' formulas, token by token in float64."""

import pytest
import torch
from op_inputs import fla_file, relative_error
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm, silu

from distill_pl.mixers import SequenceMixer
from distill_pl.ops import channel_decay
from distill_pl.student.factory import StudentFactory

LENGTH, EPS = 70, 1e-6
Weights = dict[str, Tensor]


@pytest.fixture(params=[0.982, 0.5])
def retention(request) -> float:
    return request.param


def in_float64(mixer: SequenceMixer) -> Weights:
    return {name: tensor.double() for name, tensor in mixer.state_dict().items()}


def by_head(x: Tensor, heads: int) -> Tensor:
    """Split [B, T, heads' width] -> [B, T, H, width]; grouped heads serve consecutive query heads."""
    x = x.unflatten(-1, (-1, 8))
    return torch.stack([x[:, :, head * x.shape[2] // heads] for head in range(heads)], 2)


def hgrn2_inputs(w: Weights, x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Return q, v and the forget gate f, [B, T, H, K or V]."""
    forget = torch.sigmoid(x @ w["decay_proj.weight"].T + w["decay_proj.bias"])
    return silu(by_head(x @ w["q_proj.weight"].T, heads)), by_head(x @ w["v_proj.weight"].T, heads), by_head(forget, heads)


def hgrn2_output(w: Weights, y: Tensor) -> Tensor:
    """Apply RMSNorm over the hidden width and the output projection."""
    return rms_norm(y.flatten(2), w["norm.weight"].shape, w["norm.weight"], EPS) @ w["o_proj.weight"].T


def metala_inputs(w: Weights, x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Return the hidden state after the causal convolution of four taps and silu, and its q, v and decay alpha."""
    past = torch.cat([torch.zeros_like(x[:, :3]), x], 1)
    x = silu(sum(past[:, tap : tap + x.shape[1]] * w["conv.weight"][:, tap] for tap in range(4)))
    alpha = torch.sigmoid(x @ w["decay_proj.weight"].T + w["decay_proj.bias"]) ** (1 / 16)
    return x, by_head(x @ w["q_proj.weight"].T, heads), by_head(x @ w["v_proj.weight"].T, heads), by_head(alpha, heads)


def metala_output(w: Weights, x: Tensor, q: Tensor, v: Tensor, alpha: Tensor, y: Tensor) -> Tensor:
    """Apply self-augmentation, head norm without weights, swish gate and output projection."""
    weight = torch.einsum("bthk,hk,bthk->bth", q, w["augmentation"], 1 - alpha)
    y = layer_norm(y + torch.sigmoid(weight[..., None] * v), (8,), eps=EPS)
    return (y.flatten(2) * silu(x @ w["gate_proj.weight"].T + w["gate_proj.bias"])) @ w["o_proj.weight"].T


def recurrence(q: Tensor, v: Tensor, forget: Tensor) -> Tensor:
    """Compute the recurrence of both papers: S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, y_t = S_t^T q_t / sqrt(K)."""
    state, outputs = q.new_zeros(*q.shape[:1], q.shape[2], 8, 8), []
    for time in range(q.shape[1]):
        f = forget[:, time, :, :, None]
        state = f * state + (1 - f) * v[:, time, :, None]
        outputs.append((q[:, time, :, :, None] * state).sum(-2) / 8**0.5)
    return torch.stack(outputs, 1)


def test_hgrn2_is_its_formula(teacher, trained, kv_heads, retention):
    mixer, hidden, position = trained("hgrn2", kv_heads=kv_heads, retention=retention)
    assert teacher.config.rms_norm_eps == EPS and mixer.key_dim == 8
    w = in_float64(mixer)
    expected = hgrn2_output(w, recurrence(*hgrn2_inputs(w, hidden.double(), mixer.heads)))
    assert relative_error(mixer(hidden, position)[0], expected) < 1e-5


def test_hgrn2_is_flas_naive_gla(trained, kv_heads, retention):
    mixer, hidden, position = trained("hgrn2", kv_heads=kv_heads, retention=retention)
    w = mixer.state_dict()
    q, v, f = hgrn2_inputs(w, hidden, mixer.heads)
    y, _ = fla_file("ops/gla/naive.py").naive_recurrent_gla(q, 1 - f, v, f.log())
    assert relative_error(mixer(hidden, position)[0], hgrn2_output(w, y)) < 1e-5


def test_hgrn2_is_flas_naive_hgrn_of_an_expanded_state(trained, kv_heads, retention):
    """HGRN computes h_t = f_t h_{t-1} + x_t: here x_t is the outer product (1 - f_t) v_t^T, and q reads h_t."""
    mixer, hidden, position = trained("hgrn2", kv_heads=kv_heads, retention=retention)
    w = mixer.state_dict()
    q, v, f = hgrn2_inputs(w, hidden, mixer.heads)
    added, decay = (1 - f)[..., None] * v[..., None, :], f.log()[..., None].expand(*f.shape, 8)
    states, _ = fla_file("ops/hgrn/naive.py").naive_recurrent_hgrn(added.flatten(2), decay.flatten(2))
    y = torch.einsum("bthk,bthkv->bthv", q, states.view_as(added)) / 8**0.5
    assert relative_error(mixer(hidden, position)[0], hgrn2_output(w, y)) < 1e-5


def test_metala_is_its_formula(trained, kv_heads, retention):
    mixer, hidden, position = trained("metala", kv_heads=kv_heads, retention=retention)
    w = in_float64(mixer)
    x, *inputs = metala_inputs(w, hidden.double(), mixer.heads)
    assert relative_error(mixer(hidden, position)[0], metala_output(w, x, *inputs, recurrence(*inputs))) < 1e-5


def test_metala_is_flas_naive_gla(trained, kv_heads, retention):
    mixer, hidden, position = trained("metala", kv_heads=kv_heads, retention=retention)
    w = mixer.state_dict()
    x, q, v, alpha = metala_inputs(w, hidden, mixer.heads)
    y, _ = fla_file("ops/gla/naive.py").naive_recurrent_gla(q, 1 - alpha, v, alpha.log())
    assert relative_error(mixer(hidden, position)[0], metala_output(w, x, q, v, alpha, y)) < 1e-5


@pytest.mark.parametrize("name", ["hgrn2", "metala"])
def test_matrix_is_the_direct_sum(trained, name, kv_heads, retention):
    mixer, hidden, position = trained(name, kv_heads=kv_heads, retention=retention)
    q, _, f = (hgrn2_inputs if name == "hgrn2" else metala_inputs)(in_float64(mixer), hidden.double(), mixer.heads)[-3:]
    a = torch.zeros(2, mixer.heads, LENGTH, LENGTH, dtype=torch.float64)
    keys = f[:, :0]  # (1 - f_j) prod_{j < r <= i} f_r of all j <= i
    for i in range(LENGTH):
        keys = torch.cat([keys * f[:, i, None], 1 - f[:, i, None]], 1)
        a[:, :, i, : i + 1] = torch.einsum("bhk,bjhk->bhj", q[:, i], keys) / 8**0.5
    assert relative_error(mixer.matrix(hidden, position), a) < 1e-5


@pytest.mark.parametrize("name", ["hgrn2", "metala"])
def test_key_is_what_the_gate_lets_in(trained, name):
    """Check it also where the gate is almost shut: in fp32, 1 - sigmoid(30) is 0."""
    mixer, hidden, position = trained(name)
    mixer.decay_proj.weight.zero_()
    mixer.decay_proj.bias.copy_(torch.linspace(-100, 80, len(mixer.decay_proj.bias)))
    logits, temperature = mixer.decay_proj.bias.double(), 16 if name == "metala" else 1
    inputs, _ = mixer.inputs(hidden, position, None, None)
    expected = -torch.expm1(torch.nn.functional.logsigmoid(logits) / temperature).view(mixer.heads, 8)
    assert ((inputs.k - expected).abs() <= 1e-6 * expected).all() and (expected > 0).all()
    log_decay = channel_decay.log_decay(inputs.g, inputs.temperature)
    assert log_decay.isfinite().all() and (log_decay <= 0).all()


@pytest.mark.parametrize("name", ["hgrn2", "metala"])
def test_there_is_no_key_projection_and_no_norm(variant, name):
    """A key made from the gate has neither a projection nor a norm."""
    student = StudentFactory(name).build(variant("qwen3"), seed=0)
    names = {name for mixer in student.mixers for name, _ in mixer.named_parameters()}
    assert not any(name.startswith("k_") for name in names) and "q_norm.weight" in names


def test_hgrn2_query_is_the_teachers_through_silu(teacher):
    student = StudentFactory("hgrn2").build(teacher, seed=0).requires_grad_(False)
    hidden = torch.randn(2, LENGTH, teacher.config.hidden_size, generator=torch.Generator().manual_seed(1))
    query = teacher.model.model.layers[0].self_attn.q_proj(hidden).detach()
    q = student.mixers[0].inputs(hidden, student.position(hidden), None, None)[0].q
    assert torch.equal(q.flatten(2), silu(query))


def test_metala_starts_without_augmentation(teacher):
    """The head norm removes the sigmoid's 1/2, so that only A v of the convolved hidden state remains."""
    student = StudentFactory("metala", init="fresh").build(teacher, seed=0).requires_grad_(False)
    mixer = student.mixers[0]
    hidden = torch.randn(2, LENGTH, teacher.config.hidden_size, generator=torch.Generator().manual_seed(1))
    w = in_float64(mixer)
    x, *inputs = metala_inputs(w, hidden.double(), mixer.heads)
    assert torch.equal(x, silu(hidden.double()))
    y = layer_norm(recurrence(*inputs), (8,), eps=EPS).flatten(2)
    expected = (y * silu(x @ w["gate_proj.weight"].T + w["gate_proj.bias"])) @ w["o_proj.weight"].T
    assert relative_error(mixer(hidden, student.position(hidden))[0], expected) < 1e-4
