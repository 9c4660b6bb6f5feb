"""A layer compiles to one graph, also around the kernels, and one compilation serves all layers of a kind."""

import importlib.util

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from distill_pl.compiling.joined_products import JoinProducts
from distill_pl.compiling.layers import configure_compiler
from distill_pl.mixers import MIXERS
from distill_pl.mixers.short_conv import ShortConv
from distill_pl.stages.hidden_align import layer_distance
from distill_pl.stages.matrix_mixing import probed_distance, squared_distance
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student
from distill_pl.teacher import Teacher, run_layer

pytestmark = pytest.mark.slow

LENGTH = 32


@pytest.fixture
def graphs() -> list[torch.fx.GraphModule]:
    """Collect the graphs that `keep` is given to compile."""
    torch.compiler.reset()
    return []


@pytest.fixture
def keep(graphs):
    """Return a backend that runs a graph as it is."""
    return lambda graph, inputs: (graphs.append(graph), graph.forward)[1]


@pytest.fixture
def tokens(teacher) -> torch.Tensor:
    return torch.randint(teacher.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", ["llama_bias", "qwen2", "qwen3", "mistral"])
def test_a_teacher_is_one_graph(variant, shape, tokens, graphs, keep, monkeypatch):
    teacher = variant(shape)
    plain = [layer.output for layer in teacher.layers(tokens)]
    run = torch.compile(run_layer, backend=keep, fullgraph=True, dynamic=False)
    monkeypatch.setattr(teacher, "run_layer", run)
    for layer, expected in zip(teacher.layers(tokens), plain, strict=True):
        torch.testing.assert_close(layer.output, expected)
    assert len(graphs) == 1 < len(plain)


FUNCTIONS = {
    "block": lambda own, theirs, signs: layer_distance(own, theirs, "l2"),
    "probe": lambda own, theirs, signs: probed_distance(own, theirs, signs),
    "exact": lambda own, theirs, signs: squared_distance(
        own, theirs.input, theirs.query, theirs.key, theirs.scale, theirs.position
    ),
}
# every mixer's forward pass and every mixer's matrix, one of which has a window beside it; a product of the matrix with probes
# runs the forward pass's op on other values, by code that all mixers share
TRACED = [
    (name, "window" if beside and place == index % 2 else "grouped", what)
    for index, (name, mixer) in enumerate(MIXERS.items())
    for beside in ["k" in mixer.copies and name not in ("softmax", "swa")]
    for place, what in enumerate(["block", "exact"])
] + [("gla", "grouped", "probe"), ("retnet", "window", "probe")]


@pytest.mark.parametrize(("name", "layout", "what"), TRACED, indirect=["name", "layout"])
def test_a_student_is_one_graph(teacher, tokens, name, layout, graphs, keep, what):
    student = StudentFactory(name, init="fresh", **layout).build(teacher, seed=0)
    layers = list(zip(student.model.layers, teacher.layers(tokens), strict=True))
    signs, plain = torch.ones(1, LENGTH, 1, 4), FUNCTIONS[what]
    compiled = torch.compile(plain, backend=keep, fullgraph=True, dynamic=False)
    for layer in layers:
        torch.testing.assert_close(compiled(*layer, signs), plain(*layer, signs), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1 < len(layers)


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("fla", "triton"))), reason="needs fla-core and triton")
def test_a_graph_goes_around_the_kernels(save_model, name, graphs):
    """Trace the layer without running it, since there is no GPU here."""
    if name in ("softmax", "swa"):
        pytest.skip("torch's own")
    wide = Teacher(str(save_model("llama", hidden_size=64, head_dim=16)))
    config = StudentFactory(name, init="fresh").config(wide)
    config.backend = "fla"
    layer = Student(config).bfloat16().model.layers[0]
    position = (torch.ones(1, LENGTH, 16), torch.zeros(1, LENGTH, 16))

    def stop(graph, inputs):
        graphs.append(graph)
        raise NotImplementedError

    with pytest.raises(BackendCompilerFailed):
        torch.compile(layer, backend=stop, fullgraph=True)(torch.randn(2, LENGTH, 64).bfloat16(), position_embeddings=position)
    kernels = [node for node in graphs[0].graph.nodes if "distill_pl" in str(node.target)]
    convolutions = sum(isinstance(module, ShortConv) for module in layer.modules())
    assert len(kernels) == 1 + convolutions


def test_configure_compiler():
    """Set every flag: torch refuses the name of a flag that a version does not have. `patch` puts the flags back."""
    dynamo, functorch, inductor = torch._dynamo.config, torch._functorch.config, torch._inductor.config
    flags = ["realize_reads_threshold", "realize_opcount_threshold", "triton.mix_order_reduction_allow_multi_stages"]
    kept = {flag: inductor.get_config_copy()[flag] for flag in flags} | {"post_grad_custom_pre_pass": None}
    recompute = {"ban_recompute_materialized_backward": functorch.ban_recompute_materialized_backward}
    with dynamo.patch(optimize_ddp=True), functorch.patch(recompute), inductor.patch(kept):
        configure_compiler(960)
        assert not dynamo.optimize_ddp and not functorch.ban_recompute_materialized_backward
        assert (inductor.realize_reads_threshold, inductor.realize_opcount_threshold) == (12, 100)
        assert inductor.triton.mix_order_reduction_allow_multi_stages
        assert isinstance(inductor.post_grad_custom_pre_pass, JoinProducts)
    assert inductor.post_grad_custom_pre_pass is None
