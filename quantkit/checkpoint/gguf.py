"""A GGUF file as MODEL: transformers reads it, its weights are dequantized to bfloat16, and what
comes of it is an ordinary checkpoint in the cache.

Made once for a file (its name, size and time); the whole model is in memory meanwhile. A checkpoint
made from 4-bit weights can be no better than these. When another is made, those that weren't used
for longest make room for it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from quantkit.checkpoint.cache import cache_directory, make_room
from quantkit.errors import CheckpointError

# Of all checkpoints made from GGUF files together: two of 8 billion parameters.
MOST_BYTES = 40_000_000_000


def is_gguf(model: str | Path) -> bool:
    """Whether MODEL is meant as a GGUF file, by its name; it may not be there."""
    path = Path(model).expanduser()
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def require_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"there is no file {path}; check the name, or give a model directory or a hub id such"
            " as org/name"
        )


def checkpoint_of_gguf(path: Path) -> Path:
    """The directory of the bfloat16 checkpoint that a GGUF file stands for, made on the first
    call.
    """
    state = path.stat()
    named = hashlib.sha256(
        f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()
    ).hexdigest()[:16]
    target = cache_directory() / "gguf" / f"{path.stem}-{named}"
    if (target / "config.json").is_file():
        with suppress(OSError):  # a cache of another user's is read all the same
            os.utime(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # The file is no smaller than a quarter of what it becomes: 4 bits or more a weight.
    make_room(target.parent, 4 * state.st_size, MOST_BYTES)
    keep_converted(path, target)
    return target


def keep_converted(path: Path, target: Path) -> None:
    """The checkpoint of a GGUF file as the directory `target`, which is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        convert_gguf(path, Path(temporary) / "model")
        try:
            os.rename(Path(temporary) / "model", target)
        except OSError:
            if not (target / "config.json").is_file():  # another process may have been faster
                raise


def require_readers(what: str, extra: str) -> None:
    """what: the sentence's subject; extra: of quantkit's optional dependencies, the one that brings
    them.
    """
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{what} with {error.name}, which is not installed; pip install 'quantkit[{extra}]'"
        ) from None


def convert_gguf(gguf_file: Path, target: Path) -> None:
    """Write what transformers reads from a GGUF file, tokenizer included, as a bfloat16
    checkpoint.
    """
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
    except Exception as error:  # transformers and the reader raise every kind
        raise CheckpointError(
            f"transformers can't read {gguf_file}: {' '.join(str(error).split())[:300]}"
        ) from None
    # It is an ordinary model now; transformers would otherwise write down how it came.
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "README.md").write_text(
        f"Made from {name}, whose weights were dequantized to bfloat16.\n"
    )
