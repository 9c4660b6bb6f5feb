"""Print lines on the first rank only, and format tables, durations and perplexities. Imports no Lightning."""

import logging
import math
import os
import warnings

from torch import distributed

from distill_pl.errors import InputError

# environment variables with which torchrun, Lightning, Slurm and MPI tell a process its rank before there is a process group
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def is_first_rank() -> bool:
    """Return whether this process is rank 0 of a distributed run, or the only one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return not any(int(os.environ.get(name) or 0) for name in RANK_VARIABLES)


def say(text: str) -> None:
    """Print `text` on rank 0 and flush, so that it appears in a log file at once.

    Raises InputError where the output cannot be written, but BrokenPipeError where what read it has ended.
    """
    if is_first_rank():
        try:
            print(text.encode(errors="backslashreplace").decode(), flush=True)  # names of files may be no UTF-8
        except BrokenPipeError:
            raise
        except OSError as error:
            raise InputError(f"the output cannot be printed ({error.strerror}): see to where it goes, and go on") from error


def quiet() -> None:
    """Silence the log lines, warnings and progress bars of Lightning, transformers and torch's compiler."""
    from transformers.utils import logging as transformers_logging

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"lightning|torch\._inductor")
    # every DDP run prints this warning, because Lightning builds DDP, and so its autograd nodes, on a side stream
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def perplexity(cross_entropy: float) -> float:
    """Return e^cross_entropy for a cross-entropy in nats per token, or infinity if it overflows."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf


def perplexities(losses: dict[str, float]) -> str:
    """Format a stage's held-out losses, as in `perplexity 172 (teacher 176)`.

    losses: `student_ce` and, if the stage has a teacher, `teacher_ce`, in nats per token.
    """
    teacher = f" (teacher {perplexity(losses['teacher_ce']):.4g})" if "teacher_ce" in losses else ""
    return f"perplexity {perplexity(losses['student_ce']):.4g}{teacher}"


def percent(accuracy: float, error: float) -> str:
    """Format an accuracy and its standard error, fractions of 1, as in `52.41 ± 1.40`."""
    return f"{100 * accuracy:.2f} ± {100 * error:.2f}"


def aligned(rows: list[list[str]]) -> str:
    """Lay out rows of cells, the first row a header, in columns of plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown(rows: list[list[str]]) -> str:
    """Lay out rows of cells, the first row a header, as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
