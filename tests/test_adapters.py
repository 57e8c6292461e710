"""Saved LoRA adapters of every kind, as they are met: each works to the last tensor, or is refused in a line."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from todi.errors import InputError
from todi.models.adapters import add_lora, check_adapter, check_lora, load_adapter, merge_adapter
from todi.models.backbone import backbone_and_head
from todi.models.families import FAMILIES, family_of
from todi.models.loading import empty_model, load_config, load_model
from todi.models.probe import check_model
from todi.training.checkpoints import save_model
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]

# By name, what peft is asked for; each works when it is merged.
MERGED = {
    "plain": {},
    "pattern": {"target_modules": r".*\.0\..*(q_proj|up_proj)"},
    "all linear layers": {"target_modules": "all-linear"},
    "rank and alpha patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 8}, "alpha_pattern": {"v_proj": 2}},
    "one layer": {"layers_to_transform": [1]},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all", "lora_bias": True},
    "a norm": {"modules_to_save": ["norm"]},
    "saved embeddings and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}
NOT_TRAINED = {"embeddings", "head"}  # peft keeps copies of both with such an adapter
# LoRA that alters more than a layer's weight, or that has to be asked for at each prompt.
REFUSED = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "aLoRA": {"alora_invocation_tokens": [5, 6]},
    "replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "trained tokens": {"trainable_token_indices": [1, 2]},
}
OTHER_METHODS = {
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"), "llama", attention_bias=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tied"), "llama", tie_word_embeddings=True)


@pytest.fixture
def plain(base, tmp_path) -> Path:
    save_adapter(base, tmp_path / "plain")
    return tmp_path / "plain"


def save_adapter(base: Path, folder: Path, config=None, **lora) -> torch.Tensor:
    """Saves an adapter as its maker would; returns the logits that the maker had."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | lora
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config or LoraConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return model(input_ids=IDS).logits.detach()


def check(adapter: Path, base: Path, trained: bool = False) -> None:
    check_adapter(str(adapter), load_config(str(base)), str(base), trained=trained)


def load(base: Path):
    return load_model(str(base), torch.float32, CPU)


class TestKinds:
    @pytest.mark.parametrize("kind", MERGED)
    def test_merged_it_is_what_its_maker_had(self, base, tmp_path, kind):
        made = save_adapter(base, tmp_path, **MERGED[kind])
        check(tmp_path, base)
        model = load(base)
        before = model(input_ids=IDS).logits
        merged = merge_adapter(model, str(tmp_path))
        check_model(merged, kind)
        torch.testing.assert_close(merged(input_ids=IDS).logits, made, atol=1e-4, rtol=1e-4)
        assert (before - made).norm() > 0.01 * made.norm()

    @pytest.mark.parametrize("kind", MERGED)
    def test_gone_on_with_its_head_is_the_one_that_the_loss_reads(self, base, tmp_path, kind):
        made = save_adapter(base, tmp_path, **MERGED[kind])
        if kind in NOT_TRAINED:
            with pytest.raises(InputError, match="adapts the head, which cannot be trained|has embeddings besides"):
                check(tmp_path, base, trained=True)
            return
        check(tmp_path, base, trained=True)
        model = load_adapter(load(base), str(tmp_path)).eval()
        backbone, head = backbone_and_head(model)
        torch.testing.assert_close(head(backbone(input_ids=IDS).last_hidden_state), made, atol=1e-4, rtol=1e-4)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(t.numel() for t in saved.values())

    def test_a_checkpoint_of_one_on_the_embeddings_can_be_gone_on_with(self, base, tmp_path):
        """Without the base's embeddings, which peft would write besides."""
        model = add_lora(load_model(str(base), torch.float32, CPU), FAMILIES["tinyllama"], 4, 8, 0.0,
                         ("q_proj", "embed_tokens"))
        save_model(model, SimpleNamespace(save_pretrained=lambda folder: None), tmp_path / "saved", "", True)
        check_adapter(str(tmp_path / "saved"), load_config(str(base)), str(base), trained=True)
        names = load_file(tmp_path / "saved" / "adapter_model.safetensors").keys()
        assert any("lora_embedding_A" in name for name in names) and not any("base_layer" in name for name in names)

    @pytest.mark.parametrize("kind", ["plain", "saved embeddings and head"])
    def test_where_head_and_embeddings_are_one_tensor(self, tied, tmp_path, kind):
        made = save_adapter(tied, tmp_path, **MERGED[kind])
        check(tmp_path, tied)
        torch.testing.assert_close(merge_adapter(load(tied), str(tmp_path))(input_ids=IDS).logits, made, atol=1e-4,
                                   rtol=1e-4)

    @pytest.mark.parametrize("kind", ["embeddings", "head"])
    def test_merging_would_change_both_of_them(self, tied, tmp_path, kind):
        save_adapter(tied, tmp_path, **MERGED[kind])
        with pytest.raises(InputError, match=f"adapts the {kind}, and the model's head and embeddings are one tensor"):
            check(tmp_path, tied)

    @pytest.mark.parametrize("kind", REFUSED)
    def test_lora_that_is_not_supported(self, base, tmp_path, kind):
        save_adapter(base, tmp_path, **REFUSED[kind])
        setting, = REFUSED[kind]
        with pytest.raises(InputError, match=f"of a kind that is not supported: it sets {setting}="):
            check(tmp_path, base)

    @pytest.mark.parametrize("kind", OTHER_METHODS)
    def test_other_methods(self, base, tmp_path, kind):
        save_adapter(base, tmp_path, OTHER_METHODS[kind])
        with pytest.raises(InputError, match=f"is of the kind {kind}, supported: LORA"):
            check(tmp_path, base)

    def test_a_setting_of_a_later_peft(self, base, plain):
        rewrite(plain, twist=0.5)
        with pytest.raises(InputError, match="it sets twist=0.5"):
            check(plain, base)
        rewrite(plain, twist=None)
        check(plain, base)


