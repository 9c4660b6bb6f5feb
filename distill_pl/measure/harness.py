"""Zero-shot benchmark scores from lm-eval's own tasks, their rows taken from the hub or from a folder of jsonl files.

lm_eval takes seconds to import and to index its tasks: that happens in the first call, not on import of this module.
"""

import contextlib
import copy
import difflib
import functools
import glob
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from distill_pl.errors import InputError


def check_tasks(tasks: list[str], data: str | Path | None) -> None:
    """Check task names and files before any work starts.

    Args:
        tasks: names of lm-eval tasks; without `data` its groups and tags too.
        data: folder with one `<task>.jsonl` per task, or None for the hub.

    Raises:
        InputError: no task, a name that lm-eval does not know or `data` cannot feed, no folder, a file absent or empty.
    """
    if not tasks:
        raise InputError("tasks=[]: name at least one lm-eval task, for example arc_easy")
    index = _task_manager().task_index
    for task in tasks:
        if task not in index:
            close = ", ".join(difflib.get_close_matches(task, index)) or "one that `lm-eval ls tasks` lists"
            raise InputError(f"tasks={task}: lm-eval has no such task; did you mean {close}?")
    if data is None:
        return
    if not Path(data).is_dir():
        raise InputError(f"data={data}: no such folder; give one that holds <task>.jsonl for each task")
    for task in tasks:
        if index[task].kind.name != "TASK" or "custom_dataset" in index[task].cfg:
            remedy = "name single tasks, or leave data out"
            raise InputError(f"tasks={task}: data={data} cannot feed a group, a tag or a task made in code; {remedy}")
        if not _has_rows(Path(data, f"{task}.jsonl")):
            there = ", ".join(sorted(file.stem for file in Path(data).glob("*.jsonl") if _has_rows(file))) or "no task"
            raise InputError(f"data={data}: {task}.jsonl is missing or empty; the folder has rows for {there}")


def run_tasks(
    model,
    tokenizer,
    tasks: list[str],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, dict]:
    """Score a causal PreTrainedModel zero-shot on its own device, leaving it in eval mode and the global RNGs seeded.

    Args:
        model: the PreTrainedModel.
        tokenizer: its tokenizer; not changed.
        tasks: as for `check_tasks`, which is called first.
        data: folder with one `<task>.jsonl` per task in the columns of the task's hub dataset, all of its rows standing
            for the split that lm-eval evaluates; None loads the hub's dataset.
        limit: score only this many first rows of each task; None for all.
        batch_size: sequences in a forward pass.
        seed: for tasks that draw something; those that rank choices by likelihood draw nothing.

    Returns:
        For each task (and each named group) `n` (rows scored), `version` (of the task's definition) and lm-eval's
        metrics under its own names, such as `acc`, `acc_stderr`, `acc_norm` (fractions of 1) and `perplexity` (per
        word predicted). A stderr that lm-eval cannot estimate, as from a single row, is nan.

    Raises:
        InputError: as for `check_tasks`; a hub that cannot be reached; a first row that does not fit its task.
    """
    check_tasks(tasks, data)
    # A cache of our own: datasets' common one tells files apart by time stamp, so it can serve rows since replaced.
    with _quiet(), _no_metric_scripts(), tempfile.TemporaryDirectory(prefix="distill_pl-", ignore_cleanup_errors=True) as cache:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from transformers import set_seed

        set_seed(seed)
        loaded: dict[str, dict] = {"tasks": {}, "groups": {}}
        for name in tasks:
            found = _load(name, data, cache)
            loaded["tasks"].update(found["tasks"])
            if data is None:  # from files, the only group is the one that _load makes up
                loaded["groups"].update(found["groups"])
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise InputError(f"tasks={name}: it runs what the model writes as code; name another task")
            task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed)
        # A copy of the tokenizer, since HFLM gives it a padding token if it has none.
        lm = HFLM(model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        # Not simple_evaluate: that returns nothing on local ranks above 0 and surveys the machine for its log.
        results = evaluate(lm, loaded, limit=limit, log_samples=False)
    scores: dict[str, dict] = {}
    for name, row in results["results"].items():
        scores[name] = {"n": row["sample_len"], "version": results["versions"][name]}
        for key, value in row.items():
            if "," in key:  # "metric,filter", where almost every task's filter is "none"; other keys are labels
                scores[name][key.removesuffix(",none")] = float("nan") if value == "N/A" else value
    return scores


@functools.cache
def _task_manager():
    with _quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def _has_rows(file: Path) -> bool:
    return file.is_file() and bool(file.read_bytes().strip())


def _load(name: str, data: str | Path | None, cache: str) -> dict[str, dict]:
    """Build what lm-eval knows as `name`, its rows read: {"tasks": {name: Task}, "groups": {name: Group}, ...}."""
    spec: str | dict = name
    remedy = f"if the hub cannot be reached, give --data FOLDER with {name}.jsonl"
    if data is not None:
        stock = _task_manager().task_index[name].cfg
        evaluated = "test_split" if stock.get("test_split") else "validation_split"  # lm-eval's own choice
        swap = dict.fromkeys(["training_split", "validation_split", "fewshot_split", "fewshot_config", "dataset_name"])
        swap |= {evaluated: stock[evaluated], "dataset_path": "json", "task": name}
        files = {stock[evaluated]: glob.escape(str(Path(data, f"{name}.jsonl").resolve()))}  # datasets takes patterns
        swap["dataset_kwargs"] = {"data_files": files, "cache_dir": cache}
        # In a group of one, because members of a group are where lm-eval lets a stock task's fields be overridden.
        spec = {"group": "from_files", "task": [swap]}
        remedy = f"give {name}.jsonl in data={data} the columns of the task's hub dataset"
    try:
        return _task_manager().load(spec)
    except Exception as error:  # datasets, huggingface_hub and a task's own code raise errors of no common type
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"tasks={name}: its rows cannot be loaded ({reason}); {remedy}") from error


@contextlib.contextmanager
def _no_metric_scripts() -> Iterator[None]:
    """Refuse `evaluate.load`, by which some of lm-eval's tasks run a script from the hub or the current folder, unasked."""
    import evaluate

    refused = []

    def refuse(path: str, *args, **kwargs):
        refused.append(path)
        raise RuntimeError(f"no metric {path} from the hub")

    load, evaluate.load = evaluate.load, refuse
    try:
        yield
    except Exception as error:  # lm-eval's or a task's own, after it met the one above
        if not refused:
            raise
        raise InputError(f"tasks: lm-eval would run the script of metric {refused[0]!r} from the hub; name others") from error
    finally:
        evaluate.load = load


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence log lines, warnings and prints of lm-eval and its libraries; their progress bars stay."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
