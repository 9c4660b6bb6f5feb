"""The law of every op, matrix @ v == mix == step by step, in float64, fp32 and bf16 and under strong gates."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from distill_pl.ops import channel_decay, delta_rule, mlstm, normalized, scalar_decay, softmax

Inputs = dict[str, Tensor | float]  # an op's keyword arguments; every tensor is [B, T, heads, ...] and float64
KEY, VALUE = 8, 6  # different, so that a mix-up is an error


def softmax_inputs(normal: Callable[..., Tensor], batch: int, length: int, heads: int, strong: bool) -> Inputs:
    """Grouped kv heads; strong: scores of +-100."""
    q = normal(batch, length, heads, KEY) * (30 if strong else 1)
    k, v = normal(batch, length, heads // 2, KEY), normal(batch, length, heads // 2, VALUE)
    return {"q": q, "k": k, "v": v, "scale": KEY**-0.5}


def channel_decay_inputs(normal: Callable[..., Tensor], batch: int, length: int, heads: int, strong: bool) -> Inputs:
    """Strong: some channels keep nothing (g from -5 to -20 a step), one keeps everything, one forgets now and then."""
    shape = (batch, length, heads, KEY)
    g = -0.3 * normal(*shape).abs()
    if strong:
        g = -(5 + 15 * torch.special.ndtr(normal(*shape)))
        g[..., 0] = 0
        g[..., 1] = torch.where(normal(batch, length, heads) > 1.5, -20, -0.01)
    return {"q": normal(*shape), "k": normal(*shape), "v": normal(batch, length, heads, VALUE), "g": g, "scale": 0.4}


def scalar_decay_inputs(normal: Callable[..., Tensor], batch: int, length: int, heads: int, strong: bool) -> Inputs:
    """Strong: one head keeps nothing (g from -5 to -20 a step), one forgets now and then."""
    shape, gates = (batch, length, heads, KEY), (batch, length, heads)
    g = -0.3 * normal(*gates).abs()
    if strong:
        g = -(5 + 15 * torch.special.ndtr(normal(*gates)))
        g[..., 1] = torch.where(normal(batch, length) > 1.5, -20, -0.01)
    return {"q": normal(*shape), "k": normal(*shape), "v": normal(batch, length, heads, VALUE), "g": g, "scale": 0.4}


def mlstm_inputs(normal: Callable[..., Tensor], batch: int, length: int, heads: int, strong: bool) -> Inputs:
    """Strong: input gates of e^{+-10} as well; q, k > 0, as no arithmetic saves the digits of y where n . q is almost 0."""
    inputs = scalar_decay_inputs(normal, batch, length, heads, strong)
    if strong:
        inputs |= {name: inputs[name].abs() for name in "qk"}
    return inputs | {"i": normal(batch, length, heads) * (10 if strong else 1)}


def delta_rule_inputs(normal: Callable[..., Tensor], batch: int, length: int, heads: int, strong: bool) -> Inputs:
    """Keys of unit length; strong: they come again and again, and nearly everything is overwritten (beta up to 1 - 1e-8)."""
    k = normal(batch, length, heads, KEY)
    beta = torch.special.ndtr(normal(batch, length, heads))
    if strong:
        k = k[:, torch.arange(length) % 3] + 0.01 * k
        beta = 1 - 10 ** -(8 * beta)
    k = k / k.norm(dim=-1, keepdim=True)
    return {"q": normal(*k.shape), "k": k, "v": normal(batch, length, heads, VALUE), "beta": beta, "scale": 0.4}


def normalized_inputs(normal: Callable[..., Tensor], batch: int, length: int, heads: int, strong: bool) -> Inputs:
    """Hedgehog's features; strong: spikes, the rest of a row down to e^-100."""
    q, k = ((normal(batch, length, heads, KEY) * (20 if strong else 1)).softmax(-1) for _ in "qk")
    # an eps that is felt, and so has to stand in the same place everywhere
    return {"q": q, "k": k, "v": normal(batch, length, heads, VALUE), "scale": 0.4, "eps": 0.1}


def squared_inputs(normal: Callable[..., Tensor], batch: int, length: int, heads: int, strong: bool) -> Inputs:
    """ReBased's; strong: S up to 1e8, and with it the row sums."""
    q, k = (normal(batch, length, heads, KEY) * (30 if strong else 1) for _ in "qk")
    return {"q": q, "k": k, "v": normal(batch, length, heads, VALUE), "scale": 0.4, "eps": 0.1, "power": 2}


