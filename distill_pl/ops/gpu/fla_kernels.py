"""fla's kernels, tuned ahead and as operators that torch.compile takes for one step of a graph.

An op imports them from here when it first calls one, as loading them takes seconds.

Left alone, fla tries each kernel in up to 48 configurations at its first call, half a minute to three of an op. tuned.json has
what it settled on at the study's shapes, and for the inverses one warp, which it does not try; a kernel tries that one alone
where it knows its arguments. On other GPUs, for other shapes and dtypes, with another fla, or where the user has told fla its
own way (FLA_CACHE_MODE), fla tunes as ever.
"""

import functools
import importlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv_local, chunk_fwd_o
from fla.ops.common.fused_chunk import fused_chunk_bwd_kernel, fused_chunk_fwd_kernel
from fla.ops.delta_rule.wy_fast import prepare_wy_repr_bwd, prepare_wy_repr_fwd
from fla.ops.gla import chunk_gla
from fla.ops.rebased.parallel import parallel_rebased_bwd_kernel, parallel_rebased_fwd_kernel
from fla.ops.utils import chunk_local_cumsum
from fla.ops.utils.cache import FLA_CACHE_MODE, FlaCacheMode
from fla.ops.utils.constant import RCP_LN2
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad
from triton import Config, cdiv, next_power_of_2
from triton.runtime.autotuner import Autotuner

__all__ = ["chunk_gla", "delta_rule", "scalar_decay", "squared"]

TUNED = json.loads(Path(__file__).with_name("tuned.json").read_text())
COUNTS = {"B", "H", "HV"}  # arguments that say how many programs run, not what one does


def autotuner(kernel: str) -> Autotuner:
    """Of the kernel with this dotted name."""
    module, name = kernel.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    while not isinstance(found, Autotuner):
        found = found.fn
    return found


def arguments(tuner: Autotuner, values: dict[str, Any]) -> dict[str, Any]:
    """Of a kernel's arguments, what its best configuration depends on: as fla's own key, without COUNTS."""
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in values.values() if isinstance(x, torch.Tensor)})
    return {name: values[name] for name in tuner.keys if name in values and name not in COUNTS} | {"dtypes": dtypes}


def candidates(tuner: Autotuner, tuned: list[dict], prune, configs: Sequence[Config], named: dict[str, Any],
               **given) -> Sequence[Config]:  # fmt: skip
    """Triton's early_config_prune: the tuned configuration alone, or what fla's own `prune` leaves."""
    wanted = arguments(tuner, named | given)
    known = [Config(**entry["config"]) for entry in tuned if entry["arguments"] == wanted]
    return known or (prune(configs, named, **given) if prune else configs)


def applies() -> bool:
    """Whether tuned.json is about this fla and this GPU, and fla is not told otherwise."""
    return (
        FLA_CACHE_MODE is FlaCacheMode.DISABLED
        and version("fla-core") == TUNED["fla-core"]
        and torch.cuda.is_available()
        and list(torch.cuda.get_device_capability()) == TUNED["capability"]
    )


if applies():
    for kernel, tuned in TUNED["kernels"].items():
        tuner = autotuner(kernel)
        tuner.early_config_prune = functools.partial(candidates, tuner, tuned, tuner.early_config_prune)


CHUNK = 64  # fla's; fewer tokens are one chunk


def _new(like: Tensor, *shape: int) -> Tensor:
    """Contiguous, like a tensor; or of another shape, then in fp32."""
    return like.new_empty(shape or like.shape, dtype=torch.float32 if shape else like.dtype)


def _blocks(k: Tensor, v: Tensor) -> tuple[int, int, int, int, int]:
    """Sizes of a chunk, of the K and of the V of one program, and how many programs share a head's K and V."""
    key, value = (min(64, max(16, next_power_of_2(x.shape[-1]))) for x in (k, v))
    chunk = min(CHUNK, max(16, next_power_of_2(k.shape[1])))
    return chunk, key, value, cdiv(k.shape[-1], key), cdiv(v.shape[-1], value)


def _whole(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0, dtype=parts.dtype)  # which autocast would else make fp32


@custom_op("distill_pl::scalar_decay", mutates_args=())
def _scalar_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
                  state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the state, and the sums of g that the backward pass needs."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    state = None if state is None else state.contiguous()
    (batch, length, heads, key), value = k.shape, v.shape[-1]
    chunk, of_key, _, parts, _ = _blocks(k, v)
    y, final = v.new_empty(parts, *v.shape), _new(v, batch, heads, key, value)
    with torch.cuda.device_of(q):
        sums = None if g is None else chunk_local_cumsum(g.contiguous(), chunk_size=chunk, scale=RCP_LN2)  # the kernels use 2^x
        fused_chunk_fwd_kernel[lambda meta: (cdiv(value, meta["BV"]) * parts * batch * heads,)](
            q, k, v, sums, None, y, state, final, None, scale, length,
            B=batch, H=heads, K=key, V=value, BT=chunk, BK=of_key,
        )  # fmt: skip
    return _whole(y), final, q.new_empty(0) if sums is None else sums


