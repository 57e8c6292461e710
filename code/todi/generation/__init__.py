"""Decoding many prompts: for evaluation, for dev scores, for training on what the student writes."""
