"""Sliding-window attention against its formula, softmax attention and padding; tests/ops/test_laws.py has its law."""

import pytest
import torch
from op_inputs import Inputs, cut, make, matrix, mixed, relative_error, stepped
from torch import Tensor

from distill_pl.ops import softmax, window

WINDOWS = [(1, 1), (2, 3), (4, 2), (5, 9), (30, 2)]  # (window, sinks), of 24 tokens


def inputs_of(size: int, sinks: int, **options) -> Inputs:
    return make("window", 24, **options) | {"window": size, "sinks": sinks}


def by_formula(inputs: Inputs, key_mask: Tensor) -> Tensor:
    """Compute A [B, H, T, T] one head and one query at a time."""
    q, k = inputs["q"], inputs["k"].repeat_interleave(2, 2)
    a = q.new_zeros(len(q), q.shape[2], q.shape[1], q.shape[1])
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in a.shape[:3])).tolist():
        sinks = key_mask[b].nonzero()[: inputs["sinks"], 0].tolist()
        seen = [j for j in range(i + 1) if key_mask[b, j] and (i - j < inputs["window"] or j in sinks) or j == i]
        a[b, h, i, seen] = (k[b, seen, h] @ q[b, i, h] * inputs["scale"]).softmax(0)
    return a


@pytest.mark.parametrize(("size", "sinks"), WINDOWS)
@pytest.mark.parametrize("masked", [[], range(7), [0, 4, 5, 9, 20]], ids=str)
def test_it_is_softmax_over_the_last_tokens_and_the_first(size, sinks, masked):
    inputs, key_mask = inputs_of(size, sinks), torch.ones(2, 24, dtype=torch.bool)
    key_mask[0, masked] = False
    if masked:
        inputs["key_mask"] = key_mask
    expected = by_formula(inputs, key_mask)
    assert relative_error(matrix(window, inputs), expected) < 1e-12
    y = torch.einsum("bhij,bjhv->bihv", expected, inputs["v"].repeat_interleave(2, 2))
    for run in (mixed, stepped):
        assert relative_error(run(window, inputs), y) < 1e-12


@pytest.mark.parametrize("size", [24, 100])
def test_a_window_of_the_whole_sequence_is_softmax_attention(size):
    inputs, plain = inputs_of(size, sinks=2), make("softmax", 24)
    assert torch.equal(matrix(window, inputs), matrix(softmax, plain))
    for run in (mixed, stepped):
        assert relative_error(run(window, inputs), run(softmax, plain)) < 1e-12


@pytest.mark.parametrize(("size", "sinks"), WINDOWS)
def test_left_padding_leaves_no_trace(size, sinks):
    inputs, padding = inputs_of(size, sinks), 5
    key_mask = torch.arange(24).expand(2, 24) >= padding
    alone = mixed(window, cut(inputs, slice(padding, None)))
    for run in (mixed, stepped):
        assert relative_error(run(window, inputs | {"key_mask": key_mask})[:, padding:], alone) < 1e-12


@pytest.mark.parametrize(("size", "sinks"), WINDOWS)
def test_the_state_is_of_constant_size(size, sinks):
    inputs = inputs_of(size, sinks)
    for length in (1, 3, 24):
        k, v, exists = window.mix(**cut(inputs, slice(0, length)))[1]
        assert k.shape[2] == v.shape[2] == exists.shape[1] == size + sinks - 1


def test_memory_of_training_grows_linearly():
    def kept(length: int) -> int:
        sizes = []
        inputs = make("window", length)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
            window.mix(**inputs | {"q": inputs["q"].requires_grad_(True)})
        return sum(sizes)

    assert kept(560) < 2.1 * kept(280)
