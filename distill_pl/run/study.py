"""`distill-pl study`: carry out the runs that a file lists, several at once, and keep what came out of each in a small JSON."""

import ctypes
import difflib
import functools
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
import yaml
from filelock import FileLock, Timeout
from jsonargparse import Namespace
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from distill_pl.console import aligned, perplexity, quiet, say
from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.data.sources import counted
from distill_pl.errors import AT_LEAST_1, POSITIVE, SEED, InputError, check_numbers, one_line
from distill_pl.measure.bench import theory
from distill_pl.measure.evaluate import (
    check_options,
    check_questions,
    check_writable,
    load_tokenizer,
    read_report,
    results_suffix,
)
from distill_pl.measure.report import scalars
from distill_pl.run.experiments import STUDIES, bundled, config_file
from distill_pl.run.folder import StageRun, differing, disk_refused, flat, plain, read_metrics, write_aside
from distill_pl.run.plan import plan
from distill_pl.run.summary import STATE_TOKENS, summary
from distill_pl.run.trainer import device, end_with_parent
from distill_pl.run.values import KeysOnce, check_values
from distill_pl.stages import STAGES
from distill_pl.tokens import Tokens, short

FILE_KEYS: dict[str, type | tuple] = {"common": dict, "seeds": list, "evaluate": dict, "runs": list}
GROUP_KEYS: dict[str, type | tuple] = {"config": (str, list), "name": str, "set": dict, "over": dict, "seeds": list}
SECONDS_BETWEEN_LOOKS, SECONDS_TO_STOP = 0.2, 60.0
ALWAYS_STATED = ("teacher", "data.dataset", "tokens")  # keys that results name, changed or not
NOT_OF_A_RUN = {"seed", "out", "config", "dry_run", "print_config", "help"}  # keys of fit
NO_MEMORY = ("out of memory", "memory is full")  # of what a command prints, where the runs beside it may have filled it
NAME_BYTES = 200  # of a run: file systems take 255 with what is appended
STOPPED_BY = (signal.SIGINT, signal.SIGTERM)

Step = tuple[subprocess.Popen, bool]  # what a run waits for, and whether it trains


class Run(NamedTuple):
    """Hold one run of a study."""

    name: str  # of its folder and of its results
    row: str  # its name without the seed: runs of one row are repetitions
    seed: int
    args: list[str]  # of distill-pl fit
    config: Namespace
    changed: dict[str, Any]  # of the configuration, by dotted key: ALWAYS_STATED and what is not the default


class Texts(KeysOnce):
    """Read YAML with values as text, as on the command line, which parses them; `<<` merges mappings as usual."""

    yaml_implicit_resolvers = {"<": KeysOnce.yaml_implicit_resolvers["<"]}


class Failed(Exception):
    """Signal that a command of a run ended with an error; the text is the last line that it printed."""


