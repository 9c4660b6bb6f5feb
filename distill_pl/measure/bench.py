"""`distill-pl bench`: what generation costs against length, in time and in memory (paper, section 5.3 and Figure 2)."""

import csv
import difflib
import gc
import json
import platform
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.cache_utils import Cache

from distill_pl.console import quiet, say
from distill_pl.decoding.decoder import Decoder, why_not
from distill_pl.errors import InputError
from distill_pl.measure.evaluate import load, student_folder
from distill_pl.measure.params import smollm_360m
from distill_pl.mixers import MIXERS
from distill_pl.run.folder import write_aside
from distill_pl.student.cache import state_bytes
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student, StudentConfig
from distill_pl.tokens import short

RANDOM = "random"  # stands for the place of weights that come from nowhere
GPU, CPU = ("1024,4096,16384,65536", 5), ("128,256,512,1024", 3)  # default lengths and repeats
DECODE = ("auto", "graph", "plain")
WIDTHS = {"length": 8, "prefill tokens/s": 16, "decode": 6, "decode ms/token": 24, "of limit": 8, "tokens/s": 8,
          "GiB prefill": 11, "GiB decode": 10, "state bytes": 14, "in theory": 14}  # fmt: skip

Row = dict[str, Any]


def bench(
    models: list[str],
    lengths: str | None = None,
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int | None = None,
    prefill_chunk: int = 0,
    decode: str = "auto",
    seed: int = 0,
    out: str = "bench",
) -> None:
    """Time generation against the length of the prompt, prefill and decode apart, and its memory (paper, Figure 2).

    Each model reads a prompt of random tokens, then adds tokens one at a time, each time the likeliest; bf16 on a GPU, fp32 on
    a CPU; by the clock. Prints a row a length: prompt tokens a second; how it decodes (--decode); milliseconds a decoded token
    (of the whole batch at a time), median and range of the repeats; how near that is to the limit, the time in which the GPU
    copies as many bytes as the weights and the state have, measured in the same run; decoded tokens a second over the batch;
    at their peak the GiB that prefill and decode add to the weights, on a GPU only; the bytes of the state, measured (before
    the first decoded token; decoding by graph, of the buffers that have room for all) and in theory.

    Writes bench.json (all repeats), bench.csv and bench.png after every row. The same command goes on where it was stopped
    and never measures a row twice.

    Args:
        models: run folders of `distill-pl fit`, model folders, hub ids, or names of mixers, e.g. gla: a student of
            SmolLM-360M's shape with random weights, which time does not depend on; softmax is SmolLM-360M's own
            architecture. A folder of that name comes first.
        lengths: of the prompts, in tokens, e.g. 1024,4096. Default: 1024,4096,16384,65536; 128,256,512,1024 on a CPU.
            Also beyond what a model was trained for: its time holds there, its text would not.
        new_tokens: decoded after each prompt.
        batch_size: prompts at a time.
        repeats: of each length, after one that is not counted. Default: 5; 3 on a CPU.
        prefill_chunk: read the prompt in pieces of so many tokens, which bounds the memory of prefill; 0: at once, the
            fastest way for softmax attention, which has kernels for a whole triangle and masks a piece.
        decode: graph, each step compiled and captured as one CUDA graph, states in fixed buffers (softmax attention too, whose
            keys and values have room for the length and the new tokens), for what is built like Llama; plain, by the model's
            own cached forward pass; auto, graph on a GPU.
        seed: of random weights and prompts.
        out: folder to write to. Results that are there under other settings are refused, not replaced.
    """
    quiet()
    gpu = torch.cuda.is_available()
    default_lengths, default_repeats = GPU if gpu else CPU
    repeats = default_repeats if repeats is None else repeats
    at = parse(default_lengths if lengths is None else lengths)
    for name, value, least in [("new_tokens", new_tokens, 1), ("batch_size", batch_size, 1), ("repeats", repeats, 1),
                               ("prefill_chunk", prefill_chunk, 0)]:  # fmt: skip
        if value < least:
            raise InputError(f"{name} {value} is too small: give at least {least}")
    sources = {model: find(model, at[-1] + new_tokens) for model in dict.fromkeys(models)}
    if decode not in DECODE or (decode == "graph" and not gpu):
        raise InputError(f"decode {decode!r}: " + ("needs a GPU" if decode in DECODE else f"choose from {', '.join(DECODE)}"))
    if decode == "auto":
        decode = "graph" if gpu else "plain"
    settings = {"new_tokens": new_tokens, "batch_size": batch_size, "repeats": repeats, "prefill_chunk": prefill_chunk,
                "decode": decode, "seed": seed} | environment()  # fmt: skip
    file = Path(out) / "bench.json"
    rows = known(file, settings)

    say(f"{settings['device']}, {settings['dtype']}, batch of {batch_size}, {repeats} repeats of {new_tokens} new tokens")
    if not gpu:
        say("no GPU: lengths and repeats are small unless given; memory has no honest peak here, only the state's size is told")
    width = max(map(len, sources))
    say(line(["model", *WIDTHS], width))
    bandwidth = None
    for model, source in sources.items():
        network = None
        for length in at:
            row = next((r for r in rows if (r["model"], r["weights"], r["length"]) == (model, source, length)), None)
            before = row is not None
            if row is None:
                first, row = network is None, {"model": model, "weights": source, "length": length}
                if network is None:
                    network = open_model(model, source, seed, at[-1] + new_tokens)
                    bandwidth = bandwidth or measured_bandwidth()
                    reason = why_not(network, at[-1] + new_tokens) if decode == "graph" else None
                    if reason:
                        say(f"{model}: decodes the plain way: {reason}")
                row |= {"softmax": not isinstance(network, Student), "weights_bytes": network.get_memory_footprint(),
                        "decode": "plain" if reason else decode, "bandwidth": bandwidth}  # fmt: skip
                try:
                    row |= measure(network, length, settings | {"decode": row["decode"]}, warm_up=new_tokens if first else 1)
                    row |= limit(network, row)
                except torch.OutOfMemoryError:
                    row["out_of_memory"] = True
                rows.append(row)
                write(Path(out), settings, rows)
            say(line(cells(row), width) + ("  (measured before)" if before else ""))
            if "out_of_memory" in row:
                if length < at[-1]:
                    say(f"{model}: lengths beyond {length} are left out")
                break
        del network
        gc.collect()
        torch.cuda.empty_cache()
    write(Path(out), settings, rows)
    say(f"in {out}: bench.png, bench.csv, bench.json")


