"""Random inputs for every family of ops: what the laws are tested on, on any device."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from distill_pl.ops import channel_decay, delta_rule, mlstm, normalized, scalar_decay, softmax

Inputs = dict[str, Tensor | float]  # an op's keyword arguments; every tensor is [B, T, heads, ...] and float64
Normal = Callable[..., Tensor]
Shape = tuple[int, int, int]  # B, T, H
KEEP_FP32 = ("g", "i", "beta")  # gates, whatever dtype q, k and v have


def softmax_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Grouped kv heads; strong: scores of +-100."""
    grouped = (*shape[:2], shape[2] // 2)
    q = normal(*shape, key) * (30 if strong else 1)
    return {"q": q, "k": normal(*grouped, key), "v": normal(*grouped, value), "scale": key**-0.5}


def channel_decay_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Strong: some channels keep nothing (g from -5 to -20 a step), one keeps everything, one forgets now and then."""
    g = -0.3 * normal(*shape, key).abs()
    if strong:
        g = -(5 + 15 * torch.special.ndtr(normal(*shape, key)))
        g[..., 0] = 0
        g[..., 1] = torch.where(normal(*shape) > 1.5, -20, -0.01)
    return {"q": normal(*shape, key), "k": normal(*shape, key), "v": normal(*shape, value), "g": g, "scale": 0.4}


def logits_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """The same log decays as logits of gates, 20 at most."""
    inputs = channel_decay_inputs(normal, shape, key, value, strong)
    gates = (inputs["g"] * 3).clamp(max=-1e-8)
    return inputs | {"g": gates - torch.log(-torch.expm1(gates)), "temperature": 3}


def scalar_decay_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Strong: one head keeps nothing (g from -5 to -20 a step), one forgets now and then."""
    g = -0.3 * normal(*shape).abs()
    if strong:
        g = -(5 + 15 * torch.special.ndtr(normal(*shape)))
        g[..., 1] = torch.where(normal(*shape[:2]) > 1.5, -20, -0.01)
    return {"q": normal(*shape, key), "k": normal(*shape, key), "v": normal(*shape, value), "g": g, "scale": 0.4}


def mlstm_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Strong: input gates of e^{+-10} as well; q, k > 0, as no arithmetic saves the digits of y where n . q is almost 0."""
    inputs = scalar_decay_inputs(normal, shape, key, value, strong)
    if strong:
        inputs |= {name: inputs[name].abs() for name in "qk"}
    return inputs | {"i": normal(*shape) * (10 if strong else 1)}


def delta_rule_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Keys of unit length; strong: they come again and again, and nearly everything is overwritten (beta up to 1 - 1e-8)."""
    k = normal(*shape, key)
    beta = torch.special.ndtr(normal(*shape))
    if strong:
        k = k[:, torch.arange(shape[1]) % 3] + 0.01 * k
        beta = 1 - 10 ** -(8 * beta)
    k = k / k.norm(dim=-1, keepdim=True)
    return {"q": normal(*k.shape), "k": k, "v": normal(*shape, value), "beta": beta, "scale": 0.4}


def normalized_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Hedgehog's features; strong: spikes, the rest of a row down to e^-100."""
    q, k = ((normal(*shape, key) * (20 if strong else 1)).softmax(-1) for _ in "qk")
    # an eps that is felt, and so has to stand in the same place everywhere
    return {"q": q, "k": k, "v": normal(*shape, value), "scale": 0.4, "eps": 0.1}


def squared_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """ReBased's; strong: S up to 1e8, and with it the row sums."""
    q, k = (normal(*shape, key) * (30 if strong else 1) for _ in "qk")
    return {"q": q, "k": k, "v": normal(*shape, value), "scale": 0.4, "eps": 0.1, "power": 2}


# family -> its functions, and what makes their tensors; a new family is tested by standing here
FAMILIES: dict[str, tuple[ModuleType, Callable[..., Inputs]]] = {
    "softmax": (softmax, softmax_inputs),
    "channel_decay": (channel_decay, channel_decay_inputs),
    "channel_decay, logits": (channel_decay, logits_inputs),
    "scalar_decay": (scalar_decay, scalar_decay_inputs),
    "mlstm": (mlstm, mlstm_inputs),
    "delta_rule": (delta_rule, delta_rule_inputs),
    "normalized": (normalized, normalized_inputs),
    "squared": (normalized, squared_inputs),
}


def make(family: str, length: int, dtype=torch.float64, batch=2, heads=4, strong=False, seed=0, key=8, value=6) -> Inputs:
    """Of one family; key and value differ, so that a mix-up is an error."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return cast(FAMILIES[family][1](normal, (batch, length, heads), key, value, strong), dtype)


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor)}


def cast(inputs: Inputs, *to, keep: tuple[str, ...] = ()) -> Inputs:
    """Every tensor but `keep` to a dtype or device."""
    return inputs | {name: x.to(*to) for name, x in tensors_of(inputs).items() if name not in keep}


def matrix(op: ModuleType, inputs: Inputs) -> Tensor:
    return op.matrix(**{name: x for name, x in inputs.items() if name != "v"})


def matrix_times_v(op: ModuleType, inputs: Inputs) -> Tensor:
    a, v = matrix(op, inputs), inputs["v"]
    v = v.repeat_interleave(a.shape[1] // v.shape[2], dim=2).to(a.dtype)
    return torch.einsum("bhij,bjhv->bihv", a, v)
