"""A GGUF file as MODEL: transformers reads it, dequantizes its weights to bfloat16, and saves an
ordinary checkpoint in the cache.

It is made once for a file (name, size and time), with the whole model in memory. A checkpoint made
from 4-bit weights is no better than these.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from quantkit.checkpoint.cache import cache_directory, make_room
from quantkit.errors import CheckpointError, brief

# The limit of all converted checkpoints in the cache: two of 8 billion parameters.
MOST_BYTES = 40_000_000_000


def is_gguf(model: str | Path) -> bool:
    """Whether MODEL is meant as a GGUF file, by its name. The file may be missing."""
    path = Path(model).expanduser()
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def require_file(path: Path) -> None:
    """Raise CheckpointError where there is no such file."""
    if not path.is_file():
        raise CheckpointError(
            f"there is no file {path}; check the name, or give a model directory or a hub id such"
            " as org/name"
        )


def checkpoint_of_gguf(path: Path) -> Path:
    """The directory of the bfloat16 checkpoint of a GGUF file. It is made on the first call.

    Raises CheckpointError where the file can't be converted.
    """
    state = path.stat()
    named = hashlib.sha256(
        f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()
    ).hexdigest()[:16]
    target = cache_directory() / "gguf" / f"{path.stem}-{named}"
    if (target / "config.json").is_file():
        with suppress(OSError):  # a cache that belongs to another user can be read all the same
            os.utime(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # From 4 bits or more a weight to 16: the checkpoint is at most four times as large.
    make_room(target.parent, 4 * state.st_size, MOST_BYTES)
    keep_converted(path, target)
    return target


def keep_converted(path: Path, target: Path) -> None:
    """Convert a GGUF file to a checkpoint in the directory `target`, which is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        convert_gguf(path, Path(temporary) / "model")
        try:
            os.rename(Path(temporary) / "model", target)
        except OSError:
            if not (target / "config.json").is_file():  # another process may have been faster
                raise


def require_readers(what: str, extra: str) -> None:
    """Raise CheckpointError where the packages that read GGUF files are missing.

    what: the beginning of the error's sentence.
    extra: the optional dependency of quantkit that contains them.
    """
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{what} with {error.name}, which is not installed; pip install 'quantkit[{extra}]'"
        ) from None


def convert_gguf(gguf_file: Path, target: Path) -> None:
    """Read a GGUF file with transformers and save model and tokenizer as a bfloat16 checkpoint."""
    require_readers(f"{gguf_file.name} is read", "gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(gguf_file.parent), gguf_file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        settings = GgufConfig(gguf_file=name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, dtype=torch.bfloat16, quantization_config=settings
        )
    except Exception as error:  # transformers and the reader raise exceptions of many kinds
        raise CheckpointError(f"transformers can't read {gguf_file}: {brief(error, 300)}") from None
    # The model is an ordinary one now: otherwise transformers would save it as quantized.
    model.config.__dict__.pop("quantization_config", None)
    vars(model).update(is_quantized=False, hf_quantizer=None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "README.md").write_text(
        f"Made from {name}, whose weights were dequantized to bfloat16.\n"
    )
