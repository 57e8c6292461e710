"""How many texts a model writes together, and what their keys and values take."""

from transformers import PretrainedConfig

from todi.models.families import is_tested
from todi.models.inputs import ModelInputs

READ_TOGETHER = 32  # prompts; of more the activations would take more memory and hardly less time
_KEYS_AND_VALUES, _MOST_ROWS = 4 << 30, 256  # of texts that are written together; more rows hardly are faster


def cache_bytes(config: PretrainedConfig, samples: int, length: int, width: int) -> int:
    """Bytes of the keys and values of `samples` texts of `length` tokens, numbers of `width` bytes each; 0 of a model
    without attention."""
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    return 2 * config.num_hidden_layers * heads * size * samples * length * width


def rows_written_together(wanted: int, model: ModelInputs, length: int) -> int:
    """How many texts of `length` tokens a model writes together: as many as are `wanted`, or where that is 0 as many as
    4 GiB of keys and values hold, 256 at most. It is a matter of the model's shape alone, so that what goes on
    elsewhere, or beside others, has the same batches as before."""
    of_one = cache_bytes(model.config, 1, length, model.precision.dtype.itemsize)
    return wanted or max(1, min(_MOST_ROWS, _KEYS_AND_VALUES // max(1, of_one)))


def prompts_read_together(rows: int, config: PretrainedConfig) -> int:
    """How many prompts of `rows` texts a model reads at a time: transformers' own cache takes all of them at once."""
    return min(rows, READ_TOGETHER) if is_tested(config.model_type) else rows
