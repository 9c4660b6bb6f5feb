"""Find the experiments of the paper by name: their YAML files are in the installed package, too."""

import difflib
from pathlib import Path

from distill_pl.console import aligned, say
from distill_pl.errors import InputError

STUDIES = ("study", "recipes")  # files beside the experiments that list runs of them


def bundled(folder: str) -> Path:
    """Return the folder `configs` or `experiments`: in an installed package inside it, in a checkout beside it."""
    package = Path(__file__).parent.parent
    return next(parent / folder for parent in (package, package.parent) if (parent / folder).is_dir())


def named() -> dict[str, Path]:
    """Return the files of the paper's experiments by name, such as gla_qkv_mm_h2h."""
    files = sorted(bundled("experiments").glob("*.yaml"))
    return {file.stem: file for file in files if not file.stem.startswith(("quickstart", *STUDIES))}


def experiments() -> None:
    """List the experiments that `distill-pl fit --config NAME` runs, with the row of the paper's tables that each fills."""
    rows = [[name, file.read_text().splitlines()[0].removeprefix("# ")] for name, file in named().items()]
    say(aligned([["name", "row of the paper"], *rows]))


def with_paths(args: list[str]) -> list[str]:
    """Return command-line arguments with each `--config` right after the command, and the name of an experiment as its file.

    In that place, a file does not replace what is given beside it. Raises InputError for what is neither a file nor the name of
    an experiment.
    """
    configs, others, left = [], [], iter(args)
    for arg in left:
        key, equals, name = arg.partition("=")
        if key not in ("--config", "-c"):
            others.append(arg)
        elif (value := name if equals else next(left, None)) is not None:
            configs.append(f"--config={config_file(value)}")
        else:
            others.append(arg)  # without a value, of which the parser complains
    return [*others[:1], *configs, *others[1:]]


def config_file(name: str) -> str:
    """Return a configuration file, given by its path or as the name of an experiment. Raises InputError if there is none."""
    if Path(name).expanduser().is_file():
        return name
    if name in named():
        return str(named()[name])
    near = difflib.get_close_matches(Path(name).stem, named(), n=1)
    hint = f"did you mean {near[0]}?" if near else "distill-pl experiments lists those of the paper"
    raise InputError(f"config {name!r} is no file and no experiment's name: {hint}")
