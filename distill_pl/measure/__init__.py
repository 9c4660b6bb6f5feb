"""Measurements of finished models: perplexity and lm-eval tasks, time and memory of generation, parameter counts, reports."""
