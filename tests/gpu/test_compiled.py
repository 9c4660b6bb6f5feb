"""Compiled and captured steps compute what plain ones do on a GPU: every stage's loss and gradients, of all mixers."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from distill_pl.compiling import compile_stage
from distill_pl.compiling.cuda_graphs import capture_losses
from distill_pl.measure.report import scalars
from distill_pl.mixers import MIXERS
from distill_pl.stages import STAGES
from distill_pl.stages.matrix_mixing import mixing_parameters
from distill_pl.student.factory import StudentFactory
from distill_pl.teacher import Teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BATCH, LENGTH = 8, 128


@pytest.fixture(scope="module")
def small(save_model) -> Teacher:
    """Make a teacher of two layers with heads as wide as SmolLM-360M's, which the kernels are tuned for."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "max_position_embeddings": 512}
    sizes["rms_norm_eps"] = 0.03  # else gradients are those of the few tokens whose q . k is almost 0, which head norms amplify
    teacher = Teacher(str(save_model("llama", randomise=True, **sizes, initializer_range=0.05)), torch.bfloat16)
    return teacher.to(torch.device("cuda"))


def loss_and_gradients(stage, tokens: torch.Tensor, losses=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        loss, _ = (losses or stage.losses_given)(tokens, *stage.draw(tokens, seed=0))
    trained = [p for p in stage.student.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, trained, allow_unused=True))


@pytest.mark.parametrize("stage_name", ["kd", "matrix_mixing", "other"])
def test_compiled_is_plain(small, name, stage_name):
    """Compile KD, probes and, in turn, hidden alignment or exact matrices, which compile the same layers of a mixer."""
    other = ["hidden_align", "exact"][list(MIXERS).index(name) % 2]
    check_compiled(small, StudentFactory(name, init="fresh"), other if stage_name == "other" else stage_name)


@pytest.mark.parametrize("stage_name", [*STAGES, "exact"])
def test_a_window_compiled_is_plain(small, stage_name):
    check_compiled(small, StudentFactory("gla", init="fresh", window=16), stage_name)


def check_compiled(small: Teacher, factory: StudentFactory, stage_name: str) -> None:
    torch.compiler.reset()
    options = {"estimator": "exact"} if stage_name == "exact" else {}
    student, name = factory.build(small, seed=0), factory.mixer
    if name == "rebased":  # keep q . k away from 0, where its gradient jumps
        for mixer in student.mixers:
            torch.nn.init.ones_(mixer.feature_map.bias)
    stage = STAGES["matrix_mixing" if stage_name == "exact" else stage_name](student, small, **options).cuda()
    stage.configure_model()
    tokens = torch.randint(small.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.compiler.set_stance("force_eager"):
        expected, gradients = loss_and_gradients(stage, tokens)
    compile_stage(stage)
    found, others = loss_and_gradients(stage, tokens)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-4)
    error = sum((x.float() - y.float()).square().sum() for x, y in zip(others, gradients, strict=True) if x is not None)
    size = sum(y.float().square().sum() for y in gradients if y is not None)
    off = (error / size).sqrt().item()
    print(name, stage_name, expected.item(), found.item(), f"gradients off by {off:.1e}")
    assert off < 5e-2  # two roundings to bf16 of the same

    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        captured, _ = capture_losses(stage.losses_given, student, (tokens.flip(1), *stage.draw(tokens, seed=1)))
    again, same = loss_and_gradients(stage, tokens, captured)
    torch.testing.assert_close([again, *same], [found, *others], rtol=1e-3, atol=1e-5)  # sums in another order


def test_matrix_mixing_trains_what_it_trains_on_a_cpu(small, name):
    mixer = StudentFactory(name, init="fresh").build(small, seed=0).mixers[0].cpu()
    expected = mixing_parameters(mixer)
    assert [id(p) for p in mixing_parameters(mixer.cuda())] == [id(p) for p in expected]


def test_what_waits_for_the_gpu_cannot_be_captured_and_runs_as_ever(small):
    stage = STAGES["kd"](StudentFactory("gla", init="fresh").build(small, seed=0), small).cuda()
    stage.configure_model()
    tokens = torch.randint(small.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()

    def waiting(tokens):
        loss, parts = stage.losses_given(tokens)
        return loss * (1 if loss.item() else 2), parts

    compile_stage(stage)
    expected, _ = loss_and_gradients(stage, tokens)
    with pytest.raises(RuntimeError), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        capture_losses(waiting, stage.student, (tokens,))
    found, _ = loss_and_gradients(stage, tokens)
    torch.testing.assert_close(found, expected)


@pytest.fixture
def options(small) -> dict:
    """Configure a run of GLA: three stages of four steps of four micro-batches, whose gradients a graph writes to one place."""
    return {
        "teacher": small.path, "student.mixer": "gla", "student.init": "fresh", "data.micro_batch_size": 1, "tokens": 1536,
        "matrix_mixing.tokens": 512, "hidden_align.tokens": 512, "trainer.accelerator": "gpu", "trainer.log_every_n_steps": 1,
        "trainer.devices": 1,
    }  # fmt: skip


def test_steps_of_graphs_are_those_of_kernels(options, fitted, monkeypatch, capsys):
    found = steps(fitted(**options))
    assert "no CUDA graph" not in capsys.readouterr().out

    def refuse(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("distill_pl.compiling.cuda_graphs.capture_losses", refuse)
    expected = steps(fitted(**options))
    refused = "kd: no CUDA graph of a step can be captured, so kernels are launched one by one (out of memory)"
    assert refused in capsys.readouterr().out
    assert len(expected) == 3 * 2 * 4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def command(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "distill_pl.cli", *arguments], check=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_steps_on_two_gpus_are_those_of_one(options, fitted, capfd, strategy):
    found = steps(fitted(command, **options | {"trainer.devices": 2, "trainer.strategy": strategy}))
    said = capfd.readouterr()
    assert "no CUDA graph" not in said.out
    assert "warn" not in said.err.lower()
    # sharded layers are compiled one by one, with other roundings to bf16, which Adam's first steps enlarge
    torch.testing.assert_close(found, steps(fitted(**options)), rtol=5e-3 if strategy == "fsdp" else 1e-3, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_sharded_run_on_two_gpus_goes_on_where_it_was_killed(options, fitted):
    sharded = options | {"trainer.devices": 2, "trainer.strategy": "fsdp", "checkpoint_every": 128}

    def killed(arguments: list[str]) -> None:
        for stage in STAGES:
            process = subprocess.Popen([sys.executable, "-m", "distill_pl.cli", *arguments], stdout=subprocess.PIPE, text=True,
                                       start_new_session=True)  # fmt: skip
            assert any(line.startswith(f"{stage}  step 1/") for line in process.stdout)
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        command(arguments)

    found, expected = (load_file(fitted(run, **sharded) / "student" / "model.safetensors") for run in (killed, command))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def steps(run) -> list[float]:
    """Read every step's loss and gradient norm of all stages."""
    found = [scalars(folder) for folder in sorted(run.glob("[123]_*"))]
    return [value for stage in found for key in ("loss", "grad_norm") for value in stage[f"train/{key}"][1]]
