"""Distil a softmax Transformer into a subquadratic language model.

Importing this package makes transformers' Auto classes load its students.
"""

from distill_pl.student.modeling import Student, StudentConfig

__version__ = "0.1.0"  # read by pyproject.toml, and by model cards, since the package may not be installed
__all__ = ["Student", "StudentConfig", "__version__"]
