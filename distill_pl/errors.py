"""The two ways a run ends early. The command line prints their text as one line and exits with their code."""


class InputError(Exception):
    """Bad input, found before any work starts: one line that names the key, the value and the remedy."""

    exit_code = 2


class Diverged(Exception):
    """A loss or gradient that is not finite: one line that names stage, step and layer."""

    exit_code = 1
