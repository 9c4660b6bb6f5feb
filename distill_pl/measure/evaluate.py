"""`distill-pl evaluate` and `distill-pl generate`: score a model, and let it write."""

import inspect
import json
import math
import os
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from distill_pl.console import aligned, percent, perplexity, quiet, say
from distill_pl.data.chunks import waiting_lock
from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.data.files import OR_SKIP
from distill_pl.data.sources import TextSource, counted
from distill_pl.errors import AT_LEAST_1, ROWS, SEED, InputError, Range, check_numbers, first_line, one_line
from distill_pl.measure import long_text, paper, recall
from distill_pl.measure.harness import check_tasks, load_tasks, prompt_tokenizer, run_tasks
from distill_pl.run.card import add_results, read_card
from distill_pl.run.folder import (
    WHAT_IS_READ,
    check_teacher_of,
    disk_refused,
    fingerprint,
    read_config,
    read_fingerprints,
    teacher_of,
    write_aside,
)
from distill_pl.run.values import parse_lengths
from distill_pl.student.modeling import StudentConfig
from distill_pl.teacher import load_model
from distill_pl.tokenizer import special_tokens

HAYSTACK_DOCUMENTS = 2000  # of a dataset given for recall tasks
ANSWER = 64  # tokens that follow a prompt of a recall task, at most
TOKENS_PER_ROW = {"cpu": 2048, "cuda": 4096}  # of one forward pass over long rows, for each of batch_size
Results = dict[str, dict[str, Any]]  # by task, and "held-out": a measure's name -> its value


def evaluate(
    models: list[str],
    tasks: str = "",
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    lengths: str = "512,1024,2048,4096",
    text: str | None = None,
    seed: int = 0,
) -> None:
    """Measure models: perplexity on held-out text, zero-shot accuracy on lm-eval tasks (paper, section 4.2), and recall.

    Prints a table and writes JSON to RUN/eval/ for a run folder, to eval/ for any other model. A result in that JSON is reused
    as long as weights, questions, limit, seed, dtype and lm-eval are the same.

    Args:
        models: run folders of `distill-pl fit`, whose teacher and held-out text are measured as well; or model folders or
            hub ids, for which there are only tasks and `text`.
        tasks: names of lm-eval tasks, e.g. arc_easy,piqa or, where the model writes, gsm8k,triviaqa,ifeval; `study` stands for
            the paper's six benchmarks, `recall` for the tasks of finding again what was read: niah_single_1, niah_single_2,
            niah_multikey, niah_multivalue, mqar, induction and copy.
        data: folder of <task>.jsonl files in the hub's columns; without it lm-eval downloads its data from the hub.
        limit: number of questions of each task (for recall tasks: of each length), and of rows of `text`. Default: all; for
            recall tasks and `text` 25.
        batch_size: sequences in a forward pass; of recall tasks and `text`, batch_size x 2048 tokens (x 4096 on a GPU).
        lengths: lengths of the prompts of recall tasks, in tokens; the largest is also that of the rows of `text`. Results of
            other lengths, or of another text, are replaced.
        text: local file, folder or hub dataset on which to measure perplexity, by position too, and in which recall tasks hide
            numbers; by default these use the held-out text of a run.
        seed: seed of whatever lm-eval and the recall tasks draw.

    Raises:
        InputError: an option, model, run or text that cannot be used.
    """
    quiet()
    runs = {model: read_config(Path(model)) for model in models if is_run(model)}
    for model in models:
        if not tasks.strip(", ") and text is None and model not in runs:
            what = "run folder" if Path(model).exists() else "folder here, and a model of the hub has no held-out text"
            raise InputError(f"model {model!r} is no {what}: give a run folder, or --tasks or --text")
    if data is not None and not Path(data).is_dir():
        raise InputError(f"data {data!r} is no folder: give one of <task>.jsonl files, or leave it out")
    names, questions = check_options(tasks, data, limit, batch_size, lengths, text, seed)
    suffix = results_suffix(limit)
    jobs: dict[str, list[tuple[str, str, Path]]] = {}  # what to measure for each of `models`: name, weights, file of results
    teachers: dict[tuple[str, str], str] = {}  # of a teacher and the text of its perplexity -> name of its row
    for model in models:
        path, folder = weights_path(model), Path(model) / "eval"
        if model in runs:
            teacher, its_text = teacher_of(Path(model)), held_out_text(Path(model))
            name = f"{teacher} (text of {model})" if teacher in teachers.values() else teacher
            name = teachers.setdefault((teacher, its_text), name)
            jobs[model] = [(name, teacher, folder / f"teacher{suffix}"), (model, path, folder / f"student{suffix}")]
            check_writable(Path(path) / "README.md")
            read_card(Path(path))
        else:
            place = os.path.normpath(model)
            place = os.path.abspath(model) if place.startswith(".") else place  # a dot in front would hide the file
            jobs[model] = [(model, path, Path("eval") / f"{place.strip('/').replace('/', '--')}{suffix}")]
        for _, path, file in jobs[model]:
            check_questions(path, names, questions, has_text=model in runs or text is not None)
            read_report(file)
            check_writable(file)
    results: dict[str, Results] = {}
    known: dict[str, Results] = {}  # by the path of the weights
    for model in models:
        run = Path(model) if model in runs else None
        for name, path, file in jobs[model]:
            before = known.get(path, {}) | results.get(name, {})
            with waiting_lock(file.with_name(f".{file.name}.lock"), f"another evaluate is writing {file}, waiting for it"):
                known[path] = results[name] = measure(path, file, names, run, data, batch_size, limit, questions, before)
        if model in runs:
            add_results(Path(path), measured_so_far(Path(model) / "eval", "student"))
    printed = table(results, {model: jobs[model][0][0] for model in runs})
    say("\n" + printed)
    if "kept" in printed:
        say("kept: the share of the teacher's average margin over guessing that the student keeps; of likelihood, that of the "
            "teacher's probability of a token (geometric mean)")  # fmt: skip


