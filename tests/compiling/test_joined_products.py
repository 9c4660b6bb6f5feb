"""Products that share a factor become one, and nothing else changes: outputs and gradients of a layer, of all students."""

import copy
import shutil
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code

from distill_pl.compiling.joined_products import JoinProducts, add_product, join_products, results, where_to
from distill_pl.student.factory import StudentFactory
from distill_pl.teacher import run_layer

LENGTH = 32
OPTIONS = {"post_grad_custom_pre_pass": JoinProducts(), "fx_graph_cache": False}
FREE = (torch.Tag.flexible_layout,)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
aten = torch.ops.aten


@pytest.fixture
def joined():
    """A backend that joins products of inductor's graphs and runs them; and, graph by graph, what it found and left."""
    torch.compiler.reset()
    counts = []

    def products(graph) -> int:
        return sum(node.target in (aten.mm.default, aten.addmm.default, add_product._opoverload) for node in graph.nodes)

    def inner(graph, inputs, **options):
        before = products(graph.graph)
        join_products(graph.graph)
        graph.recompile()
        counts.append((before, products(graph.graph)))
        return make_boxed_func(graph.forward)

    return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner), counts


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_student_s_layer(teacher, name, joined, autocast):
    layer = StudentFactory(name, init="fresh").build(teacher, seed=0).model.layers[0]
    tokens = torch.randint(teacher.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    seen = next(teacher.layers(tokens))
    backend, counts = joined
    outputs, gradients = [], []
    for run in (layer, torch.compile(layer, backend=backend, dynamic=False)):
        x = seen.input.clone().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(run(x, position_embeddings=seen.position).float())
        found = torch.autograd.grad(outputs[-1].square().sum(), [x, *layer.parameters()], allow_unused=True)
        gradients.append(torch.cat([g.flatten().float() for g in found if g is not None]))
    for value, expected in (outputs, gradients):
        assert (value - expected).norm() / expected.norm() < (2e-2 if autocast else 1e-5)
    products = 4 + (name == "gla")  # of what reads the first norm, o, of what reads the second, down; GLA's gate has two
    assert [left for _, left in counts] == [products, 2 * products]  # their inputs' and their weights' gradients
    assert all(found > left for found, left in counts)


def test_a_teacher_s_layer(teacher, joined):
    backend, counts = joined
    hidden = torch.randn(2, LENGTH, teacher.config.hidden_size)
    position = teacher.model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    with torch.no_grad():
        expected = run_layer(teacher.model.model.layers[0], hidden, position)
        found = torch.compile(run_layer, backend=backend, dynamic=False)(teacher.model.model.layers[0], hidden, position)
    torch.testing.assert_close(found, expected)
    assert counts == [(7, 4)]  # q, k and v; o; the gate and what it lets through; down


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
    assert [text.count("extern_kernels.mm(") for text in code] == [2, 4] and "distill_pl" not in code[1], code


@needs_compiler
def test_what_is_kept_of_cast_weights_is_the_joined_one(teacher):
    torch.compiler.reset()
    mlp = copy.deepcopy(teacher.model.model.layers[0].mlp).requires_grad_(True)
    compiled, kept = torch.compile(mlp, dynamic=False, options=OPTIONS), []
    x = torch.randn(3, LENGTH, teacher.config.hidden_size, requires_grad=True)
    keep = torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y)
    with torch.autocast("cpu", torch.bfloat16), keep:
        y = compiled(x)
    weights = [y.untyped_storage().data_ptr() for y in kept if y.numel() == mlp.gate_proj.weight.numel()]
    assert (len(weights), len(set(weights))) == (3, 2)  # those of the gate and of what it lets through are in one
    (found,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(mlp(x).sum(), x)
    assert (found - expected).norm() / expected.norm() < 2e-2


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_adds_to_what_it_is_added_to(teacher, dtype):
    torch.compiler.reset()
    layer = copy.deepcopy(teacher.model.model.layers[0]).to(dtype)
    hidden = torch.randn(2, LENGTH, teacher.config.hidden_size, dtype=dtype)
    position = teacher.model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    compiled = torch.compile(layer, dynamic=False, options=OPTIONS)
    with torch.no_grad():
        expected = layer(hidden, position_embeddings=position)
        found, code = run_and_get_code(compiled, hidden.clone(), position_embeddings=position)
    assert (found - expected).norm() / expected.norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert code[0].count("add_product_") == 1  # the MLP's; what attention's is added to is the layer's input


@torch.library.custom_op("tests::mixed", mutates_args=(), tags=FREE)
def mixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q + 2 * k + 3 * v


@torch.library.custom_op("tests::mixed_backward", mutates_args=(), tags=FREE)
def mixed_backward(dy: torch.Tensor, width: int, starts: Sequence[int]) -> list[torch.Tensor]:
    filled = results([dy] * 3, width, starts)
    for i, place in enumerate(where_to(filled, [dy] * 3, starts)):
        place.copy_((i + 1) * dy)
    return filled


mixed.register_fake(lambda q, k, v: torch.empty_like(q))
mixed_backward.register_fake(lambda dy, width, starts: results([dy] * 3, width, starts))
mixed.register_autograd(lambda ctx, dy: tuple(mixed_backward(dy.contiguous(), 0, [])[:3]))


@torch.library.custom_op("tests::split", mutates_args=(), tags=FREE)
def split(x: torch.Tensor, share: float) -> list[torch.Tensor]:
    return [share * x, (1 - share) * x]


split.register_fake(lambda x, share: [torch.empty_like(x), torch.empty_like(x)])
split.register_autograd(lambda ctx, dy: (split(dy[0], 1.0)[0], None))


@needs_compiler
@pytest.mark.parametrize("read", ["in products alone", "elsewhere too"])
def test_an_operator_writes_its_results_where_the_whole_has_them(read):
    torch.compiler.reset()
    q, k, v, gate, other = (nn.Linear(64, 64, bias=False) for _ in range(5))

    def layer(x):
        heads = [proj(x).unflatten(-1, (2, 32)) for proj in (q, k, v)]
        if read == "elsewhere too":  # its gradient is read by more than a product
            heads[1] = heads[1] + shift
        # the gate's gradient is worked out by inductor, the other's is a result of an operator that cannot write it elsewhere
        return mixed(*heads).flatten(2) * gate(x).sigmoid() + sum(split(other(x), 0.5))

    shift = torch.randn(2, 32, requires_grad=True)
    x = torch.randn(2, LENGTH, 64, requires_grad=True)
    leaves = [x, shift, *(proj.weight for proj in (q, k, v, gate, other))]

    def gradients(run) -> list[torch.Tensor]:
        return list(torch.autograd.grad(run(x).square().sum(), leaves, allow_unused=True))

    found, code = run_and_get_code(gradients, torch.compile(layer, dynamic=False, options=OPTIONS))
    torch.testing.assert_close(found, gradients(layer), rtol=1e-4, atol=1e-4)
    assert ", 320, [256, 192, 128])" in code[1] and "fill_in" not in code[1]
