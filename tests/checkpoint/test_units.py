"""Sizes as people write them."""

import pytest

from quantkit.checkpoint.units import format_bytes, parse_bytes
from quantkit.errors import OutputError


def test_sizes_are_read_in_decimal_and_binary_units():
    assert [parse_bytes(text) for text in ("5GB", "500MB", "2GiB", "10", "1.5kB")] == [
        5 * 10**9,
        5 * 10**8,
        2**31,
        10,
        1500,
    ]
    for wrong in ("", "many", "-1GB", "5XB"):
        with pytest.raises(OutputError):
            parse_bytes(wrong)


def test_sizes_are_written_in_decimal_units():
    written = [format_bytes(count) for count in (0, 999, 1000, 1_500_000, 2.5e12)]
    assert written == ["0 bytes", "999 bytes", "1 kB", "1.5 MB", "2500.0 GB"]
