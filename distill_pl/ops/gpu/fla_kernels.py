"""Kernels of flash-linear-attention (fla), tuned ahead, as custom operators, which torch.compile does not trace.

All of fla that training uses is reached from here, but for the convolutions of short_conv.py. An op imports this module when it
first calls a kernel, because loading fla takes seconds.

By default, fla tries each kernel in up to 48 configurations at its first call, which takes 30 to 180 seconds for an op.
tuned.json lists the configurations that were fastest at the study's shapes (among them one warp for the delta rule's inverses,
which fla does not try); a kernel called with arguments listed there tries the listed configuration alone. On other GPUs, for
other arguments, with another version of fla, or if the user chose a mode of fla's own cache (FLA_CACHE_MODE), fla tunes as
usual.

    scalar_decay   RetNet, Mamba2, mLSTM; Hedgehog, without g        rank_one    RWKV-7
    delta_rule     DeltaNet                                          squared     ReBased, where no state is kept
    gated_delta    Gated DeltaNet (one g per head), KDA              chunk_gla   fla's own: see FUSED in ops/channel_decay.py

Behind all but the last two of the right column are operators (q, k, v, .., scale, state) -> y, final state, what the backward
pass needs; those with "backward" in their name take dy and d_final, the gradients of y and of the final state. `sums` are
cumulative sums of the log decay g within each chunk, divided by ln 2, because the kernels compute 2^x. An inverse is
(I + L)^{-1} [C, C] of a chunk, with L_ij = beta_i (k_i . k_j) times the decay from token j to i, for i > j.
"""

import functools
import importlib
import inspect
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
from fla.ops.common.chunk_o import chunk_bwd_dv_local
from fla.ops.common.fused_chunk import fused_chunk_bwd_kernel, fused_chunk_fwd_kernel
from fla.ops.delta_rule.chunk import chunk_delta_rule_bwd, chunk_delta_rule_fwd
from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd
from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd, recompute_w_u_fwd
from fla.ops.generalized_delta_rule.dplr.chunk import ChunkDPLRDeltaRuleFunction, chunk_dplr_fwd
from fla.ops.gla import chunk_gla
from fla.ops.kda.chunk_bwd import chunk_kda_bwd
from fla.ops.kda.chunk_fwd import chunk_kda_fwd
from fla.ops.rebased.parallel import parallel_rebased_bwd_kernel, parallel_rebased_fwd_kernel
from fla.ops.utils import chunk_local_cumsum
from fla.ops.utils.cache import FLA_CACHE_MODE, FlaCacheMode
from fla.ops.utils.constant import RCP_LN2
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad
from triton import Config, cdiv, next_power_of_2
from triton.runtime.autotuner import Autotuner

from distill_pl.ops.gpu import contiguous

__all__ = ["chunk_gla", "delta_rule", "gated_delta", "rank_one", "scalar_decay", "squared"]

TUNED = json.loads(Path(__file__).with_name("tuned.json").read_text())
COUNTS = {"B", "H", "HV"}  # arguments that set how many programs run, not what a program does


def autotuner(kernel: str) -> Autotuner:
    """Find the autotuner of the fla kernel with this dotted name."""
    module, name = kernel.rsplit(".", 1)
    wrapped = getattr(importlib.import_module(module), name)
    while not isinstance(wrapped, Autotuner):
        wrapped = wrapped.fn
    return wrapped


def arguments(tuner: Autotuner, values: dict[str, Any]) -> dict[str, Any]:
    """Pick the arguments of a kernel on which its best configuration depends: those of fla's own cache key, without COUNTS."""
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in values.values() if isinstance(x, torch.Tensor)})
    return {name: values[name] for name in tuner.keys if name in values and name not in COUNTS} | {"dtypes": dtypes}


def candidates(tuner: Autotuner, tuned: list[dict], prune, configs: Sequence[Config], named: dict[str, Any],
               **given) -> Sequence[Config]:  # fmt: skip
    """Return the configurations to try: the tuned one alone if there is one, else those that fla's own `prune` leaves.

    The interface is that of Triton's early_config_prune.
    """
    wanted = arguments(tuner, named | given)
    known = [Config(**entry["config"]) for entry in tuned if entry["arguments"] == wanted]
    return known or (prune(configs, named, **given) if prune else configs)