def check_options(tasks: str = "", data: str | None = None, limit: int | None = None, batch_size: int = 16,
                  lengths: str = "512,1024,2048,4096", text: str | None = None,
                  seed: int = 0) -> tuple[list[str], recall.Questions]:  # fmt: skip
    """Check the options of `evaluate` -> the names of all tasks, and what recall tasks and `text` ask.

    Raises InputError for an option out of range, for a task that neither lm-eval nor this package knows or `data` lacks,
    and for a row of `data` that does not fit its task.
    """
    numbers = {"limit": limit, "batch_size": batch_size, "seed": seed}
    check_numbers(numbers, {"limit": AT_LEAST_1, "batch_size": ROWS, "seed": SEED})
    groups = {"study": paper.TASKS, "recall": list(recall.TASKS)}
    words = filter(None, map(str.strip, tasks.split(",")))
    names = list(dict.fromkeys(task for word in words for task in groups.get(word, [word])))
    questions = recall.Questions(parse_lengths(lengths), 25 if limit is None else limit, text, seed)
    if of_harness := [name for name in names if name not in recall.TASKS]:
        check_tasks(of_harness, data, others=[*groups, *recall.TASKS])
        if data is not None:
            with load_tasks(of_harness, data, limit, seed):
                pass  # a row that does not fit is found before anything is measured
    return names, questions


def check_questions(path: str, tasks: list[str], questions: recall.Questions, has_text: bool) -> None:
    """Raise InputError, before weights are read, where the tokenizer or the positions at `path`, or `text`, do not suffice.

    has_text: whether there will be a text in which recall tasks hide numbers.
    """
    tokenizer = load_tokenizer(path)
    prompt_tokenizer(tokenizer)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if questions.text is not None or set(tasks) & set(recall.TASKS):
        check_positions(path, config, questions.lengths[-1] + ANSWER)
    if questions.text is not None:
        long_text.rows(documents(questions.text), tokenizer, config, questions.lengths[-1], 1)
    source = recall.make_source(tokenizer, " ".join(recall.FILLER) if has_text else "")
    for task in (task for task in tasks if task in recall.TASKS):
        recall.make_items(task, source, questions.lengths[0], questions)


