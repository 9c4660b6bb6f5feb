"""The Triton kernels without a GPU: Triton's interpreter runs them, in a process of its own, against torch."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from op_inputs import FAMILIES, KEEP_FP32, cast, make, matrix_times_v, tensors_of

from distill_pl.exports.fresh import tune_nothing
from distill_pl.ops import gated_delta

pytestmark = pytest.mark.slow

# name -> family, and how it is not the usual; a border is where the state is handed on, and its gradient back
KERNELS = {name: (name, {}) for name in FAMILIES if name not in ("softmax", "window")} | {
    "gated_delta, channels": ("gated_delta, channels", {"length": 24}),
    "gated_delta, rank one": ("gated_delta, rank one", {"length": 24}),
    "channel_decay, fla's": ("channel_decay", {"key": 24}),
    "channel_decay, pieces": ("channel_decay", {"length": 150, "border": 130, "heads": 1, "value": 32}),
    "channel_decay, strong pieces": ("channel_decay", {"length": 200, "border": 150, "heads": 1, "key": 32, "strong": True}),
    "channel_decay, pieces of logits": ("channel_decay, logits", {"length": 100, "border": 70, "heads": 1}),
    "scalar_decay, parts": ("scalar_decay", {"key": 80, "value": 72, "length": 70, "border": 64}),
    "normalized, parts": ("normalized", {"key": 128, "value": 80}),
    "normalized, pieces": ("normalized", {"border": 24}),
    "mlstm, pieces": ("mlstm", {"border": 24}),
    "gated_delta, pieces": ("gated_delta", {"length": 70, "border": 4}),
    "gated_delta, pieces of rank one": ("gated_delta, rank one", {"length": 24, "border": 8, "heads": 1}),
    "channel_decay, columns": ("channel_decay", {"columns": True, "batch": 2, "length": 70}),
}
ROWS = {  # sizes, width, and whether there are biases, a norm, a residual, an MLP's gate
    "rows": ((9,), 33, False, False, False, False),
    "rows, normed": ((400, 15, 7), 24, False, True, True, False),
    "rows, gated": ((300, 300), 16, False, True, True, True),
    "rows, biased": ((5, 1, 1, 1, 1), 100, True, True, False, False),
    "rows, gated and biased": ((9, 9), 33, True, False, False, True),
}
CONVS = {  # tokens, heads, channels of a head
    "convolution": (300, 2, 24),
    "convolution, in fours": (200, 1, 16),
    "convolution, short": (2, 3, 40),
}
# fp16; g below -9 counts as -9; of g 16 bits count
TOLERANCE = {name: 2e-3 for name, (family, _) in KERNELS.items() if FAMILIES[family][0] is gated_delta} | {
    "channel_decay, strong pieces": 1e-4,
    "channel_decay, logits": 2e-5,
}


class Index(int):
    """Count loops in a kernel: an int that can be cast, as Triton's compiled counters can."""

    def to(self, dtype) -> "Index":
        return self


def indices(*bounds):
    """Replace `range` in a kernel, where bounds may be tensors."""
    return map(Index, range(*(b if isinstance(b, int) else b.handle.data.item() for b in bounds)))


