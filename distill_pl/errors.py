"""The two errors that end a run early, and checks of numbers and choices. The command line prints an error's text as one line
and exits with its `exit_code`.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class InputError(Exception):
    """Bad input, reported in one line that names the key, the value and the remedy."""

    exit_code = 2


class Diverged(Exception):
    """A loss or gradient that is not finite, reported in one line that names stage, step and layer."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    """Format an error of another library as `Type: message`, on one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, of at most 200 characters, or the error's type where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class Range(NamedTuple):
    """Say which numbers a key may have."""

    least: float
    most: float = math.inf
    above: bool = False  # whether `least` itself is too small

    def __contains__(self, number: object) -> bool:
        """Return whether a number is within the range; nan never is."""
        assert isinstance(number, Real)
        return (self.least < number if self.above else self.least <= number) and number <= self.most

    def __str__(self) -> str:
        """Format the range as the remedy of an error message."""
        lower = f"more than {self.least:g}" if self.above else f"at least {self.least:g}"
        return f"{lower} and at most {self.most:.10g}" if self.most < math.inf else lower


SHARE = Range(0, 1)
POSITIVE = Range(0, most=1e6, above=True)  # larger values would overflow fp32
AT_LEAST_1 = Range(1, 1e15)  # steps and chunks are counted in 64 bits
ROWS = Range(1, 1e6)  # of a batch that is measured
SEED = Range(0, 2**32 - 1)  # what numpy takes


def check_numbers(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raise InputError, naming key, value and range, for the first number outside its range; other values pass."""
    for key, allowed in ranges.items():
        value = values.get(key)
        if isinstance(value, Real) and not isinstance(value, bool) and value not in allowed:
            wrong = "no number" if value != value else "too large" if value > allowed.most else "too small"
            raise InputError(f"{key} {value} is {wrong}: give {allowed}")


def check_arguments(group: str, init: Callable, given: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raise InputError for an argument of `init` that is not in its range, or none of the values of its Literal.

    The command line parses its arguments by the annotations of `init`; callers in Python mistype, too.

    group: the group of keys that the message names. given: arguments by name, such as `locals()` at the beginning of `init`.
    ranges: of the numbers among them; one that is annotated as int and not as float must be whole.
    """
    for key, hint in get_type_hints(init).items():
        kinds, value = [hint, *get_args(hint)], given[key]
        if value is None and NoneType in kinds:
            continue
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        if choices and value not in choices:
            raise InputError(f"{group}.{key} {value!r} is unknown: choose one of {', '.join(choices)}")
        types = tuple(kind for kind in kinds if isinstance(kind, type))
        if bool in kinds and key not in ranges and not isinstance(value, types):
            raise InputError(f"{group}.{key} {value!r} is neither True nor False: give one of the two")
        if key in ranges and not (isinstance(value, bool) and bool in kinds):
            if not isinstance(value, Real if float in kinds else Integral) or isinstance(value, bool):
                whole = "" if float in kinds else "whole "
                raise InputError(f"{group}.{key} {value!r} is no {whole}number: give {ranges[key]}")
            check_numbers({f"{group}.{key}": value}, {f"{group}.{key}": ranges[key]})