def measure(path: str, file: Path, tasks: list[str], run: Path | None, data: str | None, batch_size: int,
            limit: int | None, questions: recall.Questions, known: Results) -> Results:  # fmt: skip
    """Measure the model at `path` -> results by task; `file` is brought up to date after each task.

    Nothing that `file` holds and that still applies is measured again, nor what this call has measured already, `known`; what
    `file` holds of these weights stays. run: run folder, for perplexity on its held-out text. data: folder of jsonl files, or
    None for the hub.
    """
    network, tokenizer = load(path)
    weights = fingerprint(network, torch.bfloat16)  # the same on machines that load them in fp32
    if file.name.startswith("teacher"):
        check_teacher_of(file.parent.parent, path, weights)
    settings = {"seed": questions.seed, "lm_eval": version("lm_eval"), "dtype": str(network.dtype),
                "config": config_hash(network, tokenizer)}  # fmt: skip
    report: dict[str, Any] = {
        "model": path, "limit": limit, "weights": weights, "device": network.device.type, "torch": torch.__version__,
        "transformers": version("transformers"),
    }  # fmt: skip
    earlier = read_report(file)
    report["results"] = (earlier["results"] if earlier.get("weights") == weights else {}) | known

    def keep(measured: Results, source: str) -> None:
        report["results"] |= {task: row | {"source": source, "settings": settings} for task, row in measured.items()}
        write_aside(file, lambda aside: aside.write_text(json.dumps(report, indent=2)))

    def is_known(task: str, source: str) -> bool:
        row = report["results"].get(task, {})
        return (row.get("source"), row.get("settings")) == (source, settings)

    if run is not None:
        source = held_out_text(run)
        if not is_known("held-out", source):
            keep({"held-out": {"perplexity": held_out_perplexity(network, tokenizer, run, batch_size)}}, source)
    tokens_at_once = batch_size * TOKENS_PER_ROW[network.device.type]
    if questions.text is not None:
        tokens = long_text.rows(documents(questions.text), tokenizer, network.config, questions.lengths[-1], questions.number)
        source = sha256(tokens.numpy().tobytes()).hexdigest()
        if not is_known("text", source):
            length = tokens.shape[1]
            at_once = min(tokens_at_once // length, batch_size * long_text.SEGMENT // min(length, long_text.SEGMENT))
            keep({"text": long_text.summary(long_text.losses(network, tokens, max(1, at_once)))}, source)
        by_position = report["results"]["text"]["by_position"].items()
        said = f"{path}  perplexity by position in {counted(len(tokens), 'row')} of {tokens.shape[1]} tokens: "
        say(said + ", ".join(f"{position} {value:.4g}" for position, value in by_position))
    material = None
    for task in tasks:
        if task in recall.TASKS:
            material = material or recall.make_source(tokenizer, haystack(network, tokenizer, run, questions.text))
            items = {length: recall.make_items(task, material, length, questions) for length in questions.lengths}
            source = recall.fingerprint(items)
        else:
            source = "hub" if data is None else sha256(Path(data, f"{task}.jsonl").read_bytes()).hexdigest()
        if is_known(task, source):
            say(f"{path}  {task}: measured before")
        elif task in recall.TASKS:
            scores = {length: recall.score(network, tokenizer, row, tokens_at_once) for length, row in items.items()}
            keep({task: recall.summary(items, scores)}, source)
            by_length = report["results"][task]["by_length"].items()
            say(f"{path}  {task}: " + ", ".join(f"{accuracy:.0%} of {length}" for length, accuracy in by_length))
        else:
            say(f"{path}  {task}")
            keep(run_tasks(network, tokenizer, [task], data=data, limit=limit, batch_size=batch_size,
                           seed=questions.seed), source)  # fmt: skip
    if known or earlier.get("weights") != weights:  # another run's folder may have them, but not this one's
        keep({}, "")
    asked = ["held-out", *["text"] * (questions.text is not None), *tasks]
    return {task: row for task, row in report["results"].items() if task in asked}


def config_hash(network: PreTrainedModel, tokenizer: Any) -> str:
    """Hash what a model's results depend on beside its weights: its config.json, but for where and how it was saved; tokens."""
    config = network.config.to_diff_dict()
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version", "dtype")}
    tokens = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.get_vocab())
    return sha256(f"{json.dumps(config, sort_keys=True, default=str)} {tokens}".encode()).hexdigest()[:16]


