"""Measure the time from the start of `distill-pl fit` to its first finished step, with cold caches and with warm ones.

    python benchmarks/startup.py [--mixers gla,mlstm] [--stages kd,matrix_mixing,hidden_align]

Each run distils a teacher of SmolLM-360M's shape with random weights, in the study's batches. Cold: Triton's and Inductor's
caches are empty and no text is packed. Warm: both are there from the cold run. Prints a Markdown table. Meant for a GPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import synthetic
import torch

from distill_pl.stages import STAGES

TOKENS = 48 * 512 * 2


def seconds(command: list[str], env: dict[str, str], line: str) -> float:
    """Run a command until it prints a line that contains `line`, stop it, and return the seconds this took."""
    start, output = time.monotonic(), []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for printed in process.stdout:
            output.append(printed)
            if line in printed:
                process.kill()
                return time.monotonic() - start
    raise SystemExit("".join(output))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default="gla,mlstm")
    parser.add_argument("--stages", default="kd")
    args = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{gpu}, torch {torch.__version__}\n\n| mixer | stage | cold, s | warm, s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher, text = synthetic.teacher(folder / "teacher"), synthetic.text(folder / "text.jsonl", 10**6)
        for mixer in args.mixers.split(","):
            for stage in args.stages.split(","):
                cache = folder / f"{mixer}_{stage}"
                env = os.environ | {f"{name}_CACHE_DIR": str(cache / name) for name in ("TRITON", "TORCHINDUCTOR")}
                budgets = {f"{name}.tokens": TOKENS if name == stage else 0 for name in STAGES}
                keys = {"teacher": teacher, "data.dataset": text, "data.cache": cache / "chunks", "tokens": TOKENS}
                keys |= budgets | {"student.mixer": mixer}
                command = [sys.executable, "-m", "distill_pl.cli", "fit", *(f"--{key}={value}" for key, value in keys.items())]
                times = [seconds([*command, f"--out={cache / run}"], env, f"{stage}  step 1/") for run in ("cold", "warm")]
                print(f"| {mixer} | {stage} | {times[0]:.1f} | {times[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