def study(
    file: str,
    teacher: str | None = None,
    dataset: str | None = None,
    tokens: Tokens | None = None,
    data: str | None = None,
    out: str = "runs/study",
    results: str | None = None,
    parallel: int = 1,
    seeds: int | None = None,
    only: str = "*",
    index: int | None = None,
    time_limit: float | None = None,
    show: Literal["plan", "summary"] | None = None,
) -> None:
    """Carry out the runs that a file lists, several at once, and write what came out of each to a JSON of a few kB.

    The same command goes on after an interruption of any kind, and skips what is done. The file's `runs` is a list of groups:
    `config`, one or several experiments; `set`, keys of `fit`; `over`, keys of `fit` with lists of values, all combinations of
    which are run; `seeds`; and `name`, appended to the experiment's. `common` are keys of `fit` for all runs, `seeds` those of
    groups without their own, and `evaluate` options of `distill-pl evaluate`, which follows each run. Stages of an experiment
    keep their share of its tokens.

    Args:
        file: YAML file, or `study` or `recipes`, which come with this package.
        teacher: teacher of all runs, instead of the file's.
        dataset: text of all runs, instead of the file's.
        tokens: tokens of all runs, such as 30M, instead of the file's.
        data: folder of <task>.jsonl files for `evaluate`, instead of the file's.
        out: folder of the run folders, and of the runs' console output, in logs/.
        results: folder of the JSON files, by default `results` in `out`.
        parallel: how many runs train at once on this machine, whose GPUs they share, while others are evaluated.
        seeds: run only the first N seeds of each group.
        only: run only what matches this pattern, such as 'gla_*_s0'.
        index: run only this one of the runs, counted from 1: for a Slurm array.
        time_limit: minutes after which no run begins, and those that are running are stopped; they can be resumed.
        show: instead of carrying out the study, print its `plan`, with what is done, or a `summary` of its results as Markdown.

    Raises:
        InputError: an option, model, run or text that cannot be used.
    """
    quiet()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each run that was resumed
    numbers = {"parallel": parallel, "seeds": seeds, "index": index, "time_limit": time_limit}
    check_numbers(numbers, {key: POSITIVE if key == "time_limit" else AT_LEAST_1 for key in numbers})
    folder = Path(results or Path(out) / "results")
    deadline = math.inf if time_limit is None else time.monotonic() + 60 * time_limit
    lines = read(file)
    if show == "summary":
        if only != "*" or index is not None:
            raise InputError("show summary is of all results in the folder: leave out only and index")
        say(summary(folder))
        return
    if data is not None:
        lines["evaluate"] = lines.get("evaluate", {}) | {"data": data}
    own = {"teacher": teacher, "data.dataset": dataset, "tokens": None if tokens is None else str(tokens)}
    runs = expand(file, lines, {key: value for key, value in own.items() if value is not None}, Path(out), seeds)
    runs = [run for run in runs if fnmatch(run.name, only)]
    if not runs:
        raise InputError(f"only {only!r} leaves none of the runs of {file}: --show plan lists them without --only")
    check_numbers({"index": index}, {"index": AT_LEAST_1._replace(most=len(runs))})
    numbered = {f"[{number:>{len(str(len(runs)))}}/{len(runs)}] {run.name}": run for number, run in enumerate(runs, start=1)}
    options = lines.get("evaluate")
    wanted = numbered if index is None else dict(list(numbered.items())[index - 1 : index])
    done = [name for name, run in wanted.items() if is_done(run, folder, options)]
    left = {name: run for name, run in wanted.items() if name not in done}
    tokens_left = sum(sum(stage_tokens(run).values()) for run in left.values() if not is_trained(run))
    say(f"{counted(len(wanted), 'run')}, {len(done)} done; {short(tokens_left)} tokens are left to train on")
    if show == "plan":
        say(plan_table(wanted, done))
        return
    check_material(file, list(left.values()), options and evaluation(options, parser()))
    for place in [Path(out) / "logs" / "log", folder / "result"] if left else []:
        check_writable(place)
    failed = execute(left, Path(out), folder, options, parallel, deadline)
    if failed:
        sys.exit(1)


def read(file: str) -> dict[str, Any]:
    """Read a study's file. Raises InputError where it is no YAML or its keys are not those of a study."""
    path = Path(file)
    if not path.is_file() and file in STUDIES:
        path = bundled("experiments") / f"{file}.yaml"
    try:
        lines = yaml.load(path.read_text(), Texts)
        json.dumps(lines)  # fails for an anchor within itself
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"study {file!r} cannot be read as YAML ({one_line(error)}): mend it, or give `study`") from error
    check_keys(f"study {file!r}", lines, FILE_KEYS)
    for key, value in lines.get("evaluate", {}).items():  # its options that have several values are texts such as a,b
        lines["evaluate"][key] = ",".join(map(str, value)) if isinstance(value, list) else value
    if not lines.get("runs"):
        raise InputError(f"study {file!r} has no runs: list groups of them under `runs`, such as - {{config: gla_qkv}}")
    for number, group in enumerate(lines["runs"], start=1):
        check_keys(f"study {file!r}, group {number} of runs", group, GROUP_KEYS)
    return lines