def rewrite(adapter: Path, **settings: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


class TestTensors:
    """Adapters whose tensors are not those that its description asks for."""

    @staticmethod
    def change(adapter: Path, how) -> None:
        file = adapter / "adapter_model.safetensors"
        save_file(how(load_file(file)), file, {"format": "pt"})

    @pytest.mark.parametrize("renamed", [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace("layers.1", "layers.2"),
    ])
    def test_other_names(self, base, plain, renamed):
        self.change(plain, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})
        with pytest.raises(InputError, match=r"lacks \d of 8 tensors, the first: base_model.* and has \d that have no"):
            check(plain, base)

    def test_half_of_them(self, base, plain):
        self.change(plain, lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.0" in name})
        with pytest.raises(InputError, match="lacks 4 of 8 tensors, the first: .*layers.1.self_attn.q_proj.lora_A"):
            check(plain, base)

    def test_none(self, base, plain):
        self.change(plain, lambda tensors: {})
        with pytest.raises(InputError, match="lacks 8 of 8 tensors"):
            check(plain, base)

    def test_emptied_by_zero_3(self, base, plain):
        self.change(plain, lambda tensors: {name: torch.empty(0) for name in tensors})
        with pytest.raises(InputError, match=r"is empty \(.*ZeRO-3.* is \(0,\), the model takes \(4, 32\)"):
            check(plain, base)

    def test_of_another_model(self, plain, tmp_path):
        other = tiny_model(tmp_path / "other", "llama", hidden=48)
        with pytest.raises(InputError, match=rf"was made for another model than {other}"):
            check(plain, other)
        other = tiny_model(tmp_path / "gpt2", "gpt2")
        with pytest.raises(InputError, match="does not fit a GPT2LMHeadModel: Target modules"):
            check(plain, other)

    def test_a_larger_vocabulary(self, base, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(model.config.vocab_size + 5)
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"],
                                         modules_to_save=["embed_tokens", "lm_head"])).save_pretrained(tmp_path)
        for trained in (False, True):
            with pytest.raises(InputError, match=r"its .*(lm_head|embed_tokens).* is \(305, 32\), the model takes "
                                                 r"\(300, 32\)"):
                check(tmp_path, base, trained)

    def test_what_the_check_lets_pass_is_used(self, base, plain, monkeypatch):
        renamed = {name.replace("q_proj", "k_proj"): tensor
                   for name, tensor in load_file(plain / "adapter_model.safetensors").items()}
        save_file(renamed, plain / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="has tensors that .* does not use, the first: .*k_proj.lora_A"):
            merge_adapter(load(base), str(plain))

    def test_a_pickle_gives_its_tensors(self, base, plain, tmp_path, caplog):
        made = merge_adapter(load(base), str(plain))(input_ids=IDS).logits
        shutil.copytree(plain, tmp_path / "pickle")
        file = tmp_path / "pickle" / "adapter_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
        with caplog.at_level("INFO", "todi"):
            check(tmp_path / "pickle", base)
        assert "adapter_model.bin: tensors are read, nothing else in it is" in caplog.text
        assert torch.equal(merge_adapter(load(base), str(tmp_path / "pickle"))(input_ids=IDS).logits, made)
        torch.save({"run": Path.unlink}, file.with_suffix(".bin"))
        with pytest.raises(InputError, match="cannot read .*adapter_model.bin: "):
            check(tmp_path / "pickle", base)