def patch() -> None:
    """Give the interpreter what it lacks: counters that can be cast, GPU instructions, and one configuration a kernel."""
    from triton import language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    def dot(builder, a, b, total, *unused):
        """Multiply bf16 as fp32, since numpy has no bf16."""
        factors = [x.data if x.dtype != tl.bfloat16 else (x.data.astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
        return interpreter.TensorHandle(np.matmul(*factors, dtype=total.data.dtype) + total.data, total.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot
    libdevice.exp2, libdevice.fast_expf = (lambda x: tl.exp2(x)), (lambda x: tl.exp(x))
    libdevice.fast_log2f, libdevice.fast_dividef = (lambda x: tl.log2(x)), (lambda x, y: x / y)

    tune_nothing()
    # tl.gather under another name, which the interpreter does not know
    importlib.import_module("fla.utils").IS_GATHER_SUPPORTED = False
    importlib.import_module("fla.ops")
    importlib.import_module("distill_pl.ops.gpu.channel_decay")
    for name, module in list(sys.modules.items()):
        if name.startswith(("fla.ops.", "distill_pl.ops.gpu.")):
            module.range = indices


def errors(family: str, length=40, border=0, columns=False, **options) -> dict[str, float]:
    """Compute ||value - expected|| / ||expected|| of y and of each gradient of an op."""
    op = FAMILIES[family][0]
    inputs = make(family, length, torch.float32, **({"batch": 1, "heads": 2, "key": 16, "value": 16} | options))
    if family == "squared":
        inputs["remember"] = False  # as with a state there is no kernel
    if op is gated_delta:
        inputs = cast(inputs, torch.float16, keep=KEEP_FP32)  # as its kernels refuse fp32
    exact = cast(inputs, torch.float64)
    if columns:  # of a product of which they are a part
        inputs |= {name: torch.cat([x, x], 2)[:, :, : x.shape[2]] for name, x in tensors_of(inputs).items()}
    leaves, exact_leaves = ([x.requires_grad_(True) for x in tensors_of(i).values()] for i in (inputs, exact))
    state, outputs = None, []
    for piece in [slice(border), slice(border, None)] if border else [slice(None)]:
        some = inputs | {name: x[:, piece] for name, x in tensors_of(inputs).items()}
        y, state = op.mix(**some, backend="fla", state=state)
        outputs.append(y)
    y, expected = torch.cat(outputs, 1), matrix_times_v(op, exact)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    values = [y, *torch.autograd.grad(y, leaves, weight)]
    expectations = [expected, *torch.autograd.grad(expected, exact_leaves, weight.double())]
    names = ["y", *(f"d{name}" for name in tensors_of(inputs))]
    return {n: ((x.double() - e).norm() / e.norm()).item() for n, x, e in zip(names, values, expectations, strict=True)}


def row_errors(sizes: tuple[int, ...], width: int, biased: bool, normed: bool, added: bool, gated: bool) -> dict[str, float]:
    """Compute the largest error of `row_products` over its largest value."""
    from distill_pl.ops.gpu.row_products import launch, plain

    numbers = torch.Generator().manual_seed(0)
    x, residual, gain = (torch.randn(1, 1, width, generator=numbers) for _ in range(3))
    weights = [torch.randn(size, width, generator=numbers) for size in sizes]
    biases = [torch.randn(size, generator=numbers) for size in sizes] if biased else []
    arguments = x, weights, biases, gain[0, 0] if normed else None, 0.1, residual if added else None, gated
    (y, total), (expected, sums) = launch(*arguments), plain(*arguments)
    pairs = [("y", y, expected)] + ([("sum", total, sums)] if added else [])
    return {name: ((found - right).abs().max() / right.abs().max()).item() for name, found, right in pairs}


def conv_errors(length: int, heads: int, size: int) -> dict[str, float]:
    """Compute the errors of a short convolution of columns of a wider tensor, and of its gradients, as `errors` does."""
    from distill_pl.mixers.short_conv import ShortConv
    from distill_pl.ops.gpu.short_conv import short_conv

    numbers, width = torch.Generator().manual_seed(0), heads * size
    conv = ShortConv(width)
    torch.nn.init.normal_(conv.weight, generator=numbers)
    wide = torch.randn(2, length, width + 24, generator=numbers)
    x, dy = wide[..., 8 : 8 + width].requires_grad_(True), torch.randn(2, length, width, generator=numbers)
    results = []
    for y in (short_conv(x, conv.weight), conv(x, None, "")):
        results.append([y, *torch.autograd.grad(y, [x, conv.weight], dy)])
    pairs = zip(("y", "dx", "dw"), *results, strict=True)
    return {name: ((value - expected).norm() / expected.norm()).item() for name, value, expected in pairs}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    missing = [name for name in ("triton", "fla", "einops") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    tests = str(Path(__file__).parent.parent)
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", [*KERNELS, *ROWS, *CONVS])
def test_kernel_is_what_torch_computes(measured, kernel):
    assert max(measured[kernel].values()) < TOLERANCE.get(kernel, 1e-5), measured[kernel]


if __name__ == "__main__":
    patch()
    found = {name: errors(family, **options) for name, (family, options) in KERNELS.items()}
    found |= {name: row_errors(*case) for name, case in ROWS.items()}
    print(json.dumps(found | {name: conv_errors(*case) for name, case in CONVS.items()}))
