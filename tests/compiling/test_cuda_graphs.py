"""The callback that launches steps as CUDA graphs takes the steps of a stage without it; on a CPU, with graphs imitated."""

from collections.abc import Callable

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from distill_pl.compiling import cuda_graphs
from distill_pl.compiling.cuda_graphs import StepGraphs
from distill_pl.stages import HiddenAlignStage
from distill_pl.student.factory import StudentFactory

STEPS, MICRO_BATCHES = 3, 2


class _Graphed(torch.autograd.Function):
    """Write the gradients of every backward pass to the same tensors, as the graphs of make_graphed_callables do."""

    @staticmethod
    def forward(ctx, losses, places, inputs, *parameters):
        with torch.enable_grad():
            loss, parts = losses(*inputs)
            ctx.gradients, ctx.places = torch.autograd.grad(loss, parameters), places
        return loss.detach(), parts

    @staticmethod
    def backward(ctx, d_loss, _):
        for place, gradient in zip(ctx.places, ctx.gradients, strict=True):
            place.copy_(d_loss * gradient)
        return None, None, None, *(place.detach() for place in ctx.places)


def imitated(losses: Callable, student, inputs) -> tuple[Callable, int]:
    parameters = [p for p in student.parameters() if p.requires_grad]
    places = [torch.zeros_like(p) for p in parameters]
    return lambda *given: _Graphed.apply(losses, places, given, *parameters), 0


def refused(*args):
    raise RuntimeError("out of memory\nand more")


@pytest.mark.parametrize("capture", [imitated, refused])
def test_steps_are_those_without_graphs(teacher, monkeypatch, capsys, tmp_path, capture):
    monkeypatch.setattr(cuda_graphs, "capture_losses", capture)
    numbers = torch.Generator().manual_seed(0)
    tokens = torch.randint(teacher.config.vocab_size, (STEPS * MICRO_BATCHES * 2, 16), generator=numbers)
    weights = []
    for callbacks in ([], [StepGraphs()]):
        stage = HiddenAlignStage(StudentFactory("gla", init="fresh").build(teacher, seed=0), teacher, lr=1e-2)
        trainer = L.Trainer(
            accelerator="cpu", max_steps=STEPS, accumulate_grad_batches=MICRO_BATCHES, callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(stage, DataLoader(tokens, batch_size=2))
        assert stage.captured_losses is None
        weights.append(torch.cat([p.detach().flatten() for p in stage.student.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    message = "hidden_align: no CUDA graph of a step can be captured, so kernels are launched one by one (out of memory)"
    assert (message in capsys.readouterr().out) == (capture is refused)
