"""Measure every stage's training step at the study's shape, and the same step written by hand: speed, memory, share of peak.

    python benchmarks/training.py [--stages kd,exact] [--length 512] [--mixers gla,mlstm] [--steps 40]

Stages are those of the package, and `exact`: matrix mixing with whole T x T matrices. `matrix_mixing` estimates by probes.
The step of this package is `distill-pl fit` itself (Lightning, fp32 weights, bf16 compute, clipping, TensorBoard); all options
not listed here are passed to it, and the speed printed is the one it logs. The step by hand is what one would write with
transformers and fla.layers: whole logits, torch's own losses, nothing compiled. For a mixer that fla.layers does not have, or
not without further packages, this package's mixer stands in, not compiled. The peaks are those of a large bf16 matrix product
in the same process: one at a time, and many without a pause, which a GPU's power limit may slow down as it may a step. Prints
Markdown. Needs a GPU and `pip install -e '.[gpu,bench]'`.
"""

import argparse
import contextlib
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import synthetic
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import LlamaForCausalLM

from distill_pl.cli import main as distill_pl
from distill_pl.errors import one_line
from distill_pl.losses import hidden_distance
from distill_pl.measure.params import count, smollm_360m
from distill_pl.measure.report import scalars
from distill_pl.mixers import MIXERS
from distill_pl.run import fit as fit_module
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student

GIB = 2**30


def attention_by_hand(mixer: str, layer_idx: int) -> nn.Module | None:
    """Build fla's layer with heads like SmolLM-360M's; return None where no layer runs on fla alone."""
    import fla.layers as layers

    import distill_pl.ops.gpu.fla_kernels  # noqa: F401 (uses the kernels tuned ahead: tuning takes minutes)

    shape = {"hidden_size": 960, "num_heads": 15, "layer_idx": layer_idx}
    made: dict[str, Callable[[], nn.Module]] = {
        "gla": lambda: layers.GatedLinearAttention(expand_k=1.0, **shape),
        "hgrn2": lambda: layers.HGRN2Attention(expand_ratio=64, **shape),
        "retnet": lambda: layers.MultiScaleRetention(expand_v=1.0, **shape),
        "delta_net": lambda: layers.DeltaNet(**shape),
        "rebased": lambda: layers.ReBasedLinearAttention(feature_dim=64, num_key_value_heads=15, **shape),
        "gated_delta_net": lambda: layers.GatedDeltaNet(head_dim=64, expand_v=1, **shape),
        "kda": lambda: layers.KimiDeltaAttention(head_dim=64, **shape),
    }
    return made[mixer]() if mixer in made else None


class ByHand(nn.Module):
    """Stand in for a Llama's attention with a layer of fla."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, **unused) -> tuple[Tensor, None]:
        """Mix hidden_states [B, T, D] -> [B, T, D] and None, as transformers' attention does."""
        found = self.attention(hidden_states)
        return (found[0] if isinstance(found, tuple) else found), None


def student_by_hand(mixer: str) -> nn.Module:
    """Build a random fp32 model of SmolLM-360M's shape with the mixer as attention, on the GPU."""
    config = smollm_360m().config
    with torch.device("cuda"):
        if attention_by_hand(mixer, 0) is None:
            return Student(StudentFactory(mixer, "fresh").config(smollm_360m()))
        student = LlamaForCausalLM(config)
        for index, layer in enumerate(student.model.layers):
            layer.self_attn = ByHand(attention_by_hand(mixer, index))
    return student


