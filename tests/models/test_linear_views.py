"""Tensors counted anew: the numbers of each Linear are found where they lie, and none is lost or
read twice.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint.reader import Checkpoint, MappedShard
from quantkit.models.linear_views import (
    as_linear_views,
    conv1d_as_linear,
    find_stacks,
    transposed_weights,
)

EXPERTS = "model.layers.0.mlp.experts"


def stored(directory: Path, **tensors: torch.Tensor) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return Checkpoint.open(directory)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_apart_are_the_parts_of_their_stack(tmp_path, transposed):
    experts, hidden, intermediate = 3, 10, 6
    gate, up, down = (
        torch.randn(experts, *shape)
        for shape in ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    )
    stacks = {"gate_up_proj": torch.cat([gate, up], 1), "down_proj": down}
    if transposed:
        stacks = {leaf: stack.transpose(1, 2).contiguous() for leaf, stack in stacks.items()}
    checkpoint = stored(tmp_path, **{f"{EXPERTS}.{leaf}": stack for leaf, stack in stacks.items()})
    matrices = as_linear_views(checkpoint)
    assert len(matrices.tensors) == 3 * experts and matrices.nbytes == checkpoint.nbytes
    shard = MappedShard(tmp_path / "model.safetensors")
    for leaf, expected in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        for expert in range(experts):
            name = f"{EXPERTS}.{expert}.{leaf}.weight"
            assert torch.equal(matrices.read(name), expected[expert])
            rows = shard.rows(matrices.tensors[name], 1, 4)
            assert torch.equal(rows, expected[expert][1:4])
            del rows
            shard.release(matrices.tensors[name], 1, 4)


def test_a_stack_is_known_by_its_shape_and_not_by_its_name():
    shapes = {"a.moe.input_linear.weight": (4, 96, 16), "a.moe.output_linear.weight": (4, 16, 48)}
    stacks = find_stacks(shapes)
    assert stacks["a.moe.input_linear.weight"].linears(2) == [
        "a.moe.experts.2.gate_proj",
        "a.moe.experts.2.up_proj",
    ]
    assert stacks["a.moe.output_linear.weight"].linears(0) == ["a.moe.experts.0.down_proj"]
    assert not any(stack.is_transposed for stack in stacks.values())


@pytest.mark.parametrize(
    "shapes",
    [
        {"a.experts.gate_up_proj": (4, 96, 16)},  # alone
        # what one gives the other doesn't take
        {"a.experts.gate_up_proj": (4, 96, 16), "a.experts.down_proj": (4, 16, 40)},
        {"a.experts.gate_up_proj": (4, 96, 16), "a.experts.down_proj": (3, 16, 48)},
        # without a gate either may be transposed
        {"a.experts.up_proj": (4, 48, 16), "a.experts.down_proj": (4, 16, 48)},
        {
            "a.experts.gate_up_proj": (4, 96, 16),
            "a.experts.down_proj": (4, 16, 48),
            "a.experts.gate_up_proj_bias": (4, 96),
        },
        {"a.rg_lru.input_gate_weight": (4, 16, 16), "a.rg_lru.recurrent_gate_weight": (4, 16, 16)},
    ],
)
def test_what_cannot_be_told_is_no_stack(shapes):
    assert len(find_stacks(shapes)) < 2


def test_a_transposed_weight_is_turned(tmp_path):
    weight = torch.randn(6, 18)
    checkpoint = stored(
        tmp_path, **{"h.0.c_attn.weight": weight, "h.0.c_attn.bias": torch.zeros(18)}
    )
    upright = conv1d_as_linear(checkpoint)
    assert upright.tensors["h.0.c_attn.weight"].shape == (18, 6) and torch.equal(
        upright.read("h.0.c_attn.weight"), weight.T
    )
    assert upright.nbytes == checkpoint.nbytes


def test_a_square_weight_is_transposed_where_others_are():
    square = {"h.0.c_proj.weight": (8, 8), "h.0.c_proj.bias": (8,)}
    assert transposed_weights(square) == set()
    assert transposed_weights(
        square | {"h.0.c_attn.weight": (8, 24), "h.0.c_attn.bias": (24,)}
    ) == {"h.0.c_proj.weight", "h.0.c_attn.weight"}
    assert transposed_weights({"h.0.q_proj.weight": (24, 8), "h.0.q_proj.bias": (24,)}) == set()
