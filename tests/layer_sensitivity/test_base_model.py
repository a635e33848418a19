"""The base model of a sensitivity analysis."""

import pytest
import torch

from quantkit.errors import EvaluationError
from quantkit.layer_sensitivity.base_model import recovered_weight
from quantkit.ops.reference import quantize, sqnr_db
from quantkit.schemes.scheme import SCHEMES


def test_scales_that_were_folded_before_rounding_are_found_again():
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(96, 160, generator=generator)
    folded = (
        original
        * torch.rand(96, 1, generator=generator).add(0.2)
        * torch.rand(1, 160, generator=generator).mul(6).exp()
    )
    values = quantize(folded, SCHEMES["int8-dynamic"].weight).dequantize()
    assert float(sqnr_db(folded, recovered_weight(original, values))) > 50
    rotation = torch.linalg.qr(torch.randn(160, 160, generator=generator))[0]
    with pytest.raises(EvaluationError, match="with scaled rows and columns"):
        recovered_weight(
            original, quantize(original @ rotation, SCHEMES["int8-dynamic"].weight).dequantize()
        )
