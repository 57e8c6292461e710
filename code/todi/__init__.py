"""ToDi: token-wise distillation of language models via fine-grained divergence control."""

__version__ = "0.1.0"