def parse(lengths: str) -> list[int]:
    """`1024,4096` as numbers in ascending order. Raises InputError for anything else."""
    parts = [part.strip() for part in lengths.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"lengths {lengths!r} are not whole positive numbers: write e.g. 1024,4096")
    return sorted({int(part) for part in parts})


def find(model: str, positions: int) -> str:
    """Where the weights of a model are: folder, hub id, or RANDOM for a mixer. Only its configuration is read.

    Raises InputError where there is no such model, or where it has a table of fewer than `positions` positions.
    """
    if model in MIXERS and not Path(model).exists():
        return RANDOM
    near = [] if "/" in model or Path(model).exists() else difflib.get_close_matches(model, MIXERS, n=1)
    if near:
        raise InputError(f"model {model!r} is neither a folder nor a mixer: did you mean {near[0]}?")
    path = student_folder(model) if (Path(model) / "config.yaml").is_file() else model
    try:
        if model[:1] in "./~" and not Path(model).exists():
            raise OSError("no such folder")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model {model!r} cannot be had ({str(error).strip().splitlines()[0][:200]}): give a run folder, a Hugging Face "
            f"model folder, a hub id, or a mixer: {', '.join(MIXERS)}"
        ) from error
    limit = getattr(config, "max_position_embeddings", None)
    if limit and limit < positions and not isinstance(config, StudentConfig) and not hasattr(config, "rope_parameters"):
        raise InputError(f"model {model!r} has a table of {limit} positions, {positions} are asked for: give shorter lengths")
    return path