@_scalar_decay.register_fake
def _(q, k, v, g, scale, state):
    return _new(v), _new(v, v.shape[0], *k.shape[2:], v.shape[3]), q.new_empty(0) if g is None else _new(g)


def _to_fill(q: Tensor, k: Tensor, v: Tensor, sums: Tensor,
             state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Room for the gradients of q, k, v and g, in the parts that a head's programs make, and of the state."""
    *_, key_parts, value_parts = _blocks(k, v)
    dtype = torch.float32 if sums.numel() and value_parts > 1 else q.dtype  # mLSTM's v and normaliser nearly cancel
    dq, dk = (x.new_empty(value_parts, *x.shape, dtype=dtype) for x in (q, k))
    dv = v.new_empty(key_parts, *v.shape)
    dg = sums.new_empty(key_parts * value_parts, *sums.shape) if sums.numel() else q.new_empty(0)
    return dq, dk, dv, dg, q.new_empty(0) if state is None else _new(state)


@custom_op("distill_pl::scalar_decay_backward", mutates_args=())
def _scalar_decay_backward(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, scale: float, state: Tensor | None, dy: Tensor,
                           d_final: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients; whoever reads them adds up their parts."""
    q, k, v, dy = (x.contiguous() for x in (q, k, v, dy))
    state, d_final = (x if x is None else x.contiguous() for x in (state, d_final))
    (batch, length, heads, key), value = k.shape, v.shape[-1]
    chunk, of_key, of_value, key_parts, value_parts = _blocks(k, v)
    gradients = dq, dk, dv, dg, d_state = _to_fill(q, k, v, sums, state)
    gate, d_gate = (sums, dg) if sums.numel() else (None, None)
    with torch.cuda.device_of(q):
        fused_chunk_bwd_kernel[key_parts * value_parts * batch * heads,](
            q, k, v, gate, None, dy, dq, dk, dv, d_gate, state, d_final, None if state is None else d_state, None, scale,
            length, B=batch, H=heads, K=key, V=value, BT=chunk, BK=of_key, BV=of_value,
        )  # fmt: skip
    return gradients


@_scalar_decay_backward.register_fake
def _(q, k, v, sums, scale, state, dy, d_final):
    return _to_fill(q, k, v, sums, state)


@custom_op("distill_pl::delta_rule", mutates_args=())
def _delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float,
                state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the state, and what the backward pass needs: inverses [B, T, H, CHUNK], w like k, new values like v, chunk states."""
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    state = None if state is None else state.contiguous()
    with torch.cuda.device_of(q):
        w, u, inverse = prepare_wy_repr_fwd(k, v, beta, None)
        states, new, final = chunk_gated_delta_rule_fwd_h(k, w, u, initial_state=state, output_final_state=True)
        y = chunk_fwd_o(q, k, new, states, scale=scale)
    return y, final, inverse, w, new, states


@_delta_rule.register_fake
def _(q, k, v, beta, scale, state):
    (batch, length, heads, key), value = k.shape, v.shape[3]
    inverse, states = k.new_empty(batch, length, heads, CHUNK), k.new_empty(batch, cdiv(length, CHUNK), heads, key, value)
    return _new(v), _new(v, batch, heads, key, value), inverse, _new(k), _new(v), states


@custom_op("distill_pl::delta_rule_backward", mutates_args=())
def _delta_rule_backward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, inverse: Tensor, w: Tensor, new: Tensor, states: Tensor,
                         scale: float, state: Tensor | None, dy: Tensor,
                         d_final: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As fla's chunk_delta_rule_bwd, which makes w, the new values and the states again."""
    q, k, v, beta, dy = (x.contiguous() for x in (q, k, v, beta, dy))
    state, d_final = (x if x is None else x.contiguous() for x in (state, d_final))
    with torch.cuda.device_of(q):
        dv = chunk_bwd_dv_local(q, k, dy, scale=scale)
        d_states, d_state, dv = chunk_gated_delta_rule_bwd_dhu(q, k, w, dy, dv, h0=state, dht=d_final, scale=scale)
        dq, dk, dw, _ = chunk_bwd_dqkwg(q, k, new, dy, states, d_states, w, dv=dv, scale=scale)
        more, dv, d_beta = prepare_wy_repr_bwd(k, v, beta, inverse, dw, dv, None)
    return dq, dk.add_(more), dv, d_beta, q.new_empty(0) if state is None else d_state


@_delta_rule_backward.register_fake
def _(q, k, v, beta, inverse, w, new, states, scale, state, dy, d_final):
    return _new(q), _new(k), _new(v), _new(beta), q.new_empty(0) if state is None else _new(state)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, state = inputs
    ctx.save_for_backward(*tensors, state, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(backward):
    def run(ctx, dy, d_final, *_):
        q, k, v, gate, state, *kept = ctx.saved_tensors
        dy = torch.zeros_like(v) if dy is None else dy
        dq, dk, dv, d_gate, d_state = backward(q, k, v, gate, *kept, ctx.scale, state, dy, d_final)
        return dq, dk, dv, None if gate is None else d_gate, None, None if state is None else d_state

    return run


def _scalar_decay_gradients(q, k, v, g, sums, *rest) -> tuple[Tensor, ...]:
    *gradients, d_state = _scalar_decay_backward(q, k, v, sums, *rest)
    return *(_whole(parts).to(x.dtype) for parts, x in zip(gradients, (q, k, v, sums), strict=True)), d_state


_scalar_decay.register_autograd(_differentiate(_scalar_decay_gradients), setup_context=_save)
_delta_rule.register_autograd(_differentiate(_delta_rule_backward), setup_context=_save)


def scalar_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
                 state: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fla's fused_chunk_simple_gla: q, k [B, T, H, K], v [B, T, H, V] of one dtype, g [B, T, H] fp32 or None -> y, state.

    By the kernels themselves: where programs share a head, fla's function has them write in fp32, adds up and casts.
    """
    value, missing = v.shape[-1], -v.shape[-1] % 8  # other rows than of 16 bytes are read 4 at a time
    if missing:
        v, state = pad(v, (0, missing)), None if state is None else pad(state, (0, missing))
    y, state, _ = _scalar_decay(q, k, v, g, scale, state)
    return (y[..., :value], state[..., :value].contiguous()) if missing else (y, state)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """fla's chunk_delta_rule: q, k [B, T, H, K], v [B, T, H, V] of one dtype other than fp32, beta [B, T, H] -> y, state."""
    return _delta_rule(q, k, v, beta, scale, state)[:2]


def _squared_sizes(q: Tensor, v: Tensor, rows: int) -> tuple[tuple[int, int], dict[str, int]]:
    """How many programs, of so many rows each, and the arguments of either kernel."""
    (batch, heads, length, key), value = q.shape, v.shape[-1]
    sizes = {"T": length, "B": batch, "H": heads, "K": key, "V": value, "BTL": rows, "BTS": 32}
    blocks = {"BK": max(16, next_power_of_2(key)), "BV": max(16, next_power_of_2(value))}
    return (cdiv(length, rows), batch * heads), sizes | blocks | {"num_warps": 4, "num_stages": 2}


@custom_op("distill_pl::squared", mutates_args=())
def squared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """fla's parallel_rebased without its scale: contiguous [B, H, T, K or V] of one dtype -> sum_j S_ij v_j, sum_j S_ij.

    K and V up to 128. By the kernels themselves: fla's function has them write in fp32, and sums over a dimension of 1. Both
    results are rounded alike, or a row that is one token's would not be its v, nor the gradient of its score 0.
    """
    y, total = _new(v), v.new_empty(v.shape[:3])
    grid, sizes = _squared_sizes(q, v, 128)
    with torch.cuda.device_of(q):
        parallel_rebased_fwd_kernel[grid](q, k, v, y, total, 1, **sizes)
    return y, total


@squared.register_fake
def _(q, k, v):
    return _new(v), v.new_empty(v.shape[:3])


@custom_op("distill_pl::squared_backward", mutates_args=())
def _squared_backward(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, d_total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy, d_total = dy.contiguous(), d_total.contiguous()
    dq, dk, dv = _new(q), _new(k), _new(v)
    grid, sizes = _squared_sizes(q, v, 64)
    with torch.cuda.device_of(q):
        parallel_rebased_bwd_kernel[grid](q, k, v, dy, d_total, dq, dk, dv, 1, **sizes)
    return dq, dk, dv


@_squared_backward.register_fake
def _(q, k, v, dy, d_total):
    return _new(q), _new(k), _new(v)


squared.register_autograd(
    lambda ctx, *gradients: _squared_backward(*ctx.saved_tensors, *gradients),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