def kd_by_hand(student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    """Compute Eq. 5 from whole logits for tokens [B, T]."""
    with torch.no_grad():
        expected = teacher(tokens, use_cache=False).logits[:, :-1]
    logits = student(tokens, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    log_q, log_p = log_softmax(logits, -1), log_softmax(expected.flatten(0, 1).float(), -1)
    return cross_entropy(logits, tokens[:, 1:].flatten()) + kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def align_by_hand(student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    """Compute Eq. 8 for tokens [B, T], each block on the teacher's input of that block."""
    with torch.no_grad():
        states = teacher.model(tokens, use_cache=False, output_hidden_states=True).hidden_states
        position = teacher.model.rotary_emb(states[0], torch.arange(tokens.shape[1], device="cuda")[None])
    layers = zip(student.model.layers, states[:-1], states[1:], strict=True)
    return sum(hidden_distance(layer(x, position_embeddings=position), y) for layer, x, y in layers)


def speed_by_hand(stage: str, mixer: str, shape: tuple[int, int], repeats: int = 8) -> tuple[float, float]:
    """Measure a whole step by hand: return tokens a second and peak GiB."""
    student, teacher = student_by_hand(mixer), LlamaForCausalLM(smollm_360m().config).bfloat16().cuda()
    if stage == "hidden_align":
        student.requires_grad_(False)
        for layer in student.model.layers:
            layer.self_attn.requires_grad_(True)
    loss_of = align_by_hand if stage == "hidden_align" else kd_by_hand
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(student, teacher, torch.randint(49152, shape, device="cuda"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return math.prod(shape) / timed(step, repeats), torch.cuda.max_memory_allocated() / GIB


def timed(run: Callable[[], object], repeats: int, warm_up: int = 3) -> float:
    """Return the median seconds of a call, waiting for the GPU each time."""
    times = []
    for _ in range(warm_up + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def peak_of_products(at_once: int, repeats: int) -> float:
    """Return the FLOP/s of `at_once` consecutive bf16 products of two random 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        for _ in range(at_once):
            a @ b

    return at_once * 2 * 8192**3 / timed(multiply, repeats)


@torch.no_grad()
def speed_of_teacher(shape: tuple[int, int]) -> float:
    """Return the tokens a second of the teacher's own forward pass, logits included."""
    teacher = LlamaForCausalLM(smollm_360m().config).bfloat16().cuda()
    tokens = torch.randint(49152, shape, device="cuda")
    return math.prod(shape) / timed(lambda: teacher(tokens, use_cache=False), 10)


class Trained(Exception):
    """Signal that a stage has taken its last step."""


def stop(*args) -> None:
    """Raise Trained; this replaces the function that saves a student, which is not to be measured."""
    raise Trained


def fitted(stage: str, mixer: str, folder: Path, args: argparse.Namespace) -> tuple[Sequence[float], float, float]:
    """Run `distill-pl fit`: return the tokens a second between its log lines, the peak GiB and the last training loss."""
    name = "matrix_mixing" if stage == "exact" else stage
    tokens = args.steps * args.batch * args.length
    out = Path(tempfile.mkdtemp(dir=folder))
    fit_module.save_student = stop
    with contextlib.suppress(Trained):
        distill_pl([
            "fit", f"--out={out / 'run'}", f"--teacher={folder / 'teacher'}", f"--data.dataset={folder / 'text.jsonl'}",
            f"--data.cache={folder / 'cache'}", "--student.init=fresh", f"--student.mixer={mixer}", f"--tokens={tokens}",
            "--kd.tokens=0", f"--{name}.tokens={tokens}", f"--data.batch_size={args.batch}", "--data.validation_tokens=25k",
            f"--data.sequence_length={args.length}",
            "--trainer.log_every_n_steps=5", *(["--matrix_mixing.estimator=exact"] if stage == "exact" else []), *args.options,
        ])  # fmt: skip
    logged = scalars(next(out.glob("run/*_*")))
    speeds, peaks, losses = (logged[f"train/{key}"][1] for key in ("tokens_per_second", "peak_gib", "loss"))
    return speeds[1:], max(peaks), losses[-1]  # the first speed includes compilation


def clear() -> None:
    """Free what earlier measurements compiled and allocated."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="kd,hidden_align,matrix_mixing,exact")
    parser.add_argument("--mixers", default=",".join(name for name in MIXERS if name != "softmax"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--hand", default="kd,hidden_align", help="stages to measure by hand as well")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    args, args.options = parser.parse_known_args()
    if args.steps < 10:
        parser.error(f"--steps {args.steps} is too few for a speed: give at least 10")
    shape = (args.batch, args.length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.teacher(folder / "teacher")
        synthetic.text(folder / "text.jsonl", int(1.2 * args.steps * math.prod(shape)) + 100_000)
        peaks, teacher = (peak_of_products(1, 20), peak_of_products(500, 3)), speed_of_teacher(shape)
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.batch} x {args.length} tokens; bf16 products at "
            f"{peaks[0] / 1e12:.0f} TFLOP/s one at a time, {peaks[1] / 1e12:.0f} without a pause; the teacher's forward pass "
            f"alone, by hand: {teacher / 1e3:.0f} thousand tokens/s"
        )
        header = ["stage", "mixer", "thousand tokens/s (range)", "of the peaks", "GiB", "last loss", "by hand", "GiB", "ratio"]
        rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for stage in args.stages.split(","):
            for mixer in args.mixers.split(","):
                clear()
                speeds, memory, loss = fitted(stage, mixer, folder, args)
                speed = statistics.median(speeds)
                spread = f"{speed / 1e3:.1f} ({min(speeds) / 1e3:.1f} to {max(speeds) / 1e3:.1f})"
                cells = [spread, "", f"{memory:.1f}", f"{loss:.4f}"]
                print(f"{stage}, {mixer}: {spread}, {memory:.1f} GiB", flush=True)  # at once: by hand, fla may tune for minutes
                clear()
                if stage in args.hand.split(","):
                    try:
                        hand, hand_memory = speed_by_hand(stage, mixer, shape)
                        cells += [f"{hand / 1e3:.1f}", f"{hand_memory:.1f}", f"{speed / hand:.2f}"]
                    except torch.OutOfMemoryError:
                        cells += ["out of memory", "", ""]
                    except RuntimeError as error:  # fla refuses some of its kernels on some GPUs
                        cells += [f"refused: {one_line(error)}", "", ""]
                else:
                    cells += ["", "", f"{teacher / speed:.2f} x the teacher's forward"]
                if stage == "kd":  # FLOP of a token: per parameter 2 forward, 4 backward; the teacher (362M) only forward
                    flops = 2 * 362e6 + 6 * count(StudentFactory(mixer), smollm_360m())
                    cells[1] = ", ".join(f"{speed * flops / peak:.0%}" for peak in peaks)
                rows.append(f"| {stage} | {mixer} | {' | '.join(cells)} |")
                print(rows[-1], flush=True)
        print("\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
