"""The model card of an exported student: what it is, how to load it, how it was made, and its scores."""

import re
from glob import has_magic
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, model_info
from jsonargparse import Namespace
from transformers import PreTrainedModel

from distill_pl import __version__
from distill_pl.console import markdown, percent, perplexity
from distill_pl.errors import InputError, one_line
from distill_pl.measure import paper
from distill_pl.run.folder import StageRun, plain, read_metrics, write_aside
from distill_pl.student.modeling import Student
from distill_pl.tokens import short

IMPORT = "import distill_pl  # lets transformers load its students\n"
LOAD = 'AutoModelForCausalLM.from_pretrained("path/to/this/folder"'  # not closed: exports add arguments
TEXT = """
# {name}

A causal language model that distill_pl {made} `{teacher}`, with {mixer} in {layers}. {parameters} parameters.

## How to load it

```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

model = {load})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=40)[0]))
```

## How it was made

{stages}

Perplexity is measured on text that no stage trained on{of_teacher}. The text is `{dataset}`; distill_pl {version},
torch {torch}, transformers {transformers}. The whole configuration, in the form that `distill-pl fit --config` reads:

```yaml
{config}```

## Results

{results}

## Licence

{licence}
"""
NOT_EVALUATED = "Not evaluated yet: run `distill-pl evaluate RUN --tasks study`."
METRIC = "accuracy, by distill-pl evaluate"  # tells its results in a card's front matter from those that others added
RESULTS = "<!-- distill-pl evaluate writes here -->\n{}\n<!-- as far as here -->"  # cards on disk have these very marks


def model_card(config: Namespace, stages: list[StageRun], model: PreTrainedModel) -> ModelCard:
    """Write the model card of a run's student; of a stage without weights it says tokens and learning rate alone."""
    teacher, dataset = config.teacher, config.data.dataset
    taught = config.kd.alpha > 0 or any(stage.name != "kd" for stage in stages)  # else by the text alone
    derived = taught or config.student.init != "scratch" or config.student.start_from is not None
    licence, licence_sentence = licence_of(teacher) if derived else (None, f"The weights do not derive from `{teacher}`.")
    count, kept = model.config.num_hidden_layers, sorted(set(config.student.softmax_layers))
    layers, mixer = f"each of its {count} layers", "softmax" if len(kept) == count else config.student.mixer
    if kept and mixer != "softmax":
        others = f"softmax attention in layer{'s' * (len(kept) > 1)} {', '.join(map(str, kept))}"
        layers = f"{count - len(kept)} of its {count} layers and {others}"
    metrics = [read_metrics(stage.weights) if stage.weights.is_file() else {} for stage in stages]
    rows = [["stage", "tokens", "learning rate", "perplexity afterwards"]]
    for stage, losses in zip(stages, metrics, strict=True):
        tokens = short(stage.steps * config.data.batch_size * config.data.sequence_length)
        afterwards = f"{perplexity(losses['student_ce']):.2f}" if losses else "not known"  # its weights were deleted
        rows.append([stage.name, tokens, f"{config[stage.name].lr:g}", afterwards])
    data = ModelCardData(
        base_model=teacher if derived and not Path(teacher).exists() else None,
        datasets=None if Path(dataset).exists() or has_magic(dataset) else [dataset],
        library_name="transformers",
        license=licence,
        pipeline_tag="text-generation",
        tags=["distill_pl", *["knowledge-distillation"] * taught, mixer],
    )
    text = TEXT.format(
        name=Path(config.out).name,
        teacher=teacher,
        made="distilled from" if taught else "trained, without distillation, in the shape of",
        layers=layers,
        mixer=mixer,
        parameters=short(sum(p.numel() for p in model.parameters())),
        imports=IMPORT if isinstance(model, Student) else "",
        load=LOAD,
        stages=markdown(rows),
        of_teacher=f"; the teacher's is {perplexity(metrics[-1]['teacher_ce']):.2f}" if "teacher_ce" in metrics[-1] else "",
        dataset=dataset,
        version=__version__,
        torch=version("torch"),
        transformers=version("transformers"),
        config=yaml.safe_dump(plain(config), sort_keys=False),
        results=RESULTS.format(NOT_EVALUATED),
        licence=licence_sentence,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def licence_of(teacher: str) -> tuple[str | None, str]:
    """Read the licence from the card of a model folder or of a hub id -> its identifier or None, a sentence about it."""
    unknown = f"The weights derive from `{teacher}`: its licence applies to them too, but could not be read"
    try:
        if Path(teacher).exists():
            card = Path(teacher) / "README.md"
            licence = (metadata_load(card) or {}).get("license") if card.is_file() else None
        else:
            licence = getattr(model_info(teacher, timeout=10).card_data, "license", None)
    except Exception as error:  # the errors of the hub's network library change between versions, and none is worth a run
        return None, f"{unknown} ({one_line(error)})."
    if not licence:
        return None, f"{unknown} (its card names none)."
    return licence, f"The weights derive from `{teacher}`, whose licence, {licence}, applies to them too."


def read_card(student: Path) -> ModelCard | None:
    """Read an exported student's card, None where it has none. Raises InputError where its front matter is no YAML."""
    file = student / "README.md"
    try:
        return ModelCard(file.read_text()) if file.is_file() else None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({one_line(error)}): mend its front matter, or delete the file") from error


def add_results(student: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write what `evaluate` measured, by task, into an exported student's card; the rest of the card stays.

    lm-eval's results as the paper's columns, and those of recall tasks by the length of the prompt.
    """
    columns, recalled = paper.columns(results), {task: row for task, row in results.items() if "by_length" in row}
    card = read_card(student)
    if card is None or (not (columns or recalled) and NOT_EVALUATED in card.text):
        return
    tables = []
    if columns:
        rows = [["tasks", "zero-shot accuracy, %"]]
        rows += [[", ".join(paper.COLUMNS.get(column, ["average"])), percent(*value)] for column, value in columns.items()]
        tables.append(markdown(rows))
    if recalled:
        lengths = sorted({length for row in recalled.values() for length in row["by_length"]}, key=int)
        rows = [["recall, % of prompts of so many tokens", *lengths, "by guessing"]]
        for task, row in recalled.items():
            shares = [f"{100 * row['by_length'][length]:.0f}" if length in row["by_length"] else "" for length in lengths]
            rows.append([task, *shares, f"{100 * row['chance']:.1f}"])
        tables.append(markdown(rows))
    before, after = (re.escape(part) for part in RESULTS.split("{}"))
    written = RESULTS.format("\n\n".join(tables) or NOT_EVALUATED)
    card.text = re.sub(f"{before}.*{after}", lambda _: written, card.text, flags=re.DOTALL)
    data: Any = card.data
    data.model_name = data.model_name or student.resolve().parent.name
    kind: Any = {"task_type": "text-generation", "metric_type": "acc", "metric_name": METRIC}
    others = [found for found in data.eval_results or [] if found.metric_name != METRIC and found.dataset_type not in results]
    data.eval_results = others + [
        EvalResult(dataset_type=task, dataset_name=task, metric_value=row["acc"], **kind)
        for task, row in results.items()
        if "acc" in row and task not in recalled
    ] or None
    write_aside(student / "README.md", lambda aside: aside.write_text(f"---\n{data.to_yaml()}\n---\n{card.text}"))
