"""Build the Lightning Trainer of a stage from a run's configuration."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from distill_pl.console import RANK_VARIABLES, is_first_rank
from distill_pl.errors import InputError, one_line
from distill_pl.run.folder import StageRun, write_aside
from distill_pl.stages.sharding import FullyShardedStrategy

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
LEADER = "DISTILL_PL_LEADER"  # environment variable: number of the process that starts the ranks


class AsideCheckpointIO(TorchCheckpointIO):
    """Save checkpoints whole or not at all: Lightning's own saving moves a file between disks, which a kill cuts short."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Write a checkpoint beside `path`, then rename it to `path`."""
        write_aside(Path(path), lambda aside: torch.save(checkpoint, aside))


def build_trainer(config: Namespace, folder: Path | None = None, **options) -> L.Trainer:
    """Build a Trainer from the configuration's `trainer.*`, with `options` and what this package decides itself on top.

    `trainer.profiler` writes to `folder`; without it nothing is profiled. Raises InputError for values that Lightning refuses.
    """
    plugins: list = [AsideCheckpointIO()]
    defaults: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "profiler": None}
    if config.trainer.profiler and folder:
        defaults["profiler"] = PROFILERS[config.trainer.profiler](dirpath=folder, filename="profile")
    if config.trainer.strategy == "fsdp":
        defaults["strategy"] = FullyShardedStrategy()
    try:
        if SLURMEnvironment.detect():  # Lightning's requeueing loses steps; the batch script requeues
            plugins.append(SLURMEnvironment(auto_requeue=False))
        return L.Trainer(
            **(config.trainer.as_dict() | {"precision": precision(config)} | defaults | options),
            plugins=plugins,
            default_root_dir=config.out,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,  # sharded tensors cannot be moved in it
        )
    except (MisconfigurationException, ImportError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise InputError(f"trainer: {one_line(error)}") from error


def build_loggers(config: Namespace, stage: StageRun, step: int, tokens: int) -> list[Logger]:
    """Build the loggers of a stage, TensorBoard and those of `trainer.logger`, from step `step` and `tokens` of the run on.

    TensorBoard drops what was logged beyond `tokens`, by steps that are taken again. A CSV file is never written to twice: each
    start of a stage has its own. wandb has one run for all stages. Raises InputError where the wandb package is not installed.
    """
    loggers: list[Logger] = [TensorBoardLogger(stage.folder, name="", version="", purge_step=tokens + 1)]
    names = config.trainer.logger or []
    if "csv" in names:
        loggers.append(CSVLogger(stage.folder, name="csv", version=f"from_step_{step}"))
    if "wandb" in names:
        run = Path(config.out).resolve()
        identity = sha256(str(run).encode()).hexdigest()[:8]  # all stages, and resumed ones, are one run
        loggers.append(WandbLogger(run.name, run, version=identity, project="distill_pl"))
    return loggers


def end_with_parent(libc: ctypes.CDLL) -> None:
    """Let Linux send this process a SIGTERM when the one that started it dies, even by SIGKILL."""
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Tell the ranks that Lightning starts meanwhile which process starts them."""
    os.environ[LEADER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(LEADER, None)


def end_with_leader() -> None:
    """Let a rank that Lightning started end with the first one: Lightning ends it only once all ranks have met."""
    leader = os.environ.get(LEADER)
    if leader and int(os.environ.get("LOCAL_RANK") or 0):
        end_with_parent(ctypes.CDLL(None))
        if os.getppid() != int(leader):  # it has ended already
            sys.exit(1)


def check_launcher(config: Namespace, trainer: L.Trainer) -> None:
    """Raise InputError where the number of processes that were launched is not `trainer.devices` x `trainer.num_nodes`.

    A process would otherwise wait for others for ever, train alone while devices idle, or take itself for another rank.
    """
    found = [kind() for kind in (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment) if kind.detect()]
    devices, nodes = trainer.num_devices, trainer.num_nodes
    for environment in found:
        if environment.world_size() != devices * nodes:
            raise InputError(
                f"trainer.devices {config.trainer.devices} means {devices}, on trainer.num_nodes {nodes}, but torchrun, srun "
                f"or MPI launched {environment.world_size()}: launch one process for each device"
            )
        try:
            environment.validate_settings(devices, nodes)
        except ValueError as error:
            raise InputError(f"trainer: {one_line(error)}") from error
    by_hand = "MASTER_ADDR" in os.environ and ("NODE_RANK" in os.environ or "GROUP_RANK" in os.environ)
    if nodes > 1 and not by_hand and not found:
        raise InputError(
            f"trainer.num_nodes {nodes}, but no launcher started this process: use srun or torchrun, or set "
            "MASTER_ADDR and NODE_RANK on each node"
        )
    if not (is_first_rank() or trainer.global_rank):
        name = next(name for name in RANK_VARIABLES if int(os.environ.get(name) or 0))
        raise InputError(f"the environment variable {name} is {os.environ[name]}, but this run has one process: unset {name}")


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
