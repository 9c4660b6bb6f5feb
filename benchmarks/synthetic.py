"""What the benchmarks of training run on, made up on the spot: a teacher of SmolLM-360M's shape, and text of random words."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from distill_pl.measure.params import smollm_360m

DOCUMENT = 600  # words, about as long as FineWeb's


def teacher(folder: Path) -> Path:
    """A folder with random weights in bf16, as SmolLM-360M's are, and a tokenizer that knows the words w1 to w49151."""
    config = smollm_360m().config
    config.max_position_embeddings = 2**16  # for texts of any length: nobody reads what it writes
    words = {"<eos>": config.eos_token_id} | {f"w{i}": i for i in range(1, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def text(file: Path, tokens: int) -> Path:
    """A .jsonl file of at least so many tokens; small numbers are frequent words, as by Zipf's law."""
    made = random.Random(0)
    with open(file, "w") as out:
        for _ in range(-(-tokens // DOCUMENT)):
            words = (f"w{int(49151 ** made.random())}" for _ in range(DOCUMENT))
            out.write(json.dumps({"text": " ".join(words)}) + "\n")
    return file
