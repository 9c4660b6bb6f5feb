"""benchmarks/soak.py runs, and shows that a run's folder does not grow by its checkpoints."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_disk_is_flat(monkeypatch, capsys):
    monkeypatch.setattr(ModelCheckpoint, "_save_checkpoint", ModelCheckpoint._save_checkpoint)  # the script wraps it
    monkeypatch.setattr(sys, "argv", [str(SOAK), "--checkpoints", "18", "--every", "6"])
    runpy.run_path(str(SOAK), run_name="__main__")
    growth = re.findall(r"6 checkpoints: RSS .* disk ([+-][\d,]+) bytes", capsys.readouterr().out)
    assert len(growth) == 3  # TensorBoard's events take 340 bytes a step, a checkpoint some 200k
    assert all(int(size.replace(",", "")) < 100 * 1000 for size in growth), growth
