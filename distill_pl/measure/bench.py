"""`distill-pl bench`: time and memory of generation against the length of the prompt (paper, section 5.3 and Figure 2)."""

import csv
import difflib
import functools
import gc
import json
import math
import platform
import time
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.cache_utils import Cache

from distill_pl.console import aligned, quiet, say
from distill_pl.data.sources import counted
from distill_pl.errors import AT_LEAST_1, ROWS, SEED, InputError, Range, check_numbers, first_line
from distill_pl.measure.evaluate import check_positions, check_writable, load, other_settings, read_report, weights_path
from distill_pl.measure.params import smollm_360m
from distill_pl.mixers import MIXERS
from distill_pl.run.folder import write_aside
from distill_pl.run.values import parse_lengths
from distill_pl.student.cache import CACHE, state_bytes
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student
from distill_pl.tokens import short

RANDOM = "random"  # in place of a path: random weights
GPU_DEFAULTS, CPU_DEFAULTS = ("1024,4096,16384,65536", 5), ("128,256,512,1024", 3)  # lengths and repeats
DECODE = ("auto", "graph", "plain")
RANGES = {"new_tokens": AT_LEAST_1, "batch_size": ROWS, "repeats": AT_LEAST_1, "prefill_chunk": Range(0, 1e15),
          "seed": SEED}  # fmt: skip
SOFTMAX_LAYERS = ("attention", "full_attention", "sliding_attention", "chunked_attention")  # kinds in transformers' layer_types
PREFILL_CHUNK = 2048  # tokens that a model whose state does not grow reads at once by default
WIDTHS = {"prompt": 8, "prefill tokens/s": 16, "first token ms": 14, "decode": 6, "ms/token (min to max)": 24, "of limit": 8,
          "decode tokens/s": 15, "prefill GiB": 11, "decode GiB": 10, "state bytes": 14, "state in theory": 15}  # fmt: skip

Row = dict[str, Any]


def bench(
    models: list[str],
    lengths: str | None = None,
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int | None = None,
    prefill_chunk: int | None = None,
    decode: str = "auto",
    seed: int = 0,
    out: str = "bench",
) -> None:
    """Measure the time and memory of prefill and of decoding against the length of the prompt (paper, Figure 2).

    Each model reads a prompt of random tokens, then adds the likeliest token, one at a time; in bf16 on a GPU, in fp32 on a
    CPU; wall-clock time. Prints a row for each length. Its columns: `first token`, the time from a prompt to the first new
    token, in which `prefill tokens/s` are read; `decode`, how further tokens are decoded (--decode); `ms/token`, for the whole
    batch, median and range of the repeats; `of limit`, how close that is to the limit of memory bandwidth, the
    time in which a large copy, timed in the same run, moves as many bytes as weights and state have; `decode tokens/s`, over
    the batch; `GiB`, on a GPU only, the peak beyond the weights; `state`, bytes before the first decoded token (with --decode
    graph those of buffers that have room for all tokens), measured and from the architecture alone. Then, for each student and
    each Transformer of as many layers of one width, the length of the prompt from which on the student takes less time or
    memory, read off a straight line between two measured lengths on logarithmic scales.

    Writes bench.json (all repeats), bench.csv and bench.png after every row. The same command resumes where it stopped and
    measures no row twice.

    Args:
        models: run folders of `distill-pl fit`, model folders, hub ids, or names of mixers, e.g. gla: a student of
            SmolLM-360M's shape with random weights, on which time does not depend; softmax is SmolLM-360M's own
            architecture. A folder of that name takes precedence.
        lengths: prompt lengths in tokens, e.g. 1024,4096. Default: 1024,4096,16384,65536; on a CPU 128,256,512,1024.
            Lengths beyond those a model was trained for are timed correctly, but its text would be of no use.
        new_tokens: tokens to decode after each prompt.
        batch_size: number of prompts decoded together.
        repeats: timed repetitions of each length, after one that is not counted. Default: 5; on a CPU 3.
        prefill_chunk: read the prompt in chunks of this many tokens, the state carried from one to the next, which bounds the
            memory of prefill; 0 reads it at once, the fastest way for softmax attention, whose kernels for a whole triangle do
            not apply to a chunk. Default: 2048 for models whose state does not grow, else 0.
        decode: graph: each step compiled and captured as one CUDA graph, states in fixed buffers (for softmax attention too,
            whose keys and values get room for prompt and new tokens), for models built like Llama; plain: the model's own
            cached forward pass; auto: graph on a GPU.
        seed: seed of random weights and prompts.
        out: folder to write to. Results of other settings in it are refused, not replaced.

    Raises:
        InputError: an option, model, run or text that cannot be used.
    """
    quiet()
    gpu = torch.cuda.is_available()
    default_lengths, default_repeats = GPU_DEFAULTS if gpu else CPU_DEFAULTS
    prompt_lengths = parse_lengths(default_lengths if lengths is None else lengths)
    repeats = default_repeats if repeats is None else repeats
    settings = {"new_tokens": new_tokens, "batch_size": batch_size, "repeats": repeats, "prefill_chunk": prefill_chunk,
                "decode": check_decode(decode, gpu), "seed": seed} | environment()  # fmt: skip
    check_numbers(settings, RANGES)
    sources = {model: locate(model, prompt_lengths[-1] + new_tokens) for model in dict.fromkeys(models)}
    rows = earlier_rows(Path(out) / "bench.json", settings)
    check_writable(Path(out) / "bench.json")

    times = f"{counted(repeats, 'repeat')} of {counted(new_tokens, 'new token')}"
    say(f"{settings['device']}, {settings['dtype']}, batch size {batch_size}, {times}")
    if not gpu:
        say("no GPU: default lengths and repeats are small, and memory is given as the size of the state, not as a peak")
    width = max(map(len, sources))
    say(line(["model", *WIDTHS], width))
    for model, source in sources.items():
        for row in model_rows(model, source, prompt_lengths, settings, rows):
            measured_before = row in rows
            if not measured_before:
                rows.append(row)
                write(Path(out), settings, rows)
            say(line(cells(row), width) + ("  (measured before)" if measured_before else ""))
        gc.collect()
        torch.cuda.empty_cache()
    write(Path(out), settings, rows)
    if table := crossover_table(rows):
        say(f"\n{table}\n")
    say(f"wrote bench.png, bench.csv and bench.json to {out}")


