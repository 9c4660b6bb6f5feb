"""The law of every op, matrix @ v == mix == step by step, in float64, fp32 and bf16 and under strong gates."""

import math

import pytest
import torch
from op_inputs import (
    cast,
    cut,
    families,
    fla_file,
    kept_in_fp32,
    make,
    matrix,
    matrix_times_v,
    mixed,
    op_of,
    relative_error,
    stepped,
    tensors_of,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

from distill_pl.ops import channel_decay, gated_delta, mlstm, softmax

KEY, VALUE = 8, 6  # of `make`
LENGTHS = [1, 5, 64, 130]  # one token; less than a chunk, odd; a chunk; two chunks and a rest
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# each of LENGTHS, and in either dtype a sequence within a chunk and one across chunks or of a whole chunk
CASES = [(1, torch.float64), (5, torch.float32), (64, torch.float32), (130, torch.float64)]


@pytest.fixture(params=families())
def family(request) -> str:
    return request.param


@pytest.mark.parametrize(("length", "dtype"), CASES)
def test_matrix_times_v_is_mix_is_step_by_step(family, length, dtype):
    op, inputs = op_of(family), make(family, length, dtype)
    expected = matrix_times_v(op, inputs)
    assert relative_error(mixed(op, inputs), expected) < TOLERANCE[dtype]
    assert relative_error(stepped(op, inputs), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("borders", [[1, 4], [64], [3, 67, 129], [129]])
def test_pieces_with_carried_state_are_the_whole(family, borders):
    op, inputs = op_of(family), make(family, length=130)
    whole, final = op.mix(**inputs)
    outputs, state = [], None
    for start, end in zip([0, *borders], [*borders, 130], strict=True):
        y, state = op.mix(**cut(inputs, slice(start, end)), state=state)
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), whole) < 1e-10
    for tensor, expected in zip(tree_leaves(state), tree_leaves(final), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-10, atol=1e-10)


def test_mix_and_step_continue_each_other(family):
    op, inputs = op_of(family), make(family, length=20)
    first, state = op.mix(**cut(inputs, slice(0, 9)))
    token, state = op.step(**cut(inputs, 9), state=state)
    rest, _ = op.mix(**cut(inputs, slice(10, 20)), state=state)
    assert relative_error(torch.cat([first, token[:, None], rest], 1), mixed(op, inputs)) < 1e-10


@pytest.mark.parametrize(("length", "dtype"), CASES)
def test_gradients_agree(family, length, dtype):
    op, inputs = op_of(family), make(family, length, dtype)
    leaves = tensors_of(inputs)
    for leaf in leaves.values():
        leaf.requires_grad_(True)

    def gradients(run) -> list[Tensor]:
        y = run(op, inputs)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return torch.autograd.grad((y * weight).sum(), list(leaves.values()), materialize_grads=True)

    expected, tolerance = gradients(matrix_times_v), 1e-10 if dtype == torch.float64 else 1e-4
    for run in (mixed, stepped):
        for name, value, gradient in zip(leaves, gradients(run), expected, strict=True):
            # at T = 1 nothing has decayed and softmax is 1: those gradients are zero on both sides
            scale = max(gradient.abs().max().item(), 1e-3)
            assert (value - gradient).abs().max() < tolerance * scale, (run.__name__, name)


@pytest.mark.slow
@pytest.mark.parametrize("run", [matrix_times_v, mixed, stepped])
def test_gradients_are_those_of_finite_differences(family, run):
    op, inputs = op_of(family), make(family, length=3, batch=1, heads=2, key=2, value=1)
    leaves = tensors_of(inputs)

    def of_tensors(*values: Tensor) -> Tensor:
        return run(op, inputs | dict(zip(leaves, values, strict=True)))

    leaves_with_gradients = [leaf.requires_grad_(True) for leaf in leaves.values()]
    # undefined gradients concern autograd functions of one's own
    assert torch.autograd.gradcheck(of_tensors, leaves_with_gradients, check_undefined_grad=False, fast_mode=True)


