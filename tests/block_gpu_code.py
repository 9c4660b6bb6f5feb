"""Make the GPU's code un-importable: `PYTHONPATH=tests python -m pytest -p block_gpu_code` runs the CPU suite without it."""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

ROOMS = ("distill_pl.ops.gpu", "distill_pl.compiling", "distill_pl.decoding")
TESTS_OF_ROOMS = ("compiling", "decoding", "gpu", "test_interpreted_kernels.py", "test_tuned_kernels.py")


class Blocker(MetaPathFinder):
    """Refuse to import anything in ROOMS."""

    def find_spec(self, name, path=None, target=None):
        if any(f"{name}.".startswith(f"{room}.") for room in ROOMS):
            raise ImportError(f"{name} is blocked")


def install() -> None:
    """Block the imports in this process, from now on."""
    sys.meta_path.insert(0, Blocker())


def pytest_load_initial_conftests() -> None:
    """Block the imports before the tests' own conftest imports the package."""
    install()


def pytest_ignore_collect(collection_path: Path):
    """Leave out the tests of the rooms themselves."""
    return True if collection_path.name in TESTS_OF_ROOMS else None
