"""Make what the quickstart starts from, without a download: text, a tokenizer trained on it, and a small random Llama.

The text is English that every CPython carries. Writes runs/quickstart/text.jsonl and runs/quickstart/untrained/.
"""

import ast
import json
import random
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path("runs/quickstart")
END = "<|endoftext|>"


def documents() -> list[str]:
    """Collect the reference manual's topics and the standard library's docstrings, in a fixed random order."""
    found = dict.fromkeys(topics.values())
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue  # some files are broken on purpose, to test tools
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(text for text in docstrings if text)
        found[re.sub(r"(\W)\1{3,}", r"\1\1\1", text)] = None  # rulers of ----
    texts = [text.strip() for text in found if len(text) > 200]
    random.Random(0).shuffle(texts)
    return texts


def main() -> None:
    """Write the files, unless they exist: a run that is resumed must read the same bytes."""
    untrained = FOLDER / "untrained"
    if untrained.is_dir():
        return
    transformers.utils.logging.disable_progress_bar()
    FOLDER.mkdir(parents=True, exist_ok=True)
    texts = documents()
    with open(FOLDER / "text.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    aside = untrained.with_name("untrained.new")
    LlamaForCausalLM(config).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(untrained)
    print(f"{sum(map(len, texts)) / 1e6:.1f} MB of text from this Python's manual and docstrings in {FOLDER}")


if __name__ == "__main__":
    main()
