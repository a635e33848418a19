"""Reading safetensors headers, with every entry checked before it is used.

A file is 8 bytes of little-endian header length, a JSON header, then the tensors without gaps. The
file may come from an untrusted source. Each name, dtype, shape and offset is therefore checked
against the file's size. Files that other readers refuse are refused here too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from quantkit.errors import CheckpointError

# safetensors dtype → (bytes per element, torch's name)
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
# The reference implementation refuses longer headers.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: its name, dtype and shape, and its position in the file.

    name: its key in the header.
    dtype: a key of DTYPES.
    shape: elements in each dimension.
    path: the file that holds it.
    start: its first byte, counted from the beginning of the file.
    strides: elements from one row, and from one column, to the next, for a matrix that isn't stored
        row-major (`models/linear_views.py` makes these); None for a row-major tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    strides: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes, without gaps."""
        return math.prod(self.shape) * DTYPES[self.dtype][0]

    @property
    def is_dense(self) -> bool:
        """Whether the tensor is stored row-major without gaps."""
        return self.strides is None or self.strides == (self.shape[1], 1)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The bytes that hold the rows first to last (exclusive): (first byte in the file, number
        of bytes).
        """
        size = DTYPES[self.dtype][0]
        if self.strides is None or self.is_dense:
            row_bytes = row_elements(self) * size
            return self.start + first * row_bytes, (last - first) * row_bytes
        row_stride, column_stride = self.strides
        extent = (last - first - 1) * row_stride + (self.shape[1] - 1) * column_stride + 1
        return self.start + first * row_stride * size, (
            extent * size if last > first and self.shape[1] else 0
        )


def row_count(info: TensorInfo) -> int:
    """The number of rows: the first dimension, or 1 for a scalar."""
    return info.shape[0] if info.shape else 1


def row_elements(info: TensorInfo) -> int:
    """The number of elements in a row: the product of all dimensions but the first."""
    return math.prod(info.shape[1:])


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name.

    Raises CheckpointError if the file can't be read or doesn't match its header.
    """
    try:
        with open(path, "rb") as file:
            return parse_header(file, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from None


def parse_header(file: BinaryIO, size: int, path: Path) -> dict[str, TensorInfo]:
    """The tensors of an open file, by name. The file may be on another machine.

    size: size of the whole file, in bytes.
    path: path from which its tensors will be read.

    Raises CheckpointError if the file doesn't match its header.
    """
    length = _header_length(file.read(8), size, path)
    try:
        entries = _decode(file.read(length))
        tensors = {
            name: _tensor_info(name, entry, path, 8 + length, size)
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a broken safetensors header ({type(error).__name__}); fetch or copy it"
            " again"
        ) from None
    _require_no_gap_or_overlap(tensors.values(), path, size - 8 - length)
    return tensors


def _header_length(prefix: bytes, size: int, path: Path) -> int:
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path} is {size} bytes long, too short for a safetensors file; fetch or copy it again"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(
            f"{path} claims a header of {length} bytes but is {size} bytes long; fetch or copy it"
            " again"
        )
    return length


def _decode(raw: bytes) -> dict[str, Any]:
    """The header's entries by tensor name, without its metadata.

    Stricter than Python's JSON reader: other readers refuse text that isn't UTF-8 and numbers that
    aren't sizes.
    """
    header = json.loads(
        raw.decode("utf-8"),
        object_pairs_hook=_unique_keys,
        parse_int=_size,
        parse_float=_refuse_number,
        parse_constant=_refuse_number,
    )
    _require_text(header.pop("__metadata__", None))
    return header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dict.

    JSON allows a repeated key, and Python keeps the last one; a header with a repeated key is
    refused.
    """
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError("a key appears twice")
    return keys


def _size(text: str) -> int:
    """A JSON number as a size: no sign, at most as many digits as 64 bits hold."""
    if text[0] == "-" or len(text) > 20:
        raise ValueError(f"{text[:20]} is not a size")
    return int(text)


def _refuse_number(text: str) -> int:
    raise ValueError(f"{text[:20]} is not a size")


def _require_text(metadata: Any) -> None:
    """Refuse metadata with values other than text: the format allows only text, and other readers
    refuse the rest.
    """
    if metadata is not None:
        for text in [*metadata.keys(), *metadata.values()]:
            text.encode()  # AttributeError for what isn't text


def _tensor_info(name: str, entry: Any, path: Path, data_start: int, size: int) -> TensorInfo:
    """One entry of a header.

    data_start: the file's first byte after the header.
    size: size of the file, in bytes.
    """
    name.encode()  # JSON can escape half a surrogate pair, which isn't text
    if entry.keys() != {"dtype", "shape", "data_offsets"} or not isinstance(entry["shape"], list):
        raise ValueError("a tensor has a dtype, a shape and data_offsets")
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor '{name}' has the dtype {dtype!r}; quantkit reads {', '.join(DTYPES)}"
        )
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (*shape, begin, end)):
        raise CheckpointError(
            f"{path}: tensor '{name}' has a size that is no whole number; fetch or copy it again"
        )
    if not name:
        raise CheckpointError(f"{path} has a tensor without a name; fetch or copy it again")
    if not _is_countable(shape, dtype):
        raise CheckpointError(
            f"{path}: tensor '{name}' has a shape that no memory holds; fetch or copy it again"
        )
    info = TensorInfo(name, dtype, shape, path, data_start + begin)
    if end - begin != info.nbytes or data_start + end > size:
        raise CheckpointError(
            f"{path}: tensor '{name}' doesn't fit its place in the file ({info.nbytes} bytes at"
            f" {begin}–{end} of {size - data_start}); fetch or copy it again"
        )
    return info


def _is_countable(shape: Sequence[int], dtype: str) -> bool:
    """Whether a tensor's sizes and strides fit into 63 bits, even if a dimension is zero.

    Stops at the first product that doesn't fit.
    """
    nbytes = DTYPES[dtype][0]
    for size in shape:
        nbytes *= max(1, size)
        if nbytes >= 2**63:
            return False
    return True


def _require_no_gap_or_overlap(infos: Iterable[TensorInfo], path: Path, data_bytes: int) -> None:
    """Raise CheckpointError unless each byte after the header belongs to exactly one tensor."""
    spans = sorted((info.start, info.start + info.nbytes, info.name) for info in infos)
    for (_, previous_end, previous), (begin, _, name) in zip(spans, spans[1:]):
        if begin < previous_end:
            raise CheckpointError(
                f"{path}: the tensors '{previous}' and '{name}' overlap; fetch or copy it again"
            )
    # Without overlap, the tensors fill the file exactly when their sizes add up to it.
    if sum(end - begin for begin, end, _ in spans) != data_bytes:
        raise CheckpointError(
            f"{path} has bytes that belong to no tensor, which other readers refuse; fetch or copy"
            " it again"
        )