def check_keys(where: str, found: Any, kinds: dict[str, type | tuple]) -> None:
    """Raise InputError unless `found` is a mapping with no keys but those of `kinds`, whose types its values have."""
    if not isinstance(found, dict):
        raise InputError(f"{where} is {str(found)[:60]!r}: give a mapping with keys of {', '.join(kinds)}")
    words = {str: "a text", dict: "a mapping", list: "a list", (str, list): "a name or a list of names"}
    for key, value in found.items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1) or [" or ".join(kinds)]
            raise InputError(f"{where}: unknown key {key}: did you mean {near[0]}?")
        if not isinstance(value, kinds[key]):
            raise InputError(f"{where}: {key} is {str(value)[:60]!r}: give {words[kinds[key]]}")


def expand(file: str, lines: dict[str, Any], own: dict[str, Any], out: Path, first: int | None) -> list[Run]:
    """List all runs of a study's file, parsed and checked as `distill-pl fit` would; those of a group seed by seed.

    own: keys from the command line, by dotted key. first: how many seeds of each group, by default all. Raises InputError,
    naming the run, for what `fit` would refuse before it reads the teacher, and for two runs of one name.
    """
    parse = functools.cache(parser())
    if options := lines.get("evaluate"):
        try:
            check_options(**evaluation(options, parse))
        except InputError as error:
            raise InputError(f"study {file!r}, evaluate: {error}") from error
    defaults = flat(plain(parse(("fit", "--out=."))))
    common = flat_keys(file, lines.get("common", {}))
    runs: dict[str, Run] = {}
    for group in lines["runs"]:
        over = flat(group.get("over", {}))
        configs, seeds = group.get("config"), group.get("seeds", lines.get("seeds", ["0"]))
        configs = configs if isinstance(configs, list) else [configs]
        for seed in seeds:
            if not str(seed).isdecimal() or int(seed) not in SEED:
                raise InputError(f"study {file!r}: {seed!r} is no seed: give whole numbers from 0 to {SEED.most}")
        if not all(isinstance(value, list) for value in over.values()):
            raise InputError(f"study {file!r}: over {over} has a value that is no list: put those to be tried in [ ]")
        if not all(isinstance(config, str | None) for config in configs):
            raise InputError(f"study {file!r}: config {configs} are not all names of experiments or files")
        for key, values in {"seeds": seeds, "config": configs, **over}.items():
            if not values:
                raise InputError(f"study {file!r}: {key} [] leaves nothing of a group to run: give values, or delete the group")
        for seed, config, *values in itertools.product(map(int, seeds[:first]), configs, *over.values()):
            varied = dict(zip(over, values, strict=True))
            values_of = (f"{key}={text(value).strip('[]')}" for key, value in varied.items())
            words = [Path(config).stem if config else "", group.get("name", ""), *values_of]
            row = re.sub(r"[^\w.=-]+", "_", "_".join(filter(None, words)))
            keys = common | flat_keys(file, group.get("set", {}), varied) | own
            if not row:
                raise InputError(f"study {file!r}: give a group without `config` a `name`")
            if others := sorted(NOT_OF_A_RUN & keys.keys()):
                raise InputError(f"study {file!r}: {others[0]} is not for a run of a study: leave it out; seed, out and config "
                                 "come from `seeds`, --out and `config`")  # fmt: skip
            name = f"{row}_s{seed}"
            if name in runs:
                raise InputError(f"study {file!r} has two runs {name}: list each config, seed and value once, and give one of "
                                 "two groups another `name`")  # fmt: skip
            if len(name.encode()) > NAME_BYTES:
                raise InputError(f"study {file!r}: run {name[:40]}... has too long a name for a file: give a shorter `name`, "
                                 "or groups with a `name` and `set` instead of `over`")  # fmt: skip
            try:
                runs[name] = parse_run(name, row, seed, config, keys, out, parse, defaults)
            except InputError as error:
                raise InputError(f"study {file!r}, run {name}: {error}") from error
    return list(runs.values())


