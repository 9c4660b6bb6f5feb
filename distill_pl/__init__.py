"""Distil a softmax Transformer into a subquadratic language model.

Importing this package makes transformers' Auto classes load its students.
"""

from distill_pl.student.modeling import Student, StudentConfig

__version__ = "0.1.0"  # pyproject.toml reads it here, and model cards write it where the package is not installed
__all__ = ["Student", "StudentConfig", "__version__"]
