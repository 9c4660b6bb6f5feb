"""The command line `distill-pl`: its keys and their help are the signatures and docstrings of what they configure."""

import argparse
import difflib
import inspect
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal

import docstring_parser
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader, set_loader
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch.distributed import DistError

import distill_pl
from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.data.files import is_unicode
from distill_pl.errors import Diverged, InputError, one_line
from distill_pl.exports.command import export
from distill_pl.measure.bench import bench
from distill_pl.measure.evaluate import evaluate, generate
from distill_pl.measure.layers import layers
from distill_pl.measure.params import params
from distill_pl.measure.report import report
from distill_pl.mixers import MIXERS
from distill_pl.run.experiments import bundled, experiments, with_paths
from distill_pl.run.fit import fit
from distill_pl.run.study import study
from distill_pl.run.values import KeysOnce
from distill_pl.stages import STAGES
from distill_pl.student.factory import StudentFactory
from distill_pl.tokens import Tokens

TRAINER_KEYS = {  # of Lightning's Trainer, whose own help offers more than a run can use
    "accelerator": "cpu, gpu, or auto: a GPU where there is one.",
    "devices": "how many GPUs of each node, or a list of their numbers; auto: all. On a CPU: how many processes; auto: one.",
    "num_nodes": "number of nodes.",
    "strategy": "on several devices: ddp, which auto chooses too, or fsdp, which shards student, optimizer and teacher.",
    "precision": "32-true, or bf16-mixed: bf16 arithmetic, fp32 weights. Default: bf16-mixed on a GPU with bf16, else 32-true.",
    "log_every_n_steps": "steps between two points of the curves in TensorBoard.",
    "limit_val_batches": "batches of held-out text for each device, or their share between 0 and 1. Default: all.",
    "deterministic": "whether PyTorch must use deterministic algorithms; warn: use them where there are any.",
    "benchmark": "whether cuDNN times its algorithms and takes the fastest.",
    "detect_anomaly": "whether to name the operation whose gradient is nan; slow.",
    "sync_batchnorm": "without effect: no student has batch norms.",
}
# keys of `fit` and of the other commands
PATHS = {
    "out", "teacher", "data", "data.dataset", "data.cache", "student.start_from", "model", "models",
    "file", "dataset", "results", "run", "text",
}  # fmt: skip

JSONARGPARSE_SAYS = {  # patterns of its messages -> what people can read
    r'^Parser key "([\w.]+)": ': r"\1: ",
    r"(?:a )?<class '(?:[\w.]+\.)?(\w+)'>": r"\1",
    r"typing\.": "",
    "NoneType": "null",
    r"Does not validate against any of .* Subtypes: \[(.*)\] Errors: .*Given value:(?: (.*))?$": r"Expected \1. Got value: \2",
    r"NestedArg\(key='(.*)', val='?(.*?)'?\)": r"{\1: \2}",
    r' in "<unicode string>"': "",
    r"^Unexpected config: ?(.*)": r"a configuration file has no keys with values, but '\1': write e.g. tokens: 1M",
    r"Unable to load config ('.*?') - .*": r"\1 is no file: give a YAML file, or its keys one by one",
}


