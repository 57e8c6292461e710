"""Models and tokenizers that are made on the fly in a second: a test downloads nothing.

    tokenizer = tiny_tokenizer(tmp_path)                 # both in one folder make a checkpoint
    tiny_model(tmp_path, "llama", vocab=len(tokenizer))  # gpt2, llama, qwen2, olmo2, gemma3_text
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# A second thread gains nothing on tensors of this size, and waits for its turn where cores are shared: 10 x slower.
torch.set_num_threads(1)

ARCHITECTURES = ("gpt2", "llama", "qwen2", "olmo2", "gemma3_text")
EOS = "<|endoftext|>"

_TEXTS = (
    "Below is an instruction that describes a task.",
    "Write a response that appropriately completes the request.",
    "### Instruction:\nWhich of these numbers is the largest?\n\n### Response:\nThe largest number is 7.",
)
_GROUPED_QUERIES = {"num_key_value_heads": 2, "intermediate_size": 64}
_SPECIAL = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    # A window shorter than the tests' texts, over every other layer.
    "gemma3_text": {**_GROUPED_QUERIES, "head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 2},
}


def tiny_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 entries, saved in `path`: EOS = BOS = `EOS` with id 0, no pad."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(_TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, bos_token=EOS)
    tokenizer.save_pretrained(path)
    return tokenizer


def tiny_model(path: str | Path, family: str = "gpt2", vocab: int = 300, layers: int = 2, hidden: int = 32,
               seed: int = 0, init_std: float = 0.2, **special: object) -> Path:
    """A random float32 model that the Auto classes load, saved in `path`; returns `path`.

    Args:
        family: `model_type` of its config, one of ARCHITECTURES.
        hidden: width, a multiple of 4 (the number of attention heads).
        init_std: the larger, the surer the model is of its next token.
        special: more of its configuration.
    """
    config = AutoConfig.for_model(
        family, vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=init_std, bos_token_id=0, eos_token_id=0, pad_token_id=None,
        **_SPECIAL.get(family, _GROUPED_QUERIES) | special)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return Path(path)


def tiny_multimodal_model(path: str | Path, vocab: int = 300, layers: int = 2) -> Path:
    """A random Gemma 3 with a vision tower, as those from 4B on are published, saved in `path`; returns `path`."""
    text = {"vocab_size": vocab, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4,
            "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0,
            "pad_token_id": None, **_SPECIAL["gemma3_text"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return Path(path)
