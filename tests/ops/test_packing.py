"""Packed INT8 words, byte by byte."""

import pytest
import torch

from quantkit.ops.packing import pack_int8, unpack_int8


def test_codes_lie_as_code_plus_128_first_byte_lowest():
    words = pack_int8(torch.tensor([[-128, -127, 0, 127, 1, 2, 3, 4]], dtype=torch.int8))
    expected = [
        int.from_bytes(stored, "little", signed=True)
        for stored in (bytes([0, 1, 128, 255]), bytes([129, 130, 131, 132]))
    ]
    assert words.dtype == torch.int32
    assert words.tolist() == [expected]


def test_every_code_round_trips_in_every_place_of_a_word():
    codes = torch.arange(-128, 128).to(torch.int8)
    matrix = torch.stack([codes.roll(shift) for shift in range(4)])
    assert torch.equal(unpack_int8(pack_int8(matrix)), matrix)


@pytest.mark.parametrize("rows, columns", [(0, 8), (1, 4), (3, 12), (5, 68)])
def test_shapes_round_trip(rows, columns):
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    words = pack_int8(codes)
    assert words.shape == (rows, columns // 4)
    assert torch.equal(unpack_int8(words), codes)


def test_strided_codes_and_words_pack_like_contiguous_ones():
    codes = torch.randint(-128, 128, (8, 6), dtype=torch.int8)
    words = pack_int8(codes.t())
    assert torch.equal(words, pack_int8(codes.t().contiguous()))
    assert torch.equal(unpack_int8(words.t().contiguous().t()), codes.t())
