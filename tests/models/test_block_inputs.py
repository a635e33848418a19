"""Captured block inputs: equal tensors are kept once."""

import gc
import weakref

import torch

from quantkit.models.block_inputs import BlockInputs, SharedTensors


def test_interning_keeps_values_and_lets_go_of_those_that_never_come_again():
    known = SharedTensors()
    kept = []
    for number in range(3 * SharedTensors.COMPARED):
        tensor = torch.full((4,), float(number))
        inputs = BlockInputs(
            (tensor, [tensor, None], 5),
            {"mask": {"full": tensor.clone()}, "layer": "x"},
            "hidden_states",
        )
        (call,) = known.of_batch([inputs])
        assert call.arguments[0] is call.arguments[1][0] is call.keywords["mask"]["full"]
        assert call.arguments[0].tolist() == [number] * 4
        assert (
            call.arguments[1][1],
            call.arguments[2],
            call.keywords["layer"],
            call.hidden_name,
        ) == (None, 5, "x", "hidden_states")
        kept.append(weakref.ref(tensor))
        del tensor, call, inputs
    gc.collect()
    assert sum(reference() is not None for reference in kept) == SharedTensors.COMPARED


def test_equal_values_of_another_shape_or_type_are_not_one():
    known = SharedTensors()
    tensors = [torch.ones(4), torch.ones(2, 2), torch.ones(4, dtype=torch.bool), torch.ones(8)[::2]]
    captured = [BlockInputs((tensor,), {}, "") for tensor in tensors]
    assert len({id(inputs.arguments[0]) for inputs in known.of_batch(captured)}) == 4
