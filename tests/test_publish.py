"""todi.publish: what is uploaded, under which licence, and who takes a checkpoint; the Hub is a stand-in."""

import json

import pytest
from evaluating import add_adapter, run
from huggingface_hub.errors import HTTPError
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer
from todi import publish
from todi.errors import InputError
from todi.models.handing_on import takers

CARD = "---\nlicense: apache-2.0\n---\n\n# small\n\nfrom_pretrained(\"THIS_FOLDER\")\n"


@pytest.fixture
def base(tmp_path):
    """A base model with its licence, as fetch leaves it."""
    folder = tmp_path / "model_hub" / "anything"
    tiny_model(folder, "llama", vocab=len(tiny_tokenizer(folder)))
    (folder / "LICENSE.txt").write_text("You may.")
    (folder / "source.json").write_text('{"hub": "owner/base"}')
    return folder


@pytest.fixture
def checkpoint(tmp_path, base):
    """A checkpoint of a run, with what must stay here."""
    folder = tmp_path / "run" / "epoch1"
    tiny_model(folder, "llama", vocab=len(tiny_tokenizer(folder)))
    (folder / "README.md").write_text(CARD)
    (folder / "eval").mkdir()
    (folder / "eval" / "results.json").write_text("{}")
    for name in ("optimizer.bin", "own.py", ".secret.json"):
        (folder / name).write_text("stays")
    (folder.parent / "args.json").write_text(json.dumps({"settings": {"student": {"model_path": str(base)}}}))
    return folder


class Hub:
    """What is asked of it."""

    def __init__(self, error=None):
        self.error, self.repos, self.files = error, {}, {}

    def create_repo(self, repo, private, exist_ok):
        if self.error:
            raise self.error
        self.repos[repo] = private

    def create_commit(self, repo, operations, commit_message):
        for one in operations:
            with one.as_file() as file:
                self.files[one.path_in_repo] = file.read()


def test_what_is_uploaded(monkeypatch, checkpoint, base):
    hub = Hub()
    monkeypatch.setattr(publish, "HfApi", lambda: hub)
    assert run(monkeypatch, publish, checkpoint, "--repo", "me/small", "--private") == 0
    assert hub.repos == {"me/small": True}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE.txt"} <= hub.files.keys()
    assert not {"optimizer.bin", "own.py", ".secret.json", "results.json"} & hub.files.keys()
    assert hub.files["README.md"].decode() == CARD.replace("THIS_FOLDER", "me/small")
    assert hub.files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert hub.files["LICENSE.txt"] == b"You may."


def test_a_dry_run_asks_nobody(monkeypatch, checkpoint, capsys):
    monkeypatch.setattr(publish, "HfApi", None)
    assert run(monkeypatch, publish, checkpoint, "--repo", "me/small", "--dry-run") == 0
    screen = capsys.readouterr().out
    for said in ("lm-evaluation-harness: takes it", "vLLM: takes it (vllm serve, where its version has LlamaFor",
                 "llama.cpp: takes it", " bytes  model.safetensors", "nothing was uploaded; licence: apache-2.0"):
        assert said in screen


def test_an_adapter_names_its_base_as_the_hub_does(monkeypatch, checkpoint, base):
    folder = checkpoint.parent / "adapter"
    add_adapter(base, folder)
    tiny_tokenizer(folder)
    (folder / "README.md").write_text(CARD)
    hub = Hub()
    monkeypatch.setattr(publish, "HfApi", lambda: hub)
    assert run(monkeypatch, publish, folder, "--repo", "me/adapter") == 0
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert {one.program: one.takes for one in takers(folder)} == {
        "peft, lm-evaluation-harness": True, "vLLM": True, "llama.cpp": True}
    (base / "source.json").unlink()
    assert publish.hub_name(base) is None
    assert publish.hub_name(base.rename(base.parent / "llama2-7b")) == "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_who_takes_a_checkpoint(tmp_path, family):
    tiny_model(tmp_path, family, vocab=len(tiny_tokenizer(tmp_path)))
    assert [one.takes for one in takers(tmp_path)] == [True, True, True]


@pytest.mark.parametrize(("key", "value", "takes"), [
    ("architectures", None, [True, False, True]), ("auto_map", {"AutoConfig": "own.Config"}, [False, False, True])])
def test_who_does_not(checkpoint, key, value, takes):
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert [one.takes for one in takers(checkpoint)] == takes


def test_nobody_takes_what_is_not_whole(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"cannot read {weights}"):
        takers(checkpoint)
    weights.unlink()
    with pytest.raises(InputError, match="no model"):
        takers(checkpoint)


@pytest.mark.parametrize(("words", "message"), [
    (["nowhere"], "--repo is required"),
    (["nowhere", "--repo", "me/small"], "nowhere has no README.md"),
    (["nowhere", "--repo", "small"], "--repo must be owner/name, got 'small'"),
])
def test_bad_input(monkeypatch, capsys, words, message):
    assert run(monkeypatch, publish, *words) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_a_hub_that_refuses(monkeypatch, checkpoint, capsys):
    monkeypatch.setattr(publish, "HfApi", lambda: Hub(HTTPError("401 Unauthorized\nmore")))
    assert run(monkeypatch, publish, checkpoint, "--repo", "me/small") == 2
    assert "error: cannot upload to me/small: 401 Unauthorized. `hf auth login` wants" in capsys.readouterr().err
