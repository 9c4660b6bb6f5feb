"""The two errors that end a run early. The command line prints the error's text as one line and exits with `exit_code`."""


class InputError(Exception):
    """Bad input, reported in one line that names the key, the value and the remedy."""

    exit_code = 2


class Diverged(Exception):
    """A loss or gradient that is not finite, reported in one line that names stage, step and layer."""

    exit_code = 1


def one_line(error: Exception) -> str:
    """Format an error of another library as `Type: message`, on one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
