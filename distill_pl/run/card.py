"""The model card of an exported student: what it is, how to load it, what it was made of and what it scored."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, model_info
from jsonargparse import Namespace
from transformers import PreTrainedModel

from distill_pl.console import markdown, percent, perplexity
from distill_pl.measure import study
from distill_pl.run.folder import StageRun, plain, read_metrics, write_aside
from distill_pl.student.modeling import Student
from distill_pl.tokens import short

TEXT = """
# {name}

A causal language model that distill_pl made of `{teacher}`: in each of its {layers} layers attention was replaced by
{mixer}, and the result distilled from the original. {parameters} parameters.

## How to load it

```python
{load}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=40)[0]))
```

## How it was made

{stages}

Perplexity is of text that no stage trained on{of_teacher}. The text is `{dataset}`; distill_pl {version}, torch {torch},
transformers {transformers}. The whole configuration, which `distill-pl fit --config` takes:

```yaml
{config}```

## Results

{results}

## Licence

{licence}
"""
RESULTS = "<!-- distill-pl evaluate writes here -->\n{}\n<!-- as far as here -->"


def model_card(config: Namespace, stages: list[StageRun], model: PreTrainedModel) -> ModelCard:
    """Of the model that a finished run exports."""
    teacher, dataset = config.teacher, config.data.dataset
    licence, about = licence_of(teacher)
    metrics = [read_metrics(stage.weights) for stage in stages]
    rows = [["stage", "tokens", "learning rate", "perplexity after it"]]
    for stage, found in zip(stages, metrics, strict=True):
        tokens = short(stage.steps * config.data.batch_size * config.data.sequence_length)
        rows.append([stage.name, tokens, f"{config[stage.name].lr:g}", f"{perplexity(found['student_ce']):.2f}"])
    data = ModelCardData(
        base_model=None if Path(teacher).exists() else teacher,
        datasets=None if Path(dataset).exists() else [dataset],
        library_name="transformers",
        license=licence,
        pipeline_tag="text-generation",
        tags=["distill_pl", "knowledge-distillation", config.student.mixer],
    )
    text = TEXT.format(
        name=Path(config.out).name,
        teacher=teacher,
        layers=model.config.num_hidden_layers,
        mixer=config.student.mixer,
        parameters=short(sum(p.numel() for p in model.parameters())),
        load="import distill_pl  # lets transformers load its students\n" if isinstance(model, Student) else "",
        stages=markdown(rows),
        of_teacher=f"; the teacher's is {perplexity(metrics[-1]['teacher_ce']):.2f}" if "teacher_ce" in metrics[-1] else "",
        dataset=dataset,
        version=version("distill_pl"),
        torch=version("torch"),
        transformers=version("transformers"),
        config=yaml.safe_dump(plain(config), sort_keys=False),
        results=RESULTS.format("Not evaluated yet: `distill-pl evaluate RUN --tasks study` does it."),
        licence=about,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def licence_of(teacher: str) -> tuple[str | None, str]:
    """Of a model folder's card or of the hub's: its identifier, None where it says none, and a sentence about it."""
    unknown = f"The weights come from `{teacher}`: its licence holds for them, too, but could not be read"
    try:
        if Path(teacher).exists():
            card = Path(teacher) / "README.md"
            found = (metadata_load(card) or {}).get("license") if card.is_file() else None
        else:
            found = getattr(model_info(teacher, timeout=10).card_data, "license", None)
    except Exception as error:  # the hub's client has errors of its network library, which changes, and none is worth a run
        return None, f"{unknown} ({' '.join(str(error).split())[:120]})."
    if not found:
        return None, f"{unknown} (its card names none)."
    return found, f"The weights come from `{teacher}`, whose licence, {found}, holds for them, too."


def add_results(student: Path, results: dict[str, dict[str, Any]]) -> None:
    """Put the paper's columns of lm-eval results, by task, into an exported student's card; what else stands there stays."""
    file = student / "README.md"
    found = study.columns(results)
    if not found or not file.is_file():
        return
    card = ModelCard(file.read_text())
    rows = [["tasks", "zero-shot accuracy, %"]]
    rows += [[", ".join(study.COLUMNS.get(column, ["average"])), percent(*value)] for column, value in found.items()]
    before, after = (re.escape(part) for part in RESULTS.split("{}"))
    written = RESULTS.format(markdown(rows))
    card.text = re.sub(f"{before}.*{after}", lambda _: written, card.text, flags=re.DOTALL)
    data: Any = card.data
    data.model_name = student.resolve().parent.name
    kind: Any = {"task_type": "text-generation", "metric_type": "acc"}
    data.eval_results = [
        EvalResult(dataset_type=task, dataset_name=task, metric_value=row["acc"], **kind)
        for task, row in results.items()
        if "acc" in row
    ]
    write_aside(file, lambda aside: aside.write_text(f"---\n{data.to_yaml()}\n---\n{card.text}"))