def test_a_token_changes_nothing_before_it(family):
    op, inputs, other = op_of(family), make(family, length=130), make(family, length=130, seed=1)
    before = {run: run(op, inputs) for run in (mixed, stepped, matrix)}
    for time, runs in [(0, [mixed]), (40, [mixed]), (63, [mixed, stepped]), (64, [mixed]), (129, [mixed])]:
        changed = {
            name: torch.cat([x[:, :time], other[name][:, time : time + 1], x[:, time + 1 :]], 1)
            for name, x in tensors_of(inputs).items()
        }
        for run in runs:
            after = run(op, inputs | changed)
            assert torch.equal(before[run][:, :time], after[:, :time]), (run.__name__, time)
            assert not torch.isclose(before[run][:, time], after[:, time]).any(-1).all(), (run.__name__, time)
        assert torch.equal(before[matrix][:, :, :time], matrix(op, inputs | changed)[:, :, :time]), time


@pytest.mark.parametrize("length", LENGTHS)
def test_matrix_is_zero_above_and_alive_below_the_diagonal(family, length):
    a = matrix(op_of(family), make(family, length, torch.float32))
    assert a.shape == (2, 4, length, length)
    assert (a.triu(1) == 0).all()
    assert (a.diagonal(dim1=-2, dim2=-1) != 0).all()
    assert (a.diagonal(-1, dim1=-2, dim2=-1) != 0).all()


@pytest.mark.slow
def test_strong_gates_are_finite_at_length_512(family):
    """Log decays add up to -6000, where fp32 has no number but 0 below e^-103."""
    op, inputs = op_of(family), make(family, 512, torch.float32, batch=1, heads=2, strong=True)
    leaves = [leaf.requires_grad_(True) for leaf in tensors_of(inputs).values()]
    for run in (matrix_times_v, mixed):
        y = run(op, inputs)
        gradients = torch.autograd.grad(y.square().mean(), leaves)
        for tensor in (y, *gradients):
            assert tensor.isfinite().all()
            assert tensor.abs().max() > 0


def test_strong_gates_are_exact(family):
    op = op_of(family)
    expected = stepped(op, make(family, 130, torch.float64, strong=True))
    for run in (matrix_times_v, mixed, stepped):
        assert relative_error(run(op, make(family, 130, torch.float32, strong=True)), expected) < 1e-5, run.__name__


def test_closed_input_gates_of_mlstm_write_nothing_until_they_open():
    inputs = make("mlstm", 32, torch.float32)
    inputs["i"], inputs["g"] = inputs["i"].clamp(max=0), torch.full_like(inputs["g"], -8.0)
    inputs["i"][:, :24] = -200.0  # e^{-m} has no fp32 number here
    leaves = [leaf.requires_grad_(True) for leaf in tensors_of(inputs).values()]
    for run in (matrix_times_v, mixed, stepped):
        y = run(mlstm, inputs)
        assert (y[:, :24] == 0).all() and (y[:, 24:] != 0).all(), run.__name__
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.square().sum(), leaves)), run.__name__


def test_bf16_inputs_cost_their_rounding_only(family):
    op = op_of(family)
    exact = make(family, 130, torch.float32)
    half = cast(exact, torch.bfloat16, keep=kept_in_fp32(family))
    rounded = cast(half, torch.float32)
    expected = mixed(op, rounded)
    assert torch.equal(matrix(op, half), matrix(op, rounded))
    for run in (mixed, stepped):
        y = run(op, half)
        assert y.dtype == torch.bfloat16
        assert relative_error(y, expected) < 2**-7
    assert relative_error(expected, mixed(op, exact)) < 2e-2


