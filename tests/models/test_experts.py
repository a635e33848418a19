"""Experts with a forward of their own are run by another only where it computes the same."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quantkit.models.experts import (
    adopt_experts,
    each_expert,
    expert_linear,
    has_selectable_forward,
    intermediate,
    register_experts,
)

COUNT, HIDDEN, WIDTH = 4, 16, 24


def doubled(module, hidden_states, top_k_index, top_k_weights):
    """Twice what the experts return, so that one can see which forward runs."""
    return 2 * each_expert(
        module,
        hidden_states,
        top_k_index,
        top_k_weights,
        lambda expert, _, states: expert_linear(
            module, "down_proj", expert, intermediate(module, expert, states)
        ),
    )


class Routed(nn.Module):
    """As Llama 4 has them: [experts · tokens, features], zero where the router sends a token
    elsewhere.
    """

    def __init__(self, transposed: bool = True) -> None:
        super().__init__()
        shapes = {"gate_up_proj": (HIDDEN, 2 * WIDTH), "down_proj": (WIDTH, HIDDEN)}
        for name, shape in shapes.items():
            setattr(
                self,
                name,
                nn.Parameter(
                    torch.randn(COUNT, *(shape if transposed else shape[::-1])).double(),
                    requires_grad=False,
                ),
            )
        self.act_fn = nn.SiLU()

    def between(self, projected):
        gate, up = projected.chunk(2, -1)
        return up * self.act_fn(gate)

    def forward(self, routed):
        states = routed.view(self.gate_up_proj.shape[0], -1, HIDDEN)
        return (self.between(states @ self.gate_up_proj) @ self.down_proj).view(-1, HIDDEN)


class Chosen(Routed):
    """As Step 3.7 has them: the arguments of others, without asking transformers."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for token, (experts, weights) in enumerate(zip(top_k_index, top_k_weights)):
            for expert, weight in zip(experts, weights):
                output[token] += (
                    self.between(hidden_states[token] @ self.gate_up_proj[expert].T)
                    @ self.down_proj[expert].T
                    * weight
                )
        return output


class UpBeforeGate(Routed):
    def between(self, projected):
        up, gate = projected.chunk(2, -1)
        return up * self.act_fn(gate)


class Bounded(Routed):
    def between(self, projected):
        gate, up = projected.chunk(2, -1)
        return up.clamp(-7, 7) * self.act_fn(gate)


class Shifted(Routed):
    """Of a row of zeros something comes."""

    def forward(self, routed):
        return super().forward(routed) + 1


class AsksForMore(Routed):
    def forward(self, routed):
        return super().forward(routed) * self.config.scale


def adopted(module: nn.Module) -> nn.Module:
    register_experts("doubled", doubled)
    model = nn.Sequential(module)
    adopt_experts(model, "doubled")
    return module


def test_rows_that_were_sorted_and_scaled_are_tokens_of_their_own():
    module = Routed()
    routed = torch.randn(COUNT, 5, HIDDEN).double()
    routed[0], routed[1, 2:], routed[3, ::2] = 0, 0, 0
    expected = module(routed.flatten(0, 1))
    torch.testing.assert_close(adopted(module)(routed.flatten(0, 1)), 2 * expected)


def test_those_that_take_what_others_take_are_run_as_others_are():
    module = Chosen(transposed=False)
    arguments = (
        torch.randn(5, HIDDEN).double(),
        torch.randint(0, COUNT, (5, 2)),
        torch.rand(5, 2).double(),
    )
    expected = module(*arguments)
    torch.testing.assert_close(adopted(module)(*arguments), 2 * expected)


@pytest.mark.parametrize("kind", [UpBeforeGate, Bounded, Shifted, AsksForMore])
def test_what_computes_otherwise_stays_as_it_is(kind):
    module = kind()
    if kind is AsksForMore:
        module.config = SimpleNamespace(scale=3.0)
    before, state = dict(vars(module)), torch.get_rng_state()
    routed = torch.randn(COUNT * 5, HIDDEN, generator=torch.Generator().manual_seed(0)).double()
    expected = module(routed)
    assert not has_selectable_forward(adopted(module)) and vars(module) == before
    assert torch.equal(module(routed), expected) and torch.equal(torch.get_rng_state(), state)


def test_a_copy_runs_by_its_own_weights():
    """Folding tries scales on a copy of a block."""
    module = adopted(Routed())
    other = copy.deepcopy(nn.Sequential(module))[0]
    other.down_proj.data.mul_(3)
    routed = torch.randn(COUNT * 5, HIDDEN).double()
    torch.testing.assert_close(other(routed), 3 * module(routed))


def test_without_a_registered_forward_nothing_is_replaced():
    module = Routed()
    adopt_experts(nn.Sequential(module), "eager")
    assert not has_selectable_forward(module)
