"""Lets transformers load the student in this folder with `trust_remote_code=True`; the package distill_pl must be installed.

`distill-pl export --to remote` puts a copy of this file into a student's folder.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from distill_pl.student import modeling


class StudentConfig(modeling.StudentConfig):
    """The configuration of a student; of a class defined here, so that saving it copies this file."""


class Student(modeling.Student):
    """A student; of a class defined here, so that saving it copies this file."""

    config: StudentConfig
    config_class = StudentConfig


# the import above has registered the package's own classes, which transformers prefers at the next load
StudentConfig.register_for_auto_class()
Student.register_for_auto_class("AutoModelForCausalLM")
AutoConfig.register(StudentConfig.model_type, StudentConfig, exist_ok=True)
AutoModelForCausalLM.register(StudentConfig, Student, exist_ok=True)
