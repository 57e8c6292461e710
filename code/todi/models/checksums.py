"""Checksums of what a model computes with: its weights, its architecture, how its tokenizer cuts text."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.models.loading import load_config
from todi.models.tokenizers import pipeline

_WEIGHTS = {".safetensors", ".bin", ".gguf"}
_DESCRIPTIONS = {"config.json", "adapter_config.json"}
_PIECE = 64 << 20


def weights_checksum(model: str, trust_remote_code: bool = False) -> str:
    """Of the contents and names of a model's or an adapter's weight files and configuration; of a model on the Hub,
    the commit. Pieces of a file are read in parallel: weights are tens of gigabytes."""
    place = Path(model)
    if not place.exists():
        return str(load_config(model, trust_remote_code)._commit_hash)
    files = [place] if place.is_file() else sorted(
        file for file in place.iterdir() if file.suffix in _WEIGHTS or file.name in _DESCRIPTIONS)
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for file in files:
            whole.update(f"{file.name} {file.stat().st_size}\n".encode())
            for digest in pool.map(_piece_digest, *zip(*_pieces(file), strict=True)):
                whole.update(digest)
    return whole.hexdigest()


def tokenizer_checksum(tokenizer: Tokenizer) -> str:
    """Of all that `tokenizer_difference` compares: tokenizers that encode alike have the same."""
    parts = [sorted(tokenizer.get_vocab().items()), pipeline(tokenizer), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _pieces(file: Path) -> Iterator[tuple[Path, int]]:
    return ((file, start) for start in range(0, max(1, file.stat().st_size), _PIECE))


def _piece_digest(file: Path, start: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(start)
        return hashlib.sha256(opened.read(_PIECE)).digest()
