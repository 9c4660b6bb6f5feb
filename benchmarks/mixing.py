"""Measure every mixer's op at the study's shape, by GPU kernels and by torch: errors, time and memory, forward and backward.

    python benchmarks/mixing.py [--mixers gla,hedgehog] [--batch 48]

Prints a Markdown table. The inputs are what a fresh mixer of SmolLM-360M's shape computes from random hidden states, in bf16
with fp32 gates. Errors are relative, in norm, to the op's own matrix in float64. Needs a GPU and fla-core.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from distill_pl.measure.params import smollm_360m
from distill_pl.mixers import MIXERS
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student

LENGTH = 512
Run = Callable[..., Tensor]


def inputs_of(mixer: str, batch: int) -> dict:
    """Compute a mixer's arguments of its op from random hidden states: tensors [batch, LENGTH, H, ...]."""
    torch.manual_seed(0)
    config = StudentFactory(mixer).config(smollm_360m())
    config.num_hidden_layers = config.teacher["num_hidden_layers"] = 1
    layer = Student(config).cuda()
    hidden = torch.randn(batch, LENGTH, config.hidden_size, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        inputs = layer.mixers[0].inputs(hidden, layer.position(hidden), None, None)[0]._asdict()
    return inputs | {name: inputs[name].bfloat16() for name in "qkv"}


def gradients(run: Run, inputs: dict, weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the op: return y and, by name, the gradients of sum(weight * y) by its inputs."""
    leaves = {name: x.detach().requires_grad_(True) for name, x in inputs.items() if isinstance(x, Tensor)}
    y = run(**(inputs | leaves))
    weight = torch.ones_like(y) if weight is None else weight.to(y.dtype)
    return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), weight, allow_unused=True), strict=True))


def errors(op, run: Run, inputs: dict) -> tuple[float, str]:
    """Return |y - expected| / |expected| for y, and that of the worst gradient with its name, over the first two sequences."""
    inputs = {name: x[:2] if isinstance(x, Tensor) else x for name, x in inputs.items()}
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()}

    def by_matrix(v, **rest):
        return torch.einsum("bhij,bjhv->bihv", op.matrix(**rest), v)

    weight = torch.randn(inputs["v"].shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    y, got = gradients(run, inputs, weight)
    expected, wanted = gradients(by_matrix, exact, weight)

    def error(value: Tensor, exact: Tensor) -> float:
        return ((value.double() - exact).norm() / exact.norm()).item()

    worst = max((error(got[name], wanted[name]), f"d{name}") for name in got if wanted[name] is not None)
    return error(y, expected), f"{worst[0]:.1e} ({worst[1]})"


def speed(run: Run, inputs: dict, repeats: int = 10) -> tuple[str, float]:
    """Time forward and backward: return milliseconds as a median with its range, and the peak GiB on top of the inputs."""
    for _ in range(3):
        gradients(run, inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        gradients(run, inputs)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})", peak


def row(name: str, label: str, op, run: Run, inputs: dict) -> None:
    """Measure one op and print its line of the table."""
    forward, backward = errors(op, run, inputs)
    time, memory = speed(run, inputs)
    print(f"| {name} | {label} | {forward:.1e} | {backward} | {time} | {memory:.2f} |", flush=True)


HEADER = """| mixer | backend | error of y | worst gradient | ms forward + backward | GiB |
|---|---|---|---|---|---|"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default=",".join(name for name in MIXERS if name not in ("softmax", "swa")))
    parser.add_argument("--batch", type=int, default=48)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.batch} x {LENGTH}, bf16\n\n{HEADER}")
    for name in args.mixers.split(","):
        op, inputs = MIXERS[name].op, inputs_of(name, args.batch)
        for backend in ("fla", "torch"):
            row(name, backend, op, lambda **given: op.mix(**(given | {"backend": backend}))[0], inputs)  # noqa: B023


if __name__ == "__main__":
    main()
