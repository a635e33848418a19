"""kernels/cpu/score_logits.cpp against float64, with every instruction set that this processor
has.
"""

import pytest
import torch
from levels import LIBRARY, levels_here, on_level
from torch import Tensor

from quantkit.ops import fallback, native
from quantkit.ops.score_logits import TokenScores

if LIBRARY is None:
    pytest.skip(
        "the CPU kernels weren't built, or QUANTKIT_KERNELS asks for the reference",
        allow_module_level=True,
    )

OPS = torch.ops.quantkit
# (positions, hidden size, vocabulary): one past a tile's rows and a superblock, panels and pairs of
# them with their rests, several sums of 1024.
SHAPES = [(1, 64, 16), (7, 64, 100), (33, 96, 1000), (40, 200, 33), (513, 64, 50), (65, 576, 3003)]


@pytest.fixture(params=levels_here(), ids=lambda level: native.LEVELS[level])
def level(request):
    with on_level(request.param):
        yield request.param


class Head:
    def __init__(self, vocabulary: int, size: int, biased: bool) -> None:
        self.weight, self.bias = (
            (torch.randn(vocabulary, size) * 0.4).bfloat16(),
            torch.randn(vocabulary) if biased else None,
        )
        self.packed = OPS.pack_weight(self.weight, "bf16")

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.double() @ self.weight.double().T + (
            0 if self.bias is None else self.bias.double()
        )

    def bound(self, hidden: Tensor) -> float:
        """Of a logit's error."""
        return (
            (hidden.shape[1] + 4)
            * 2.0**-24
            * float((hidden.abs().double() @ self.weight.abs().double().T).max() + 4)
        )


def check(
    found: TokenScores, head: Head, hidden: Tensor, own: Head, own_hidden: Tensor, targets: Tensor
) -> None:
    ours, theirs = head.logits(hidden).log_softmax(-1), own.logits(own_hidden).log_softmax(-1)
    bound = 2 * max(head.bound(hidden), own.bound(own_hidden)) + 3e-6
    nll, index, confidence, own_nll, own_index, kld = found
    divergence = (ours.exp() * (ours - theirs)).sum(-1)
    close = {
        "nll": (nll, -ours.gather(1, targets[:, None])[:, 0]),
        "own_nll": (own_nll, -theirs.gather(1, targets[:, None])[:, 0]),
        "kld": (kld, divergence),
        "confidence": (confidence, ours.exp().amax(-1)),
    }
    for name, (values, expected) in close.items():
        assert float((values - expected).abs().max()) <= bound, name
    for places, exact in ((index, ours), (own_index, theirs)):
        assert float((exact.amax(-1) - exact.gather(1, places[:, None])[:, 0]).max()) <= bound


@pytest.mark.parametrize("biased", [False, True])
def test_figures_are_those_of_float64(level, biased):
    torch.manual_seed(level)
    for positions, size, vocabulary in SHAPES:
        head, own = Head(vocabulary, size, biased), Head(vocabulary, size, biased)
        own.weight.copy_(head.weight + torch.randn(vocabulary, size) * 0.01)
        own.packed = OPS.pack_weight(own.weight, "bf16")
        hidden = torch.randn(positions, size + 8).bfloat16()[:, :size]  # rows apart
        own_hidden, targets = (
            (hidden + torch.randn(positions, size) * 0.1).bfloat16(),
            torch.randint(0, vocabulary, (positions,)),
        )
        targets[-1] = vocabulary - 1
        model = (hidden, head.packed, head.bias, targets, vocabulary)
        found = OPS.score_logits(*model, own_hidden, own.packed, own.bias)
        check(found, head, hidden, own, own_hidden, targets)
        alone = OPS.score_logits(*model)
        assert all(torch.equal(one, other) for one, other in zip(alone[:3], found[:3])) and [
            len(values) for values in alone[3:]
        ] == [0, 0, 0]
        with on_level(level, threads=3):
            assert all(
                torch.equal(one, other)
                for one, other in zip(
                    OPS.score_logits(*model, own_hidden, own.packed, own.bias), found
                )
            )


