"""`distill-pl evaluate` and `distill-pl generate`: what became of a model, in numbers and in words."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from distill_pl.callbacks import perplexity, say
from distill_pl.chain import quiet
from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.errors import InputError
from distill_pl.harness import check_tasks, run_tasks
from distill_pl.run_folder import read_config, write_aside


def evaluate(
    model: str,
    tasks: str = "",
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Measure teacher and student: perplexity on the held-out text, and zero-shot lm-eval tasks (paper, section 4.2).

    Prints a table; JSON goes to MODEL/eval/ for a run folder, to eval/NAME/ for any other model.

    Args:
        model: run folder of `distill-pl fit`, which also has the teacher and the text; or any model folder or hub id,
            for which there are only tasks.
        tasks: names of lm-eval tasks, e.g. arc_easy,piqa.
        data: folder of <task>.jsonl in the hub's columns; without it lm-eval takes its data from the hub.
        limit: only so many first questions of each task.
        batch_size: sequences at a time.
        seed: of whatever lm-eval draws.
    """
    quiet()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    is_run = (Path(model) / "config.yaml").is_file()
    if not names and not is_run:
        raise InputError(f"model {model!r} is no run folder, whose held-out text could be used: give --tasks, e.g. arc_easy")
    if names:
        check_tasks(names, data)
    folder = Path(model) / "eval" if is_run else Path("eval") / Path(model).name
    config = read_config(Path(model)) if is_run else {}
    paths = {"teacher": config["teacher"], "student": student_folder(model)} if is_run else {Path(model).name: model}

    results: dict[str, dict[str, Any]] = {}
    for name, path in paths.items():
        network, tokenizer = load(path)
        results[name] = {}
        if is_run:
            results[name]["held-out"] = {"perplexity": held_out_perplexity(network, tokenizer, config["data"], batch_size)}
        if names:
            results[name] |= run_tasks(network, tokenizer, names, data=data, limit=limit, batch_size=batch_size, seed=seed)
        report = {"model": path, "limit": limit, "seed": seed, "results": results[name]}
        text = json.dumps(report, indent=2)
        write_aside(folder / f"{name}.json", lambda aside, text=text: aside.write_text(text))
    say(table(results))
    say(f"in {folder}")


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
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if gpu else torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
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


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each measure, a column for each model; accuracies in percent with their standard error."""
    models = list(results)
    rows = [["", *models]]
    for task in results[models[0]]:
        cells = []
        for name in models:
            found = results[name][task]
            if "acc" in found:
                cells.append(f"{100 * found['acc']:.2f} ± {100 * found['acc_stderr']:.2f}")
            else:
                cells.append(f"{found['perplexity']:.4g}")
        kind = "%" if "acc" in results[models[0]][task] else "perplexity"
        rows.append([f"{task} ({kind})", *cells])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as text, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
