"""Distil a softmax Transformer into a subquadratic language model.

Importing this package makes transformers' Auto classes load its students.
"""

import signal
import sys

if sys.argv[:1] and sys.argv[0].endswith("distill-pl") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the command's imports take seconds: until `main`, Ctrl-C prints no traceback

from distill_pl.student.modeling import Student, StudentConfig

__version__ = "0.1.0"  # read by pyproject.toml, and by model cards, since the package may not be installed
__all__ = ["Student", "StudentConfig", "__version__"]