def check_material(file: str, runs: list[Run], options: dict[str, Any] | None) -> None:
    """Raise InputError, before any run begins, for a tokenizer, text or questions of `evaluate` that cannot be used."""
    asked = None if options is None else check_options(**options)
    material = {json.dumps([run.config.teacher, plain(run.config.data)]): run for run in reversed(runs)}
    for run in reversed(material.values()):
        try:
            tokenizer = load_tokenizer(run.config.teacher)
            teacher = AutoConfig.from_pretrained(run.config.teacher, trust_remote_code=False)
            ChunkDataModule(**run.config.data).open(tokenizer, teacher)
            if asked is not None:
                check_questions(run.config.teacher, *asked, has_text=True)
        except InputError as error:
            raise InputError(f"study {file!r}, run {run.name}: {error}") from error


def flat_keys(file: str, *parts: dict[str, Any]) -> dict[str, Any]:
    """Flatten mappings into one with dotted keys. Raises InputError for a key that comes twice: {kd.lr: 1}, {kd: {lr: 2}}."""
    found: dict[str, Any] = {}
    for key, value in (item for part in parts for item in part.items()):
        leaves = flat({key: value})
        if twice := sorted(found.keys() & leaves.keys()):
            raise InputError(f"study {file!r}: {twice[0]} is given twice in one group: leave one out")
        found |= leaves
    return found


def evaluation(options: dict[str, Any], parse: Callable[[tuple[str, ...]], Namespace]) -> dict[str, Any]:
    """Parse the options of `evaluate`."""
    return {key: value for key, value in parse(("evaluate", ".", *options_of(options))).as_dict().items() if key != "models"}


