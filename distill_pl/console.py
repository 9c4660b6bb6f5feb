"""Rows of cells, the first of them a header, as a person reads them."""


def percent(accuracy: float, error: float) -> str:
    """As in 52.41 ± 1.40."""
    return f"{100 * accuracy:.2f} ± {100 * error:.2f}"


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as text, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