def generate(
    model: str,
    prompt: str = "Once",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    beams: int = 1,
    seed: int = 0,
) -> None:
    """Print a prompt and a model's continuation of it.

    The prompt begins with the special tokens that the tokenizer puts before every text, such as BOS, and ends with none.

    Args:
        model: run folder of `distill-pl fit`, model folder or hub id.
        prompt: the beginning of the text.
        max_new_tokens: how many tokens to add, at most.
        temperature: 0 takes the likeliest token; any other value samples at that temperature, from the 50 likeliest tokens
            unless the model's generation_config.json says otherwise.
        beams: number of beams in beam search; 1 searches without beams.
        seed: seed of the sampling.
    """
    quiet()
    numbers = {"max_new_tokens": max_new_tokens, "temperature": temperature, "beams": beams, "seed": seed}
    warmth = Range(1e-3, 1e30) if temperature else Range(0)
    ranges = {"max_new_tokens": AT_LEAST_1, "temperature": warmth, "beams": Range(1, 1024), "seed": SEED}
    check_numbers(numbers, ranges)
    path = weights_path(model)
    ids = encode_prompt(load_tokenizer(path), prompt)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_positions(model, config, len(ids) + max_new_tokens, "shorten prompt or lower max_new_tokens")
    network, tokenizer = load(path)
    inputs = torch.tensor([ids], device=network.device)
    set_seed(seed)
    tokens = None
    if beams == 1 and network.device.type == "cuda":
        from distill_pl.decoding import continue_prompt

        tokens = continue_prompt(network, inputs, max_new_tokens, temperature)
    if tokens is None:
        options = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        options |= {"max_new_tokens": max_new_tokens, "num_beams": beams, "pad_token_id": tokenizer.eos_token_id}
        tokens = network.generate(inputs, attention_mask=torch.ones_like(inputs), tokenizer=tokenizer, **options)
    say(tokenizer.decode(tokens[0], skip_special_tokens=True))


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Encode a text to be continued: it begins as the tokenizer begins texts, unless it does already, and has no end.

    Raises InputError where that is no token.
    """
    ids, (begin, _) = tokenizer.encode(prompt, add_special_tokens=False), special_tokens(tokenizer)
    ids = ids if ids[: len(begin)] == begin else begin + ids
    if not ids:
        raise InputError(f"prompt {prompt!r} is no token long: give at least a word")
    return ids


def is_run(model: str) -> bool:
    """Return whether `model` is a run folder of `distill-pl fit`."""
    return (Path(model) / "config.yaml").is_file()


def weights_path(model: str) -> str:
    """Return what transformers loads: a run's student, else `model` itself. Raises InputError for an unfinished run."""
    student = Path(model) / "student"
    if is_run(model) and not student.is_dir():
        raise InputError(f"{model} is not finished, it has no student yet: run distill-pl fit with the same configuration")
    return str(student) if is_run(model) else model


def results_suffix(limit: int | None) -> str:
    """Return how the names of the files that `evaluate` writes end, given its `limit`."""
    return ".json" if limit is None else f".limit{limit}.json"


def read_report(file: Path) -> dict[str, Any]:
    """Read what an earlier call wrote, {} if there is no such file. Raises InputError where it is no JSON object.

    Its `results`, if it has any, are a JSON object for each task.
    """
    try:
        report = json.loads(file.read_text()) if file.is_file() else {}
        whole = all(isinstance(row, dict) for row in report.get("results", {}).values())
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{file} is damaged: delete it to measure again")
    return report


def other_settings(earlier: dict[str, Any], settings: dict[str, Any]) -> str:
    """Name the settings that an earlier result was measured under otherwise, as in `limit 3, now 1`; "" if there are none."""
    return "; ".join(f"{key} {earlier.get(key)}, now {value}" for key, value in settings.items() if earlier.get(key) != value)