# family -> its functions, and what makes their tensors; a new family is tested by standing here
FAMILIES: dict[str, tuple[ModuleType, Callable[..., Inputs]]] = {
    "softmax": (softmax, softmax_inputs),
    "channel_decay": (channel_decay, channel_decay_inputs),
    "scalar_decay": (scalar_decay, scalar_decay_inputs),
    "mlstm": (mlstm, mlstm_inputs),
    "delta_rule": (delta_rule, delta_rule_inputs),
    "normalized": (normalized, normalized_inputs),
    "squared": (normalized, squared_inputs),
}
KEEP_FP32 = ("g", "i", "beta")  # gates, whatever dtype q, k and v have
LENGTHS = [1, 5, 64, 130]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def make(family: str, length: int, dtype=torch.float64, batch=2, heads=4, strong=False, seed=0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = FAMILIES[family][1](normal, batch, length, heads, strong)
    return {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor)}


def cut(inputs: Inputs, index) -> Inputs:
    """The inputs at these times: index a slice for `mix`, a number for `step`."""
    return {name: x[:, index] if isinstance(x, Tensor) else x for name, x in inputs.items()}


def matrix(op: ModuleType, inputs: Inputs) -> Tensor:
    return op.matrix(**{name: x for name, x in inputs.items() if name != "v"})