def parse_run(name: str, row: str, seed: int, experiment: str | None, keys: dict[str, Any], out: Path,
           parse: Callable[[tuple[str, ...]], Namespace], defaults: dict[str, Any]) -> Run:  # fmt: skip
    """Parse and check a run, whose seed also orders its text unless `keys` say otherwise.

    Stages of the experiment whose tokens `keys` don't give keep their share of all tokens.
    """
    chosen = ("--config", config_file(experiment)) if experiment else ()
    alone = parse(("fit", *chosen, "--out=."))
    config = parse(("fit", *chosen, *options_of({"data.shuffle": "0"} | keys), "--out=.")).clone()  # parsed once for all seeds
    config.seed, config.out = seed, str(out / name)
    if "data.shuffle" not in keys:
        config.data.shuffle = seed
        keys = {"data.shuffle": str(seed)} | keys
    for stage in STAGES:
        if alone[stage].tokens and f"{stage}.tokens" not in keys:
            config[stage].tokens = Tokens(alone[stage].tokens * config.tokens // alone.tokens)
            keys = keys | {f"{stage}.tokens": str(config[stage].tokens)}
    config.pop("config", None)  # the files that the keys came from
    config.pop("dry_run", None)
    check_values(config)
    plan(config)
    args = [*chosen, *options_of(keys), f"--seed={seed}", f"--out={config.out}"]
    changed = {key: value for key, value in flat(plain(config)).items()
               if key != "out" and (key in ALWAYS_STATED or defaults.get(key) != value)}  # fmt: skip
    return Run(name, row, config.seed, args, config, changed)


@functools.cache
def parser() -> Callable[[tuple[str, ...]], Namespace]:
    """Return a function that parses the arguments of a command of `distill-pl`, with its errors, and runs nothing."""
    from distill_pl.cli import DistillCLI, expand_home  # which imports this module

    class Parser(DistillCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    cli = Parser(["fit", "--out=."])

    def parse(args: tuple[str, ...]) -> Namespace:
        cli.parse_arguments(cli.parser, args)
        expand_home(cli.config[args[0]])
        return cli.config[args[0]].clone(with_meta=False)

    return parse


def text(value: Any) -> str:
    """Write a value of YAML, whose numbers are still text, as the command line takes it."""
    return f"[{', '.join(map(text, value))}]" if isinstance(value, list) else str(value)


def options_of(keys: dict[str, Any] | None) -> list[str]:
    """Write keys of a command, by dotted key, as arguments."""
    return [f"--{key}={text(value)}" for key, value in flat(keys or {}).items()]


def is_done(run: Run, results: Path, options: dict[str, Any] | None) -> bool:
    """Return whether a run's results are there, evaluated as `options` say. Raises InputError for another run's results."""
    file = results / f"{run.name}.json"
    kept = read_report(file)
    if not kept:
        return False
    if not {"config", "evaluate"} <= kept.keys():
        raise InputError(f"{file} is no result of distill-pl study: move it, or choose other --out and --results")
    before, now = kept["config"], run.changed
    if keys := differing(before, now):
        changes = ", ".join(f"{key} {before.get(key, 'default')} -> {now.get(key, 'default')}" for key in keys)
        raise InputError(f"{file} is of another configuration ({changes}): undo that, or choose other --out and --results")
    return what_is_asked(kept["evaluate"]) == what_is_asked(options)


def is_trained(run: Run) -> bool:
    """Return whether a run's training is finished: if the run is not done, only `evaluate` is left."""
    return (Path(run.config.out) / "student").is_dir()


def what_is_asked(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return options of `evaluate` without the folder of its questions, which may have moved, and the size of batches."""
    return options and {key: value for key, value in options.items() if key not in ("data", "batch_size")}


def stage_tokens(run: Run) -> dict[str, int]:
    """Return the tokens that each stage of a run trains on."""
    batch = run.config.data.batch_size * run.config.data.sequence_length
    return {stage.name: stage.steps * batch for stage in plan(run.config)}


def plan_table(runs: dict[str, Run], done: list[str]) -> str:
    """Lay out the runs of a study with the tokens of their stages, and what of them is done or begun."""
    rows = [["run", "tokens", ""]]
    for name, run in runs.items():
        stages = " + ".join(f"{stage} {short(tokens)}" for stage, tokens in stage_tokens(run).items())
        state = "done" if name in done else "trained" if is_trained(run) else "begun" if Path(run.config.out).is_dir() else ""
        rows.append([name, stages, state])
    return aligned(rows)


def execute(runs: dict[str, Run], out: Path, results: Path, options: dict[str, Any] | None, parallel: int,
              deadline: float) -> int:  # fmt: skip
    """Carry out runs, by the names they are printed with -> how many failed. Prints a line as each begins and ends.

    A run that is being evaluated, which hardly occupies a GPU, leaves its place to one that trains: at most `parallel` runs
    train, and at most twice as many run. One that runs out of memory beside others begins again when all others have ended.
    deadline: of time.monotonic(). At it, and on Ctrl-C or SIGTERM, the running ones are stopped so that they can be resumed.
    """
    waiting, failed, finished, elsewhere = list(runs), 0, 0, 0
    width = max(map(len, runs), default=0)
    places = environments(parallel)
    training: dict[str, dict[str, str]] = {}  # the place of each
    running: dict[str, tuple[Iterator[Step], float]] = {}
    processes: dict[str, subprocess.Popen] = {}
    measuring: set[str] = set()
    repeated: set[str] = set()
    signals: list[int] = []  # an exception could come between the start of a process and its place in `processes`
    before = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in STOPPED_BY}
    try:
        while (waiting or running) and time.monotonic() < deadline and not signals:
            while waiting and places and len(running) < 2 * parallel and not (running and waiting[0] in repeated):
                name = waiting.pop(0)
                training[name] = places.pop(0)
                say(f"{name:<{width}}   begins")
                running[name] = steps(runs[name], out, results, options, training[name], measuring), time.monotonic()
            for name, (work, began) in list(running.items()):
                trains, outcome = False, ""
                try:
                    processes[name], trains = next(work)
                except StopIteration as end:
                    outcome, finished = f"held-out {end.value:.4g}", finished + 1
                except Timeout:
                    outcome, elsewhere = "left to another study, which carries it out", elsewhere + 1
                except (Failed, InputError, OSError) as error:
                    is_full = any(words in str(error) for words in NO_MEMORY)
                    if is_full and len(running) > 1 and name not in repeated:
                        outcome = f"failed and will begin again: {error}"
                        waiting.append(name)
                        repeated.add(name)
                    else:
                        outcome, failed = f"failed: {error}", failed + 1
                if not trains and name in training:
                    places.append(training.pop(name))
                if outcome:
                    say(f"{name:<{width}}   {outcome}   {time.monotonic() - began:.0f} s")
                    del running[name]
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        if running:
            why = "interrupted" if signals else "the time is up" if time.monotonic() >= deadline else "error"
            say(f"{why}: stopping {', '.join(runs[name].name for name in running)}")
        stop([processes[name] for name in running if name in processes])
        for number, handler in before.items():
            signal.signal(number, handler)
    left = len(waiting) + len(running) + elsewhere
    again = "; the same command goes on" if left or failed else ""
    say(f"{finished} finished, {failed} failed, {left} left{again}; results are in {results}")
    if signals:
        sys.exit(128 + signals[0])
    return failed


def environments(parallel: int) -> list[dict[str, str]]:
    """Return the environment variables of `parallel` processes that share out this machine's GPUs and processor cores."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(index) for index in range(torch.cuda.device_count())] if given is None else given.split(",")
    threads = {} if parallel == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parallel))}
    own = [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[place % len(gpus) :: parallel])} if gpus else {} for place in range(parallel)]
    return [threads | dict(os.environ) | visible for visible in own]