def measured_so_far(folder: Path, name: str) -> Results:
    """Collect what `evaluate` has written about a model: all in NAME.json, all but lm-eval's tasks in NAME.limitN.json.

    name: `student` or `teacher`. A recall task that was measured several times counts with most items. Files of other weights
    than the newest file's do not count, nor does recall without a chance level, as earlier versions wrote it. Raises
    InputError for a damaged file.
    """
    files = sorted(folder.glob(f"{name}*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    reports = {file: read_report(file) for file in files}
    results: Results = {}
    for file, report in reports.items():
        if report.get("weights") != reports[files[0]].get("weights"):
            continue
        for task, row in report.get("results", {}).items():
            if "chance" in row if task in recall.TASKS else task in ("held-out", "text") or file.stem == name:
                results[task] = max(results.get(task, row), row, key=lambda row: row.get("n", 0))
    return results


def check_writable(file: Path) -> None:
    """Make the folder of `file`. Raises InputError where nothing can be written in it."""
    with disk_refused(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass


def load_tokenizer(path: str) -> Any:
    """Load a causal language model's tokenizer from a folder or the hub.

    Raises InputError where there is no tokenizer or no such model, as far as can be told without weights.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers has no common error for damaged files
        raise _not_loaded(path, error) from error
    if config.is_encoder_decoder:
        raise InputError(f"model {path!r} is an encoder-decoder ({config.model_type}): give a model that continues a text")
    return tokenizer


def load(path: str) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model, on the GPU in bf16 if there is one, and its tokenizer.

    path: folder or hub id. Raises InputError where there is no whole causal model, no tokenizer of that model, or code in place
    of weights.
    """
    tokenizer = load_tokenizer(path)
    gpu = torch.cuda.is_available()
    try:
        dtype = torch.bfloat16 if gpu else torch.float32
        model = load_model(path, f"model {path!r}", "give a whole language model", dtype=dtype)
    except InputError:
        raise
    except Exception as error:
        raise _not_loaded(path, error) from error
    largest, rows = max(tokenizer.get_vocab().values()), len(model.get_input_embeddings().weight)
    if largest >= rows:
        raise InputError(f"model {path!r}: its tokenizer has ids up to {largest}, its embedding {rows} rows: give its own")
    model = model.to("cuda" if gpu else "cpu").eval()
    try:
        ahead = reads_ahead(model)
    except Exception as error:  # kernels of other libraries fail in ways of their own
        raise InputError(f"model {path!r} cannot be computed on this machine ({one_line(error)}): use another") from error
    if ahead:
        raise InputError(f"model {path!r}: its logits depend on later tokens ({model.config.model_type}): give a causal model")
    return model, tokenizer


def _not_loaded(path: str, error: Exception) -> InputError:
    remedy = "give a run folder, a Hugging Face model folder with its tokenizer, or a hub id"
    return InputError(f"model {path!r} cannot be loaded ({first_line(error)}): {remedy}")


@torch.no_grad()
def reads_ahead(model: PreTrainedModel) -> bool:
    """Return whether logits change, beyond rounding, with a later token, as those of encoders such as BERT do."""
    tokens = torch.arange(8, device=model.device).repeat(2, 1)
    tokens[1, -1] = 0
    logits = model(tokens).logits[:, :-1].float()
    return bool((logits[0] - logits[1]).abs().max() > (1e-4 if model.dtype == torch.float32 else 0.05) * logits.abs().max())


def check_positions(model: str, config: Any, positions: int, remedy: str = "give shorter lengths") -> None:
    """Raise InputError where a model such as GPT-2 or GPT-J has a table of fewer than `positions` positions."""
    limit = getattr(config, "max_position_embeddings", None)
    if not limit or limit >= positions or isinstance(config, StudentConfig) or hasattr(config, "rope_parameters"):
        return
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    others = [x for x in network.modules() if isinstance(x, nn.Embedding) and x is not network.get_input_embeddings()]
    tables = [*(x.weight for x in others), *network.buffers()]  # GPT-J's, of sines, is a buffer
    if any(limit <= len(x) <= limit + 2 for x in tables if x.ndim == 2):  # OPT and its like have two more
        raise InputError(f"model {model!r} has a table of {limit} positions, {positions} are asked for: {remedy}")


def held_out_text(run: Path) -> str:
    """Describe the text of a run that no stage trained on, by its keys and a hash, alike for runs that have the same."""
    data, recorded = read_config(run)["data"], read_fingerprints(run).get("held_out", "")
    defaults = inspect.signature(ChunkDataModule).parameters
    others = [key for key in WHAT_IS_READ if key not in ("dataset", "validation_tokens", "shuffle")]
    changed = "".join(f", {key} {data[key]}" for key in others if data.get(key, defaults[key].default) != defaults[key].default)
    return f"{data['dataset']}, {data['validation_tokens']} tokens in chunks of {data['sequence_length']}{changed} {recorded}"


def held_out_chunks(model: PreTrainedModel, tokenizer, run: Path) -> torch.Tensor:
    """Read the chunks [N, T] of a run's text that no stage trained on.

    Raises InputError where they are no longer packed, or no longer those that the run held out.
    """
    data = read_config(run)["data"]
    try:
        module = ChunkDataModule(**data)
    except TypeError as error:  # keys of another version
        raise InputError(
            f"the run is of another version, with other keys of data ({one_line(error)}): give its folder `student`, with "
            "--tasks or --text"
        ) from error
    try:
        packed = module.open(tokenizer, model.config)
        packed.prepare(0)  # packs the held-out text again, should its cache be deleted or its files have a new date
    except InputError as error:
        raise InputError(f"the run's text, relative to the current folder: {error}") from error
    chunks = torch.from_numpy(packed.validation.astype("int64"))
    if read_fingerprints(run).get("held_out", found := packed.fingerprint(0)) != found:
        raise InputError(f"the text {data['dataset']!r} is no longer the one that {run} held out a part of: put that one back")
    return chunks


def documents(text: str) -> Iterator[str]:
    """Read the documents of a dataset given as `text`. Raises InputError where it cannot be read."""
    source = TextSource(text)
    try:
        yield from filter(None, source.texts(source.open(["train"])[0]["train"]))
    except InputError as error:
        line = str(error).replace(f", {OR_SKIP}", "").replace("data.text_column", "column")  # evaluate has no such keys
        raise InputError(f"text: {line.removeprefix('data.dataset ')}") from error


def haystack(model: PreTrainedModel, tokenizer, run: Path | None, text: str | None) -> str:
    """Read the text that recall tasks hide numbers in: the head of the dataset `text`, else a run's held-out text, or ""."""
    if text is not None:
        return " ".join(islice(documents(text), HAYSTACK_DOCUMENTS))
    return "" if run is None else tokenizer.decode(held_out_chunks(model, tokenizer, run).flatten(), skip_special_tokens=True)


def held_out_perplexity(model: PreTrainedModel, tokenizer, run: Path, batch_size: int) -> float:
    """Compute perplexity on the chunks of a run's text that no stage trained on."""
    chunks = held_out_chunks(model, tokenizer, run)
    return perplexity(long_text.losses(model, chunks, batch_size).mean().item())


def recovery(student: Results, teacher: Results) -> float | None:
    """Compute the share of the teacher's mean margin over guessing that the student keeps.

    None without all six columns, or where the teacher itself cannot be told from guessing (within two standard errors).
    A plain ratio of accuracies would hide a collapse: a model that only guesses has more than half of SmolLM-360M's accuracy.
    """
    chance = mean(paper.CHANCE.values())
    kept, whole = (paper.columns(results).get("Avg.") for results in (student, teacher))
    if not kept or not whole or whole[0] - 2 * whole[1] <= chance:
        return None
    return (kept[0] - chance) / (whole[0] - chance)


def table(results: dict[str, Results], teachers: dict[str, str]) -> str:
    """Lay out a row for each model, a column for each measure; accuracies in percent with their standard error.

    The chance levels of recall tasks are in a line beneath.

    results: by model, then by task. teachers: a student's name -> its teacher's.
    """
    rows: dict[str, dict[str, str]] = {}
    for model, measured in results.items():
        cells = {}
        if "held-out" in measured:
            cells["perplexity"] = f"{measured['held-out']['perplexity']:.4g}"
        columns = paper.columns(measured)
        cells |= {column: percent(*value) for column, value in columns.items() if column != "Avg."}
        covered = {task for column in columns for task in paper.COLUMNS.get(column, ())}
        for task, row in measured.items():
            if task not in covered | {"held-out"}:
                metric = next(key for key in ("acc", *row) if key in row and key not in ("n", "version", "source", "settings"))
                name, *filters = metric.split(",")  # of what a model wrote, as in exact_match,strict-match
                is_share = name.endswith("acc") or name == "exact_match"
                error = row.get(",".join([f"{name}_stderr", *filters]), math.nan)
                label = [name] if name not in ("acc", "exact_match") else filters
                cells[task] = " ".join([*label, percent(row[metric], error) if is_share else f"{row[metric]:.4g}"])
        if "Avg." in columns:
            cells["Avg."] = percent(*columns["Avg."])
        if model in teachers:
            shares = {"kept": recovery(measured, results[teachers[model]])} | recall.kept(measured, results[teachers[model]])
            cells |= {name: f"{share:.0%}" for name, share in shares.items() if share is not None}
        rows[model] = cells
    header = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    text = aligned([["", *header], *([model, *(cells.get(column, "-") for column in header)] for model, cells in rows.items())])
    chances: dict[str, set[str]] = {}  # several where models have other tokenizers
    for task, row in (item for measured in results.values() for item in measured.items()):
        if "chance" in row:
            chances.setdefault(task, set()).add(f"{row['chance']:.2%}")
    guessing = ", ".join(f"{task} {' or '.join(sorted(shares))}" for task, shares in chances.items())
    return f"{text}\nguessing: {guessing}" if chances else text