def matrix_times_v(op: ModuleType, inputs: Inputs) -> Tensor:
    a, v = matrix(op, inputs), inputs["v"]
    v = v.repeat_interleave(a.shape[1] // v.shape[2], dim=2).to(a.dtype)
    return torch.einsum("bhij,bjhv->bihv", a, v)


def mixed(op: ModuleType, inputs: Inputs) -> Tensor:
    return op.mix(**inputs)[0]


def stepped(op: ModuleType, inputs: Inputs) -> Tensor:
    outputs, state = [], None
    for time in range(inputs["q"].shape[1]):
        y, state = op.step(**cut(inputs, time), state=state)
        outputs.append(y)
    return torch.stack(outputs, 1)


def relative_error(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return ((value.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", LENGTHS)
def test_matrix_times_v_is_mix_is_step_by_step(family, length, dtype):
    op, inputs = FAMILIES[family][0], make(family, length, dtype)
    expected = matrix_times_v(op, inputs)
    assert relative_error(mixed(op, inputs), expected) < TOLERANCE[dtype]
    assert relative_error(stepped(op, inputs), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("borders", [[1, 4], [64], [3, 67, 129], [129]])
def test_pieces_with_carried_state_are_the_whole(family, borders):
    op, inputs = FAMILIES[family][0], make(family, length=130)
    whole, final = op.mix(**inputs)
    outputs, state = [], None
    for start, end in zip([0, *borders], [*borders, 130], strict=True):
        y, state = op.mix(**cut(inputs, slice(start, end)), state=state)
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), whole) < 1e-10
    for tensor, expected in zip(tree_leaves(state), tree_leaves(final), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-10, atol=1e-10)


def test_mix_and_step_continue_each_other(family):
    op, inputs = FAMILIES[family][0], make(family, length=20)
    first, state = op.mix(**cut(inputs, slice(0, 9)))
    token, state = op.step(**cut(inputs, 9), state=state)
    rest, _ = op.mix(**cut(inputs, slice(10, 20)), state=state)
    assert relative_error(torch.cat([first, token[:, None], rest], 1), mixed(op, inputs)) < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_agree(family, length, dtype, tolerance):
    op, inputs = FAMILIES[family][0], make(family, length, dtype)
    leaves = tensors_of(inputs)
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    weight = torch.randn(*inputs["q"].shape[:3], VALUE, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradients(run) -> list[Tensor]:
        return torch.autograd.grad((run(op, inputs) * weight).sum(), list(leaves.values()), materialize_grads=True)

    expected = gradients(matrix_times_v)
    for run in (mixed, stepped):
        for name, value, gradient in zip(leaves, gradients(run), expected, strict=True):
            # at T = 1 nothing has decayed and softmax is 1: those gradients are zero on both sides
            scale = max(gradient.abs().max().item(), 1e-3)
            assert (value - gradient).abs().max() < tolerance * scale, (run.__name__, name)


@pytest.mark.parametrize("run", [matrix_times_v, mixed, stepped])
def test_gradients_are_those_of_finite_differences(family, run):
    op, inputs = FAMILIES[family][0], make(family, length=5, batch=1, heads=2)
    leaves = tensors_of(inputs)

    def of_tensors(*values: Tensor) -> Tensor:
        return run(op, inputs | dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(of_tensors, [leaf.requires_grad_(True) for leaf in leaves.values()])


@pytest.mark.parametrize("time", [0, 40, 63, 64, 129])
def test_a_token_changes_nothing_before_it(family, time):
    op, inputs, other = FAMILIES[family][0], make(family, length=130), make(family, length=130, seed=1)
    changed = {
        name: torch.cat([x[:, :time], other[name][:, time : time + 1], x[:, time + 1 :]], 1)
        for name, x in tensors_of(inputs).items()
    }
    for run in (mixed, stepped):
        before, after = run(op, inputs), run(op, inputs | changed)
        assert torch.equal(before[:, :time], after[:, :time])
        assert not torch.isclose(before[:, time], after[:, time]).any(-1).all()
    rows = matrix(op, inputs), matrix(op, inputs | changed)
    assert torch.equal(rows[0][:, :, :time], rows[1][:, :, :time])


@pytest.mark.parametrize("length", LENGTHS)
def test_matrix_is_zero_above_and_alive_below_the_diagonal(family, length):
    a = matrix(FAMILIES[family][0], make(family, length, torch.float32))
    assert a.shape == (2, 4, length, length)
    assert (a.triu(1) == 0).all()
    assert (a.diagonal(dim1=-2, dim2=-1) != 0).all()
    assert (a.diagonal(-1, dim1=-2, dim2=-1) != 0).all()


def test_strong_gates_are_finite_at_length_2048(family):
    op, inputs = FAMILIES[family][0], make(family, 2048, torch.float32, batch=1, heads=2, strong=True)
    leaves = [leaf.requires_grad_(True) for leaf in tensors_of(inputs).values()]
    for run in (matrix_times_v, mixed):
        y = run(op, inputs)
        gradients = torch.autograd.grad(y.square().mean(), leaves)
        for tensor in (y, *gradients):
            assert tensor.isfinite().all()
            assert tensor.abs().max() > 0


@pytest.mark.parametrize("run", [matrix_times_v, mixed, stepped])
def test_strong_gates_are_exact(family, run):
    op = FAMILIES[family][0]
    expected = stepped(op, make(family, 130, torch.float64, strong=True))
    assert relative_error(run(op, make(family, 130, torch.float32, strong=True)), expected) < 1e-5


def test_bf16_inputs_cost_their_rounding_only(family):
    op = FAMILIES[family][0]
    exact = make(family, 130, torch.float32)
    half = {name: x.bfloat16() if isinstance(x, Tensor) and name not in KEEP_FP32 else x for name, x in exact.items()}
    rounded = {name: x.float() if isinstance(x, Tensor) else x for name, x in half.items()}
    expected = mixed(op, rounded)
    assert torch.equal(matrix(op, half), matrix(op, rounded))
    for run in (mixed, stepped):
        y = run(op, half)
        assert y.dtype == torch.bfloat16
        assert relative_error(y, expected) < 2**-7
    assert relative_error(expected, mixed(op, exact)) < 2e-2


def test_matrix_stays_fp32_under_autocast(family):
    op, inputs = FAMILIES[family][0], make(family, 130, torch.float32)
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
        _, stepped_on = channel_decay.step(**cut(half, 0), state=channel_decay.mix(**half)[1])
    assert stepped_on.dtype == torch.float32
    assert torch.equal(under_autocast, state)
    assert torch.equal(y, expected)


def test_softmax_state_holds_the_masked_keys_as_well():
    inputs = make("softmax", 7)
    (k, v, mask), expected = softmax.mix(**inputs)[1], (inputs["k"], inputs["v"])
    assert torch.equal(k.transpose(1, 2), expected[0])
    assert torch.equal(v.transpose(1, 2), expected[1])
    assert mask.shape == (2, 7) and mask.all()


# ---- against other people's formulas, written out


def test_channel_decay_matrix_is_the_direct_sum():
    inputs = make("channel_decay", 64)
    q, k, g = (inputs[name].transpose(1, 2) for name in ("q", "k", "g"))
    decay = g.cumsum(-2)
    weight = (decay[:, :, :, None] - decay[:, :, None]).exp()  # [B, H, i, j, K]
    direct = inputs["scale"] * torch.einsum("bhik,bhjk,bhijk->bhij", q, k, weight).tril()
    assert relative_error(matrix(channel_decay, inputs), direct) < 1e-12
    single = {name: x.float() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    assert relative_error(matrix(channel_decay, single), direct) < 1e-6


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
    fla = importlib.util.find_spec("fla")
    if fla is None:
        pytest.skip("fla-core is not installed")
    # by its path: the package around it imports triton
    source = importlib.util.spec_from_file_location("naive_gla", Path(fla.origin).parent / "ops/gla/naive.py")
    naive = importlib.util.module_from_spec(source)
    source.loader.exec_module(naive)
    inputs = make("channel_decay", 70, torch.float32) | {"scale": KEY**-0.5}
    q, k, v, g = (inputs[name] for name in "qkvg")
    expected, final = naive.naive_recurrent_gla(q, k, v, g, output_final_state=True)
    y, state = channel_decay.mix(**inputs)
    assert relative_error(y, expected) < 1e-6
    assert relative_error(state, final) < 1e-6


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Grouped-query attention, one head and one query at a time -> A [B, H, T, T], y [B, T, H, V]."""
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
