"""Runs on one or two ranks, also changing ones, and with any micro-batch take the same steps: gloo processes on a CPU."""

import os
import random
import socket
import time
from pathlib import Path

import pytest
import torch
from helpers import STAGE_FOLDERS, STEP, die_at_replace, forkserver
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distill_pl.cli import main, system_error_line
from distill_pl.measure.report import scalars
from distill_pl.run import trainer

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", "2"))
KEYS = {  # 3 + 3 + 4 steps with a checkpoint at each; two ranks cannot share 5 held-out chunks evenly
    "tokens": 10 * STEP, "matrix_mixing.tokens": 3 * STEP, "hidden_align.tokens": 3 * STEP, "checkpoint_every": STEP,
    "validate_every": 3 * STEP, "trainer.log_every_n_steps": 1, "data.validation_tokens": 5 * 32,
}  # fmt: skip


def run_rank(args: list[str], rank: int, ranks: int, port: int, files: int) -> None:
    """Run a rank in this child process as torchrun would; rank 0 kills itself after its `files`-th os.replace."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    if rank == 0:
        die_at_replace(files)
    main([*args, f"--trainer.devices={ranks}"])


def free_port() -> int:
    """Return a TCP port of this machine that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(args: list[str], ranks: int, files: int = 0, kill: tuple[int, float] | None = None) -> bool:
    """Run `ranks` ranks until they end or one dies, then kill the others; return whether all ended well.

    files: rank 0 dies after its `files`-th os.replace. kill: a rank, and the seconds after which it is killed.
    """
    port = free_port()
    children = [forkserver.Process(target=run_rank, args=(args, rank, ranks, port, files)) for rank in range(ranks)]
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


def losses(out: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Read every scalar of a run except its speed: by stage and tag, pairs of step and value."""
    curves = {}
    for stage in STAGE_FOLDERS:
        for tag, curve in scalars(out / stage).items():
            if tag != "train/tokens_per_second":
                curves[stage, tag] = list(zip(*curve, strict=True))
    return curves


def assert_same_to_rounding(out: Path, whole: Path) -> None:
    expected_losses = losses(whole)
    assert losses(out).keys() == expected_losses.keys()
    for key, values in losses(out).items():
        assert values == [(step, pytest.approx(value, rel=1e-4)) for step, value in expected_losses[key]], key
    for stage in STAGE_FOLDERS:
        weights, expected = (load_file(folder / stage / "student.safetensors") for folder in (out, whole))
        for name, tensor in weights.items():
            torch.testing.assert_close(
                tensor, expected[name], rtol=0, atol=1e-4, msg=lambda m, s=stage, n=name: f"{s} {n}: {m}"
            )


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    """Run a `command` on one rank without an interruption and return the run's folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert launch(command(out), 1)
    return out


@pytest.fixture(scope="module")
def whole_on_two_ranks(whole, command, tmp_path_factory) -> tuple[Path, float]:
    """Run a `command` on two ranks without an interruption and return the run's folder and the seconds it took.

    `whole` has packed the text and started the fork server, so that other launches take as long.
    """
    out = tmp_path_factory.mktemp("whole_on_two_ranks") / "run"
    began = time.monotonic()
    assert launch(command(out), 2)
    return out, time.monotonic() - began


def test_two_ranks_take_the_same_steps(whole_on_two_ranks, whole):
    assert_same_to_rounding(whole_on_two_ranks[0], whole)


def test_micro_batches_take_the_same_steps(arguments, whole, tmp_path):
    assert launch(arguments("micro", **{"data.micro_batch_size": 1}), 1)
    assert_same_to_rounding(tmp_path / "micro", whole)


def test_sharded_models_take_the_same_steps(arguments, whole, tmp_path):
    sharded = arguments("sharded", **{"trainer.strategy": "fsdp", "data.micro_batch_size": 1})
    for _ in range(2):  # the first dies in stage 1, the second in stage 2
        assert not launch(sharded, 2, files=4)
    assert launch(sharded, 2)
    assert_same_to_rounding(tmp_path / "sharded", whole)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sharded" / "student").config.mixer == "gla"


def test_another_number_of_ranks_and_another_micro_batch_go_on(arguments, whole, tmp_path):
    tries = [(2, 1), (1, 2), (2, 2), (1, 4), (2, 1)]  # ranks, micro-batch
    for ranks, micro in tries[:-1]:  # a run puts 14 files in place: a configuration, 10 checkpoints, 3 stages' weights
        assert not launch(arguments("changed", **{"data.micro_batch_size": micro}), ranks, files=3)
    assert launch(arguments("changed", **{"data.micro_batch_size": tries[-1][1]}), tries[-1][0])
    assert_same_to_rounding(tmp_path / "changed", whole)


def test_any_rank_may_be_killed_at_any_moment(whole_on_two_ranks, arguments, tmp_path):
    whole, took = whole_on_two_ranks
    chance = random.Random(0)
    kills, runs = 0, 1
    while kills < KILLS:
        if launch(arguments(f"killed{runs}"), 2, kill=(chance.randrange(2), chance.uniform(0.2, 0.8) * took)):
            runs += 1  # the run ended before it was to be killed
        else:
            kills += 1
    assert launch(arguments(f"killed{runs}"), 2)
    print(f"killed {kills} times in {runs} runs")
    expected = load_file(whole / "student" / "model.safetensors")
    for out in (tmp_path / f"killed{number}" for number in range(1, runs + 1)):
        assert all(torch.equal(x, expected[name]) for name, x in load_file(out / "student" / "model.safetensors").items())
        assert not [*out.rglob("*.new"), *out.rglob("*.ckpt")]


def add_up(rank: int, port: int, pipe) -> None:
    """Join a group of two processes; rank 1 ends at once, and rank 0, which waits for its sum, sends what is said of that."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.distributed.all_reduce(torch.ones(1))
    if rank == 0:
        try:
            torch.distributed.all_reduce(torch.ones(1))
        except Exception as error:
            pipe.send(system_error_line(error))
    os._exit(0)


def test_a_rank_whose_neighbour_has_ended_says_so_in_one_line():
    ours, theirs = forkserver.Pipe()
    port = free_port()
    for rank in range(2):
        forkserver.Process(target=add_up, args=(rank, port, theirs)).start()
    assert ours.poll(60)
    line = ours.recv()
    assert line.startswith("another process of this run has ended") and "\n" not in line


def test_a_rank_ends_with_the_process_that_started_it(monkeypatch):
    asked = []
    monkeypatch.setattr(trainer, "end_with_parent", asked.append)
    trainer.end_with_leader()  # not one of Lightning's ranks
    with trainer.leading():
        leader = os.environ[trainer.LEADER]
        trainer.end_with_leader()  # the first rank
    assert leader == str(os.getpid()) and trainer.LEADER not in os.environ and not asked
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(trainer.LEADER, str(os.getppid()))
    trainer.end_with_leader()
    assert len(asked) == 1
    monkeypatch.setenv(trainer.LEADER, str(os.getpid()))  # as if that process had ended, and another taken this one over
    with pytest.raises(SystemExit):
        trainer.end_with_leader()
