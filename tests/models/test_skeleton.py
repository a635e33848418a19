"""The module tree of a model, and its decoder blocks."""

from types import SimpleNamespace

import pytest
from torch import nn

from quantkit.errors import CheckpointError
from quantkit.models.skeleton import decoder_blocks


def test_a_model_without_decoder_blocks_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
    with pytest.raises(CheckpointError, match="no list of 2 decoder blocks"):
        decoder_blocks(model)


def test_decoder_blocks_are_the_list_with_the_most_parameters():
    model = nn.ModuleDict(
        {
            "norms": nn.ModuleList([nn.LayerNorm(4)] * 2),
            "blocks": nn.ModuleList([nn.Linear(9, 9)] * 2),
            "other": nn.ModuleList([nn.Linear(99, 99)]),
        }
    )
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
    name, blocks = decoder_blocks(model)
    assert name == "blocks" and blocks is model["blocks"]
    model["vision_tower"] = nn.ModuleList([nn.Linear(99, 99)] * 2)
    assert decoder_blocks(model)[0] == "blocks"
