"""Packed INT8 words, byte by byte."""

import pytest
import torch

from quantkit.ops.packing import pack_codes, unpack_codes
from quantkit.schemes.number_formats import INT8, NumberFormat

INT4 = NumberFormat("INT4", "int", -8, 7, "int8", "I8", "INT4", bits=4)


def test_codes_are_stored_as_code_plus_128_first_byte_lowest():
    words = pack_codes(torch.tensor([[-128, -127, 0, 127, 1, 2, 3, 4]], dtype=torch.int8), INT8)
    expected = [
        int.from_bytes(stored, "little", signed=True)
        for stored in (bytes([0, 1, 128, 255]), bytes([129, 130, 131, 132]))
    ]
    assert words.dtype == torch.int32
    assert words.tolist() == [expected]


def test_every_code_round_trips_in_every_place_of_a_word():
    codes = torch.arange(-128, 128).to(torch.int8)
    matrix = torch.stack([codes.roll(shift) for shift in range(4)])
    assert torch.equal(unpack_codes(pack_codes(matrix, INT8), INT8), matrix)


@pytest.mark.parametrize("rows, columns", [(0, 8), (1, 4), (3, 12), (5, 68)])
def test_shapes_round_trip(rows, columns):
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    words = pack_codes(codes, INT8)
    assert words.shape == (rows, columns // 4)
    assert torch.equal(unpack_codes(words, INT8), codes)


def test_strided_codes_and_words_pack_like_contiguous_ones():
    codes = torch.randint(-128, 128, (8, 6), dtype=torch.int8)
    words = pack_codes(codes.t(), INT8)
    assert torch.equal(words, pack_codes(codes.t().contiguous(), INT8))
    assert torch.equal(unpack_codes(words.t().contiguous().t(), INT8), codes.t())


def test_words_of_four_bits_hold_eight_codes_plus_8_the_first_in_the_lowest_bits():
    codes = torch.tensor([[-8, -7, 0, 7, 1, 2, 3, 4]], dtype=torch.int8)
    words = pack_codes(codes, INT4)
    assert words.shape == (1, 1)
    assert words.item() & 0xFFFFFFFF == 0xCBA9F810
    assert torch.equal(unpack_codes(words, INT4), codes)