def check_decode(decode: str, gpu: bool) -> str:
    """Resolve --decode into graph or plain. Raises InputError for an unknown value, or for graph without a GPU."""
    if decode not in DECODE:
        raise InputError(f"decode {decode!r}: choose from {', '.join(DECODE)}")
    if decode == "graph" and not gpu:
        raise InputError("decode 'graph' needs a GPU: choose plain or auto")
    return ("graph" if gpu else "plain") if decode == "auto" else decode


def locate(model: str, positions: int) -> str:
    """Return where a model's weights are: a folder, a hub id, or RANDOM for a mixer. Only its configuration is read.

    Raises InputError where there is no such model, or where its table of positions has fewer than `positions`.
    """
    if model in MIXERS and not Path(model).exists():
        return RANDOM
    near = [] if "/" in model or Path(model).exists() else difflib.get_close_matches(model, MIXERS, n=1)
    if near:
        raise InputError(f"model {model!r} is neither a folder nor a mixer: did you mean {near[0]}?")
    path = weights_path(model)
    try:
        if model[:1] in "./~" and not Path(model).exists():
            raise OSError("no such folder")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model {model!r} cannot be read ({first_line(error)}): give a run folder, a Hugging Face "
            f"model folder, a hub id, or a mixer: {', '.join(MIXERS)}"
        ) from error
    check_positions(model, config, positions)
    return path


def environment() -> dict[str, str | None]:
    """Describe what results depend on besides the options: device, dtype and versions."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}, threads: {torch.get_num_threads()}",
        "dtype": "bfloat16" if gpu else "float32",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "fla": version("fla-core") if find_spec("fla") else None,
    }


def earlier_rows(file: Path, settings: dict[str, Any]) -> list[Row]:
    """Read the rows of an earlier call's bench.json, if any. Raises InputError if they were measured under other settings."""
    earlier = read_report(file)
    if not earlier:
        return []
    if not (isinstance(earlier.get("settings"), dict) and isinstance(earlier.get("rows"), list)):
        raise InputError(f"{file} is no result of distill-pl bench: give another --out")
    if differing := other_settings(earlier["settings"], settings):
        raise InputError(f"{file} holds results of other settings ({differing}): give another --out")
    return [row for row in earlier["rows"] if "first_token_ms" in row or "out_of_memory" in row]  # earlier versions had it not


