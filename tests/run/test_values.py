"""Every key's edge values either work or are refused in one line before any work."""

import re

import pytest
from helpers import STEP, refused

from distill_pl.run.values import RANGES

KEYS = {"tokens": 15 * STEP}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"trainer.limit_val_batches": 0}, "trainer.limit_val_batches 0.* more than 0"),
        ({"trainer.limit_val_batches": 0.001}, "trainer.limit_val_batches 0.001 leaves none of the 2 batches.* 0.5"),
        ({"trainer.log_every_n_steps": 0}, "trainer.log_every_n_steps 0.* at least 1"),
        ({"trainer.num_nodes": 0}, "trainer.num_nodes 0.* at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every 0.* at least 1"),
        ({"validate_every": 0}, "validate_every 0.* at least 1"),
        ({"data.batch_size": 0}, "data.batch_size 0.* at least 1"),
        ({"data.micro_batch_size": -1}, "data.micro_batch_size -1.* at least 1"),
        ({"data.sequence_length": 0}, "data.sequence_length 0.* at least 2"),
        ({"tokens": 0}, "tokens 0.* at least 1 and at most"),
        ({"tokens": 10**30}, "tokens 1000.* at least 1 and at most"),
        ({"matrix_mixing.probes": 0}, "matrix_mixing.probes 0.* at least 1"),
        ({"matrix_mixing.decay": 1.5}, "matrix_mixing.decay 1.5.* at most 1"),
        ({"hidden_align.warmup": -0.1}, "hidden_align.warmup -0.1.* at most 1"),
        ({"kd.weight_decay": -1}, "kd.weight_decay -1.* at least 0"),
        ({"kd.lr": ".nan"}, "kd.lr nan.* more than 0"),
        ({"kd.lr": 1e40}, "kd.lr 1e\\+40.* more than 0"),
        ({"kd.clip": 0}, "kd.clip 0.* more than 0"),
        ({"trainer.precision": "16-mixed"}, "trainer.precision 16-mixed.* bf16-mixed"),
        ({"trainer.precision": "bf16-true"}, "trainer.precision bf16-true.* 32-true"),
        ({"trainer.precision": 64}, "trainer.precision 64.* 32-true"),
        ({"trainer.precision": "64-true"}, "trainer.precision 64-true.* 32-true"),
    ],
)
def test_values_out_of_range(arguments, tmp_path, keys, says):
    assert re.search(says, refused(*arguments(**keys)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", RANGES)
def test_every_range_is_checked_before_the_teacher_is_read(arguments, key):
    assert refused(*arguments(**{key: -(2**64), "teacher": "/nowhere"})).startswith(f"distill-pl: {key}")


def test_a_budget_of_null_is_none(arguments):
    assert "kd.tokens 100" in refused(*arguments(**{"matrix_mixing.tokens": "null", "tokens": 100}))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("evaluate /nowhere --tasks piqa --limit 0", "limit 0 .* at least 1"),
        ("evaluate /nowhere --tasks piqa --batch_size 0", "batch_size 0 .* at least 1"),
        ("evaluate /nowhere --tasks piqa --seed -1", "seed -1 .* at least 0"),
        ("generate /nowhere --max_new_tokens 0", "max_new_tokens 0 .* at least 1"),
        ("generate /nowhere --temperature -1", "temperature -1.0 .* at least 0"),
        ("generate /nowhere --temperature .nan", "temperature nan .* at least 0"),
        ("generate /nowhere --beams 0", "beams 0 .* at least 1"),
        ("generate /nowhere --seed 4294967296", "seed 4294967296 .* at most"),
        ("bench gla --repeats 0", "repeats 0 .* at least 1"),
        ("bench gla --seed -1", "seed -1 .* at least 0"),
    ],
)
def test_options_out_of_range(command, says):
    assert re.search(says, refused(*command.split()))
