"""The two errors that end a run early, and a check of choices. The command line prints an error's text as one line and exits
with its `exit_code`.
"""

from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints


class InputError(Exception):
    """Bad input, reported in one line that names the key, the value and the remedy."""

    exit_code = 2


class Diverged(Exception):
    """A loss or gradient that is not finite, reported in one line that names stage, step and layer."""

    exit_code = 1


def one_line(error: Exception) -> str:
    """Format an error of another library as `Type: message`, on one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def check_choices(group: str, init: Callable, given: Mapping[str, Any]) -> None:
    """Raise InputError for an argument of `init` that is none of the values in its annotation, a Literal: callers mistype, too.

    group: the group of keys that the message names. given: arguments by name, such as `locals()` at the beginning of `init`.
    """
    for key, hint in get_type_hints(init).items():
        kinds = [hint, *get_args(hint)]
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        if choices and given[key] not in choices and not (given[key] is None and NoneType in kinds):
            raise InputError(f"{group}.{key} {given[key]!r} is unknown: choose one of {', '.join(choices)}")
