"""Puts a checkpoint on the Hugging Face Hub, with its card and the licence of what it was made from.

    python -m todi.publish outputs/mine/epoch3 --repo me/small --dry-run      # looks at all of it, without a network
    hf auth login
    python -m todi.publish outputs/mine/epoch3 --repo me/small

What is uploaded is what a run left, but for the card, which then names the repository, and for the base model of an
adapter, which is named as the Hub names it where that is known. Responses (eval/) stay here.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError

from todi.errors import InputError, run_main
from todi.models.families import FAMILIES
from todi.models.handing_on import ADAPTER, CARD, handed_on, licence_files, licence_of, takers
from todi.options import check, option, parse
from todi.runtime.logs import set_up_logging

logger = logging.getLogger("todi.publish")


@dataclass(frozen=True)
class PublishConfig:
    """Puts a checkpoint on the Hugging Face Hub."""

    folder: str = option("", "a checkpoint of a run", flag="folder")
    repo: str = option("", "where to: owner/name", pattern=(r"[\w.-]+/[\w.-]+", "owner/name"))
    private: bool = option(False, "make the repository a private one, where it is not there yet")
    dry_run: bool = option(False, "say what would be uploaded, and stop; needs no network")


def main() -> None:
    """Look, say, upload."""
    config = parse(PublishConfig, prog="python -m todi.publish")
    set_up_logging(is_main=True)
    if not config.repo:
        raise InputError("--repo is required")
    check(config)
    folder = Path(config.folder)
    if not (folder / CARD).is_file():
        raise InputError(f"{folder} has no {CARD}: a checkpoint of a run has a model card")
    for taker in takers(folder):
        logger.info("%s: %s (%s)", taker.program, "takes it" if taker.takes else "does not take it", taker.how)
    files = contents(folder, config.repo)
    licence = licence_of(files[CARD].decode())
    if licence in (None, "other"):
        logger.warning("the card names no licence; say in %s which one holds", folder / CARD)
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        logger.info("%12s bytes  %s", f"{size:,}", name)
    if config.dry_run:
        logger.info("nothing was uploaded; licence: %s", licence)
        return
    upload(files, config.repo, config.private)
    logger.info("https://huggingface.co/%s (licence: %s)", config.repo, licence)


def contents(folder: Path, repo: str) -> dict[str, Path | bytes]:
    """What is uploaded, by name: files as they are, or the bytes of those that say something else on the Hub."""
    files: dict[str, Path | bytes] = {file.name: file for file in handed_on(folder)}
    base = base_of(folder)
    if base:
        files = {file.name: file for file in licence_files(base)} | files
    files[CARD] = (folder / CARD).read_text(encoding="utf-8").replace("THIS_FOLDER", repo).encode()
    if ADAPTER in files:
        files[ADAPTER] = _adapter_config(folder)
    return files


def base_of(folder: Path) -> Path | None:
    """The folder of the model that a run began with, by its args.json; None where that does not say, or is gone."""
    record = folder.parent / "args.json"
    try:
        base = Path(json.loads(record.read_text(encoding="utf-8"))["settings"]["student"]["model_path"])
    except (OSError, ValueError, KeyError):
        return None
    return base if base.is_dir() else None


def _adapter_config(folder: Path) -> bytes:
    """With the Hub's name of the base model, so that others find it."""
    described = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    path = Path(described["base_model_name_or_path"])
    if path.is_dir():
        name = hub_name(path)
        if name is None:
            logger.warning("the adapter's base is the folder %s, which others do not have; publish it too, and name it "
                           "in %s", path, folder / ADAPTER)
        described["base_model_name_or_path"] = name or str(path)
    return (json.dumps(described, indent=2) + "\n").encode()


def hub_name(model: Path) -> str | None:
    """What the Hub calls a model folder, by what fetched it or by the name that it has in model_hub/."""
    source = model / "source.json"
    fetched = json.loads(source.read_text(encoding="utf-8")).get("hub") if source.is_file() else None
    return fetched or {name: hub for family in FAMILIES for name, hub in FAMILIES[family].hub.items()}.get(model.name)


def upload(files: Mapping[str, Path | bytes], repo: str, private: bool) -> None:
    """In one commit. Raises InputError when the Hub does not take it, or is out of reach."""
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, [CommitOperationAdd(name, content) for name, content in files.items()],
                          commit_message="A checkpoint of todi")
    except (HTTPError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"cannot upload to {repo}: {reason}. `hf auth login` wants a token that may write there"
                         ) from error


if __name__ == "__main__":
    run_main(main)
