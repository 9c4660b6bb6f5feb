"""Measure training steps on several GPUs of one machine: speed, share of linear scaling, memory.

    python benchmarks/several_gpus.py [--gpus 1,2] [--strategies ddp,fsdp] [--stages kd] [--mixers gla,mlstm] [--size 1.7b]

Each row is a `distill-pl fit` of its own, on a teacher of SmolLM's shape with random weights and made-up text; all options not
listed here are passed to it. A GPU has `--batch` sequences a step, however many GPUs there are. Speed is the median of what
TensorBoard logged, memory the peak of the first GPU. "Of linear" is the speed divided by the number of GPUs and by the speed of
one GPU, which runs without DDP and FSDP. Prints Markdown.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import synthetic
import torch

from distill_pl.measure.report import scalars

SIZES = {  # of SmolLM, as changes to that of 360M
    "360m": {},
    "1.7b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32,
             "intermediate_size": 8192},
}  # fmt: skip


def fitted(stage: str, mixer: str, strategy: str, gpus: int, folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Run `distill-pl fit` -> tokens a second of all GPUs, and peak GiB of the first; NaN for both where it failed."""
    out = Path(tempfile.mkdtemp(dir=folder))
    batch = args.batch * gpus
    tokens = args.steps * batch * args.length
    with open(out / "console.txt", "w") as console:
        process = subprocess.run([
            sys.executable, "-m", "distill_pl.cli", "fit", f"--out={out / 'run'}", f"--teacher={folder / 'teacher'}",
            f"--data.dataset={folder / 'text.jsonl'}", f"--data.cache={folder / 'cache'}", "--student.init=fresh",
            f"--student.mixer={mixer}", f"--tokens={tokens}", "--kd.tokens=0", f"--{stage}.tokens={tokens}",
            f"--data.batch_size={batch}", f"--data.sequence_length={args.length}", "--data.validation_tokens=25k",
            "--trainer.log_every_n_steps=5", f"--trainer.devices={gpus}", f"--trainer.strategy={strategy}",
            *args.options,
        ], stdout=console, stderr=subprocess.STDOUT)  # fmt: skip
    if process.returncode:
        print((out / "console.txt").read_text()[-2000:], file=sys.stderr)
        return float("nan"), float("nan")
    logged = scalars(next(out.glob("run/*_*")))
    return statistics.median(logged["train/tokens_per_second"][1][1:]), max(logged["train/peak_gib"][1])


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default=",".join(str(n) for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()))
    parser.add_argument("--strategies", default="ddp,fsdp")
    parser.add_argument("--stages", default="kd,matrix_mixing")
    parser.add_argument("--mixers", default="gla,delta_net,mlstm")
    parser.add_argument("--size", choices=SIZES, default="360m")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=48, help="sequences a step on each GPU")
    parser.add_argument("--length", type=int, default=512)
    args, args.options = parser.parse_known_args()
    counts = [int(count) for count in args.gpus.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.teacher(folder / "teacher", **SIZES[args.size])
        synthetic.text(folder / "text.jsonl", int(1.2 * args.steps * args.batch * args.length * max(counts)) + 100_000)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, SmolLM-{args.size}'s shape, {args.batch} x "
              f"{args.length} tokens a GPU\n")  # fmt: skip
        print("| stage | mixer | GPUs | strategy | thousand tokens/s | of linear | GiB a GPU |")
        print("|---" * 7 + "|", flush=True)
        alone: dict[tuple[str, str], float] = {}
        for stage, mixer, gpus in itertools.product(args.stages.split(","), args.mixers.split(","), counts):
            for strategy in args.strategies.split(",") if gpus > 1 else ["auto"]:
                speed, memory = fitted(stage, mixer, strategy, gpus, folder, args)
                if gpus == 1:
                    alone[stage, mixer] = speed
                share = f"{speed / (gpus * alone[stage, mixer]):.2f}" if (stage, mixer) in alone else ""
                cells = [stage, mixer, str(gpus), strategy, f"{speed / 1e3:.1f}", share, f"{memory:.1f}"]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
