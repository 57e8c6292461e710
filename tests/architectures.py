"""Tiny random models of every architecture that transformers has a causal language model for.

    config = tiny_config("mixtral")     # raises what transformers raises where no such model can be made
"""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_NOT_MADE = {
    "musicgen", "musicgen_melody",  # music out of text
    "gemma3n", "gemma4_assistant", "dots3_note",  # more than a text model, which has a name of its own
}
ARCHITECTURES = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in _NOT_MADE)
VOCABULARY = 300

_SIZES = {
    VOCABULARY: "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions original_max_position_embeddings",
    32: "hidden_size d_model n_embd dim embedding_size embedding_dim emb_dim word_embed_proj_dim backbone_hidden_size "
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size lru_width "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size input_embedding_size output_embedding_size "
        "mamba_d_ssm dim_model_base",
    64: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff ffn_hidden_size "
        "intermediate_size_mlp prefix_dense_intermediate_size dense_intermediate_size block_ff_dim d_inner "
        "feed_forward_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
       "num_decoder_attention_heads num_encoder_attention_heads attention_heads linear_num_value_heads mamba_num_heads "
       "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_heads swa_num_attention_heads",
    2: "num_key_value_heads num_kv_heads linear_num_key_heads num_experts_per_tok moe_topk moe_k top_k_experts "
       "swa_num_key_value_heads num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
       "num_decoder_layers num_encoder_layers num_blocks",
    8: "head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
       "linear_head_dim swa_head_dim attention_head_size mamba_head_dim mamba_d_head mamba_d_state ssm_state_size "
       "state_size d_head dim_head rotary_dim",
    16: "sliding_window sliding_window_size local_attention attention_window_size window_size q_lora_rank kv_lora_rank "
        "attention_chunk_size hidden_size_per_layer_input chunk_size mamba_chunk_size block_size keep_window_size",
    1: "n_group topk_group n_shared_experts first_k_dense_replace num_shared_experts",
}
# Also where there is no default.
_ALWAYS = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}


def tiny_config(model_type: str, **special: Any) -> PretrainedConfig:
    """A configuration with small sizes and no dropout, and whatever else its class asks for by itself."""
    return _shrunk(CONFIG_MAPPING[model_type], **special)


def _shrunk(kind: type[PretrainedConfig], **special: Any) -> PretrainedConfig:
    default, settings = kind(), {}
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            settings[name] = _shrunk(type(value)).to_dict()
        elif isinstance(value, float) and "drop" in name:
            settings[name] = 0.0
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            settings[name] = 0
        elif name in _SIZE_OF and (type(value) is int or (value is None and name in _ALWAYS)):
            settings[name] = min(_SIZE_OF[name], value or VOCABULARY)
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:  # latent attention has one for each head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return kind(**settings | _SPECIAL.get(kind.model_type, {}) | special)


_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
# What a class does not derive from the sizes above.
_SPECIAL: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "adapter_rank": 8},
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA, "lm_head_multiplier": 0.5},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "n_groups": 2, "mamba_num_heads": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **_MAMBA},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.5},
    **{name: {"layer_types": ["linear_attention", "full_attention"]} for name in (
        "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "num_experts_per_tok": 2},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 8, "n_group": 2,
                       "num_experts_per_tok": 2},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], "indexer_budget": 64,
                       "indexer_compress_ratio": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "rwkv": {"attention_hidden_size": 32},
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "bert": {"is_decoder": True},
}