def applies() -> bool:
    """Return whether tuned.json holds for this version of fla and this GPU, and the user chose no mode of fla's own cache."""
    return (
        FLA_CACHE_MODE is FlaCacheMode.DISABLED
        and version("fla-core") == TUNED["fla-core"]
        and torch.cuda.is_available()
        and list(torch.cuda.get_device_capability()) == TUNED["capability"]
    )


if applies():  # this changes fla's own autotuners, for every caller in this process
    for kernel, tuned in TUNED["kernels"].items():
        tuner = autotuner(kernel)
        tuner.early_config_prune = functools.partial(candidates, tuner, tuned, tuner.early_config_prune)


CHUNK = 64  # fla's chunk length; a shorter sequence is one chunk


def _new(like: Tensor, *shape: int) -> Tensor:
    """Allocate a contiguous tensor: of the shape and dtype of `like`, or of another shape in fp32."""
    return like.new_empty(shape or like.shape, dtype=torch.float32 if shape else like.dtype)


def _blocks(k: Tensor, v: Tensor) -> tuple[int, int, int, int, int]:
    """Return a chunk's length, the K and V channels of one program, and how many programs share a head's K and its V."""
    key, value = (min(64, max(16, next_power_of_2(x.shape[-1]))) for x in (k, v))
    chunk = min(CHUNK, max(16, next_power_of_2(k.shape[1])))
    return chunk, key, value, cdiv(k.shape[-1], key), cdiv(v.shape[-1], value)


def _add_up(parts: Tensor) -> Tensor:
    """Sum the partial results [parts, ...] of the programs that share a head, in their dtype even under autocast."""
    return parts[0] if len(parts) == 1 else parts.sum(0, dtype=parts.dtype)


@custom_op("distill_pl::scalar_decay", mutates_args=())
def _scalar_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
                  state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute y, the final state, and the `sums` [B, T, H] that the backward pass needs."""
    q, k, v, g, state = contiguous(q, k, v, g, state)
    (batch, length, heads, key), value = k.shape, v.shape[-1]
    chunk, of_key, _, parts, _ = _blocks(k, v)
    y, final = v.new_empty(parts, *v.shape), _new(v, batch, heads, key, value)
    with torch.cuda.device_of(q):
        sums = None if g is None else chunk_local_cumsum(g, chunk_size=chunk, scale=RCP_LN2)  # the kernels use 2^x
        fused_chunk_fwd_kernel[lambda meta: (cdiv(value, meta["BV"]) * parts * batch * heads,)](
            q, k, v, sums, None, y, state, final, None, scale, length,
            B=batch, H=heads, K=key, V=value, BT=chunk, BK=of_key,
        )  # fmt: skip
    return _add_up(y), final, q.new_empty(0) if sums is None else sums


@_scalar_decay.register_fake
def _(q, k, v, g, scale, state):
    return _new(v), _new(v, v.shape[0], *k.shape[2:], v.shape[3]), q.new_empty(0) if g is None else _new(g)


def _allocate_gradients(q: Tensor, k: Tensor, v: Tensor, sums: Tensor,
             state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate the gradients of q, k, v and g, with a first dimension for the programs that share a head, and of the state."""
    *_, key_parts, value_parts = _blocks(k, v)
    # mLSTM's dq and dk have a part from v and one from the normaliser, which nearly cancel: in bf16, their sum would be inexact
    dtype = torch.float32 if sums.numel() and value_parts > 1 else q.dtype
    dq, dk = (x.new_empty(value_parts, *x.shape, dtype=dtype) for x in (q, k))
    dv = v.new_empty(key_parts, *v.shape)
    dg = sums.new_empty(key_parts * value_parts, *sums.shape) if sums.numel() else q.new_empty(0)
    return dq, dk, dv, dg, q.new_empty(0) if state is None else _new(state)


