"""Measure whether a long run grows: a tiny `distill-pl fit` of all three stages with a checkpoint after every step.

    python benchmarks/soak.py [--checkpoints 450] [--every 50]

Runs on a CPU or a GPU, makes its own teacher and text, and downloads nothing. Prints the memory of the process and the bytes
of the run folder as it goes. In the end it prints for each stage how fast they grow, by a straight line through all samples but
the first third, in which a stage still allocates.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from distill_pl.cli import main as distill_pl


def make_inputs(folder: Path) -> None:
    """Write a random Llama of two layers with its tokenizer, and a text, into the folder."""
    texts = ["".join(random.Random(i).choices("abcdefgh ", k=400)) for i in range(600)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(texts[:50], trainers.BpeTrainer(vocab_size=100, special_tokens=["<eos>"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder / "teacher")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(folder / "teacher")


def main() -> None:
    """Run all stages, sample memory and disk after every checkpoint, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=450)
    parser.add_argument("--every", type=int, default=50)
    args = parser.parse_args()
    rows: dict[str, list[tuple[float, float, float]]] = {}  # by stage: RSS MiB, GPU MiB, bytes of the run folder
    save, process, console = ModelCheckpoint._save_checkpoint, psutil.Process(), sys.stdout

    def counted(self, trainer, path) -> None:
        save(self, trainer, path)
        found = rows.setdefault(trainer.lightning_module.name, [])
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        found.append((process.memory_info().rss / 2**20, torch.cuda.memory_allocated() / 2**20, size))
        if (done := sum(map(len, rows.values()))) % args.every == 0:
            print(f"{done:11} {found[-1][0]:9.1f} {found[-1][1]:9.1f} {size:12,}", file=console, flush=True)

    ModelCheckpoint._save_checkpoint = counted
    step, stage = 4 * 32, args.checkpoints // 3 * 4 * 32  # tokens
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch), Path(scratch) / "run"
        make_inputs(folder)
        keys = {
            "out": out, "teacher": folder / "teacher", "data.dataset": folder / "text.jsonl", "data.cache": folder / "cache",
            "tokens": 3 * stage, "matrix_mixing.tokens": stage, "hidden_align.tokens": stage,
            "data.sequence_length": 32, "data.batch_size": 4, "data.validation_tokens": 8 * 32,
            "data.repeat": True, "checkpoint_every": step, "validate_every": 10 * step, "trainer.log_every_n_steps": 1,
        }  # fmt: skip
        print("checkpoints   RSS MiB   GPU MiB   run, bytes")
        with contextlib.redirect_stdout(io.StringIO()):
            distill_pl(["fit", *(f"--{key}={value}" for key, value in keys.items())])
        print("\ngrowth per 100 checkpoints")
        for name, found in rows.items():
            late = np.array(found[len(found) // 3 :])
            rss, memory, size = 100 * np.polyfit(np.arange(len(late)), late, 1)[0]
            print(f"{name:15} {len(found)} checkpoints: RSS {rss:+.2f} MiB, GPU {memory:+.2f} MiB, disk {size:+,.0f} bytes")


if __name__ == "__main__":
    main()