def steps(run: Run, out: Path, results: Path, options: dict[str, Any] | None, environment: dict[str, str],
          measuring: set[str]) -> Iterator[Step]:  # fmt: skip
    """Train, evaluate and summarise a run, yielding the process that it waits for -> its held-out perplexity.

    measuring: names of the runs that are being evaluated; the first of a study measures the teacher for all of them. Raises
    Failed with the last line that a command printed where it ended with an error, and Timeout where another study has the run.
    """
    folder = Path(run.config.out)
    log = out / "logs" / f"{run.name}.log"
    with disk_refused(log):
        log.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(log.with_name(f"{run.name}.lock"), timeout=0):
        if is_done(run, results, options):  # by another study, since this one began
            return read_report(results / f"{run.name}.json")["held_out"]["student"]
        for process in command(["fit", *run.args], log, environment):
            yield process, True
        if options is not None:
            own = folder / "eval" / f"teacher{results_suffix(options.get('limit'))}"
            student = own.name.replace("teacher", "student")  # which is begun when the teacher's file is complete
            while (known := next(out.glob(f"*/eval/{student}"), None)) is None and measuring:
                yield process, False
            if known is not None and not own.exists():  # evaluate measures nothing twice, and checks what it finds
                own.parent.mkdir(exist_ok=True)
                measured = known.with_name(own.name)
                write_aside(own, lambda aside: shutil.copy(measured, aside))
            measuring.add(run.name)
            try:
                for process in command(["evaluate", str(folder), *options_of(options)], log, environment):
                    yield process, False
            finally:
                measuring.remove(run.name)
        result = summarise(run, options)
        write_aside(results / f"{run.name}.json", lambda aside: aside.write_text(json.dumps(result, indent=1) + "\n"))
        return result["held_out"]["student"]


