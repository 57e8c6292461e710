"""Model families, loading, tokenizers, LoRA, GGUF conversion and depth pruning."""
