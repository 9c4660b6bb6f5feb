"""The student: a Hugging Face model with a mixer in place of attention, and the factory that builds it from a teacher."""
