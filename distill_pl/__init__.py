"""Distil a softmax Transformer into a subquadratic language model.

Importing this package makes transformers' Auto classes load its students.
"""

from distill_pl.student.modeling import Student, StudentConfig

__all__ = ["Student", "StudentConfig"]
