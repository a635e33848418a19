"""A part of the vocabulary at a time gives what the whole gives, and what the textbook says."""

import numpy as np
import pytest
import torch
from tiny_models import SIZES, make_model

from quantkit.errors import EvaluationError
from quantkit.evaluation.logits import OutputHead, score_pair
from quantkit.evaluation.token_scores import PairedScores


class Logits:
    """A head whose logits are given, in parts of so many."""

    def __init__(self, logits: torch.Tensor, size: int) -> None:
        self._logits = logits
        self.parts = [slice(start, start + size) for start in range(0, logits.shape[1], size)]

    def logits_of(self, hidden: torch.Tensor):
        return lambda part: (self._logits if part is None else self._logits[:, part]).clone()

    def packed(self, _: torch.Tensor) -> None:
        return None


def scores(
    base: torch.Tensor, quant: torch.Tensor, targets: torch.Tensor, size: int = 7
) -> PairedScores:
    return score_pair(Logits(base, size), base, targets, Logits(quant, size), quant)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(50, 40, generator=generator) * 4
    return (
        base,
        base + torch.randn(50, 40, generator=generator) * 0.3,
        torch.randint(0, 40, (50,), generator=generator),
    )


@pytest.mark.parametrize("size", [1, 7, 13, 40, 64])
def test_any_parts_give_the_figures_of_float64(logits, size):
    base, quant, targets = logits
    found = scores(base, quant, targets, size)
    ours, theirs = (values.double().log_softmax(-1) for values in (base, quant))
    np.testing.assert_allclose(
        found.nll, -ours.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
        found.quant_nll, -theirs.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(found.kld, (ours.exp() * (ours - theirs)).sum(-1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.confidence, ours.exp().amax(-1), rtol=1e-6)
    assert (found.same_top1 == (base.argmax(-1) == quant.argmax(-1)).numpy()).all()
    assert (found.hit == (base.argmax(-1) == targets).numpy()).all() and (
        found.quant_hit == (quant.argmax(-1) == targets).numpy()
    ).all()
    assert found.nonfinite == 0


def test_a_model_against_itself_has_no_divergence_at_all(logits):
    base, _, targets = logits
    found = scores(base, base.clone(), targets)
    assert (found.kld == 0).all() and (found.nll == found.quant_nll).all() and found.same_top1.all()


def test_ties_at_the_top_go_to_the_lower_index():
    base = torch.zeros(2, 20)
    base[0, [4, 9, 17]] = 3.0
    quant = base.clone()
    quant[1, 19] = 1e-3
    assert scores(base, quant, torch.tensor([4, 0])).hit.tolist() == [True, True]
    assert scores(base, quant, torch.tensor([4, 0])).same_top1.tolist() == [True, False]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 80.0])
def test_sums_neither_overflow_nor_vanish(scale):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 100, generator=generator) * scale + 1000
    quant = base.flip(0)
    found, targets = scores(base, quant, torch.arange(8)), torch.arange(8)
    ours, theirs = (values.double().log_softmax(-1) for values in (base, quant))
    np.testing.assert_allclose(
        found.kld, (ours.exp() * (ours - theirs)).sum(-1), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        found.nll, -ours.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_counted(logits, value):
    base, quant, targets = logits
    quant[3, 5] = quant[7, 39] = value
    assert scores(base, quant, targets).nonfinite == 2


class GivenBody(torch.nn.Module):
    """In place of a model's body: the hidden states that were given."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    @property
    def decoder(self) -> torch.nn.Module:
        return self

    def forward(self, *_, **__):
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.hidden[None])


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere2", {"logit_scale": 0.25}),
        ("opt", {}),
    ],
)
@pytest.mark.parametrize("use_kernel", [True, False])
def test_parts_are_those_of_the_models_own_logits(kind, changes, use_kernel, tmp_path):
    """Also where the model scales or caps its logits."""
    model = make_model(tmp_path, kind, torch.float32, **changes)
    hidden = torch.randn(5, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    body = model.base_model
    setattr(model, model.base_model_prefix, GivenBody(hidden))
    expected = model(input_ids=torch.zeros(1, 5, dtype=torch.long)).logits[0]
    setattr(model, model.base_model_prefix, body)
    head = OutputHead.of(model, use_kernel, part_size=64)
    assert len(head.parts) == 4 and head.parts[-1].start == 192
    torch.testing.assert_close(
        torch.cat([head.logits_of(hidden)(part) for part in head.parts], dim=-1),
        expected,
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(head.logits_of(hidden)(None), expected, rtol=1e-5, atol=1e-5)


def test_a_transform_before_the_head_may_change_the_width(tmp_path):
    """RemBERT's."""
    model = make_model(
        tmp_path,
        "rembert",
        torch.float32,
        output_embedding_size=48,
        input_embedding_size=32,
        is_decoder=True,
    )
    hidden = torch.randn(5, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    expected = model.cls(hidden)
    head = OutputHead.of(model, False, part_size=64)
    assert len(head.parts) == 4
    torch.testing.assert_close(
        torch.cat([head.logits_of(hidden)(part) for part in head.parts], dim=-1),
        expected,
        rtol=1e-5,
        atol=1e-5,
    )


def test_logits_of_more_than_hidden_states_are_refused(tmp_path, monkeypatch):
    """ProphetNet's come from a second output of its body."""
    model = make_model(tmp_path, "llama", torch.float32)
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, *arguments, **keywords: self.model(*arguments, **keywords)[1],
    )
    with pytest.raises(
        EvaluationError,
        match=(
            "LlamaForCausalLM can't be evaluated: its logits depend on more than the final hidden"
            " states"
        ),
    ):
        OutputHead.of(model, False, part_size=64)


@pytest.mark.parametrize("use_kernel", [True, False])
def test_hidden_states_that_bfloat16_does_not_hold_are_not_rounded(use_kernel, tmp_path):
    model = make_model(tmp_path, "llama")
    weight, hidden = (
        model.lm_head.weight.detach().double(),
        torch.randn(5, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1)),
    )
    head = OutputHead.of(model, use_kernel, part_size=64)
    for states in (hidden, hidden.bfloat16()):
        logits = torch.cat([head.logits_of(states)(part) for part in head.parts], dim=-1)
        torch.testing.assert_close(
            logits.double(), states.double() @ weight.T, rtol=1e-5, atol=1e-5
        )


def test_a_head_that_looks_at_the_whole_vocabulary_comes_as_a_whole(tmp_path, monkeypatch):
    model = make_model(tmp_path, "llama", torch.float32)
    hidden = torch.randn(3, SIZES["hidden_size"])
    weight, forward = model.lm_head.weight, type(model).forward

    def normalized(self, *arguments, **keywords):
        output = forward(self, *arguments, **keywords)
        output.logits = output.logits.log_softmax(-1)
        return output

    monkeypatch.setattr(type(model), "forward", normalized)
    head = OutputHead.of(model, False, part_size=64)
    assert list(head.parts) == [None]
    torch.testing.assert_close(
        head.logits_of(hidden)(None), (hidden @ weight.T).log_softmax(-1), rtol=1e-5, atol=1e-5
    )