class TestDamage:
    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"peft_type": "LORA"', "version https://git-lfs"])
    def test_a_description_that_is_none(self, base, plain, text):
        (plain / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match="adapter_config.json is not a JSON object"):
            check(plain, base)

    @pytest.mark.parametrize("settings", [{"r": "four"}, {"r": 0}, {"r": None}, {"lora_alpha": "8"},
                                          {"target_modules": None}, {"target_modules": ["nowhere"]},
                                          {"target_modules": 5}, {"lora_dropout": "none"}, {"bias": "some"},
                                          {"task_type": "SEQ_CLS"}, {"rank_pattern": []}], ids=str)
    def test_values_that_make_no_sense(self, base, plain, settings):
        rewrite(plain, **settings)
        try:
            check(plain, base)
        except InputError:
            return
        load_adapter(load(base), str(plain))(input_ids=IDS)

    @pytest.mark.parametrize("damage", [
        lambda data: b"", lambda data: data[:-100], lambda data: data[:5], lambda data: b"\0" * len(data)])
    def test_weights_that_are_none(self, base, plain, damage):
        file = plain / "adapter_model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(InputError, match="cannot read .*adapter_model.safetensors: "):
            check(plain, base)

    def test_a_pointer(self, base, plain):
        file = plain / "adapter_model.safetensors"
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 134235048\n")
        with pytest.raises(InputError, match="adapter_model.safetensors is a Git LFS pointer, not the file itself"):
            check(plain, base)

    def test_nothing_there(self, base, plain):
        (plain / "adapter_model.safetensors").unlink()
        with pytest.raises(InputError, match="neither adapter_model.safetensors nor adapter_model.bin is there"):
            check(plain, base)
        (plain / "adapter_config.json").unlink()
        with pytest.raises(InputError, match="adapter_config.json is not there"):
            check(plain, base)


class TestTargets:
    @pytest.mark.parametrize("family", ["smollm3", "granite", "olmo", "arcee"])
    def test_all_linear_layers_where_nobody_says_better(self, tmp_path, family):
        model = load(tiny_model(tmp_path, family, num_key_value_heads=2, intermediate_size=64))
        check_lora(model.config, family_of("auto", family), (), "tiny")
        adapted = add_lora(model, family_of("auto", family), 4, 8, 0.0)
        layers = {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
        assert {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"} <= layers
        assert "lm_head" not in layers

    def test_those_that_are_named(self, base):
        config, family = load_config(str(base)), FAMILIES["tinyllama"]
        check_lora(config, family, ("q_proj", "up_proj"), "tiny")
        for targets, wanted in (((), {"q_proj", "v_proj"}), (("q_proj", "up_proj"), {"q_proj", "up_proj"})):
            adapted = add_lora(empty_model(config), family, 4, 8, 0.0, targets)
            assert {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith(".lora_A")} == wanted

    @pytest.mark.parametrize(("targets", "said"), [
        (("q_prj",), "tiny has no linear layer 'q_prj'; did you mean q_proj. allowed: all-linear, q_proj, k_proj"),
        (("lm_head",), "tiny has no linear layer 'lm_head'"),
        (("all-linear", "q_proj"), "all-linear stands alone"),
    ])
    def test_those_that_are_not_there(self, base, targets, said):
        with pytest.raises(InputError, match=said):
            check_lora(load_config(str(base)), FAMILIES["tinyllama"], targets, "tiny")
