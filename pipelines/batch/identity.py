"""Which model, by content: what a finished row was made with, so that a changed model makes it anew."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_dit.pipelines.generate import check_model_folder, find_model


def digest(what: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of plain values; the order of their names does not count."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def model_identity(model: str) -> str:
    """What tells two models apart, whatever they are called and wherever they lie.

    Args:
        model: as `load_pipeline` takes it.

    Returns:
        Of a folder `sha256:` and 16 digits over the names and contents of its JSON, text and weight files; of a Hub id
        the id, `@` and the commit that would be loaded, asked from the Hub, or offline from its cache.

    Raises:
        ValueError: there is no such model, or its folder is damaged.
    """
    source = find_model(model)
    if isinstance(source, Path):
        check_model_folder(source)
        return f"sha256:{_folder_digest(source)}"
    from huggingface_hub import hf_hub_download

    try:
        index = Path(hf_hub_download(source, "model_index.json"))
    except Exception as error:  # no network, no such model, no permission: there is nothing to load
        raise ValueError(f"model: {model!r} was not found on the Hub ({type(error).__name__})") from error
    return f"{source}@{index.parent.name}"


def _folder_digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(
        path for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".model", ".safetensors")
    ):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]
