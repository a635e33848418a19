"""GGUF files as MODEL: transformers dequantizes one to bfloat16 and saves an ordinary checkpoint in
the cache.

A file (name, size and modification time) is converted once, with the whole model in memory. The
result is no more accurate than the file: 4-bit weights stay 4-bit weights, written in 16 bits.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from quantkit.checkpoint.cache import cache_directory, make_room
from quantkit.errors import CheckpointError, brief

# Bytes that all converted checkpoints in the cache may take: two of 8 billion parameters.
MOST_BYTES = 40_000_000_000


def is_gguf(model: str | Path) -> bool:
    """Whether the name of MODEL is that of a GGUF file. The file may be missing."""
    path = Path(model).expanduser()
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def require_file(path: Path) -> None:
    """Raise CheckpointError if there is no such file."""
    if not path.is_file():
        raise CheckpointError(
            f"there is no file {path}; check the name, or give a model directory or a hub id such"
            " as org/name"
        )


def checkpoint_of_gguf(path: Path) -> Path:
    """The directory of the bfloat16 checkpoint that was converted from a GGUF file. The first call
    converts it.

    Raises CheckpointError if the file can't be converted.
    """
    state = path.stat()
    named = hashlib.sha256(
        f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()
    ).hexdigest()[:16]
    target = cache_directory() / "gguf" / f"{path.stem}-{named}"
    if (target / "config.json").is_file():
        with suppress(OSError):  # a cache that belongs to another user can still be read
            os.utime(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # A weight grows from at least 4 bits to 16: the checkpoint is at most four times as large.
    make_room(target.parent, 4 * state.st_size, MOST_BYTES)
    keep_converted(path, target)
    return target


def keep_converted(path: Path, target: Path) -> None:
    """Convert a GGUF file to a checkpoint in the directory `target`, which appears only when it is
    complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        convert_gguf(path, Path(temporary) / "model")
        try:
            os.rename(Path(temporary) / "model", target)
        except OSError:
            if not (target / "config.json").is_file():  # another process may have been faster
                raise


def require_readers(what: str, extra: str) -> None:
    """Raise CheckpointError if the packages that read GGUF files are missing.

    what: the beginning of the message.
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
    # The model is dequantized; without this, transformers would save it as quantized.
    model.config.__dict__.pop("quantization_config", None)
    vars(model).update(is_quantized=False, hf_quantizer=None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "README.md").write_text(
        f"Made from {name}, whose weights were dequantized to bfloat16.\n"
    )