def environment() -> dict[str, str | None]:
    """What the results depend on besides the options."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}, threads: {torch.get_num_threads()}",
        "dtype": "bfloat16" if gpu else "float32",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "fla": version("fla-core") if find_spec("fla") else None,
    }


def known(file: Path, settings: dict[str, Any]) -> list[Row]:
    """The rows of an earlier call. Raises InputError if they were measured under other settings."""
    if not file.is_file():
        return []
    found = json.loads(file.read_text())
    differ = [f"{key} {found['settings'].get(key)}, now {value}" for key, value in settings.items()
              if found["settings"].get(key) != value]  # fmt: skip
    if differ:
        raise InputError(f"{file} holds results of other settings ({'; '.join(differ)}): give another --out")
    return found["rows"]


def open_model(model: str, source: str, seed: int, positions: int) -> PreTrainedModel:
    """What `find` found at `source`, on the GPU in bf16 if there is one; says so where it is not made for `positions`."""
    if source == RANDOM:
        teacher, gpu = smollm_360m(), torch.cuda.is_available()
        # a softmax student is exported as its teacher's class, too
        config = teacher.config if model == "softmax" else StudentFactory(model).config(teacher)
        set_seed(seed)
        with torch.device("cuda" if gpu else "cpu"):
            network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if gpu else torch.float32).eval()
    else:
        network = load(source)[0]
    limit = getattr(network.config, "max_position_embeddings", None)
    turns = not isinstance(network, Student) or any(mixer.rope for mixer in network.mixers)
    if turns and limit and positions > limit:
        say(f"{model}: made for {limit} positions; beyond them its time holds, its text would not")
    return network


def theory(network: PreTrainedModel, batch: int, length: int) -> int | None:
    """Bytes of the state after `length` tokens, from the architecture alone; None where that is not built like Llama."""
    itemsize = network.dtype.itemsize
    if isinstance(network, Student):
        return sum(mixer.state_bytes(batch, length, itemsize) for mixer in network.mixers)
    if getattr(network.config, "sliding_window", None):
        return None
    try:
        widths = [a.k_proj.out_features + a.v_proj.out_features for a in (x.self_attn for x in network.model.layers)]
    except AttributeError:
        return None
    return batch * length * sum(widths) * itemsize


@torch.no_grad()
def prefill(network: PreTrainedModel, prompt: Tensor, chunk: int = 0) -> tuple[Tensor, Cache]:
    """Read a prompt [B, T], in pieces of `chunk` tokens or (0) at once -> the likeliest next token [B, 1], the cache."""
    cache: Any = None
    for piece in prompt.split(chunk or prompt.shape[1], dim=1):
        found = network(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = found.past_key_values
    return found.logits[:, -1:].argmax(-1), cache


@torch.no_grad()
def decode(network: PreTrainedModel, token: Tensor, cache: Cache, steps: int) -> Tensor:
    """Greedily from `token` [B, 1] -> the `steps` tokens after it [B, steps]. Nothing waits for the GPU in between."""
    tokens = []
    for _ in range(steps):
        token = network(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, 1)


def measured_bandwidth() -> float | None:
    """Bytes a second that the GPU reads and writes in a large copy."""
    if not torch.cuda.is_available():
        return None
    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * source.nbytes / median(times)


def limit(network: PreTrainedModel, row: Row) -> Row:
    """The time of a token if reading weights and state once were all, and what share of its time that is."""
    if row["bandwidth"] is None:
        return {}
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    looked_up = 0 if embedding.weight is head.weight else embedding.weight.nbytes  # only a row of it is read
    ms = 1000 * (row["weights_bytes"] - looked_up + row["state_bytes"]) / row["bandwidth"]
    return {"limit_ms": ms, "decode_of_limit": ms / row["decode_ms"]}


def measure(network: PreTrainedModel, length: int, settings: dict[str, Any], warm_up: int) -> Row:
    """Time and memory at one length, after a repetition of `warm_up` decoded tokens that is not counted."""
    gpu, batch = network.device.type == "cuda", settings["batch_size"]
    numbers = torch.Generator().manual_seed(settings["seed"])
    prompt = torch.randint(network.config.vocab_size, (batch, length), generator=numbers)
    prompt = prompt.to(network.device)

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak() -> int | None:  # since the last call, beyond `before`, with what a graph keeps
        if not gpu:
            return None
        found = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        return found + (decoder.pool_bytes() if decoder else 0)

    if gpu:  # neither the Decoder of the last length nor what the libraries take at their first call is of this measurement
        gc.collect()
        prefill(network, prompt[:, :1])
    before = torch.cuda.memory_allocated() if gpu else 0
    decoder = Decoder(network, length + settings["new_tokens"]) if settings["decode"] == "graph" else None
    row: Row = {"prefill_seconds": [], "decode_seconds": [], "state_in_theory": theory(network, batch, length)}
    for steps in [warm_up] + [settings["new_tokens"]] * settings["repeats"]:
        cache: Any = None
        if gpu:
            peak()
        start = now()
        if decoder is None:
            token, cache = prefill(network, prompt, settings["prefill_chunk"])
        else:
            decoder.prefill(prompt, settings["prefill_chunk"])
        read = now() - start
        row |= {"prefill_peak_bytes": peak(), "state_bytes": decoder.nbytes() if decoder else state_bytes(cache)}
        start = now()
        if decoder is None:
            decode(network, token, cache, steps)
        else:
            for _ in range(steps):
                decoder.step()
        row["prefill_seconds"].append(read)
        row["decode_seconds"].append(now() - start)
        row["decode_peak_bytes"] = peak()
        del cache  # or the next repetition's peak would hold two
    reads, writes = (row[key][1:] for key in ("prefill_seconds", "decode_seconds"))
    per_token = [1000 * seconds / settings["new_tokens"] for seconds in writes]
    return row | {
        "prefill_seconds": reads,
        "decode_seconds": writes,
        "prefill_tokens_per_second": batch * length / median(reads),
        "decode_ms": median(per_token),
        "decode_ms_min": min(per_token),
        "decode_ms_max": max(per_token),
        "decode_tokens_per_second": 1000 * batch / median(per_token),
    }


def cells(row: Row) -> list[str]:
    """A row as the console shows it."""
    if "out_of_memory" in row:
        return [row["model"], str(row["length"]), "out of memory"]
    peaks = [row["prefill_peak_bytes"], row["decode_peak_bytes"]]
    return [
        row["model"],
        str(row["length"]),
        short(row["prefill_tokens_per_second"]),
        row["decode"],
        f"{row['decode_ms']:.2f} ({row['decode_ms_min']:.2f} to {row['decode_ms_max']:.2f})",
        f"{row['decode_of_limit']:.0%}" if "decode_of_limit" in row else "",
        short(row["decode_tokens_per_second"]),
        *("" if peak is None else f"{peak / 2**30:.3f}" for peak in peaks),
        *("" if size is None else f"{size:,}" for size in (row["state_bytes"], row["state_in_theory"])),
    ]


def line(cells: list[str], width: int) -> str:
    """One line of the table, its first column `width` wide: lines are printed before later ones are known."""
    widths = list(WIDTHS.values())[: len(cells) - 1]
    return "  ".join([cells[0].ljust(width), *(cell.rjust(w) for cell, w in zip(cells[1:], widths, strict=True))]).rstrip()


def write(folder: Path, settings: dict[str, Any], rows: list[Row]) -> None:
    """bench.json, bench.csv and bench.png, each whole at any moment."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    rows = sorted(rows, key=lambda row: (names.index(row["model"]), row["length"]))
    report = {"settings": settings, "rows": rows}
    write_aside(folder / "bench.json", lambda aside: aside.write_text(json.dumps(report, indent=2)))
    flat = [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows]

    def fill(aside: Path) -> None:
        with open(aside, "w", newline="") as opened:
            table = csv.DictWriter(opened, list(dict.fromkeys(key for row in flat for key in row)))
            table.writeheader()
            table.writerows(flat)

    write_aside(folder / "bench.csv", fill)
    write_aside(folder / "bench.png", lambda aside: draw(aside, settings, rows))


