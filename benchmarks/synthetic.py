"""Make the inputs of the training benchmarks: a teacher of SmolLM-360M's shape with random weights, and random text."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from distill_pl.measure.params import smollm_360m

DOCUMENT = 600  # words, about as many as FineWeb's documents have


def teacher(folder: Path, **sizes: int) -> Path:
    """Write random weights in bf16, as SmolLM-360M's are, and a tokenizer of the words w1 to w49151; return the folder.

    sizes: keys of the configuration in place of SmolLM-360M's.
    """
    config = smollm_360m().config
    config.update({"max_position_embeddings": 2**16} | sizes)  # so that any sequence length can be measured
    words = {"<eos>": config.eos_token_id} | {f"w{i}": i for i in range(1, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def text(file: Path, tokens: int) -> Path:
    """Write a .jsonl file of at least `tokens` tokens and return it; words of small numbers are frequent, by Zipf's law."""
    made = random.Random(0)
    with open(file, "w") as out:
        for _ in range(-(-tokens // DOCUMENT)):
            words = (f"w{int(49151 ** made.random())}" for _ in range(DOCUMENT))
            out.write(json.dumps({"text": " ".join(words)}) + "\n")
    return file
