"""Build the Lightning Trainer of a stage from a run's configuration."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.environments import SLURMEnvironment

from distill_pl.errors import InputError
from distill_pl.run.folder import write_aside
from distill_pl.stages.sharding import FullyShardedStrategy


class AsideCheckpointIO(TorchCheckpointIO):
    """Save checkpoints whole or not at all: Lightning's own saving moves a file between disks, which a kill cuts short."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Write a checkpoint beside `path`, then rename it to `path`."""
        write_aside(Path(path), lambda aside: torch.save(checkpoint, aside))


def build_trainer(config: Namespace, **options) -> L.Trainer:
    """Build a Trainer from the configuration's `trainer.*`, with `options` and what this package decides itself on top.

    Raises InputError for values that Lightning refuses.
    """
    plugins: list = [AsideCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # Lightning's requeueing loses steps; the batch script requeues
    defaults: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    if config.trainer.strategy == "fsdp":
        defaults["strategy"] = FullyShardedStrategy()
    try:
        return L.Trainer(
            **(config.trainer.as_dict() | {"precision": precision(config)} | defaults | options),
            plugins=plugins,
            default_root_dir=config.out,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,  # sharded tensors cannot be moved in it
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise InputError(f"trainer: {' '.join(str(error).split())[:300]}") from error


def precision(config: Namespace) -> str:
    """Return `trainer.precision`; by default bf16-mixed on a GPU that has bf16 (weights and Adam stay fp32), else fp32."""
    if config.trainer.precision is not None:
        return str(config.trainer.precision)
    gpu_with_bf16 = device(config).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if gpu_with_bf16 else "32-true"


def device(config: Namespace) -> torch.device:
    """Return the kind of device that `trainer.accelerator` stands for on this machine."""
    gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")
