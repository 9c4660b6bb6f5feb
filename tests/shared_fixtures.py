"""Fixtures: a tiny tokenizer, teacher, corpus and finished run, and parameters of many tests. No test needs a network."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import fit_command
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from distill_pl.cli import main
from distill_pl.mixers import MIXERS
from distill_pl.teacher import Teacher

torch.set_num_threads(1)  # on tensors this small, threads made tests ten times slower beside another process

EOS = "<|endoftext|>"
SUBJECTS = "a fox|the miller|her aunt|some sailor|the old clock|a lost dog|my teacher|the tall reed".split("|")
VERBS = "sees|carries|forgets|paints|follows|answers|repairs|hides".split("|")
OBJECTS = "the river|a red door|seven stones|the last letter|warm bread|a quiet song|the north wind".split("|")
ENDS = "at dawn|in the rain|without a word|before supper|near the mill|for the third time|as it should".split("|")

# configuration of all teachers and, by name, what each variant changes; heads of 16 are together wider than the hidden state
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # large, so that attention is far from uniform
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "llama": {"model_type": "llama"},
    "llama_mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama_mqa": {"model_type": "llama", "num_key_value_heads": 1},
    "llama_bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_untied": {"model_type": "llama", "tie_word_embeddings": False},
    "llama_wide_heads": {"model_type": "llama", "head_dim": 16},
    "llama_scaled_rope": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False},
}


# for `make test-fast`: a mixer without state, with a decay, with the delta rule, and the newest; two teachers
QUICK = {"softmax", "gla", "delta_net", list(MIXERS)[-1], "llama", "qwen3"}


def slow(value) -> object:
    """Mark a value of a parameter, so that `make test-fast` leaves it out."""
    return pytest.param(value, marks=pytest.mark.slow)


def quick(values) -> list:
    """Mark all values of a parameter but those in QUICK as slow."""
    return [value if value in QUICK else slow(value) for value in values]


def in_turn(names: tuple[str, ...], *values) -> pytest.MarkDecorator:
    """Run a test with each mixer as `name`, and with the next of `values`, tuples of the parameters `names`: not with each."""
    cases = [(name, *values[index % len(values)]) for index, name in enumerate(MIXERS)]
    marked = [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] not in QUICK)) for case in cases]
    return pytest.mark.parametrize(("name", *names), marked)


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Write `count` different texts of one to nine sentences."""
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, ENDS)).capitalize() + "."

    return [f"Story {i}. " + " ".join(sentence() for _ in range(rng.randint(1, 9))) for i in range(count)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which decodes any text it encoded to the same text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(make_documents(50), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


@pytest.fixture(scope="session")
def save_model(tokenizer, tmp_path_factory) -> Callable[..., Path]:
    """Return `save_model(model_type, seed=0, randomise=False, **config)`, which saves a random model and the tokenizer.

    The function returns the folder. `config` adds to SIZES or replaces them. `randomise` also draws biases and norm weights,
    which transformers initialises to 0 and 1, so that a test sees whether they were copied.
    """

    def save(model_type: str, seed: int = 0, randomise: bool = False, **changes) -> Path:
        special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        config = AutoConfig.for_model(model_type, **SIZES | {"vocab_size": len(tokenizer)} | special | changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
            if randomise:
                randomise_vectors(model)
        folder = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@torch.no_grad()
def randomise_vectors(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn_like(parameter)


@pytest.fixture(scope="session")
def teacher_folder(save_model) -> Path:
    """Save a tiny random Llama (grouped kv heads, tied head) and its tokenizer to a Hugging Face folder."""
    return save_model("llama")


@pytest.fixture(scope="session")
def teacher(teacher_folder) -> Teacher:
    return Teacher(str(teacher_folder))


@pytest.fixture(scope="session")
def variant(save_model) -> Callable[[str], Teacher]:
    """Return `variant(name)`, which makes a teacher of one of VARIANTS with random biases and norm weights, once each."""
    made: dict[str, Teacher] = {}

    def get(name: str) -> Teacher:
        if name not in made:
            made[name] = Teacher(str(save_model(seed=1, randomise=True, **VARIANTS[name])))
        return made[name]

    return get


@pytest.fixture(params=quick(VARIANTS))
def any_teacher(request, variant) -> Teacher:
    """Run the test with each of VARIANTS as teacher."""
    return variant(request.param)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Write a folder with train.jsonl: 400 short documents, column `text`."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [json.dumps({"text": text}) for text in make_documents(400, seed=1)]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def fitted(teacher_folder, corpus, tmp_path_factory) -> Callable[..., Path]:
    """Return `fitted(run=main, **keys)`, which passes a `distill-pl fit` command to `run` and returns the run's folder."""

    def fit(run: Callable[[list[str]], object] = main, **keys) -> Path:
        folder = tmp_path_factory.mktemp("runs")
        keys = {"data.validation_tokens": 320} | keys
        run(fit_command(folder / "run", teacher_folder, corpus, folder / "cache", **keys))
        return folder / "run"

    return fit


@pytest.fixture(scope="module")
def chunk_cache(tmp_path_factory) -> Path:
    """Make the folder in which the runs of a test file share their chunks."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def command(request, teacher_folder, corpus, chunk_cache) -> Callable[..., list[str]]:
    """Return `command(out, **keys)`, the arguments of a `distill-pl fit` with the test file's KEYS."""
    return lambda out, **keys: fit_command(out, teacher_folder, corpus, chunk_cache, **(request.module.KEYS | keys))


@pytest.fixture
def arguments(command, tmp_path) -> Callable[..., list[str]]:
    """Return `arguments(out="run", **keys)`, a `command` whose run is in the test's own folder."""
    return lambda out="run", **keys: command(tmp_path / out, **keys)


@pytest.fixture(params=quick(MIXERS))
def name(request) -> str:
    """Run the test with each mixer."""
    return request.param


def layout_of(name: str, kind: str) -> dict:
    """Return the options of a mixer's layout, or skip the test where there is no such layout."""
    if kind == "window" and (name in ("softmax", "swa") or "k" not in MIXERS[name].copies):
        pytest.skip("no window stands beside this mixer")
    window = {"window": 8, "sinks": 2}  # which tests' sequences outgrow
    layouts = {"rope": {"rope": not MIXERS[name].rotates}, "paper": {"shape": "paper"}, "window": window}
    return (layouts.get(kind) or {"kv_heads": kind}) | (window if name == "swa" else {})


@pytest.fixture(params=["grouped", slow("expanded"), slow("rope"), "paper", "window"])
def layout(request, name) -> dict:
    """Run the test with each layout of a mixer that a StudentFactory offers; `rope` is the opposite of the mixer's default."""
    return layout_of(name, request.param)


# every mixer as it is and in one of the other layouts, for tests that are too slow for each with each
OTHER_LAYOUTS = ("expanded", "window", "paper", "rope")
LAYOUTS = [(name, kind) for index, name in enumerate(MIXERS) for kind in ("grouped", OTHER_LAYOUTS[index % 4])]


@pytest.fixture(params=[pair if pair[0] in QUICK else slow(pair) for pair in LAYOUTS], ids="-".join)
def name_and_layout(request) -> tuple[str, dict]:
    """Run the test with LAYOUTS: a mixer's name and options of a StudentFactory."""
    return request.param[0], layout_of(*request.param)


@pytest.fixture(params=["grouped", "expanded"])
def kv_heads(request) -> str:
    """Run the test with grouped and with expanded k and v heads."""
    return request.param


# every teacher with one mixer, and every mixer with the teachers that have biases or norms of q and k
OTHERS = [mixer for mixer in MIXERS if mixer != "gla"]
PAIRS = [("llama", "gla"), *(slow((variant, "gla")) for variant in VARIANTS if variant != "llama")]
PAIRS += [("qwen3", mixer) if mixer in QUICK else slow(("qwen3", mixer)) for mixer in OTHERS]
PAIRS += [slow(("llama_bias", mixer)) for mixer in OTHERS]


@pytest.fixture(params=PAIRS, ids="-".join)
def teacher_and_name(request, variant) -> tuple[Teacher, str]:
    """Run the test with PAIRS of a teacher and a mixer's name: all of both, though not each with each."""
    return variant(request.param[0]), request.param[1]
