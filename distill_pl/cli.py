"""`distill-pl`: the command line. Parses, delegates, prints; every default is in a signature, every help text a docstring."""

import difflib
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.errors import Diverged, InputError
from distill_pl.measure.bench import bench
from distill_pl.measure.evaluate import evaluate, generate
from distill_pl.measure.params import params
from distill_pl.measure.report import report
from distill_pl.run.fit import fit
from distill_pl.stages import STAGES
from distill_pl.student.factory import StudentFactory
from distill_pl.tokens import Tokens

BASE = Path(__file__).parent.parent / "configs" / "base.yaml"  # under every experiment, where there is a checkout
TRAINER_KEYS = {
    "accelerator", "devices", "num_nodes", "strategy", "precision", "log_every_n_steps", "limit_val_batches",
    "deterministic", "benchmark", "detect_anomaly", "profiler", "sync_batchnorm",
}  # fmt: skip


class DistillCLI(LightningCLI):
    """LightningCLI with one slot for each stage instead of one model, and commands that need no Trainer."""

    def __init__(self, args: Sequence[str] | None = None):
        super().__init__(
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "distill-pl", "description": sys.modules["distill_pl"].__doc__, "exit_on_error": False},
            args=None if args is None else list(args),
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs) -> None:
        self._subcommand_parsers = {}
        self.commands: dict[str, Callable] = {
            "fit": fit, "evaluate": evaluate, "generate": generate, "params": params, "report": report,
            "bench": bench,
        }  # fmt: skip
        subcommands = parser.add_subcommands()
        for name, command in self.commands.items():
            summary = inspect.getdoc(command).splitlines()[0]
            own: ArgumentParser
            if command is fit:
                own = self.init_parser(description=summary, exit_on_error=False, default_config_files=[str(BASE)])
                self._add_arguments(own)
            else:
                own = LightningArgumentParser(description=summary, exit_on_error=False)
                if "models" in inspect.signature(command).parameters:
                    documented = docstring_parser.parse(inspect.getdoc(command) or "").params
                    text = next(param.description for param in documented if param.arg_name == "models")
                    own.add_argument("models", nargs="+", help=text)
                own.add_function_arguments(command, as_positional=True, skip={"models"})
            self._subcommand_parsers[name] = own
            subcommands.add_subcommand(name, own, help=summary)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The keys of the run itself."""
        parser.add_argument("--out", type=str, required=True, help="run folder; the same command resumes what is in it")
        parser.add_argument("--teacher", type=str, required=True, help="hub id or folder of a Llama-like model")
        parser.add_argument("--tokens", type=Tokens, default=Tokens("1B"), help="budget of all stages, e.g. 80M, 1B")
        parser.add_argument("--seed", type=int, default=0, help="of the student's new weights")
        text = "on a GPU, compile the layers and make a step a CUDA graph (not under fsdp)"
        parser.add_argument("--compile", type=bool, default=True, help=text)
        parser.add_argument("--checkpoint_every", type=Tokens, default=Tokens("20M"), help="tokens between checkpoints")
        parser.add_argument("--validate_every", type=Tokens, default=Tokens("20M"), help="tokens between validations")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One group for each part of a run."""
        parser.add_class_arguments(StudentFactory, "student", instantiate=False)
        for name, stage in STAGES.items():
            parser.add_class_arguments(stage, name, skip={"student", "teacher"}, instantiate=False)
        parser.add_class_arguments(ChunkDataModule, "data", instantiate=False)
        ours = set(inspect.signature(Trainer).parameters) - TRAINER_KEYS
        parser.add_class_arguments(Trainer, "trainer", skip=ours, instantiate=False, fail_untyped=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str] | None) -> None:
        """Parse, with the parser's complaints in one line and the nearest key where one was misspelt."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            text = " ".join(str(error).split())
            unknown = re.search(r"(?:does not accept option '|unrecognized arguments: --)([\w.]+)", text)
            if unknown:
                keys = {action.dest for own in self._subcommand_parsers.values() for action in own._actions}
                near = difflib.get_close_matches(unknown[1], keys, n=1)
                hint = f"did you mean {near[0]}?" if near else "see distill-pl fit --help"
                raise InputError(f"unknown key {unknown[1]}: {hint}") from error
            text = re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", text)
            text = re.sub(r"(?:a )?<class '(\w+)'>", r"\1", text).replace("typing.", "")
            text = re.sub(rf"arguments are required: (?:{'|'.join(self.commands)})\.", "arguments are required: ", text)
            raise InputError(text) from error

    def _set_seed(self) -> None:
        """Nothing global is random: whatever needs a seed is given `seed`."""

    def instantiate_classes(self) -> None:
        """Left to the commands: a stage is made when the one before it is done."""

    def _run_subcommand(self, subcommand: str) -> None:
        config = self.config[subcommand]
        command = self.commands[subcommand]
        if command is fit:
            for where_from in ("config", "__default_config__"):
                config.pop(where_from, None)
            fit(config)
        else:
            command(**config.as_dict())


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: bad input is one line and exit code 2."""
    try:
        DistillCLI(args)
    except (InputError, Diverged) as error:
        if int(os.environ.get("SLURM_PROCID", 0)):
            time.sleep(5)  # what every rank trips over is rank 0's to say: srun ends the others as soon as one has failed
        print(f"distill-pl: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
