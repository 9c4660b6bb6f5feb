"""Every op on a GPU, by kernels and by torch, gives its own matrix times v in float64, forward and gradients."""

import pytest
import torch
from op_inputs import FAMILIES, KEEP_FP32, cast, make, matrix_times_v, tensors_of

from distill_pl.ops import channel_decay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTH, HEADS, HEAD = 512, 15, 64  # as in the study: kernels are tuned anew for every shape
# of the norm; the kernels multiply fp32 numbers as tf32
TOLERANCE = {
    ("fla", torch.bfloat16): 1e-2, ("fla", torch.float32): 5e-3,
    ("torch", torch.bfloat16): 3e-3, ("torch", torch.float32): 2e-5,
}  # fmt: skip
# in bf16 under strong gates: keys that come again and again are solved for, and gradients of rows that are all one token's
# value are differences of equals
STRONG_TOLERANCE = {"delta_rule": 4e-2, "gated_delta": 4e-2, "mlstm": 6e-2}
# the same dg as the log decay's, times sigmoid(-logit): channels that keep everything, whose dg is large and exact, count less
LOGITS_TOLERANCE = {
    (torch.bfloat16, False): 1.2e-2, (torch.bfloat16, True): 6e-2,
    (torch.float32, False): 5e-3, (torch.float32, True): 1e-2,
}  # fmt: skip


@pytest.fixture(params=[name for name in FAMILIES if name not in ("softmax", "window")])
def family(request) -> str:
    return request.param


@pytest.fixture(params=["fla", "torch"])
def backend(request) -> str:
    if request.param == "fla":
        pytest.importorskip("fla")
    return request.param


def inputs_of(family: str, strong: bool = False, **options):
    inputs = make(family, LENGTH, torch.float32, heads=HEADS, strong=strong, key=HEAD, value=HEAD) | options
    if family == "mlstm":  # else n . q is 0 now and then, where no precision saves y, and its gradient jumps near e^{-m}
        inputs |= {name: inputs[name].abs() for name in "qk"}
    return cast(inputs, "cuda")


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("strong", [False, True], ids=["ordinary", "strong"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mix_and_its_gradients_are_those_of_the_matrix(family, backend, dtype, strong):
    op = FAMILIES[family][0]
    # squared, the kernel has no state
    inputs = cast(inputs_of(family, strong, **({"remember": False} if family == "squared" else {})), dtype, keep=KEEP_FP32)
    exact = cast(inputs, torch.float64)
    leaves, exact_leaves = ([x.requires_grad_(True) for x in tensors_of(i).values()] for i in (inputs, exact))
    y, _ = op.mix(**inputs, backend=backend)
    expected = matrix_times_v(op, exact)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to("cuda", y.dtype)
    gradients = torch.autograd.grad(y, leaves, weight)
    expected_gradients = torch.autograd.grad(expected, exact_leaves, weight.double())
    errors = {"y": error(y, expected)}
    for name, gradient, exact_gradient in zip(tensors_of(inputs), gradients, expected_gradients, strict=True):
        errors[f"d{name}"] = error(gradient, exact_gradient)
    print(family, backend, dtype, "strong" if strong else "ordinary", {name: f"{e:.1e}" for name, e in errors.items()})
    tolerance = TOLERANCE[backend, dtype]
    if strong and (backend, dtype) == ("fla", torch.bfloat16):
        tolerance = STRONG_TOLERANCE.get(family, tolerance)
    if (family, backend) == ("channel_decay, logits", "fla"):
        tolerance = LOGITS_TOLERANCE[dtype, strong]
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("strong", [False, True], ids=["ordinary", "strong"])
def test_channel_decay_of_other_widths_is_fla_s(monkeypatch, strong):
    pytest.importorskip("fla")
    monkeypatch.setattr(channel_decay, "FUSED", ())
    test_mix_and_its_gradients_are_those_of_the_matrix("channel_decay", "fla", torch.bfloat16, strong)


@pytest.mark.parametrize("borders", [[1], [64], [100, 300]], ids=str)
def test_pieces_with_carried_state_are_the_whole(family, backend, borders):
    op, inputs = FAMILIES[family][0], inputs_of(family)
    expected = matrix_times_v(op, cast(inputs, torch.float64))
    inputs = cast(inputs, torch.bfloat16, keep=KEEP_FP32)
    outputs, state = [], None
    for start, end in zip([0, *borders], [*borders, LENGTH], strict=True):
        piece = inputs | {name: x[:, start:end] for name, x in tensors_of(inputs).items()}
        y, state = op.mix(**piece, backend=backend, state=state)
        outputs.append(y)
    assert error(torch.cat(outputs, 1), expected) < 2e-2  # that of rounding the inputs to bf16 included
