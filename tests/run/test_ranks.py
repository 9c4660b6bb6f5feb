"""Any number of ranks, also a changing one, and any micro-batch take the same steps: two gloo processes on a CPU."""

import multiprocessing
import os
import random
import signal
import socket
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distill_pl.cli import main
from distill_pl.measure.report import scalars

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["distill_pl.cli"])
STEP = 4 * 32  # tokens of one step
KILLS = int(os.environ.get("KILLS", "3"))
STAGE_FOLDERS = ["1_matrix_mixing", "2_hidden_align", "3_kd"]


@pytest.fixture
def arguments(teacher_folder, corpus, tmp_path):
    """A run of 3 + 3 + 4 steps with a checkpoint at each, held-out chunks that two ranks can not share evenly."""
    return lambda out, **keys: [
        "fit",
        *(f"--{key}={value}" for key, value in ({
            "out": tmp_path / out, "teacher": teacher_folder, "data.dataset": corpus, "data.cache": tmp_path / "cache",
            "tokens": 10 * STEP, "matrix_mixing.tokens": 3 * STEP, "hidden_align.tokens": 3 * STEP,
            "data.sequence_length": 32, "data.batch_size": 4, "data.validation_tokens": 5 * 32, "trainer.accelerator": "cpu",
            "checkpoint_every": STEP, "validate_every": 3 * STEP, "trainer.log_every_n_steps": 1,
        } | keys).items()),
    ]  # fmt: skip


def be_rank(args: list[str], rank: int, ranks: int, port: int, die_at_replace: int) -> None:
    """As torchrun starts one; rank 0 dies when it has put the n-th file in place."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    replace, count = os.replace, 0

    def counting_replace(*names):
        nonlocal count
        replace(*names)
        count += 1
        if count == die_at_replace:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0 and die_at_replace:
        os.replace = counting_replace
    main([*args, f"--trainer.devices={ranks}"])


def launch(args: list[str], ranks: int, die_at_replace: int = 0, kill: tuple[int, float] | None = None) -> bool:
    """Run to the end, or till a rank dies, which takes the others along -> whether it ended well.

    kill: a rank, and the seconds after which it is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [processes.Process(target=be_rank, args=(args, rank, ranks, port, die_at_replace)) for rank in range(ranks)]
    for child in children:
        child.start()
    if kill:
        children[kill[0]].join(timeout=kill[1])
        children[kill[0]].kill()
    while any(child.is_alive() for child in children):
        if any(child.exitcode for child in children):
            for child in children:
                child.kill()
        time.sleep(0.05)
    return all(child.exitcode == 0 for child in children)


def losses(out) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Every scalar of a run but its speed: by stage and tag, steps and values."""
    found = {}
    for stage in STAGE_FOLDERS:
        for tag, curve in scalars(out / stage).items():
            if tag != "train/tokens_per_second":
                found[stage, tag] = list(zip(*curve, strict=True))
    return found


def assert_same_to_rounding(out, whole) -> None:
    theirs = losses(whole)
    assert losses(out).keys() == theirs.keys()
    for key, values in losses(out).items():
        assert values == [(step, pytest.approx(value, rel=1e-4)) for step, value in theirs[key]], key
    for stage in STAGE_FOLDERS:
        ours, expected = (load_file(folder / stage / "student.safetensors") for folder in (out, whole))
        for name, tensor in ours.items():
            torch.testing.assert_close(
                tensor, expected[name], rtol=0, atol=1e-4, msg=lambda m, s=stage, n=name: f"{s} {n}: {m}"
            )


@pytest.fixture
def whole(arguments, tmp_path):
    assert launch(arguments("whole"), 1)
    return tmp_path / "whole"


@pytest.mark.parametrize(("ranks", "micro"), [(2, None), (1, 1), (2, 1)])
def test_ranks_and_micro_batches_take_the_same_steps(arguments, whole, tmp_path, ranks, micro):
    assert launch(arguments("other", **({"data.micro_batch_size": micro} if micro else {})), ranks)
    assert_same_to_rounding(tmp_path / "other", whole)


def test_sharded_models_take_the_same_steps(arguments, whole, tmp_path):
    sharded = arguments("sharded", **{"trainer.strategy": "fsdp", "data.micro_batch_size": 1})
    for _ in range(3):
        assert not launch(sharded, 2, die_at_replace=2)
    assert launch(sharded, 2)
    assert_same_to_rounding(tmp_path / "sharded", whole)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sharded" / "student").config.mixer == "gla"


def test_another_number_of_ranks_and_another_micro_batch_go_on(arguments, whole, tmp_path):
    tries = [(2, 1), (1, 2), (2, 2), (1, 1), (1, 4), (2, 1)]  # ranks, micro-batch
    for ranks, micro in tries[:-1]:  # each puts two files in place: a checkpoint and another, or the stage's end
        assert not launch(arguments("changed", **{"data.micro_batch_size": micro}), ranks, die_at_replace=2)
    assert launch(arguments("changed", **{"data.micro_batch_size": tries[-1][1]}), tries[-1][0])
    assert_same_to_rounding(tmp_path / "changed", whole)


def test_any_rank_may_be_killed_at_any_moment(arguments, tmp_path):
    assert launch(arguments("first"), 2)  # which imports everything and packs the text
    began = time.monotonic()
    assert launch(arguments("whole"), 2)
    took, chance = time.monotonic() - began, random.Random(0)
    kills, runs = 0, 1
    while kills < KILLS:
        if launch(arguments(f"killed{runs}"), 2, kill=(chance.randrange(2), chance.uniform(0.2, 0.8) * took)):
            runs += 1  # it was faster
        else:
            kills += 1
    assert launch(arguments(f"killed{runs}"), 2)
    print(f"killed {kills} times in {runs} runs")
    expected = load_file(tmp_path / "whole" / "student" / "model.safetensors")
    for out in (tmp_path / f"killed{number}" for number in range(1, runs + 1)):
        assert all(torch.equal(x, expected[name]) for name, x in load_file(out / "student" / "model.safetensors").items())
        assert not [*out.rglob("*.new"), *out.rglob("*.ckpt")]