def command(args: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Run `distill-pl` with `args`, yielding its process until it ends; its output is appended to `log`."""
    libc = ctypes.CDLL(None)
    with open(log, "ab") as console:  # a session of its own: Ctrl-C reaches the study alone, which stops what it has started
        start = console.tell()
        process = subprocess.Popen([sys.executable, "-m", "distill_pl.cli", *args], stdin=subprocess.DEVNULL, stdout=console,
                                   stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                                   preexec_fn=lambda: end_with_parent(libc))  # fmt: skip
    while process.poll() is None:
        yield process
    if process.returncode:
        silent = f"nothing was printed, with {shutil.disk_usage(log.parent).free / 1e6:.0f} MB free for it"
        printed = log.read_bytes()[start:].decode(errors="replace").strip().splitlines() or [silent]
        line = next((line for line in reversed(printed) if line.startswith("distill-pl: ")), printed[-1])
        raise Failed(f"{line.removeprefix('distill-pl: ')[:300]} (exit code {process.returncode}, see {log})")


def stop(processes: list[subprocess.Popen]) -> None:
    """End processes by SIGTERM, after which a run can be resumed, and wait for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def summarise(run: Run, options: dict[str, Any] | None) -> dict[str, Any]:
    """Summarise a finished run in a few kB: configuration, held-out perplexity, what `evaluate` measured, speed, versions."""
    stages, config = plan(run.config), run.config
    metrics = read_metrics(stages[-1].weights)
    curve: dict[int, float] = {}
    speeds = {}
    for stage in stages:
        logged = scalars(stage.folder)
        curve |= dict(zip(*logged.get("validation/student_perplexity", ((), ())), strict=True))
        if "train/tokens_per_second" in logged:
            speeds[stage.name] = median(logged["train/tokens_per_second"][1])
    held_out = {"student": perplexity(metrics["student_ce"])}
    kd = config.kd
    if stages[-1].name == "kd" and kd.alpha and (kd.divergence, kd.temperature, kd.top_k) == ("forward", 1, None):  # Eq. 6
        held_out["kl"] = (metrics["loss"] - kd.ce * metrics["student_ce"]) / kd.alpha
    if "teacher_ce" in metrics:
        held_out["teacher"] = perplexity(metrics["teacher_ce"])
    with safe_open(stages[-1].weights, framework="pt") as weights:
        parameters = sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())
    evaluated = {}
    suffix = results_suffix((options or {}).get("limit"))
    for model in ("student", "teacher"):
        results = read_report(Path(config.out) / "eval" / f"{model}{suffix}").get("results", {})
        evaluated[model] = {task: {key: value for key, value in row.items() if key not in ("source", "version", "settings")}
                            for task, row in results.items()}  # fmt: skip
    models = {"student": str(Path(config.out) / "student"), "teacher": config.teacher}
    return rounded({
        "name": run.name, "row": run.row, "seed": run.seed, "config": run.changed, "evaluate": options,
        "stages": stage_tokens(run),
        "held_out": held_out, "curve": {str(tokens): value for tokens, value in curve.items()}, "evaluated": evaluated,
        "parameters": parameters, "state_bytes": {name: state_bytes(path) for name, path in models.items()},
        "tokens_per_second": speeds, "seconds": sum(map(seconds, stages)),
        "device": torch.cuda.get_device_name() if device(config).type == "cuda" else "CPU",
        "versions": {name: version(name) for name in ("distill_pl", "torch", "lightning", "transformers")},
    })  # fmt: skip


def state_bytes(path: str) -> int | None:
    """Return the bytes of a bf16 model's state after STATE_TOKENS tokens, by its architecture; None for one unlike Llama's."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    return theory(model, 1, STATE_TOKENS)


def seconds(stage: StageRun) -> float:
    """Add up, over the times that a stage was started or resumed, the seconds from its first to its last logged value."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    times = [[event.wall_time for event in EventFileLoader(str(file)).Load()] for file in stage.folder.glob("events.out.*")]
    return sum(max(row) - min(row) for row in times if row)


def rounded(value: Any) -> Any:
    """Round all floats in nested dicts to six digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
