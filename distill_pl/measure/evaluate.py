"""`distill-pl evaluate` and `distill-pl generate`: score a model, and let it write."""

import json
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from distill_pl.console import aligned, percent, perplexity, quiet, say
from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.errors import InputError
from distill_pl.measure import study
from distill_pl.measure.harness import check_tasks, run_tasks
from distill_pl.run.card import add_results
from distill_pl.run.folder import fingerprint, read_config, write_aside
from distill_pl.run.values import AT_LEAST_1, SEED, Range, check_numbers
from distill_pl.teacher import load_model

Results = dict[str, dict[str, Any]]  # by task, and "held-out": a measure's name -> its value


def evaluate(
    models: list[str],
    tasks: str = "",
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Measure models: perplexity on held-out text, and zero-shot accuracy on lm-eval tasks (paper, section 4.2).

    Prints a table and writes JSON to RUN/eval/ for a run folder, to eval/ for any other model. A result in that JSON is reused
    as long as weights, questions, limit, seed and lm-eval are the same.

    Args:
        models: run folders of `distill-pl fit`, whose teacher and held-out text are measured as well; or model folders or
            hub ids, for which there are only tasks.
        tasks: names of lm-eval tasks, e.g. arc_easy,piqa; `study` stands for the paper's six benchmarks.
        data: folder of <task>.jsonl files in the hub's columns; without it lm-eval downloads its data from the hub.
        limit: score only this many first questions of each task.
        batch_size: sequences in a forward pass.
        seed: seed of whatever lm-eval draws.
    """
    quiet()
    numbers = {"limit": limit, "batch_size": batch_size, "seed": seed}
    check_numbers(numbers, {"limit": AT_LEAST_1, "batch_size": AT_LEAST_1, "seed": SEED})
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    names = [task for name in names for task in (study.TASKS if name == "study" else [name])]
    runs = {model: read_config(Path(model)) for model in models if is_run(model)}
    for model in models:
        if not names and model not in runs:
            raise InputError(f"model {model!r} is no run folder, whose held-out text could be used: give --tasks, e.g. study")
    if names:
        check_tasks(names, data)
    options = {"limit": limit, "seed": seed, "lm_eval": version("lm_eval")}
    results: dict[str, Results] = {}
    teachers: dict[str, str] = {}
    for model in models:
        jobs = [(model, weights_path(model), Path("eval") / f"{model.strip('/').replace('/', '--')}.json")]
        if model in runs:
            folder, teacher = Path(model) / "eval", runs[model]["teacher"]
            jobs = [(teacher, teacher, folder / "teacher.json"), (model, weights_path(model), folder / "student.json")]
            teachers[model] = teacher
        texts = runs.get(model, {}).get("data")
        for name, path, file in jobs:
            file = file if limit is None else file.with_suffix(f".limit{limit}.json")
            results[name] = measure(path, file, names, texts, data, batch_size, options, results.get(name, {}))
        if model in runs and limit is None:
            add_results(Path(path), results[model])
    text = table(results, teachers)
    say("\n" + text)
    if "kept" in text:
        say("kept: the share of the teacher's average margin over guessing that the student keeps")


def measure(path: str, file: Path, tasks: list[str], texts: dict | None, data: str | None, batch_size: int,
            options: dict, known: Results) -> Results:  # fmt: skip
    """Measure the model at `path` -> results by task; `file` is brought up to date after each task.

    Nothing that `file` holds and that still applies is measured again, nor what this call has measured already, `known`.
    texts: a run's data keys, for perplexity on its held-out text; data: folder of jsonl files, or None for the hub.
    """
    network, tokenizer = load(path)
    report = options | {"model": path, "weights": fingerprint(network), "torch": torch.__version__, "results": {}}
    report |= {"device": network.device.type, "dtype": str(network.dtype), "transformers": version("transformers")}
    earlier = json.loads(file.read_text()) if file.is_file() else {}
    if all(earlier.get(key) == report[key] for key in (*options, "weights", "dtype")):
        report["results"] = earlier["results"]
    report["results"] |= known

    def keep(measured: Results, source: str) -> None:
        report["results"] |= {task: row | {"source": source} for task, row in measured.items()}
        write_aside(file, lambda aside: aside.write_text(json.dumps(report, indent=2)))

    if texts is not None:
        source = f"{texts['dataset']}, {texts['validation_tokens']} tokens in chunks of {texts['sequence_length']}"
        if report["results"].get("held-out", {}).get("source") != source:
            keep({"held-out": {"perplexity": held_out_perplexity(network, tokenizer, texts, batch_size)}}, source)
    for task in tasks:
        source = "hub" if data is None else sha256(Path(data, f"{task}.jsonl").read_bytes()).hexdigest()
        if report["results"].get(task, {}).get("source") == source:
            say(f"{path}  {task}: measured before")
        else:
            say(f"{path}  {task}")
            keep(run_tasks(network, tokenizer, [task], data=data, limit=options["limit"], batch_size=batch_size,
                           seed=options["seed"]), source)  # fmt: skip
    return {task: row for task, row in report["results"].items() if task == "held-out" or task in tasks}


def generate(
    model: str,
    prompt: str = "Once",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    beams: int = 1,
    seed: int = 0,
) -> None:
    """Print a prompt and a model's continuation of it.

    Args:
        model: run folder of `distill-pl fit`, model folder or hub id.
        prompt: the beginning of the text.
        max_new_tokens: how many tokens to add, at most.
        temperature: 0 takes the likeliest token; any other value samples at that temperature.
        beams: number of beams in beam search; 1 searches without beams.
        seed: seed of the sampling.
    """
    quiet()
    numbers = {"max_new_tokens": max_new_tokens, "temperature": temperature, "beams": beams, "seed": seed}
    ranges = {"max_new_tokens": AT_LEAST_1, "temperature": Range(0, 1e30), "beams": AT_LEAST_1, "seed": SEED}
    check_numbers(numbers, ranges)
    network, tokenizer = load(weights_path(model))
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(network.device)
    if inputs["input_ids"].shape[1] == 0:
        raise InputError(f"prompt {prompt!r} is no token long: give at least a word")
    set_seed(seed)
    tokens = None
    if beams == 1 and network.device.type == "cuda":
        from distill_pl.decoding import continue_prompt

        tokens = continue_prompt(network, inputs["input_ids"], max_new_tokens, temperature)
    if tokens is None:
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        tokens = network.generate(
            **inputs, max_new_tokens=max_new_tokens, num_beams=beams, pad_token_id=tokenizer.eos_token_id, **sampling
        )
    say(tokenizer.decode(tokens[0], skip_special_tokens=True))


def is_run(model: str) -> bool:
    """Return whether `model` is a run folder of `distill-pl fit`."""
    return (Path(model) / "config.yaml").is_file()


def weights_path(model: str) -> str:
    """Return what transformers loads: a run's student, else `model` itself. Raises InputError for an unfinished run."""
    student = Path(model) / "student"
    if is_run(model) and not student.is_dir():
        raise InputError(f"{model} is not finished, it has no student yet: run distill-pl fit with the same configuration")
    return str(student) if is_run(model) else model


def load(path: str) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model, on the GPU in bf16 if there is one, and its tokenizer.

    path: folder or hub id. Raises InputError where there is no model, no tokenizer, or code in place of weights.
    """
    gpu = torch.cuda.is_available()
    try:
        model = load_model(path, dtype=torch.bfloat16 if gpu else torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"model {path!r} cannot be loaded ({str(error).strip().splitlines()[0][:200]}): give a run folder, "
            "a Hugging Face model folder with its tokenizer, or a hub id"
        ) from error
    return model.to("cuda" if gpu else "cpu").eval(), tokenizer  # type: ignore[arg-type]


@torch.no_grad()
def held_out_perplexity(model: PreTrainedModel, tokenizer, data: dict[str, Any], batch_size: int) -> float:
    """Compute perplexity on the chunks of a run's text that no stage trained on. data: the run's data keys."""
    module = ChunkDataModule(**data)
    chunks = torch.from_numpy(module.open(tokenizer).validation.astype("int64"))
    if len(chunks) == 0:
        raise InputError(f"the packed text of {data['dataset']!r} is no longer in {module.cache}: run distill-pl fit again")
    total = 0.0
    for tokens in chunks.split(batch_size):
        tokens = tokens.to(model.device)
        logits = model(tokens, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
    return perplexity(total / chunks[:, 1:].numel())


def recovery(student: Results, teacher: Results) -> float | None:
    """Compute the share of the teacher's mean margin over guessing that the student keeps.

    None without all six columns, or where the teacher itself cannot be told from guessing (within two standard errors).
    A plain ratio of accuracies would hide a collapse: a model that only guesses has more than half of SmolLM-360M's accuracy.
    """
    chance = mean(study.CHANCE.values())
    kept, whole = (study.columns(results).get("Avg.") for results in (student, teacher))
    if not kept or not whole or whole[0] - 2 * whole[1] <= chance:
        return None
    return (kept[0] - chance) / (whole[0] - chance)


def table(results: dict[str, Results], teachers: dict[str, str]) -> str:
    """Lay out a row for each model, a column for each measure; accuracies in percent with their standard error.

    results: by model, then by task. teachers: a student's name -> its teacher's.
    """
    rows: dict[str, dict[str, str]] = {}
    for model, measured in results.items():
        cells = {}
        if "held-out" in measured:
            cells["perplexity"] = f"{measured['held-out']['perplexity']:.4g}"
        columns = study.columns(measured)
        cells |= {column: percent(*value) for column, value in columns.items() if column != "Avg."}
        covered = {task for column in columns for task in study.COLUMNS.get(column, ())}
        for task, row in measured.items():
            if task not in covered | {"held-out"}:
                metric = next(key for key in ("acc", *row) if key in row and key not in ("n", "version", "source"))
                cells[task] = percent(row["acc"], row["acc_stderr"]) if metric == "acc" else f"{metric} {row[metric]:.4g}"
        if "Avg." in columns:
            cells["Avg."] = percent(*columns["Avg."])
        kept = recovery(measured, results[teachers[model]]) if model in teachers else None
        if kept is not None:
            cells["kept"] = f"{kept:.0%}"
        rows[model] = cells
    header = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    return aligned([["", *header], *([model, *(cells.get(column, "-") for column in header)] for model, cells in rows.items())])