def test_matrix_stays_fp32_under_autocast(family):
    op, inputs = op_of(family), make(family, 130, torch.float32)
    expected = matrix(op, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        a = matrix(op, inputs)
    assert a.dtype == torch.float32
    assert torch.equal(a, expected)


def test_recurrent_state_stays_fp32():
    inputs = make("channel_decay", 130, torch.float32)
    expected, state = channel_decay.mix(**inputs)
    half = {name: x.bfloat16() if name in "qkv" else x for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, under_autocast = channel_decay.mix(**inputs)
        _, state_after_step = channel_decay.step(**cut(half, 0), state=channel_decay.mix(**half)[1])
    assert state_after_step.dtype == torch.float32
    assert torch.equal(under_autocast, state)
    assert torch.equal(y, expected)


def test_softmax_state_holds_the_masked_keys_as_well():
    inputs = make("softmax", 7)
    (k, v, mask), expected = softmax.mix(**inputs)[1], (inputs["k"], inputs["v"])
    assert torch.equal(k.transpose(1, 2), expected[0])
    assert torch.equal(v.transpose(1, 2), expected[1])
    assert mask.shape == (2, 7) and mask.all()


# ---- against formulas written out and implementations of others


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("length", [1, 2, 16, 64, 100])
def test_channel_decay_matrix_is_the_direct_sum(length, strong):
    inputs = make("channel_decay", length, strong=strong)
    q, k, g = (inputs[name].transpose(1, 2) for name in ("q", "k", "g"))
    decay = g.cumsum(-2)
    weight = (decay[:, :, :, None] - decay[:, :, None]).exp()  # [B, H, i, j, K]
    direct = inputs["scale"] * torch.einsum("bhik,bhjk,bhijk->bhij", q, k, weight).tril()
    assert relative_error(matrix(channel_decay, inputs), direct) < 1e-12
    assert relative_error(matrix(channel_decay, cast(inputs, torch.float32)), direct) < 1e-6
    changed = inputs | {"g": inputs["g"].index_fill(1, torch.tensor(length - 1), -30.0)}
    assert torch.equal(matrix(channel_decay, changed)[:, :, :-1], matrix(channel_decay, inputs)[:, :, :-1])


@pytest.mark.parametrize("length", [64, 65, 600])
def test_delta_rule_matrix_is_its_formula(length):
    inputs = make("delta_rule", length)
    q, k = (inputs[name].transpose(1, 2) for name in "qk")
    beta = inputs["beta"].transpose(1, 2)[..., None]
    steps = torch.eye(length) + (beta * k @ k.mT).tril(-1)
    direct = inputs["scale"] * (q @ k.mT).tril() @ torch.linalg.inv(steps) * beta.mT
    assert relative_error(matrix(gated_delta, inputs), direct) < 1e-12


@pytest.mark.parametrize("strong", [False, True])
def test_delta_rules_are_the_recurrence(strong):
    """From any state, with all of g, r and b, which default to no decay, the key and the key."""
    inputs, eye = make("gated_delta, rank one", 70, strong=strong), torch.eye(KEY)
    start = torch.randn(2, 4, KEY, VALUE, generator=torch.Generator().manual_seed(2)).double()
    state, outputs = start, []
    for time in range(70):
        q, k, v, r, b = (inputs[name][:, time, :, :, None] for name in "qkvrb")
        g, beta = inputs["g"][:, time, :, :, None], inputs["beta"][:, time, :, None, None]
        state = (eye - beta * b @ r.mT) @ (g.exp() * state) + beta * k @ v.mT
        outputs.append(inputs["scale"] * (q.mT @ state)[..., 0, :])
    y, final = gated_delta.mix(**inputs, state=start)
    assert relative_error(y, torch.stack(outputs, 1)) < 1e-12
    assert relative_error(final, state) < 1e-12

    inputs = make("gated_delta", 70, strong=strong)
    expected, all_channels = gated_delta.mix(**inputs)[0], inputs["g"].expand(-1, -1, -1, KEY)
    for same in ({"g": all_channels}, {"r": inputs["k"]}, {"b": inputs["k"]}):
        assert relative_error(gated_delta.mix(**inputs | same)[0], expected) < 1e-12
    never = inputs | {"g": torch.zeros_like(inputs["g"])}
    assert relative_error(mixed(gated_delta, never), mixed(gated_delta, inputs | {"g": None})) < 1e-12


@pytest.mark.parametrize("forgets", [-1e4, -math.inf])
def test_a_delta_rule_whose_heads_forget_everything_is_exact(forgets):
    """Differences of sums that contain such a log decay would have no digits."""
    inputs = make("gated_delta", 130)
    inputs["g"][:, [20, 64, 65, 100]] = forgets
    expected, inputs = stepped(gated_delta, inputs), cast(inputs, torch.float32)
    leaves = [leaf.requires_grad_(True) for leaf in tensors_of(inputs).values()]
    for run in (matrix_times_v, mixed, stepped):
        y = run(gated_delta, inputs)
        assert relative_error(y, expected) < 1e-6
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), leaves))


