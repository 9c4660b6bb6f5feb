"""The student: a Hugging Face model whose attention is a mixer, and the factory that makes one from a teacher."""