def test_a_model_against_itself_has_no_divergence_at_all(level):
    torch.manual_seed(level)
    head, hidden, targets = (
        Head(1500, 64, False),
        torch.randn(70, 64).bfloat16(),
        torch.randint(0, 1500, (70,)),
    )
    for packed in (head.packed, head.packed.clone()):  # read once for both, or twice
        nll, index, _, own_nll, own_index, kld = OPS.score_logits(
            hidden, head.packed, None, targets, 1500, hidden, packed, None
        )
        assert not kld.any() and torch.equal(nll, own_nll) and torch.equal(index, own_index)


def test_logits_far_above_the_first_ones(level):
    """They rise by 2000 along the vocabulary: sums are rescaled on the way, again and again."""
    hidden = torch.zeros(4, 64).bfloat16()
    hidden[:, 0] = torch.tensor([1.0, 10.0, 100.0, -3.0])
    head = Head(4096, 64, False)
    head.weight.zero_()
    head.weight[:, 0] = torch.linspace(-5, 15, 4096)
    head.packed = OPS.pack_weight(head.weight, "bf16")
    targets, own_hidden = torch.tensor([5, 4000, 100, 9]), (hidden * 0.9).bfloat16()
    check(
        OPS.score_logits(hidden, head.packed, None, targets, 4096, own_hidden, head.packed, None),
        head,
        hidden,
        head,
        own_hidden,
        targets,
    )


def test_ties_go_to_the_lower_index(level):
    head, hidden = Head(200, 64, True), torch.randn(3, 64).bfloat16()
    head.bias = torch.zeros(200)
    head.bias[[57, 40, 120, 199]] = 500.0
    head.weight[[57, 40, 120, 199]] = 0.0
    _, index, _, _, own_index, _ = OPS.score_logits(
        hidden,
        OPS.pack_weight(head.weight, "bf16"),
        head.bias,
        torch.zeros(3, dtype=torch.long),
        200,
        hidden,
        head.packed,
        head.bias,
    )
    assert index.tolist() == [40, 40, 40]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(level, bad):
    head, hidden, targets = (
        Head(300, 64, False),
        torch.randn(40, 64).bfloat16(),
        torch.zeros(40, dtype=torch.long),
    )
    hidden[20, 3] = bad
    nll, _, _, own_nll, _, kld = OPS.score_logits(
        hidden, head.packed, None, targets, 300, hidden, head.packed, None
    )
    for values in (nll, own_nll, kld):
        assert not values[20].isfinite() and values.isfinite().sum() == 39


def test_kernel_and_reference_agree():
    torch.manual_seed(0)
    head, own = Head(2100, 64, True), Head(2100, 64, True)
    hidden, targets = torch.randn(20, 64).bfloat16(), torch.randint(0, 2100, (20,))
    arguments = (hidden, head.packed, head.bias, targets, 2100, hidden, own.packed, own.bias)
    for ours, theirs in zip(OPS.score_logits(*arguments), fallback.score_logits(*arguments)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_refused():
    head, hidden, targets = (
        Head(100, 64, False),
        torch.randn(4, 64).bfloat16(),
        torch.zeros(4, dtype=torch.long),
    )
    for arguments in (
        (hidden.float(), head.packed, None, targets, 100),
        (hidden, head.packed, None, targets, 200),
        (hidden[:, :32], head.packed[:, :32], None, targets, 100),
        (hidden, head.packed, None, targets[:3], 100),
        (hidden, head.packed, None, targets + 100, 100),
        (hidden, head.packed, torch.zeros(99), targets, 100),
        (hidden, head.packed, None, targets, 100, hidden, None, None),
    ):
        with pytest.raises(ValueError):
            OPS.score_logits(*arguments)


def test_it_is_a_well_made_op():
    head, hidden, targets = (
        Head(100, 64, False),
        torch.randn(4, 64).bfloat16(),
        torch.zeros(4, dtype=torch.long),
    )
    torch.library.opcheck(OPS.score_logits.default, (hidden, head.packed, None, targets, 100))
    torch.library.opcheck(
        OPS.score_logits.default,
        (hidden, head.packed, None, targets, 100, hidden, head.packed, None),
    )
