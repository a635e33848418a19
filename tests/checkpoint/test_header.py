"""Headers of safetensors files: what is broken is refused before a byte of data is read."""

import json
import struct

import pytest

from quantkit.checkpoint.header import read_header
from quantkit.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def damaged(path, header: dict | bytes, data: bytes = b"", claimed: int | None = None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + data)
    return path


@pytest.mark.parametrize(
    ("header", "data", "claimed"),
    [
        ({"a": ENTRY}, b"1234", None),  # truncated data
        ({"a": ENTRY}, b"12345678", 10**6),  # header beyond the file
        ({"a": ENTRY}, b"12345678", 2**63),
        (b"not json", b"", None),
        (b"[]", b"", None),
        (b"\xff\xfe", b"", None),
        ({"a": {"dtype": "F32"}}, b"", None),
        ({"a": ENTRY | {"dtype": "F13"}}, b"12345678", None),
        ({"a": ENTRY | {"shape": [-2]}}, b"12345678", None),
        ({"a": ENTRY | {"shape": [2.0]}}, b"12345678", None),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, b"12345678", None),
        ({"a": ENTRY | {"data_offsets": [0, 4]}}, b"12345678", None),
        ({"a": ENTRY, "b": ENTRY}, b"12345678", None),  # overlapping
    ],
)
def test_broken_files_are_refused(tmp_path, header, data, claimed):
    with pytest.raises(CheckpointError):
        read_header(damaged(tmp_path / "x.safetensors", header, data, claimed))


def test_file_too_short_for_a_header_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="too short"):
        read_header(tmp_path / "x.safetensors")