def draw(file: Path, settings: dict[str, Any], rows: list[Row]) -> None:
    """Figure 2: time per token and memory against length, a line for each model, softmax models black and dashed."""
    from matplotlib.figure import Figure

    gpu = any(row.get("decode_peak_bytes") is not None for row in rows)
    memory, unit = ("decode_peak_bytes", 2**30) if gpu else ("state_bytes", 2**20)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    done = [row for row in rows if "out_of_memory" not in row]
    others = 0
    for model in dict.fromkeys(row["model"] for row in done):
        mine = [row for row in done if row["model"] == model]
        at, middle = ([row[key] for row in mine] for key in ("length", "decode_ms"))
        spread = [[abs(row["decode_ms"] - row[f"decode_ms_{end}"]) for row in mine] for end in ("min", "max")]
        style: dict[str, Any] = {"color": "black", "linestyle": "--", "marker": "o"}
        if not mine[0]["softmax"]:  # markers of their own: states of the same size lie on each other
            style = {"color": f"C{others % 10}", "marker": "sD^v<>pdh*"[others % 10]}
            others += 1
        left.errorbar(at, middle, spread, label=model, capsize=2, fillstyle="none", **style)
        right.plot(at, [row[memory] / unit for row in mine], fillstyle="none", **style)
    left.set(title="Time per token", ylabel="ms per decoded token, median and range", ylim=(0, None))
    right.set(title="Peak memory" if gpu else "Size of the state", yscale="log")
    right.set_ylabel("GiB of decoding, beyond the weights" if gpu else "MiB after the prompt")
    lengths = sorted({row["length"] for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, map(str, lengths), rotation=45 if len(lengths) > 6 else 0)
        axes.minorticks_off()
        axes.set_xlabel("length of the prompt, tokens")
        axes.grid(alpha=0.3)
    if done:
        figure.legend(loc="outside right center")
    figure.suptitle(f"{settings['device']}, {settings['dtype']}, batch of {settings['batch_size']}", fontsize="medium")
    figure.savefig(file, format="png", dpi=150)