def test_channel_decay_is_the_recurrence():
    inputs = make("channel_decay", 70)
    start = torch.randn(2, 4, KEY, VALUE, generator=torch.Generator().manual_seed(2)).double()
    state, outputs = start, []
    for time in range(70):
        q, k, v, g = (inputs[name][:, time] for name in "qkvg")
        state = g.exp()[..., None] * state + k[..., :, None] * v[..., None, :]
        outputs.append(inputs["scale"] * (q[..., None, :] @ state)[..., 0, :])
    y, final = channel_decay.mix(**inputs, state=start)
    assert relative_error(y, torch.stack(outputs, 1)) < 1e-12
    assert relative_error(final, state) < 1e-12


def test_channel_decay_is_flas_naive_gla():
    inputs = make("channel_decay", 70, torch.float32) | {"scale": KEY**-0.5}
    q, k, v, g = (inputs[name] for name in "qkvg")
    expected, final = fla_file("ops/gla/naive.py").naive_recurrent_gla(q, k, v, g, output_final_state=True)
    y, state = channel_decay.mix(**inputs)
    assert relative_error(y, expected) < 1e-6
    assert relative_error(state, final) < 1e-6


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute grouped-query attention one head and one query at a time -> A [B, H, T, T], y [B, T, H, V]."""
    batch, length, heads = q.shape[:3]
    a, y = q.new_zeros(batch, heads, length, length), q.new_zeros(batch, length, heads, v.shape[-1])
    for b in range(batch):
        for h in range(heads):
            kv_head = h * k.shape[2] // heads
            for i in range(length):
                seen = [j for j in range(i + 1) if key_mask[b, j] or j == i]
                a[b, h, i, seen] = (k[b, seen, kv_head] @ q[b, i, h] * scale).softmax(0)
            y[b, :, h] = a[b, h] @ v[b, :, kv_head]
    return a, y


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [[], [0, 1, 2], [0, 4, 5, 9]])
def test_softmax_is_eager_attention(kv_heads, masked):
    inputs = make("softmax", 10, heads=4)
    inputs |= {name: inputs[name].repeat(1, 1, 2, 1)[:, :, :kv_heads] for name in "kv"}
    inputs |= {"k": inputs["k"] + torch.arange(kv_heads)[:, None]}  # no two heads alike
    key_mask = torch.ones(2, 10, dtype=torch.bool)
    key_mask[0, masked] = False
    expected_a, expected_y = eager(**inputs, key_mask=key_mask)
    if masked:
        inputs["key_mask"] = key_mask
    assert relative_error(matrix(softmax, inputs), expected_a) < 1e-12
    for run in (mixed, stepped):
        assert relative_error(run(softmax, inputs), expected_y) < 1e-12


def test_left_padding_leaves_no_trace_in_softmax():
    inputs, padding = make("softmax", 10), 4
    key_mask = torch.arange(10).expand(2, 10) >= padding
    alone = mixed(softmax, cut(inputs, slice(padding, None)))
    for run in (mixed, stepped):
        assert relative_error(run(softmax, inputs | {"key_mask": key_mask})[:, padding:], alone) < 1e-12
