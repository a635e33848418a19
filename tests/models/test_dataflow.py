"""Tracing a block: the order of its Linears, which share an input, and which norm feeds which."""

import pytest
import torch
from torch import nn

from quantkit.models.dataflow import trace
from quantkit.models.hooks import EnoughSeen, capture, capture_inputs


class Block(nn.Module):
    """q and k read what the norm returns, out reads neither; spare never runs."""

    def __init__(self, norm_size: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(norm_size, bias=False)
        self.spare, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.k, self.q = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden.unflatten(-1, (-1, len(self.norm.weight)))).flatten(-2)
        return self.out(self.q(normed) + self.k(normed))


HIDDEN = torch.arange(12.0).reshape(3, 4)


def test_linears_are_in_the_order_of_their_calls_with_those_that_share_an_input():
    block = Block()
    found = trace(block, lambda: block(HIDDEN))
    assert found.order == ("q", "k", "out")
    assert found.shared_inputs == (("q", "k"), ("out",))
    assert dict(found.norm_of) == {"q": "norm", "k": "norm"}


def test_a_norm_of_a_part_of_the_input_feeds_no_linear():
    block = Block(norm_size=2)
    assert not trace(block, lambda: block(HIDDEN)).norm_of


def test_a_linear_that_runs_twice_stays_with_its_first_input():
    block = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    first, second = HIDDEN, HIDDEN + 1

    def run() -> None:
        block["a"](first), block["a"](second), block["b"](second)

    assert trace(block, run).shared_inputs == (("a",), ("b",))


def test_empty_inputs_are_not_shared():
    """They all have the address 0: experts that got no token read nothing in common."""
    block = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})

    def run() -> None:
        block["a"](torch.empty(0, 4)), block["b"](torch.empty(0, 4)), block["c"](HIDDEN)

    assert trace(block, run).shared_inputs == (("c",),)


def test_no_hook_outlives_its_context():
    block = Block()
    with pytest.raises(ZeroDivisionError), capture({"q": block.q}, before=lambda *_: 1 / 0):
        block(HIDDEN)
    block(HIDDEN)
    trace(block, lambda: block(HIDDEN))
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in block.modules())


def test_what_a_hook_returns_takes_the_place_of_the_output():
    linear = nn.Linear(4, 2)
    expected = linear(HIDDEN)
    with capture({"linear": linear}, after=lambda _, output: output * 2):
        assert torch.equal(linear(HIDDEN), expected * 2)
    with capture({"linear": linear}, after=lambda _, output: None):
        assert torch.equal(linear(HIDDEN), expected)


def test_a_forward_ends_when_every_input_was_seen():
    block, ran = Block(), []
    with capture({"out": block.out}, before=lambda *_: ran.append("out")):
        with capture_inputs({"q": block.q, "k": block.k}) as inputs_of:
            seen = inputs_of(lambda: block(HIDDEN))
        assert not ran and seen.keys() == {"q", "k"} and seen["q"].shape == (3, 4)
        with capture_inputs({"q": block.q, "spare": block.spare}) as inputs_of:
            assert inputs_of(lambda: block(HIDDEN)).keys() == {"q"}
        assert ran == ["out"]


def test_an_end_that_nobody_waits_for_is_an_error():
    linear = nn.Linear(4, 4)

    def stop(*_: object) -> None:
        raise EnoughSeen

    with pytest.raises(EnoughSeen), capture({"linear": linear}, before=stop):
        linear(HIDDEN)
