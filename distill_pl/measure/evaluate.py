"""`distill-pl evaluate` and `distill-pl generate`: what became of a model, in numbers and in words."""

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
from distill_pl.decoding.decoder import continued
from distill_pl.errors import InputError
from distill_pl.measure import study
from distill_pl.measure.harness import check_tasks, run_tasks
from distill_pl.run.card import add_results
from distill_pl.run.folder import fingerprint, read_config, write_aside
from distill_pl.teacher import load_model


def evaluate(
    models: list[str],
    tasks: str = "",
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Measure models: perplexity on the held-out text, and zero-shot lm-eval tasks (paper, section 4.2).

    Prints a table. JSON goes to RUN/eval/ for a run folder, to eval/ for any other model; what is in it is not measured again
    as long as weights, questions, limit, seed and lm-eval are the same.

    Args:
        models: run folders of `distill-pl fit`, for which the teacher and the held-out text are measured as well; or model
            folders or hub ids, for which there are only tasks.
        tasks: names of lm-eval tasks, e.g. arc_easy,piqa; `study` stands for the paper's six.
        data: folder of <task>.jsonl in the hub's columns; without it lm-eval takes its data from the hub.
        limit: only so many first questions of each task.
        batch_size: sequences at a time.
        seed: of whatever lm-eval draws.
    """
    quiet()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    names = [task for name in names for task in (study.TASKS if name == "study" else [name])]
    runs = {model: read_config(Path(model)) for model in models if (Path(model) / "config.yaml").is_file()}
    for model in models:
        if not names and model not in runs:
            raise InputError(f"model {model!r} is no run folder, whose held-out text could be used: give --tasks, e.g. study")
    if names:
        check_tasks(names, data)
    options = {"limit": limit, "seed": seed, "lm_eval": version("lm_eval")}
    results: dict[str, dict[str, Any]] = {}
    for model in models:
        jobs = [(model, model, Path("eval") / f"{model.strip('/').replace('/', '--')}.json")]
        if model in runs:
            folder, teacher = Path(model) / "eval", runs[model]["teacher"]
            jobs = [(teacher, teacher, folder / "teacher.json"), (model, student_folder(model), folder / "student.json")]
        for label, path, file in jobs:
            if limit is not None:
                file = file.with_suffix(f".limit{limit}.json")
            texts = runs.get(model, {}).get("data")
            found = measure(path, file, names, texts, data, batch_size, options, before=results.get(label, {}))
            results[label] = found if texts is None or label != model else found | {"teacher": runs[model]["teacher"]}
        if model in runs and limit is None:
            add_results(Path(path), found)
    text = table(results)
    say("\n" + text)
    if "kept" in text:
        say("kept: of the teacher's average margin over guessing")


def measure(path: str, file: Path, tasks: list[str], texts: dict | None, data: str | None, batch_size: int,
            options: dict, before: dict[str, dict]) -> dict[str, dict]:  # fmt: skip
    """Results by task of the model at `path`; `file` is kept up to date.

    What stands in `file` and still holds is not measured again, nor what was measured `before` in this call.
    """
    network, tokenizer = load(path)
    report = options | {"model": path, "weights": fingerprint(network), "torch": torch.__version__, "results": {}}
    report |= {"device": network.device.type, "dtype": str(network.dtype), "transformers": version("transformers")}
    known = json.loads(file.read_text()) if file.is_file() else {}
    if all(known.get(key) == report[key] for key in (*options, "weights", "dtype")):
        report["results"] = known["results"]
    report["results"] |= before

    def keep(found: dict[str, dict], source: str) -> None:
        report["results"] |= {task: row | {"source": source} for task, row in found.items()}
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
    """Continue a prompt.

    Args:
        model: run folder of `distill-pl fit`, model folder or hub id.
        prompt: how the text begins.
        max_new_tokens: how many tokens to add, at most.
        temperature: 0 takes the likeliest token, more samples.
        beams: of beam search.
        seed: of the sampling.
    """
    quiet()
    network, tokenizer = load(student_folder(model) if (Path(model) / "config.yaml").is_file() else model)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(network.device)
    if inputs["input_ids"].shape[1] == 0:
        raise InputError(f"prompt {prompt!r} is no token long: give at least a word")
    set_seed(seed)
    tokens = None
    if beams == 1 and network.device.type == "cuda":
        tokens = continued(network, inputs["input_ids"], max_new_tokens, temperature)
    if tokens is None:
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        tokens = network.generate(
            **inputs, max_new_tokens=max_new_tokens, num_beams=beams, pad_token_id=tokenizer.eos_token_id, **sampling
        )
    say(tokenizer.decode(tokens[0], skip_special_tokens=True))


def student_folder(run: str) -> str:
    """The Hugging Face folder of a finished run."""
    folder = Path(run) / "student"
    if not folder.is_dir():
        raise InputError(f"{run} is not finished, it has no student yet: run distill-pl fit with the same configuration")
    return str(folder)


def load(path: str) -> tuple[PreTrainedModel, Any]:
    """A causal language model, on the GPU in bf16 if there is one, and its tokenizer."""
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
    """On the chunks of a run's text that no stage trained on. `data`: the run's data keys."""
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


def recovery(student: dict[str, dict], teacher: dict[str, dict]) -> float | None:
    """The share that the student keeps of the teacher's mean margin over guessing.

    None without all six columns, or where the teacher itself can not be told from guessing (two standard errors).
    A plain ratio of accuracies hides a collapse: whoever only guesses gets more than half of SmolLM-360M's.
    """
    chance = mean(study.CHANCE.values())
    mine, theirs = (study.columns(results).get("Avg.") for results in (student, teacher))
    if not mine or not theirs or theirs[0] - 2 * theirs[1] <= chance:
        return None
    return (mine[0] - chance) / (theirs[0] - chance)


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each model, a column for each measure; accuracies in percent with their standard error.

    results: of each model by task, and under `teacher` which of the models is its teacher.
    """
    rows: dict[str, dict[str, str]] = {}
    for model, found in results.items():
        cells = {}
        if "held-out" in found:
            cells["perplexity"] = f"{found['held-out']['perplexity']:.4g}"
        known = study.columns(found)
        cells |= {column: percent(*value) for column, value in known.items() if column != "Avg."}
        covered = {task for column in known for task in study.COLUMNS.get(column, ())}
        for task, row in found.items():
            if task not in covered | {"held-out", "teacher"}:
                metric = next(key for key in ("acc", *row) if key in row and key not in ("n", "version", "source"))
                cells[task] = percent(row["acc"], row["acc_stderr"]) if metric == "acc" else f"{metric} {row[metric]:.4g}"
        if "Avg." in known:
            cells["Avg."] = percent(*known["Avg."])
        kept = recovery(found, results[found["teacher"]]) if "teacher" in found else None
        if kept is not None:
            cells["kept"] = f"{kept:.0%}"
        rows[model] = cells
    header = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    return aligned([["", *header], *([model, *(cells.get(column, "-") for column in header)] for model, cells in rows.items())])
