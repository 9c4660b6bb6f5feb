"""Zero-shot benchmark scores by lm-eval's own tasks, on rows from the hub or from a folder of jsonl files.

Tasks rank choices by likelihood (arc_easy, piqa) or let the model write (gsm8k, triviaqa, ifeval).

lm_eval takes seconds to import and to index its tasks, so both happen in the first call, not on import of this module.
What is no documented interface of lm-eval is reached in `_stock_task`, `_from_file`, `_make_zero_shot`, `_check_rows`,
`_no_metric_scripts`, `_task_manager` and `_batch_scorer` alone, each with a test of its name.
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
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from jinja2.meta import find_undeclared_variables
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import PreTrainedTokenizerBase

from distill_pl.errors import InputError, one_line
from distill_pl.tokenizer import special_tokens

# what a task's own code imports beyond lm-eval's requirements, and the nltk data that it would download
PACKAGES = {"ifeval": ["langdetect", "immutabledict", "nltk"]}
NLTK_DATA = {"ifeval": "punkt_tab"}


def check_tasks(tasks: list[str], data: str | Path | None, others: Iterable[str] = ()) -> None:
    """Check task names and files before any work starts.

    Args:
        tasks: names of lm-eval tasks; without `data` also groups and tags.
        data: folder with one `<task>.jsonl` for each task, or None for the hub.
        others: names that are not lm-eval's, but that a wrong one may be meant for.

    Raises:
        InputError: no task, a name that lm-eval does not know or `data` cannot feed, a package that a task needs, no folder,
            a file absent or empty.
    """
    if not tasks:
        raise InputError("tasks=[]: name at least one lm-eval task, for example arc_easy")
    known = _task_manager().all_tasks
    for task in tasks:
        if task not in known:
            close = ", ".join(difflib.get_close_matches(task, [*others, *known])) or "one that `lm-eval ls tasks` lists"
            raise InputError(f"tasks={task}: lm-eval has no such task; did you mean {close}?")
        if missing := [package for package in PACKAGES.get(task, []) if find_spec(package) is None]:
            raise InputError(f"tasks={task}: it needs packages that are not installed: pip install {' '.join(missing)}")
        if task in NLTK_DATA and not _has_nltk_data(NLTK_DATA[task]):
            remedy = f"python -m nltk.downloader {NLTK_DATA[task]}"
            raise InputError(f"tasks={task}: it needs nltk's data {NLTK_DATA[task]}, which is not there: {remedy}")
    if data is None:
        return
    if not Path(data).is_dir():
        raise InputError(f"data={data}: no such folder; give one that holds <task>.jsonl for each task")
    for task in tasks:
        if _stock_task(task) is None:
            remedy = "name single tasks, or leave data out"
            raise InputError(f"tasks={task}: data={data} cannot feed a group, a tag or a task made in code; {remedy}")
        if not _has_rows(Path(data, f"{task}.jsonl")):
            present = ", ".join(sorted(file.stem for file in Path(data).glob("*.jsonl") if _has_rows(file))) or "no task"
            raise InputError(f"data={data}: {task}.jsonl is missing or empty; the folder has rows for {present}")


@contextlib.contextmanager
def load_tasks(tasks: list[str], data: str | Path | None, limit: int | None, seed: int) -> Iterator[dict[str, dict]]:
    """Load tasks, for the context alone -> lm-eval's tasks and groups by name, zero-shot. Leaves the global RNGs seeded.

    Raises InputError where the hub cannot be reached, and for a row of `data` that does not fit its task.
    """
    # datasets' shared cache tells files apart by time stamp and can serve rows since replaced: use a cache of this call's own
    with _quiet(), _no_metric_scripts(), tempfile.TemporaryDirectory(prefix="distill_pl-", ignore_cleanup_errors=True) as cache:
        from transformers import set_seed

        set_seed(seed)
        loaded: dict[str, dict] = {"tasks": {}, "groups": {}}
        for name in tasks:
            found = _load(name, data, cache)
            loaded["tasks"].update(found["tasks"])
            if data is None:  # from files, the only group is the one that _from_file makes up
                loaded["groups"].update(found["groups"])
        for name, task in loaded["tasks"].items():
            _make_zero_shot(name, task, seed)
            if data is not None:
                _check_rows(name, task, limit)
        yield loaded


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
    """Score a causal language model zero-shot on its device; leave it in eval mode and the global RNGs seeded.

    Args:
        model: a PreTrainedModel.
        tokenizer: its tokenizer, which is not changed.
        tasks: as for `check_tasks`, which is called first.
        data: folder with one `<task>.jsonl` for each task, in the columns of the task's hub dataset; all rows of a file
            stand for the split that lm-eval evaluates. None loads the hub's dataset.
        limit: score only this many first rows of each task; None for all.
        batch_size: sequences in a forward pass.
        seed: for tasks that draw something; those that rank choices by likelihood draw nothing.

    Returns:
        For each task (and each named group) `n` (rows scored), `version` (of the task's definition) and lm-eval's
        metrics under its own names, such as `acc`, `acc_stderr`, `acc_norm` (fractions of 1), `perplexity` (per word
        predicted) and, after a filter of what the model wrote, `exact_match,strict-match`. A stderr that lm-eval cannot
        estimate, as from a single row, is nan.

    Raises:
        InputError: as for `check_tasks`; a hub that cannot be reached; a row of `data` that does not fit its task; a model with
            no more positions than a task lets it write tokens.
    """
    check_tasks(tasks, data)
    with load_tasks(tasks, data, limit, seed) as loaded:
        from lm_eval.evaluator import evaluate

        lm = _batch_scorer()(model, backend="causal", tokenizer=prompt_tokenizer(tokenizer), batch_size=batch_size)
        for name, task in loaded["tasks"].items():
            written = (task.config.generation_kwargs or {}).get("max_gen_toks", lm.max_gen_toks)
            if task.OUTPUT_TYPE == "generate_until" and written >= lm.max_length:
                raise InputError(
                    f"tasks={name}: models may write {written} tokens, and this one has {lm.max_length} positions: leave it out"
                )
        # simple_evaluate returns nothing on local ranks above 0 and surveys the machine for its log
        # lm-eval resamples 100,000 times for the standard error of a perplexity: minutes of all cores, where 1000 give it to 2%
        results = evaluate(lm, loaded, limit=limit, log_samples=False, bootstrap_iters=1000)
    scores: dict[str, dict] = {}
    for name, row in results["results"].items():
        scores[name] = {"n": row["sample_len"], "version": results["versions"][name]}
        for key, value in row.items():
            if "," in key:  # "metric,filter", where almost every task's filter is "none"; other keys are labels
                scores[name][key.removesuffix(",none")] = float("nan" if value == "N/A" else value)
    return scores


@functools.cache
def _batch_scorer() -> type:
    """Make an HFLM that fetches the scores of a batch of continuations together, computed in fp32.

    lm-eval's own waits for the GPU several times for each continuation, which is slow where other processes use it too.
    """
    from lm_eval.models.huggingface import HFLM

    class BatchScorer(HFLM):
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[tuple[float, bool]]:
            """Score (key, context's tokens, continuation's) each -> log-probability, and whether greedy decoding gives it."""
            size, scores = int(self.batch_size), [(0.0, False)] * len(requests)
            order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]) + len(requests[i][2]), reverse=True)
            for first in trange(0, len(order), size, desc=f"batches of {size} continuations", disable=disable_tqdm):
                batch = order[first : first + size]
                if (longest := max(len(requests[i][2]) for i in batch)) > self.max_length:
                    raise InputError(f"a task continues by {longest} tokens, the model reads {self.max_length}: leave it out")
                rows = [torch.tensor((requests[i][1] + requests[i][2])[-(self.max_length + 1) :]) for i in batch]
                tokens, place = pad_sequence(rows, batch_first=True), torch.arange(1, len(rows[0]))
                ends = torch.tensor([len(row) for row in rows])[:, None]
                begins = ends - torch.tensor([len(requests[i][2]) for i in batch])[:, None]
                asked, tokens = ((place >= begins) & (place < ends)).to(self.device), tokens.to(self.device)
                logits, target = self._model_call(tokens[:, :-1])[asked].float(), tokens[:, 1:][asked]
                losses = torch.stack([cross_entropy(logits, target, reduction="none"), (logits.argmax(-1) != target).float()])
                total, wrong = torch.zeros(2, *asked.shape, device=self.device).masked_scatter(asked, losses).sum(-1).tolist()
                for i, loss, others in zip(batch, total, wrong, strict=True):
                    scores[i] = (-loss, others == 0)
            return scores

    return BatchScorer


def prompt_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Copy a tokenizer for lm-eval, which gives it a padding token and continues what it encodes.

    The copy begins texts with the same special tokens, such as BOS, and ends them with none: after an EOS nothing continues.
    Raises InputError as `special_tokens` does, and for a tokenizer that is not a fast one and ends texts.
    """
    copied: Any = copy.deepcopy(tokenizer)
    before, after = special_tokens(tokenizer)
    if after:
        if not hasattr(copied, "backend_tokenizer"):
            raise InputError(f"tokenizer {tokenizer.name_or_path!r} ends texts with special tokens: give it a tokenizer.json")
        names = copied.convert_ids_to_tokens(before)
        pairs = list(zip(names, before, strict=True))
        copied.backend_tokenizer.post_processor = TemplateProcessing(single=[*names, "$A"], special_tokens=pairs)
    return copied


@functools.cache
def _task_manager():
    with _quiet():
        from lm_eval import utils
        from lm_eval.tasks import TaskManager

        # lm-eval compiles a task's templates again for every question, which takes longer than all else that is done on the CPU
        utils.env.from_string = functools.lru_cache(1000)(utils.env.from_string)  # type: ignore[method-assign]
        return TaskManager()


def _has_rows(file: Path) -> bool:
    return file.is_file() and bool(file.read_bytes().strip())


def _has_nltk_data(name: str) -> bool:
    import nltk

    try:
        nltk.data.find(f"tokenizers/{name}")
    except LookupError:
        return False
    return True


def _load(name: str, data: str | Path | None, cache: str) -> dict[str, dict]:
    """Load a task, group or tag with its rows -> {"tasks": {name: Task}, "groups": {name: Group}, ...}."""
    if data is None:
        spec, remedy = name, f"if the hub cannot be reached, give --data FOLDER with {name}.jsonl"
    else:
        spec = _from_file(name, Path(data, f"{name}.jsonl"), cache)  # type: ignore[assignment]
        remedy = f"give {name}.jsonl in data={data} the columns of the task's hub dataset"
    try:
        return _task_manager().load(spec)
    except ImportError as error:
        raise InputError(f"tasks={name}: its code cannot be imported ({one_line(error)}): install what is missing") from error
    except Exception as error:  # datasets, huggingface_hub and a task's own code raise errors of no common type
        reason = error.__cause__ or error  # datasets says of a line that is no JSON only that something is wrong
        raise InputError(f"tasks={name}: its rows cannot be loaded ({one_line(reason)}); {remedy}") from error


def _stock_task(name: str) -> dict[str, Any] | None:
    """Return the YAML configuration of one of lm-eval's tasks; None for a group, a tag or a task made in code."""
    entry = _task_manager().task_index[name]
    return entry.cfg if entry.kind.name == "TASK" and "custom_dataset" not in entry.cfg else None


def _from_file(name: str, file: Path, cache: str) -> dict[str, Any]:
    """Return a specification, which lm-eval's `TaskManager.load` takes, of a stock task that reads its rows from `file`.

    The task is in a group of one, because lm-eval lets a stock task's fields be overridden only in members of a group.
    """
    stock = _stock_task(name) or {}
    evaluated = "test_split" if stock.get("test_split") else "validation_split"  # lm-eval's own choice
    task = dict.fromkeys(["training_split", "validation_split", "fewshot_split", "fewshot_config", "dataset_name"])
    task |= {evaluated: stock[evaluated], "dataset_path": "json", "task": name}
    files = {stock[evaluated]: glob.escape(str(file.resolve()))}  # datasets takes patterns
    task["dataset_kwargs"] = {"data_files": files, "cache_dir": cache}
    return {"group": "from_files", "task": [task]}


def _make_zero_shot(name: str, task: Any, seed: int) -> None:
    """Set a loaded lm-eval task to no examples and a seed. Raises InputError for one that runs what the model writes."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"tasks={name}: it runs what the model writes as code; name another task")
    task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed)


def _check_rows(name: str, task: Any, limit: int | None) -> None:
    """Raise InputError, naming the row, where the answer is missing or none of the choices, or a choice is no text.

    lm-eval counts such answers as wrong, without a word.
    """
    templates = [text for text in (task.config.doc_to_text, task.config.doc_to_target) if isinstance(text, str)]
    read = [name for text in templates for name in find_undeclared_variables(Environment().parse(text)) or {text}]
    for number, row in enumerate(islice(task.eval_docs, limit), start=1):
        try:
            found = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
            if task.OUTPUT_TYPE == "multiple_choice":
                choices = task.doc_to_choice(row)
                answers = found if isinstance(found, list) else [found]
                fits = all(isinstance(choice, str) for choice in choices) and all(
                    answer in range(len(choices)) if isinstance(answer, int) else answer in choices for answer in answers
                )
                says = f"it has choices {str(choices)[:80]} and answer {found!r}"
            else:
                task.doc_to_text(row)
                fits = None not in map(row.get, row.keys() & read) and bool(str(found).strip())
                says = f"a column is empty: {str(dict(row))[:80]}"
        except Exception as error:  # of a task's own code
            fits, says = False, one_line(error)
        if not fits:
            raise InputError(f"tasks={name}: row {number} does not fit ({says}): give {name}.jsonl the columns of the task's "
                             "hub dataset, of the same types")  # fmt: skip


@contextlib.contextmanager
def _no_metric_scripts() -> Iterator[None]:
    """Refuse `evaluate.load`, by which some lm-eval tasks run a script from the hub or the current folder, unasked."""
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
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