@custom_op("distill_pl::scalar_decay_backward", mutates_args=())
def _scalar_decay_backward(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, scale: float, state: Tensor | None, dy: Tensor,
                           d_final: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k, v, g, each still to be summed over its parts, and of the initial state."""
    q, k, v, state, dy, d_final = contiguous(q, k, v, state, dy, d_final)
    (batch, length, heads, key), value = k.shape, v.shape[-1]
    chunk, of_key, of_value, key_parts, value_parts = _blocks(k, v)
    gradients = dq, dk, dv, dg, d_state = _allocate_gradients(q, k, v, sums, state)
    gate, d_gate = (sums, dg) if sums.numel() else (None, None)
    with torch.cuda.device_of(q):
        fused_chunk_bwd_kernel[key_parts * value_parts * batch * heads,](
            q, k, v, gate, None, dy, dq, dk, dv, d_gate, state, d_final, None if state is None else d_state, None, scale,
            length, B=batch, H=heads, K=key, V=value, BT=chunk, BK=of_key, BV=of_value,
        )  # fmt: skip
    return gradients


@_scalar_decay_backward.register_fake
def _(q, k, v, sums, scale, state, dy, d_final):
    return _allocate_gradients(q, k, v, sums, state)


@custom_op("distill_pl::delta_rule", mutates_args=())
def _delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float,
                state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute y, the final state, and the inverses [B, T, H, CHUNK] that the backward pass needs, by fla's delta rule."""
    q, k, v, beta, state = contiguous(q, k, v, beta, state)
    with torch.cuda.device_of(q):
        y, inverse, final = chunk_delta_rule_fwd(q, k, v, beta, scale, state, output_final_state=True)
    return y, final, inverse


@_delta_rule.register_fake
def _(q, k, v, beta, scale, state):
    return _new(v), _new(v, v.shape[0], *k.shape[2:], v.shape[3]), k.new_empty(*k.shape[:3], CHUNK)


@custom_op("distill_pl::delta_rule_backward", mutates_args=())
def _delta_rule_backward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, inverse: Tensor, scale: float, state: Tensor | None,
                         dy: Tensor, d_final: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k, v, beta and, unless it is None, of the initial state."""
    q, k, v, beta, state, dy, d_final = contiguous(q, k, v, beta, state, dy, d_final)
    with torch.cuda.device_of(q):
        *gradients, d_state = chunk_delta_rule_bwd(q, k, v, beta, inverse, scale, state, dy, d_final)
    return *gradients, q.new_empty(0) if state is None else d_state


@_delta_rule_backward.register_fake
def _(q, k, v, beta, inverse, scale, state, dy, d_final):
    return _new(q), _new(k), _new(v), _new(beta), q.new_empty(0) if state is None else _new(state)


@custom_op("distill_pl::kda", mutates_args=())
def _kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
         state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute by fla's KDA: y, the final state, and `sums`, scores and inverses [B, T, H, CHUNK] for the backward pass.

    Scores are scale * q_i . k_j with decays, for i >= j; fla calls them Aqk and the inverses Akk.
    """
    q, k, v, g, beta, state = contiguous(q, k, v, g, beta, state)
    with torch.cuda.device_of(q):
        y, final, sums, scores, inverse, *_ = chunk_kda_fwd(q, k, v, g, beta, scale, state, output_final_state=True)
    return y, final, sums, scores, inverse


@_kda.register_fake
def _(q, k, v, g, beta, scale, state):
    products = [k.new_empty(*k.shape[:3], CHUNK) for _ in range(2)]
    return _new(v), _new(v, v.shape[0], *k.shape[2:], v.shape[3]), _new(g), *products


@custom_op("distill_pl::kda_backward", mutates_args=())
def _kda_backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, sums: Tensor, scores: Tensor, inverse: Tensor,
                  scale: float, state: Tensor | None, dy: Tensor,
                  d_final: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k, v, g, beta and, unless it is None, of the initial state."""
    q, k, v, beta, state, dy, d_final = contiguous(q, k, v, beta, state, dy, d_final)
    with torch.cuda.device_of(q):
        dq, dk, dv, d_beta, dg, d_state, *_ = chunk_kda_bwd(q, k, v, beta, scores, inverse, scale, state, dy, d_final, g=sums)
    return dq.to(q), dk.to(k), dv, dg, d_beta, q.new_empty(0) if state is None else d_state


@_kda_backward.register_fake
def _(q, k, v, g, beta, sums, scores, inverse, scale, state, dy, d_final):
    return *(_new(x) for x in (q, k, v, g, beta)), q.new_empty(0) if state is None else _new(state)


@custom_op("distill_pl::gated_delta_net", mutates_args=())
def _gated_delta_net(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
                     state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute by fla's Gated DeltaNet: y, the final state, and `sums` and inverses [B, T, H, CHUNK] for the backward pass."""
    q, k, v, g, beta, state = contiguous(q, k, v, g, beta, state)
    with torch.cuda.device_of(q):
        sums, y, inverse, final, *_ = chunk_gated_delta_rule_fwd(q, k, v, g, beta, scale, state, output_final_state=True)
    return y, final, sums, inverse


@_gated_delta_net.register_fake
def _(q, k, v, g, beta, scale, state):
    return _new(v), _new(v, v.shape[0], *k.shape[2:], v.shape[3]), _new(g), k.new_empty(*k.shape[:3], CHUNK)


def chunk_gradients(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, h: Tensor, dy: Tensor, dh: Tensor, dv: Tensor,
                    scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Differentiate the outputs and states of all chunks -> gradients of q, k and w [B, T, H, K], and of g [B, T, H].

    With a = 2^sums [B, T, H] the decays since a chunk's start, and a' those until its end, the function is

        y = scale * (a q h + (q k^T * decays) v)        h' = a_end h + (a' k)^T v        v = u - w h

    q, k [B, T, H, K]; v, dy, dv [B, T, H, V]; h [B, chunks, H, K, V] the state before each chunk, dh the gradient of the state
    after it. This replaces fla's chunk_bwd_dqkwg, which Triton 3.4 to 3.7.0 miscompiles on Hopper GPUs. It is plain PyTorch and
    no operator, so that torch.compile fuses it.
    """
    length = q.shape[1]

    def split(x: Tensor) -> Tensor:  # [B, chunks, H, CHUNK, X]; what is beyond T has no gradient
        return pad(x, (0, 0, 0, 0, 0, -length % CHUNK)).unflatten(1, (-1, CHUNK)).transpose(2, 3)

    def join(x: Tensor) -> Tensor:
        return x.transpose(2, 3).flatten(1, 2)[:, :length]

    sums = pad(sums.mT, (0, -length % CHUNK), mode="replicate").unflatten(2, (-1, CHUNK)).transpose(1, 2)
    since_start, until_end = sums.exp2()[..., None], (sums[..., -1:] - sums).exp2()[..., None]
    decays = (sums[..., :, None] - sums[..., None, :]).exp2().tril() * scale
    q, k, v, dy, dv = (split(x) for x in (q, k, v, dy, dv))
    weights = dy @ v.mT * decays
    d_sums = weights * (q @ k.mT)  # gradients of the sums of g itself, not divided by ln 2 as `sums` is
    d_sums = d_sums.sum(-1) - d_sums.sum(-2)
    weights = weights.to(q.dtype)
    dq, dk = dy @ h.mT * (since_start * scale), v @ dh.mT * until_end
    from_states = (k * dk).sum(-1)
    d_sums += (q * dq).sum(-1) - from_states
    d_sums[..., -1] += from_states.sum(-1) + (h * dh).sum((-2, -1), dtype=torch.float32) * since_start[..., -1, 0]
    dq, dk, dw = dq.to(q.dtype) + weights @ k, dk.to(k.dtype) + weights.mT @ q, -(dv @ h.mT)
    dg = d_sums.flip(-1).cumsum(-1).flip(-1)
    return join(dq), join(dk), join(dw), join(dg[..., None])[..., 0]


@custom_op("distill_pl::gated_delta_net_states", mutates_args=())
def _gated_delta_net_states(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, sums: Tensor, inverse: Tensor, scale: float,
                            state: Tensor | None, dy: Tensor,
                            d_final: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute h, v, dv and dh, which `chunk_gradients` reads, and the gradient of the initial state."""
    q, k, v, beta, state, dy, d_final = contiguous(q, k, v, beta, state, dy, d_final)
    with torch.cuda.device_of(q):
        w, u = recompute_w_u_fwd(k, v, beta, inverse, g=sums)
        h, v_new, _ = chunk_gated_delta_rule_fwd_h(k, w, u, g=sums, initial_state=state)
        dv = chunk_bwd_dv_local(q, k, dy, g=sums, scale=scale)
        dh, d_state, dv = chunk_gated_delta_rule_bwd_dhu(q, k, w, dy, dv, g=sums, h0=state, dht=d_final, scale=scale)
    return h, v_new, dv, dh, q.new_empty(0) if state is None else d_state


@_gated_delta_net_states.register_fake
def _(q, k, v, beta, sums, inverse, scale, state, dy, d_final):
    h = k.new_empty(k.shape[0], cdiv(k.shape[1], CHUNK), *k.shape[2:], v.shape[3])
    return h, _new(v), _new(v), _new(h), q.new_empty(0) if state is None else _new(state)


@custom_op("distill_pl::gated_delta_net_solved", mutates_args=())
def _gated_delta_net_solved(k: Tensor, v: Tensor, beta: Tensor, sums: Tensor, inverse: Tensor, dw: Tensor,
                            du: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of k, v, g and beta from dw and du, those of w = inverse (beta 2^sums k), u = inverse (beta v)."""
    k, v, beta, dw, du = contiguous(k, v, beta, dw, du)
    with torch.cuda.device_of(k):
        dk, dv, d_beta, d_sums = prepare_wy_repr_bwd(k, v, beta, inverse, dw, du, g=sums)
        return dk, dv, chunk_local_cumsum(d_sums, chunk_size=CHUNK, reverse=True), d_beta


@_gated_delta_net_solved.register_fake
def _(k, v, beta, sums, inverse, dw, du):
    return _new(k), _new(v), _new(sums), _new(beta)


DPLR_CHUNK = 16  # the chunk length at which fla's kernels take any decay


@custom_op("distill_pl::rank_one", mutates_args=())
def _rank_one(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float,
              state: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute y and the final state; the backward pass recomputes everything else."""
    q, k, v, a, b, g, state = contiguous(q, k, v, a, b, g, state)
    with torch.cuda.device_of(q):
        y, final, *_ = chunk_dplr_fwd(q, k, v, a, b, g, scale, state, output_final_state=True, chunk_size=DPLR_CHUNK)
    return y, final


@_rank_one.register_fake
def _(q, k, v, a, b, g, scale, state):
    return _new(v), _new(v, v.shape[0], *k.shape[2:], v.shape[3])


@custom_op("distill_pl::rank_one_backward", mutates_args=())
def _rank_one_backward(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float, state: Tensor | None,
                       dy: Tensor, d_final: Tensor | None) -> list[Tensor]:  # fmt: skip
    """Compute the gradients of q, k, v, a, b, g and, unless it is None, of the initial state, by fla's autograd function."""
    context = SimpleNamespace(
        saved_tensors=contiguous(q, k, v, a, b, g, state), scale=scale, chunk_size=DPLR_CHUNK, safe_gate=False,
        disable_recompute=False, cu_seqlens=None, chunk_indices=None, cp_context=None,
    )  # fmt: skip
    backward = inspect.unwrap(ChunkDPLRDeltaRuleFunction.backward)  # without decorators, which need autograd's own context
    with torch.cuda.device_of(q):
        dq, dk, dv, da, db, dg, _, d_state, *_ = backward(context, *contiguous(dy, d_final))
    return [dq, dk, dv, da, db, dg, q.new_empty(0) if state is None else d_state]


@_rank_one_backward.register_fake
def _(q, k, v, a, b, g, scale, state, dy, d_final):
    return [*(_new(x) for x in (q, k, v, a, b, g)), q.new_empty(0) if state is None else _new(state)]


def _save(ctx, inputs, output) -> None:
    """Save the inputs of an operator, and its outputs beyond y and the final state, for the backward pass."""
    *tensors, ctx.scale, state = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, state, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(backward):
    """Return the autograd formula of an operator whose gradients `backward` computes."""

    def run(ctx, dy, d_final, *_):
        tensors, (state, *kept) = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        dy = torch.zeros_like(tensors[2]) if dy is None else dy
        *gradients, d_state = backward(*tensors, *kept, ctx.scale, state, dy, d_final)
        gradients = [None if x is None else gradient for x, gradient in zip(tensors, gradients, strict=True)]
        return *gradients, None, None if state is None else d_state

    return run


def _scalar_decay_gradients(q, k, v, g, sums, *rest) -> tuple[Tensor, ...]:
    *gradients, d_state = _scalar_decay_backward(q, k, v, sums, *rest)
    return *(_add_up(parts).to(x.dtype) for parts, x in zip(gradients, (q, k, v, sums), strict=True)), d_state


def _gated_delta_net_gradients(q, k, v, g, beta, sums, inverse, scale, state, dy, d_final) -> tuple[Tensor, ...]:
    h, v_new, dv, dh, d_state = _gated_delta_net_states(q, k, v, beta, sums, inverse, scale, state, dy, d_final)
    dq, dk, dw, dg = chunk_gradients(q, k, v_new, sums, h, dy, dh, dv, scale)
    dk_of_w, dv, dg_of_w, d_beta = _gated_delta_net_solved(k, v, beta, sums, inverse, dw, dv)
    return dq, dk + dk_of_w, dv, dg + dg_of_w, d_beta, d_state


_scalar_decay.register_autograd(_differentiate(_scalar_decay_gradients), setup_context=_save)
_delta_rule.register_autograd(_differentiate(_delta_rule_backward), setup_context=_save)
_kda.register_autograd(_differentiate(_kda_backward), setup_context=_save)
_gated_delta_net.register_autograd(_differentiate(_gated_delta_net_gradients), setup_context=_save)
_rank_one.register_autograd(_differentiate(_rank_one_backward), setup_context=_save)


def scalar_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
                 state: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mix as `ops.scalar_decay.mix` does, by the kernels of fla's fused_chunk_simple_gla -> y [B, T, H, V], state.

    q, k [B, T, H, K] and v [B, T, H, V] have one dtype; g [B, T, H] is fp32, or None for no decay. The kernels are called
    directly, since in fla's function programs that share a head write fp32, which separate kernels sum and cast: this costs
    Hedgehog 11% of a training step.
    """
    value, missing = v.shape[-1], -v.shape[-1] % 8  # rows that are no multiple of 16 bytes are read 4 bytes at a time
    if missing:
        v, state = pad(v, (0, missing)), None if state is None else pad(state, (0, missing))
    y, state, _ = _scalar_decay(q, k, v, g, scale, state)
    return (y[..., :value], state[..., :value].contiguous()) if missing else (y, state)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mix as `ops.gated_delta.mix` does without decay, by fla's chunk_delta_rule -> y [B, T, H, V], state [B, H, K, V].

    q, k [B, T, H, K] and v [B, T, H, V] have one dtype, which is not fp32; beta is [B, T, H].
    """
    return _delta_rule(q, k, v, beta, scale, state)[:2]


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
                state: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mix as `ops.gated_delta.mix` does with a decay -> y [B, T, H, V], state [B, H, K, V].

    q, k [B, T, H, K] and v [B, T, H, V] have one dtype, which is not fp32; beta is fp32 [B, T, H]. g is fp32: [B, T, H, K],
    mixed by fla's chunk_kda, or [B, T, H, 1], by the kernels of its chunk_gated_delta_rule, which itself refuses Hopper GPUs.
    """
    if g.shape[-1] == 1:
        return _gated_delta_net(q, k, v, g[..., 0], beta, scale, state)[:2]
    return _kda(q, k, v, g, beta, scale, state)[:2]


def rank_one(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float,
             state: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mix by S_t = (diag(e^{g_t}) + b_t a_t^T) S_{t-1} + k_t v_t^T, by fla's chunk_dplr_delta_rule -> y, state [B, H, K, V].

    q, k, a, b [B, T, H, K] and v [B, T, H, V] have one dtype, which is not fp32; g is fp32 [B, T, H, K].
    """
    return _rank_one(q, k, v, a, b, g, scale, state)


def _squared_sizes(q: Tensor, v: Tensor, rows: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid for programs of `rows` rows, and the arguments that both kernels take."""
    (batch, heads, length, key), value = q.shape, v.shape[-1]
    sizes = {"T": length, "B": batch, "H": heads, "K": key, "V": value, "BTL": rows, "BTS": 32}
    blocks = {"BK": max(16, next_power_of_2(key)), "BV": max(16, next_power_of_2(value))}
    return (cdiv(length, rows), batch * heads), sizes | blocks | {"num_warps": 4, "num_stages": 2}


@custom_op("distill_pl::squared", mutates_args=())
def squared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sum_j S_ij v_j [B, H, T, V] and sum_j S_ij [B, H, T] with S_ij = (q_i . k_j)^2, by fla's parallel_rebased.

    q, k, v are contiguous [B, H, T, K or V] of one dtype, K and V at most 128. The kernels are called directly, since fla's
    function makes them write fp32 and sums over a dimension of size 1. Both results have the dtype of v: if one were fp32, the
    first row would not be its token's v, nor the gradient of its score 0.
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
