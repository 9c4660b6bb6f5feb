"""The student: a Hugging Face model with mixers in place of attention, and the factory that builds it from a teacher."""