class DistillCLI(LightningCLI):
    """LightningCLI with a group of keys for each stage instead of one model, and with commands that need no Trainer.

    Lightning calls `_add_subcommands`, `_run_subcommand` and `_set_seed` private, and may change them in a minor version;
    tests/test_private_apis.py checks them.
    """

    def __init__(self, args: Sequence[str] | None = None):
        super().__init__(
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": "distill-pl",
                "description": distill_pl.__doc__,
                "version": distill_pl.__version__,
                "exit_on_error": False,
            },
            args=None if args is None else list(args),
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs) -> None:
        self.parsers: dict[str, ArgumentParser] = {}
        self.commands: dict[str, Callable] = {
            "fit": fit, "evaluate": evaluate, "generate": generate, "params": params, "report": report,
            "bench": bench, "layers": layers, "experiments": experiments, "export": export, "study": study,
        }  # fmt: skip
        subcommands = parser.add_subcommands()
        for name, command in self.commands.items():
            doc = docstring_parser.parse(inspect.getdoc(command) or "")
            summary = doc.short_description
            subparser: ArgumentParser
            if command is fit:
                base = str(bundled("configs") / "base.yaml")
                subparser = self.init_parser(description=summary, exit_on_error=False, default_config_files=[base])
                self.add_default_arguments_to_parser(subparser)
                self.add_core_arguments_to_parser(subparser)
            else:
                description = " ".join(filter(None, [summary, doc.long_description]))
                subparser = LightningArgumentParser(description=description, exit_on_error=False)
                if "models" in inspect.signature(command).parameters:  # jsonargparse would want a list: [a, b]
                    help_text = next(param.description for param in doc.params if param.arg_name == "models")
                    subparser.add_argument("models", nargs="+", help=help_text)
                subparser.add_function_arguments(command, as_positional=True, skip={"models"})
            self.parsers[name] = subparser
            subcommands.add_subcommand(name, subparser, help=summary)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys that concern the whole run."""
        text = "run folder; the same command resumes the run that was begun in it"
        parser.add_argument("--out", type=str, required=True, help=text)
        parser.add_argument("--teacher", type=str, required=True, help="hub id or folder of a Llama-like model")
        parser.add_argument("--tokens", type=Tokens, default=Tokens("1B"), help="tokens of all stages together, e.g. 80M, 1B")
        parser.add_argument("--seed", type=int, default=0, help="seed of the student's randomly initialised weights")
        text = "on a GPU, compile the layers and capture each training step as a CUDA graph (with fsdp, no graphs)"
        parser.add_argument("--compile", type=bool, default=True, help=text)
        text = "print what would be run, with its memory and disk space, and stop"
        parser.add_argument("--dry_run", action="store_true", help=text)
        parser.add_argument("--checkpoint_every", type=Tokens, default=Tokens("20M"), help="tokens between checkpoints")
        parser.add_argument("--validate_every", type=Tokens, default=Tokens("20M"), help="tokens between validations")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add a group of keys for each part of a run: student, stages, data and trainer."""
        parser.add_class_arguments(StudentFactory, "student", instantiate=False)
        mixer = next(action for action in actions(parser) if action.dest == "student.mixer")
        mixer.help = f"{str(mixer.help).rstrip('.')}: one of {', '.join(MIXERS)}."
        for name, stage in STAGES.items():
            parser.add_class_arguments(stage, name, skip={"student", "teacher"}, instantiate=False)
        parser.add_class_arguments(ChunkDataModule, "data", instantiate=False)
        not_offered = set(inspect.signature(Trainer).parameters) - TRAINER_KEYS.keys()
        parser.add_class_arguments(Trainer, "trainer", skip=not_offered, instantiate=False, fail_untyped=False)
        (parser.groups or {})["trainer"].title = "Devices, precision, validation and logs: keys of Lightning's Trainer"
        for action in actions(parser):
            group, _, key = action.dest.partition(".")
            if group == "trainer" and key in TRAINER_KEYS:
                action.help = TRAINER_KEYS[key]
        text = "loggers beside TensorBoard, as in [csv, wandb]; csv writes to <stage folder>/csv"
        parser.add_argument("--trainer.logger", type=list[Literal["csv", "wandb"]], default=[], help=text)
        text = "profiler that writes to each stage's folder"
        parser.add_argument("--trainer.profiler", type=Literal["simple", "advanced", "pytorch"] | None, default=None, help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str] | None) -> None:
        """Parse `args` into `self.config`. Raises InputError in one line, with the nearest key where a key is unknown."""
        try:
            self.config = parser.parse_args(with_paths(sys.argv[1:] if args is None else [*args]))
            command = self.config.subcommand
            check_groups(self.config[command], self.parsers[command])
            self.parsers[command].validate(self.config[command], False)  # null in a YAML file, which parse_args lets pass
        except UnicodeDecodeError as error:
            raise InputError(f"a YAML file is not encoded as UTF-8 ({error}): save it as UTF-8") from error
        except RecursionError as error:
            raise InputError("a YAML file nests too deeply, or has an anchor within itself: mend it") from error
        except (ArgumentError, OverflowError, TypeError) as error:
            text = " ".join(str(error).split())
            unknown = re.search(r"(?:does not accept option '|unrecognized arguments: --)([\w.-]+)", text)
            if unknown:
                command = next((name for name in self.commands if name in (sys.argv[1:] if args is None else args)), "fit")
                keys = [action.dest for action in actions(self.parsers[command]) if action.dest != unknown[1]]
                near = difflib.get_close_matches(unknown[1], keys, n=1)
                hint = f"did you mean {near[0]}?" if near else f"see distill-pl {command} --help"
                raise InputError(f"unknown key {unknown[1]}: {hint}") from error
            for pattern, words in JSONARGPARSE_SAYS.items():
                text = re.sub(pattern, words, text)
            text = re.sub(rf"arguments are required: (?:{'|'.join(self.commands)})\.", "arguments are required: ", text)
            raise InputError(text) from error

    def _set_seed(self) -> None:
        """Leave the global random state alone: each function that draws random numbers is given a seed."""

    def instantiate_classes(self) -> None:
        """Instantiate nothing: the commands do it, as a stage starts from the student that the stage before it trained."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Call the function of the chosen command: `fit` with the configuration, the others with their keys."""
        config = self.config[subcommand]
        expand_home(config)
        command = self.commands[subcommand]
        if command is fit:
            config.pop("config", None)  # the files that the keys came from
            fit(config.clone(with_meta=False))
        else:
            command(**config.as_dict())


