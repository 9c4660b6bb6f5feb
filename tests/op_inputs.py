"""Random inputs of every family of ops, and ways to run one: what the laws are tested on, on any device."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from distill_pl.ops import channel_decay, gated_delta, mlstm, normalized, scalar_decay, softmax, window

Inputs = dict[str, Tensor | float]  # an op's keyword arguments; every tensor is [B, T, heads, ...] and float64
Normal = Callable[..., Tensor]  # normal(*shape): random numbers in float64
Shape = tuple[int, int, int]  # B, T, H
Maker = Callable[[Normal, Shape, int, int, bool], Inputs]  # of (normal, shape, K, V, strong)
KEEP_FP32 = ("g", "i", "beta")  # gates, whatever dtype q and k have


def softmax_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Make inputs with grouped kv heads; strong: scores of +-100."""
    grouped = (*shape[:2], shape[2] // 2)
    q = normal(*shape, key) * (30 if strong else 1)
    return {"q": q, "k": normal(*grouped, key), "v": normal(*grouped, value), "scale": key**-0.5}


def window_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Make inputs like `softmax_inputs` for a window that most of the laws' sequences outgrow."""
    return softmax_inputs(normal, shape, key, value, strong) | {"window": 7, "sinks": 3}


def channel_decay_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Strong: most channels keep nothing (g from -5 to -20 a step), one keeps everything, one forgets now and then."""
    g = -0.3 * normal(*shape, key).abs()
    if strong:
        g = -(5 + 15 * torch.special.ndtr(normal(*shape, key)))
        g[..., 0] = 0
        g[..., 1] = torch.where(normal(*shape) > 1.5, -20, -0.01)
    return {"q": normal(*shape, key), "k": normal(*shape, key), "v": normal(*shape, value), "g": g, "scale": 0.4}


def logits_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Make the log decays of `channel_decay_inputs` as logits of gates, 20 at most."""
    inputs = channel_decay_inputs(normal, shape, key, value, strong)
    gates = (inputs["g"] * 3).clamp(max=-1e-8)
    return inputs | {"g": gates - torch.log(-torch.expm1(gates)), "temperature": 3}


def scalar_decay_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Strong: most heads keep nothing (g from -5 to -20 a step), one forgets now and then."""
    g = -0.3 * normal(*shape).abs()
    if strong:
        g = -(5 + 15 * torch.special.ndtr(normal(*shape)))
        g[..., 1] = torch.where(normal(*shape[:2]) > 1.5, -20, -0.01)
    return {"q": normal(*shape, key), "k": normal(*shape, key), "v": normal(*shape, value), "g": g, "scale": 0.4}


def mlstm_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Strong: input gates of e^{+-10} as well; q, k > 0, as no arithmetic saves the digits of y where n . q is near 0."""
    inputs = scalar_decay_inputs(normal, shape, key, value, strong)
    if strong:
        inputs |= {name: inputs[name].abs() for name in "qk"}
    return inputs | {"i": normal(*shape) * (10 if strong else 1)}


def delta_rule_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Make keys of unit length; strong: three keys that recur, each overwritten almost whole (beta up to 1 - 1e-8)."""
    k = normal(*shape, key)
    beta = torch.special.ndtr(normal(*shape))
    if strong:
        k = k[:, torch.arange(shape[1]) % 3] + 0.01 * k
        beta = 1 - 10 ** -(8 * beta)
    k = k / k.norm(dim=-1, keepdim=True)
    return {"q": normal(*k.shape), "k": k, "v": normal(*shape, value), "beta": beta, "scale": 0.4}


def gated_delta_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Add the log decays of `scalar_decay_inputs` to keys of the delta rule."""
    inputs = delta_rule_inputs(normal, shape, key, value, strong)
    return inputs | {"g": scalar_decay_inputs(normal, shape, key, value, strong)["g"][..., None]}


def channel_delta_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Add the log decays of `channel_decay_inputs` to keys of the delta rule."""
    inputs = delta_rule_inputs(normal, shape, key, value, strong)
    return inputs | {"g": channel_decay_inputs(normal, shape, key, value, strong)["g"]}


def rank_one_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Erase in each channel another share of what is read along the keys of the delta rule, and write along others."""
    inputs = channel_delta_inputs(normal, shape, key, value, strong)
    r = inputs["k"]
    return inputs | {"k": normal(*shape, key), "r": r, "b": r * torch.special.ndtr(normal(*shape, key))}


def normalized_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Make features like Hedgehog's; strong: spikes, the rest of a row down to e^-100."""
    q, k = ((normal(*shape, key) * (20 if strong else 1)).softmax(-1) for _ in "qk")
    # eps is large, so that matrix, mix and step differ if one of them adds it in another place
    return {"q": q, "k": k, "v": normal(*shape, value), "scale": 0.4, "eps": 0.1}


def squared_inputs(normal: Normal, shape: Shape, key: int, value: int, strong: bool) -> Inputs:
    """Make inputs like ReBased's; strong: S up to 1e8, and with it the row sums."""
    q, k = (normal(*shape, key) * (30 if strong else 1) for _ in "qk")
    return {"q": q, "k": k, "v": normal(*shape, value), "scale": 0.4, "eps": 0.1, "power": 2}


# the families whose inputs are written by hand, in their extremes; the kernels are tested on these
FAMILIES: dict[str, tuple[ModuleType, Maker]] = {
    "softmax": (softmax, softmax_inputs),
    "window": (window, window_inputs),
    "channel_decay": (channel_decay, channel_decay_inputs),
    "channel_decay, logits": (channel_decay, logits_inputs),
    "scalar_decay": (scalar_decay, scalar_decay_inputs),
    "mlstm": (mlstm, mlstm_inputs),
    "delta_rule": (gated_delta, delta_rule_inputs),
    "gated_delta": (gated_delta, gated_delta_inputs),
    "gated_delta, channels": (gated_delta, channel_delta_inputs),
    "gated_delta, rank one": (gated_delta, rank_one_inputs),
    "normalized": (normalized, normalized_inputs),
    "squared": (normalized, squared_inputs),
}


def families() -> dict[str, tuple[ModuleType, Maker]]:
    """Return FAMILIES and, by the name of its mixer, every op of MIXERS that is not among them, on inputs the mixer makes."""
    from distill_pl.mixers import MIXERS  # not above: it loads transformers, which the process that interprets kernels spares

    known = [op for op, _ in FAMILIES.values()]
    return FAMILIES | {name: (mixer.op, partial(mixer_inputs, name)) for name, mixer in MIXERS.items() if mixer.op not in known}


def mixer_inputs(name: str, normal: Normal, shape: Shape, key: int, value: int, strong: bool, dtype=torch.float32) -> Inputs:
    """Let a mixer of MIXERS, its weights random, make its op's inputs of random hidden states; strong: three times as large.

    An op that is ill-conditioned on such inputs, or has other extremes, needs a maker in FAMILIES.
    """
    from distill_pl.mixers import MIXERS
    from distill_pl.mixers.mixer import Paper
    from distill_pl.student.cache import MixerState
    from distill_pl.student.modeling import StudentConfig

    batch, length, heads = shape
    mixer_class, width = MIXERS[name], heads * key
    config = StudentConfig(
        mixer=name, shape="paper", hidden_size=width, num_hidden_layers=1, num_attention_heads=heads, head_dim=key,
        num_key_value_heads=heads if mixer_class.kv_heads == "expanded" else heads // 2,
    )  # fmt: skip
    # `value` is no size that a user could choose: only Paper lets K and V differ
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = type(name, (mixer_class,), {"paper": Paper(value=value / key)})(config, 0).requires_grad_(False)
        mixer.start(config)
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    angles = torch.arange(length)[None, :, None] * 1e4 ** -(torch.arange(key) % (key // 2) * 2 / key)
    position = (angles.cos().to(dtype), angles.sin().to(dtype))
    hidden = normal(batch, length, width).to(dtype) * (3 if strong else 1)
    # as in generation: otherwise a mixer may tell its op to leave the state out
    return mixer.to(dtype).inputs(hidden, position, None, MixerState())[0]._asdict()


def family_of(name: str) -> tuple[ModuleType, Maker]:
    return FAMILIES.get(name) or families()[name]


def op_of(family: str) -> ModuleType:
    return family_of(family)[0]


def kept_in_fp32(family: str) -> tuple[str, ...]:
    """Return the names of the inputs that stay fp32 in a bf16 model: those that the mixer itself makes in fp32."""
    if family in FAMILIES:
        return KEEP_FP32
    inputs = mixer_inputs(family, torch.ones, (1, 2, 2), 8, 8, False, torch.bfloat16)
    return tuple(name for name, x in tensors_of(inputs).items() if x.dtype == torch.float32)


def make(family: str, length: int, dtype=torch.float64, batch=2, heads=4, strong=False, seed=0, key=8, value=6) -> Inputs:
    """Make inputs of one family; K and V differ, so that a mix-up is an error."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return cast(family_of(family)[1](normal, (batch, length, heads), key, value, strong), dtype)


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor)}


def cast(inputs: Inputs, *to, keep: tuple[str, ...] = ()) -> Inputs:
    """Cast every tensor but `keep` to a dtype or device."""
    return inputs | {name: x.to(*to) for name, x in tensors_of(inputs).items() if name not in keep}


def cut(inputs: Inputs, index) -> Inputs:
    """Take the inputs at some times: index is a slice for `mix`, a number for `step`."""
    return inputs | {name: x[:, index] for name, x in tensors_of(inputs).items()}


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
    for time in range(inputs["v"].shape[1]):
        y, state = op.step(**cut(inputs, time), state=state)
        outputs.append(y)
    return torch.stack(outputs, 1)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute expected value."""
    assert value.shape == expected.shape
    return ((value.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def fla_file(path: str) -> ModuleType:
    """Load one file of fla-core by its path, because the package around it imports triton; skip the test without fla-core."""
    package = importlib.util.find_spec("fla")
    if package is None:
        pytest.skip("fla-core is not installed")
    source = importlib.util.spec_from_file_location("fla_" + Path(path).stem, Path(package.origin).parent / path)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module
