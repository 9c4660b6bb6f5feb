"""tuned.json names kernels that fla has, with arguments they take, and Triton then tries its configurations alone."""

from functools import partial
from importlib.metadata import version

import pytest
import torch

kernels = pytest.importorskip("distill_pl.ops.gpu.fla_kernels", reason="fla-core is not installed")
FORWARD = "fla.ops.common.fused_chunk.fused_chunk_fwd_kernel"


@pytest.mark.parametrize("kernel", kernels.TUNED["kernels"])
def test_fla_has_the_kernel_with_these_arguments(kernel):
    assert kernels.TUNED["fla-core"] == version("fla-core"), "tune again: see ops/kernels.py"
    tuner = kernels.autotuner(kernel)
    chosen = [set(config.kwargs) for config in tuner.configs]
    seen = []
    for entry in kernels.TUNED["kernels"][kernel]:
        names, config = set(entry["arguments"]) - {"dtypes"}, dict(entry["config"])
        assert set(config.pop("kwargs")) in chosen
        assert set(config) == {"num_warps", "num_stages"}
        assert names == set(tuner.keys) - kernels.COUNTS - set(entry["config"]["kwargs"])
        assert all(hasattr(torch, dtype) for dtype in entry["arguments"]["dtypes"])
        assert entry["arguments"] not in seen
        seen.append(entry["arguments"])


def test_a_kernel_tries_what_was_tuned_alone_and_for_other_arguments_all():
    tuner = kernels.autotuner(FORWARD)
    named = {"q": torch.zeros(1, dtype=torch.bfloat16), "g": torch.zeros(1), "B": 48, "H": 15, "K": 64, "V": 64, "BT": 64}
    known = {"K": 64, "V": 64, "BT": 64, "dtypes": ["bfloat16", "float32"]}
    assert kernels.arguments(tuner, named) == known
    config = {"kwargs": {"BV": 32}, "num_warps": 1, "num_stages": 7}
    prune = partial(kernels.candidates, tuner, [{"arguments": known, "config": config}], None, tuner.configs)
    (only,) = prune(named, BK=64)
    assert (only.kwargs, only.num_warps, only.num_stages) == ({"BV": 32}, 1, 7)
    (only,) = prune(named | {"B": 7, "H": 9})
    assert only.num_stages == 7
    assert prune(named | {"V": 66}) == prune(named | {"g": None}) == tuner.configs


def test_they_are_for_the_gpu_and_the_fla_they_were_tuned_on_unless_fla_is_told_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert kernels.applies()
    for change in [
        (torch.cuda, "is_available", lambda: False),
        (torch.cuda, "get_device_capability", lambda: (8, 9)),
        (kernels, "FLA_CACHE_MODE", kernels.FlaCacheMode.FULL),
        (kernels, "version", lambda name: "0.6.1"),
    ]:
        with monkeypatch.context() as other:
            other.setattr(*change)
            assert not kernels.applies()