def model_rows(model: str, source: str, lengths: list[int], settings: dict[str, Any], known: list[Row]) -> Iterator[Row]:
    """Yield a row for each length, from `known` or measured; the first that runs out of memory is the last.

    source: as `locate` returns it. lengths: ascending.
    """
    network, positions = None, lengths[-1] + settings["new_tokens"]
    described = Path(source, "config.json")  # of what times depend on; weights do not matter
    kind = sha256(described.read_bytes()).hexdigest()[:16] if described.is_file() else None
    for length in lengths:
        asked = {"model": model, "weights": source, "kind": kind, "length": length}
        row = next((row for row in known if {key: row.get(key) for key in asked} == asked), None)
        if row is None:
            warm_up = 1
            if network is None:
                network = random_model(model, settings["seed"]) if source == RANDOM else load(source)[0]
                warn_beyond_positions(model, network, positions)
                mode = decode_mode(model, network, settings["decode"], positions)
                chunk = prefill_chunk(network, settings["prefill_chunk"])
                warm_up = settings["new_tokens"]
            row = asked | {
                "softmax": is_transformer(network), "size": size(network), "weights_bytes": network.get_memory_footprint(),
                "decode": mode, "prefill_chunk": chunk, "bandwidth": bandwidth(),
            }  # fmt: skip
            try:
                row |= measure(network, length, settings | {"decode": mode, "prefill_chunk": chunk}, warm_up)
                row |= limit(network, row)
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
        yield row
        if "out_of_memory" in row:
            if length < lengths[-1]:
                say(f"{model}: lengths beyond {length} are skipped")
            return


def is_transformer(network: PreTrainedModel) -> bool:
    """Return whether a model other than a Student has softmax attention in each layer, and no recurrent mixer in any."""
    kinds = getattr(network.config, "layer_types", None) or ["attention"]
    softmax = hasattr(network.config, "num_attention_heads") and all(kind in SOFTMAX_LAYERS for kind in kinds)
    return softmax and not isinstance(network, Student)


def size(network: PreTrainedModel) -> list[int]:
    """Return the number of layers and their width: only models of one size are compared."""
    config = network.config.get_text_config()
    return [config.num_hidden_layers, config.hidden_size]


def random_model(mixer: str, seed: int) -> PreTrainedModel:
    """Build a student of SmolLM-360M's shape with random weights, on the GPU in bf16 if there is one."""
    teacher, gpu = smollm_360m(), torch.cuda.is_available()
    # a softmax student is exported as its teacher's class, too
    config = teacher.config if mixer == "softmax" else StudentFactory(mixer).config(teacher)
    set_seed(seed)
    with torch.device("cuda" if gpu else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if gpu else torch.float32).eval()


def warn_beyond_positions(model: str, network: PreTrainedModel, positions: int) -> None:
    """Say so where a model with RoPE was made for fewer positions."""
    made_for = getattr(network.config, "max_position_embeddings", None)
    uses_rope = (any(mixer.rope or mixer.beside_window for mixer in network.mixers) if isinstance(network, Student)
                 else is_transformer(network))  # fmt: skip
    if uses_rope and made_for and positions > made_for:
        say(f"{model}: made for {made_for} positions; timing beyond them is valid, the generated text is not")


def decode_mode(model: str, network: PreTrainedModel, decode: str, positions: int) -> str:
    """Return `decode`, but plain where a CUDA graph cannot decode so many positions of the model, and say why."""
    if decode == "graph":
        from distill_pl.decoding import unsupported_reason

        reason = unsupported_reason(network, positions)
        if reason:
            say(f"{model}: decodes without a CUDA graph: {reason}")
            return "plain"
    return decode


def prefill_chunk(network: PreTrainedModel, chunk: int | None) -> int:
    """Resolve --prefill_chunk for a model; 0 reads prompts at once."""
    if chunk is not None:
        return chunk
    sizes = {theory(network, 1, length) for length in (2**30, 2**31)}
    return PREFILL_CHUNK if len(sizes) == 1 and None not in sizes else 0


