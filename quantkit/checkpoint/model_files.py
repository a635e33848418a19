"""A model directory's files other than its weights: config.json, other JSON files, and the files
that an export copies.

A directory may come from an untrusted source. Links that lead out of it are refused, and so is JSON
that isn't an object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.checkpoint.formats import config_of_side_file, side_files
from quantkit.errors import CheckpointError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    advice: end of the message if the file is missing.

    Raises CheckpointError if the file is missing, can't be read or isn't a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing{'; ' + advice if advice else ''}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not readable as JSON; fetch or copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is JSON but not an object; fetch or copy it again")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory. If it has no quantization_config, that of a side file
    (ModelOpt's) is added.

    Raises CheckpointError if config.json is missing or damaged.
    """
    require_inside(path / "config.json", path)
    config = read_json(
        path / "config.json",
        "every Hugging Face checkpoint has one; copy it from where the model comes from",
    )
    for name in side_files():
        if config.get("quantization_config") is None and (path / name).is_file():
            require_inside(path / name, path)
            stored = config_of_side_file(name, read_json(path / name, ""))
            config = config | {"quantization_config": stored}
    return config


def require_inside(path: Path, directory: Path) -> Path:
    """Return `path`, or raise CheckpointError if it is a link that leads out of the directory.

    An untrusted checkpoint must not make quantkit read other files of this machine. In the hub's
    cache, snapshots/REVISION holds links to ../../blobs; these count as inside.
    """
    try:
        root, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(
            f"{path} is a link to itself; put a copy of the file in its place"
        ) from None
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(
            f"{path} is a link to {target}, out of its directory; put a copy in its place if you"
            " trust it"
        )
    return path


def is_carried_over(name: str) -> bool:
    """Whether an export copies a file of this name unchanged."""
    made = {"config.json", INDEX_FILE, *side_files(), "quantkit.json"}
    weights = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", *PICKLE_SUFFIXES)
    return name not in made and not name.endswith(weights) and not name.startswith(".")


def carried_over_files(directory: Path) -> list[Path]:
    """The files that an export copies: tokenizer, templates, generation config, licence and model
    card, but neither weights nor config.json.
    """
    files = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and is_carried_over(path.name)
    ]
    templates = directory / "additional_chat_templates"
    if templates.is_dir():
        files += sorted(
            path for path in require_inside(templates, directory).iterdir() if path.is_file()
        )
    return [require_inside(path, directory) for path in files]