def load_yaml(stream: str) -> object:
    """Load YAML as jsonargparse does. Raises YAMLError where a mapping has a key twice."""
    if ":" in stream:
        yaml.load(stream, KeysOnce)
    return jsonargparse_yaml(stream)


jsonargparse_yaml = get_loader("yaml")
set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))


def check_groups(config: Namespace, parser: ArgumentParser) -> None:
    """Raise InputError for a group of keys that has none, as in a YAML file where all lines below `kd:` are comments."""
    for group in dict.fromkeys(action.dest.split(".")[0] for action in actions(parser) if "." in action.dest):
        if not isinstance(config[group], Namespace):
            raise InputError(f"{group} has no keys with values: write e.g. {group}: {{KEY: VALUE}}, or leave it out")


def expand_home(config: Namespace) -> None:
    """Replace `~` at the beginning of each path in place: in a YAML file, and after the `=` of a flag, no shell does.

    Raises InputError for a path that is empty, as an unset variable of the shell leaves it: Python takes it for `.`; and for
    one that is not UTF-8, in which configurations are saved.
    """
    for key in PATHS:
        value = config.get(key)
        for path in value if isinstance(value, list) else [value]:
            if path == "":
                raise InputError(f"{key} is empty: give a path")
            if isinstance(path, str) and not is_unicode(path):
                raise InputError(f"{key} {path!r} is not UTF-8: rename it")
        if isinstance(value, str):
            config[key] = os.path.expanduser(value)
        elif isinstance(value, list):
            config[key] = [os.path.expanduser(path) for path in value]


def system_error_line(error: Exception) -> str | None:
    """Return one line for an error of files, memory or the other processes of a run, which no check foresees, else None."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)[:200]}: {error.strerror}: check that path"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"out of memory ({one_line(error)}): give a smaller batch or a shorter text"
    if "EADDRINUSE" in str(error):
        return f"the port in MASTER_PORT, {os.environ.get('MASTER_PORT')}, is in use: unset it, or choose another"
    if isinstance(error, DistError) or "/gloo/" in str(error):  # gloo's errors have no type of their own
        return (
            f"another process of this run has ended or does not answer ({one_line(error)}): see what it printed, then run the "
            "same command again; what has been written is kept"
        )
    return None


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the parser's arguments, which argparse lists in a private attribute alone."""
    return parser._actions


def main(args: Sequence[str] | None = None) -> None:
    """Run the command in `args` (default: sys.argv); print an error or Ctrl-C in one line and exit with its code."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as `import distill_pl` left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        DistillCLI(args)
    except (InputError, Diverged) as error:
        if int(os.environ.get("SLURM_PROCID", 0)):
            time.sleep(5)  # rank 0 must print first: srun ends all ranks as soon as one has failed
        print(f"distill-pl: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("distill-pl: interrupted: what has been written is kept, run the same command again", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # what read the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        line = system_error_line(error)
        if line is None:
            raise
        print(f"distill-pl: {line}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