def theory(network: PreTrainedModel, batch: int, length: int) -> int | None:
    """Compute the bytes of the state after `length` tokens from the architecture alone; None for one unlike Llama's."""
    itemsize = network.dtype.itemsize
    if isinstance(network, Student):
        return sum(mixer.cache_bytes(batch, length, itemsize) for mixer in network.mixers)
    if getattr(network.config, "sliding_window", None):
        return None
    try:
        widths = [a.k_proj.out_features + a.v_proj.out_features for a in (x.self_attn for x in network.model.layers)]
    except AttributeError:
        return None
    return batch * length * sum(widths) * itemsize


@torch.no_grad()
def prefill(network: PreTrainedModel, prompt: Tensor, chunk: int = 0) -> tuple[Tensor, Cache]:
    """Read a prompt [B, T] at once, or in chunks of `chunk` tokens if not 0 -> the likeliest next token [B, 1], the cache."""
    cache: Any = None
    for tokens in prompt.split(chunk or prompt.shape[1], dim=1):
        output = network(tokens, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        cache = output[CACHE]
    return output.logits[:, -1:].argmax(-1), cache


@torch.no_grad()
def decode(network: PreTrainedModel, token: Tensor, cache: Cache, steps: int) -> Tensor:
    """Decode `steps` tokens greedily after `token` [B, 1] -> [B, steps], without waiting for the GPU in between."""
    tokens = []
    for _ in range(steps):
        token = network(token, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, 1)


@functools.cache
def bandwidth() -> float | None:
    """Measure how many bytes per second the GPU reads and writes in a large copy; None without a GPU."""
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
    """Compute the time per token if reading weights and state once were all, and its share of the measured time."""
    if row["bandwidth"] is None:
        return {}
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    not_read = 0 if embedding.weight is head.weight else embedding.weight.nbytes  # one row of an untied embedding is read
    ms = 1000 * (row["weights_bytes"] - not_read + row["state_bytes"]) / row["bandwidth"]
    return {"limit_ms": ms, "decode_of_limit": ms / row["decode_ms"]}


def measure(network: PreTrainedModel, length: int, settings: dict[str, Any], warm_up: int) -> Row:
    """Measure time and memory at one length, after an uncounted repetition that decodes `warm_up` tokens."""
    gpu, batch = network.device.type == "cuda", settings["batch_size"]
    generator = torch.Generator().manual_seed(settings["seed"])
    prompt = torch.randint(network.config.vocab_size, (batch, length), generator=generator).to(network.device)

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_since_last_call() -> int | None:  # beyond `allocated`, a graph's own memory included
        if not gpu:
            return None
        peak = torch.cuda.max_memory_allocated() - allocated
        torch.cuda.reset_peak_memory_stats()
        return peak + (decoder.pool_bytes() if decoder else 0)

    if gpu:  # free the Decoder of the last length, and allocate what libraries take at their first call, before counting
        gc.collect()
        prefill(network, prompt[:, :1])
    allocated, decoder = torch.cuda.memory_allocated() if gpu else 0, None
    if settings["decode"] == "graph":
        from distill_pl.decoding import Decoder

        decoder = Decoder(network, length + settings["new_tokens"], chunk=settings["prefill_chunk"])
    row: Row = {"prefill_seconds": [], "decode_seconds": [], "state_in_theory": theory(network, batch, length)}
    for steps in [warm_up] + [settings["new_tokens"]] * settings["repeats"]:
        cache: Any = None
        peak_since_last_call()
        start = now()
        if decoder is None:
            token, cache = prefill(network, prompt, settings["prefill_chunk"])
        else:
            decoder.prefill(prompt)
        row["prefill_seconds"].append(now() - start)
        row["prefill_peak_bytes"] = peak_since_last_call()
        row["state_bytes"] = decoder.nbytes() if decoder else state_bytes(cache)
        start = now()
        if decoder is None:
            decode(network, token, cache, steps)
        else:
            for _ in range(steps):
                decoder.step()
        row["decode_seconds"].append(now() - start)
        row["decode_peak_bytes"] = peak_since_last_call()
        del cache  # or the next repetition's peak would hold two
    prefill_seconds, decode_seconds = (row[key][1:] for key in ("prefill_seconds", "decode_seconds"))
    per_token = [1000 * seconds / settings["new_tokens"] for seconds in decode_seconds]
    return row | {
        "prefill_seconds": prefill_seconds,
        "decode_seconds": decode_seconds,
        "prefill_tokens_per_second": batch * length / median(prefill_seconds),
        "first_token_ms": 1000 * median(prefill_seconds),
        "decode_ms": median(per_token),
        "decode_ms_min": min(per_token),
        "decode_ms_max": max(per_token),
        "decode_tokens_per_second": 1000 * batch / median(per_token),
    }


def cells(row: Row) -> list[str]:
    """Format a row for the console."""
    if "out_of_memory" in row:
        return [row["model"], str(row["length"]), "out of memory"]
    peaks = [row["prefill_peak_bytes"], row["decode_peak_bytes"]]
    return [
        row["model"],
        str(row["length"]),
        short(row["prefill_tokens_per_second"]),
        f"{row['first_token_ms']:.1f}",
        row["decode"],
        f"{row['decode_ms']:.2f} ({row['decode_ms_min']:.2f} to {row['decode_ms_max']:.2f})",
        f"{row['decode_of_limit']:.0%}" if "decode_of_limit" in row else "",
        short(row["decode_tokens_per_second"]),
        *("" if peak is None else f"{peak / 2**30:.3f}" for peak in peaks),
        *("" if size is None else f"{size:,}" for size in (row["state_bytes"], row["state_in_theory"])),
    ]


def line(cells: list[str], width: int) -> str:
    """Lay out one line of the table, its first column `width` wide: lines are printed before later rows are known."""
    widths = list(WIDTHS.values())[: len(cells) - 1]
    return "  ".join([cells[0].ljust(width), *(cell.rjust(w) for cell, w in zip(cells[1:], widths, strict=True))]).rstrip()


def crossover(student: dict[int, float], transformer: dict[int, float]) -> str:
    """Say from which length on a student has less than a Transformer: of times or bytes by length, infinite if out of memory.

    Between two measured lengths, both are taken to be straight lines on logarithmic scales. Empty without a common length.
    """
    lengths = sorted(student.keys() & transformer.keys())
    worse = [length for length in lengths if student[length] >= transformer[length]]
    if not lengths or not worse:
        return f"{lengths[0]:,} or less" if lengths else ""
    if worse[-1] == lengths[-1]:
        return f"none up to {lengths[-1]:,}"
    start, end = worse[-1], lengths[lengths.index(worse[-1]) + 1]
    if transformer[end] == math.inf:
        return f"{end:,}"
    before, after = (math.log(student[length] / transformer[length]) for length in (start, end))
    return f"about {start * (end / start) ** (before / (before - after)):,.0f}"


def crossover_table(rows: list[Row]) -> str:
    """Lay out from which length on each student takes less than each Transformer of its size; empty without such a pair."""
    memory = "decode_peak_bytes" if any(row.get("decode_peak_bytes") for row in rows) else "state_bytes"
    measures = {"first_token_ms": "first token", "decode_ms": "time per token", memory: "memory"}
    values: dict[bool, dict[str, dict[str, dict[int, float]]]] = {False: {}, True: {}}  # of students, of Transformers
    for row in rows:
        of_model = values[row["softmax"]].setdefault(row["model"], {key: {} for key in measures})
        for key in measures:
            of_model[key][row["length"]] = math.inf if "out_of_memory" in row else row[key]
    sizes = {row["model"]: row.get("size") for row in rows}  # earlier versions had it not
    table = [["takes less from a prompt of", *measures.values()]]
    for student, own in values[False].items():
        for transformer, other in values[True].items():
            if sizes[student] == sizes[transformer]:
                table.append([f"{student} against {transformer}", *(crossover(own[key], other[key]) for key in measures)])
    return aligned(table) if len(table) > 1 else ""


def write(folder: Path, settings: dict[str, Any], rows: list[Row]) -> None:
    """Write bench.json, bench.csv and bench.png, each of which is whole at any moment."""
    from distill_pl.measure.plots import draw_bench

    names = list(dict.fromkeys(row["model"] for row in rows))
    rows = sorted(rows, key=lambda row: (names.index(row["model"]), row["length"]))
    report = {"settings": settings, "rows": rows}
    write_aside(folder / "bench.json", lambda aside: aside.write_text(json.dumps(report, indent=2)))
    flat = [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows]

    def write_csv(aside: Path) -> None:
        with open(aside, "w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
            table.writeheader()
            table.writerows(flat)

    write_aside(folder / "bench.csv", write_csv)
    write_aside(folder / "bench.png", lambda aside: draw_bench(aside, settings, rows))
