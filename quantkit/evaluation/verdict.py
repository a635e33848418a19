"""The verdict on an evaluation, in words: which quantized model loses least, whether that is beyond
noise, and whether the gates passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.checkpoint.short_names import short_names
from quantkit.checkpoint.units import format_bytes
from quantkit.evaluation.intervals import Difference
from quantkit.evaluation.metrics import KLD, PPL_DELTA, TOP1_AGREEMENT, Deltas
from quantkit.evaluation.result import Evaluation, GateResult, QuantResult


@dataclass(frozen=True)
class Verdict:
    """The verdict on an evaluation.

    headline: the most important sentence.
    sentences: the sentences after it.
    gates: the worst outcome of all gates: "pass", "fail" or "inconclusive"; None without gates.
    """

    headline: str
    sentences: tuple[str, ...]
    gates: str | None


def model_names(evaluation: Evaluation) -> dict[str, str]:
    """Path → short name, of the base model and of each quantized model."""
    return short_names([evaluation.base.path, *(quant.path for quant in evaluation.quants)])


def verdict(evaluation: Evaluation) -> Verdict:
    """Models are ranked by their mean KL. It has less noise than the change of perplexity, which
    may even be negative.
    """
    names = model_names(evaluation)
    if not evaluation.quants:
        base = evaluation.base
        return Verdict(
            f"{names[base.path]} has a perplexity of {base.perplexity:.4f}.",
            ("It was evaluated alone; no quantized model was given.",),
            None,
        )
    ranked = sorted(evaluation.quants, key=lambda quant: quant.metrics[KLD].mean)
    best = ranked[0]
    sentences = [_beyond_noise(best, names)]
    if len(ranked) > 1:
        sentences += _compared_with_next(evaluation, best, ranked[1], names)
    sentences += _gate_sentences(evaluation.gates, names)
    return Verdict(
        _headline(evaluation, best, names), tuple(sentences), _worst_outcome(evaluation.gates)
    )


def _headline(evaluation: Evaluation, best: QuantResult, names: Mapping[str, str]) -> str:
    sizes = f"{format_bytes(best.bytes)} instead of {format_bytes(evaluation.base.bytes)}"
    share = f"at {100 * best.size_ratio:.0f} % of the size ({sizes})"
    kld, delta = f"{best.metrics[KLD].mean:.5f} nats", best.metrics[PPL_DELTA].text()
    if len(evaluation.quants) == 1:
        return f"{names[best.path]} costs {delta} perplexity, with a mean KL of {kld}, {share}."
    return f"{names[best.path]} loses least: mean KL {kld}, perplexity {delta}, {share}."


def is_beyond_noise(difference: Difference) -> bool | None:
    """Whether the 95 % interval excludes 0; None if there is no interval."""
    if difference.low is None or difference.high is None:
        return None
    return not difference.low <= 0 <= difference.high


def _beyond_noise(best: QuantResult, names: Mapping[str, str]) -> str:
    beyond, name = is_beyond_noise(best.metrics[PPL_DELTA]), names[best.path]
    if beyond is None:
        return "One window gives no interval, so nobody can tell whether this is noise."
    if beyond:
        return f"The change of {name}'s perplexity is beyond noise: its 95 % interval excludes 0."
    return f"The change of {name}'s perplexity is within noise: its 95 % interval includes 0."


def _compared_with_next(
    evaluation: Evaluation, best: QuantResult, following: QuantResult, names: Mapping[str, str]
) -> list[str]:
    """How the best model differs from the next, and from the one with the lowest perplexity."""
    divergence = _paired(evaluation, best, following)[KLD]
    sentences = [
        f"Next is {names[following.path]}. The difference of their mean KL is"
        f" {divergence.text(5, ' nats')}, {_noise_words(divergence)}."
    ]
    lowest = min(evaluation.quants, key=lambda quant: quant.metrics[PPL_DELTA].value)
    if lowest is not best:
        delta = _paired(evaluation, best, lowest)[PPL_DELTA]
        sentences.append(
            f"By perplexity alone, {names[lowest.path]} is better:"
            f" {lowest.metrics[PPL_DELTA].text()}. Against {names[best.path]} that is"
            f" {delta.text()}, {_noise_words(delta)}."
        )
    return sentences


def _paired(evaluation: Evaluation, a: QuantResult, b: QuantResult) -> Deltas:
    counts = np.array(evaluation.window_tokens)
    return Deltas.of(a.window_sums, b.window_sums, counts, evaluation.tokens_per_unit)


def _noise_words(difference: Difference) -> str:
    beyond = is_beyond_noise(difference)
    if beyond is None:
        return "of which one window gives no interval"
    return "which is beyond noise" if beyond else "which is within noise"


def _worst_outcome(gates: Sequence[GateResult]) -> str | None:
    found = {gate.result for gate in gates}
    return next((each for each in ("fail", "inconclusive", "pass") if each in found), None)


def _gate_sentences(gates: Sequence[GateResult], names: Mapping[str, str]) -> list[str]:
    if not gates:
        return []
    if all(gate.result == "pass" for gate in gates):
        return ["The gate passed." if len(gates) == 1 else f"All {len(gates)} gates passed."]
    sentences = []
    for result, words in (("fail", "failed"), ("inconclusive", "could not be decided")):
        found = [gate for gate in gates if gate.result == result]
        if found:
            where = ", ".join(dict.fromkeys(names.get(gate.path, gate.path) for gate in found))
            which = "The gate" if len(gates) == 1 else f"{len(found)} of {len(gates)} gates"
            sentences.append(f"{which} {words} on {where}.")
    return sentences


def candidate_sentence(quant: QuantResult) -> str:
    """The most important numbers of a quantized model, as a sentence without its subject."""
    agreement = 100 * quant.metrics[TOP1_AGREEMENT]
    return (
        f"has {100 * quant.size_ratio:.0f} % of the base's size; its perplexity is"
        f" {quant.metrics[PPL_DELTA].text()}, and its most likely token is the base's at"
        f" {agreement:.1f} % of positions."
    )
