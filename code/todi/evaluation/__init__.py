"""Judging a model: generation, ROUGE-L, results."""
