"""The backend of decoding, and what it takes for granted of PyTorch's private interfaces."""

import inspect
from functools import reduce

import pytest
import torch

from distill_pl.decoding.backend import INDUCTOR_OPTIONS, PDL_OPTION, RECOMPILE_LIMITS, decode_backend, unlimited_recompiles

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("option", [*INDUCTOR_OPTIONS, PDL_OPTION])
def test_inductor_has_the_option(option):
    from torch._inductor import config

    reduce(getattr, option.split("."), config)  # an AttributeError names the option


def test_compile_fx_takes_decompositions_and_config_patches():
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    assert inspect.signature(compile_fx).parameters.keys() >= {"decompositions", "config_patches", "inner_compile"}
    assert torch.ops.aten.silu.default in select_decomp_table()


def test_dynamo_has_the_recompile_limits():
    before = [getattr(torch._dynamo.config, limit) for limit in RECOMPILE_LIMITS]
    with unlimited_recompiles():
        assert all(getattr(torch._dynamo.config, limit) == 1000 for limit in RECOMPILE_LIMITS)
    assert [getattr(torch._dynamo.config, limit) for limit in RECOMPILE_LIMITS] == before


def test_products_of_one_row_are_sums():
    """Others stay: those with more terms than columns, unless they read a state, and those of several rows."""
    from torch._inductor import config

    aten, kept = torch.ops.aten, []

    def inner_compile(graph, inputs, **unused):
        assert config.unroll_reductions_threshold == 17 and config.combo_kernels
        kept.extend(node.target for node in graph.graph.nodes if node.target in (aten.mm.default, aten.bmm.default))
        return graph

    def products(row, wide, tall, bias, state, rows):
        sums = torch.addmm(bias, row, wide), row.expand(3, 1, -1) @ state, row.mT @ row
        return *sums, row @ tall, rows @ wide

    numbers = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=numbers) for shape in [(1, 8), (8, 16), (8, 4), (16,), (3, 8, 4), (2, 8)]]
    compiled = torch.compile(products, backend=lambda *given: decode_backend(*given, inner_compile=inner_compile))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), products(*inputs))
    assert kept == [aten.mm.default, aten.mm.default]
