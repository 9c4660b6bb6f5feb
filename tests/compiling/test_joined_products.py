"""Backward products that share a factor become one, and nothing else changes: outputs and gradients of all students' layers."""

import copy
import shutil

import pytest
import torch
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code

from distill_pl.compiling.joined_products import JoinProducts, add_product, join_products
from distill_pl.ops import window
from distill_pl.student.factory import StudentFactory

pytestmark = pytest.mark.slow

LENGTH = 32
OPTIONS = {"post_grad_custom_pre_pass": JoinProducts(), "fx_graph_cache": False}
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
aten = torch.ops.aten


def brief_mix(q, k, v, g=None, i=0.0, **unused) -> tuple[torch.Tensor, None]:
    """Stand for an op between the linears: hundreds of nodes, none of which is a product of theirs."""
    share = (q * k).sum(-1).sigmoid()
    if g is not None:
        share = share + (g.reshape(*v.shape[:3], -1).mean(-1) + i).sigmoid()
    return share[..., None] * v, None


# mlstm has biases and narrow gates, gla a gate of two matrices; a window beside it reads the same q, k and v
@pytest.mark.parametrize(("name", "options"), [("mlstm", {}), ("gla", {"window": 8})], ids=["mlstm", "gla"])
def test_join_products_leaves_a_layers_outputs_and_gradients(teacher, monkeypatch, name, options):
    """Count products before and after `join_products`: a version of torch whose graphs look different fails here."""
    torch.compiler.reset()
    layer = StudentFactory(name, init="fresh", **options).build(teacher, seed=0).model.layers[0]
    for op in (layer.self_attn.op, window):
        monkeypatch.setattr(op, "mix", brief_mix)
    tokens = torch.randint(teacher.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    taps, counts = next(teacher.layers(tokens)), []

    def count(graph) -> int:
        return sum(node.target in (aten.mm.default, aten.addmm.default, add_product) for node in graph.nodes)

    def inner(graph, inputs, **options):
        before = count(graph.graph)
        join_products(graph.graph)
        graph.recompile()
        counts.append((before, count(graph.graph)))
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        return compile_fx(graph, inputs, inner_compile=inner)

    for autocast, tolerance in ((False, 1e-5), (True, 2e-2)):
        outputs, gradients = [], []
        for run in (layer, torch.compile(layer, backend=backend, dynamic=False)):
            x = taps.input.clone().requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs.append(run(x, position_embeddings=taps.position).float())
            found = torch.autograd.grad(outputs[-1].square().sum(), [x, *layer.parameters()], allow_unused=True)
            gradients.append(torch.cat([g.flatten().float() for g in found if g is not None]))
        for value, expected in (outputs, gradients):
            assert (value - expected).norm() / expected.norm() < tolerance
    groups = 4 + (name == "gla")  # linears that read the first norm; o; gate and up; down; GLA's second gate matrix
    forward, backward = counts[0::2], counts[1::2]
    assert all(left == before for before, left in forward)
    assert [left for _, left in backward] == [2 * groups] * 2  # gradients of each group's input and of its weights
    assert all(before > left for before, left in backward)


@needs_compiler
def test_inductor_writes_parts_where_the_whole_has_them(teacher):
    torch.compiler.reset()
    mlp = copy.deepcopy(teacher.model.model.layers[0].mlp).requires_grad_(True)
    compiled = torch.compile(mlp, dynamic=False, options=OPTIONS)

    def gradients(run) -> list[torch.Tensor]:
        x = torch.randn(2, LENGTH, teacher.config.hidden_size, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        return list(torch.autograd.grad(run(x).square().sum(), [x, *mlp.parameters()]))

    found, code = run_and_get_code(gradients, compiled)
    torch.testing.assert_close(found, gradients(mlp))
    assert [text.count("extern_kernels.mm(") for text in code] == [3, 4] and "distill_pl" not in code[1], code


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_adds_to_the_residual_stream(teacher, dtype):
    torch.compiler.reset()
    layer = copy.deepcopy(teacher.model.model.layers[0]).to(dtype)
    hidden = torch.randn(2, LENGTH, teacher.config.hidden_size, dtype=dtype)
    position = teacher.model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    compiled = torch.compile(layer, dynamic=False, options=OPTIONS)
    with torch.no_grad():
        expected = layer(hidden, position_embeddings=position)
        found, code = run_and_get_code(compiled, hidden.clone(), position_embeddings=position)
    assert (found - expected).norm() / expected.norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert code[0].count("add_product_") == 1  # the MLP's; attention's is added to the layer's input, which is read elsewhere
