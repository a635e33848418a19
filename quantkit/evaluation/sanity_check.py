"""The sanity check at the end of `quantize`: a short evaluation of the quantized model, with bounds
that only a ruined model exceeds.

It doesn't measure quality; use `eval` with your own text for that. If a bound is exceeded, the
check names the layers with the largest error, and whether it is in their weights or their inputs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.run_control import Progress, ShouldStop, never, silent
from quantkit.checkpoint.units import counted
from quantkit.data.sources import BUNDLED_EVALUATION, DataSource
from quantkit.errors import NonFiniteError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.json_values import to_json
from quantkit.evaluation.metrics import KLD, PPL_DELTA, TOP1_AGREEMENT
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.result import Evaluation, LayerError, QuantResult

# A model beyond one of these bounds is ruined. They were chosen on SmolLM2-135M, which is more
# sensitive than larger models. The worst sound recipe loses 5 % of perplexity there, at a mean KL
# of 0.038 (docs/results.md); static INT8, which outliers ruin, loses 106 to 143 %, at a mean KL of
# 0.9. KL is checked too, because the perplexity of a ruined model may fall by chance.
MOST_PPL_DELTA_PCT = 10.0
MOST_KLD = 0.15
CHECK_TOKENS = 4096
CHECK_LENGTH = 512  # tokens per window: eight windows are enough for an interval
WORST_SHOWN = 3
# Keys that the check's JSON repeats from the quantized model's result.
_REPEATED = (
    "perplexity",
    "ppl_delta_pct",
    "kld",
    "top1_agreement",
    "activations_quantized",
    "kv_cache_quantized",
)


@dataclass(frozen=True)
class LayerDamage:
    """One of the layers with the largest output error.

    name: its name in the checkpoint.
    output_sqnr_db: signal-to-quantization-noise ratio of its output, dB.
    weight_sqnr_db: that of its weight, dB.
    input_sqnr_db: that of its inputs, dB; None if they aren't quantized.
    blame: the larger error: "inputs" or "weights".
    """

    name: str
    output_sqnr_db: float | None
    weight_sqnr_db: float
    input_sqnr_db: float | None
    blame: str

    @classmethod
    def of(cls, layer: LayerError) -> LayerDamage:
        inputs = layer.input_sqnr_db
        blame = "inputs" if inputs is not None and inputs < layer.weight_sqnr_db else "weights"
        return cls(layer.name, layer.output_sqnr_db, layer.weight_sqnr_db, inputs, blame)

    def sentence(self) -> str:
        """The layer and its errors, in words."""
        decibels = self.weight_sqnr_db if self.blame == "weights" else self.input_sqnr_db
        return (
            f"{self.name} (output {self.output_sqnr_db:.1f} dB, by its {self.blame}:"
            f" {decibels:.1f} dB)"
        )


@dataclass(frozen=True)
class SanityCheck:
    """The outcome of the sanity check.

    evaluation: the evaluation; None if the quantized model computes NaN or infinity, or wasn't run.
    problem: why the quantized model is ruined, or why it wasn't run; "" if it is sound.
    was_run: whether both models were run.
    seconds: wall time.
    """

    evaluation: Evaluation | None
    problem: str
    was_run: bool = True
    seconds: float = 0.0

    @classmethod
    def not_run(cls, reason: str) -> SanityCheck:
        """A check that couldn't be made."""
        return cls(None, reason, was_run=False)

    @property
    def is_sane(self) -> bool | None:
        """Whether the check passed; None if it wasn't run."""
        return not self.problem if self.was_run else None

    def to_json(self) -> dict[str, Any]:
        if not self.was_run:
            return {"sane": None, "problem": self.problem}
        content: dict[str, Any] = {
            "sane": self.is_sane,
            "problem": self.problem,
            "bounds": {"ppl_delta_pct": MOST_PPL_DELTA_PCT, "kld_mean": MOST_KLD},
        }
        if self.evaluation is None:
            return content
        (quant,) = self.evaluation.quants
        of_quant = to_json(quant)
        return (
            content
            | {
                "tokens_scored": self.evaluation.tokens_scored,
                "data": to_json(self.evaluation.data),
                "protocol": to_json(self.evaluation.protocol),
            }
            | {key: of_quant[key] for key in _REPEATED}
            | {"worst_layers": to_json(worst_outputs(quant.layers))}
        )

    def __str__(self) -> str:
        """The outcome and the measured values, in one line."""
        if not self.was_run:
            return f"sanity check not run: {self.problem}"
        outcome = "passed" if self.is_sane else "failed"
        return f"sanity check {outcome}: {self._values()}, {self.seconds:.1f} s"

    def _values(self) -> str:
        if self.evaluation is None:
            return self.problem
        (quant,) = self.evaluation.quants
        kld = quant.metrics[KLD]
        bounds = "" if kld.mean_low is None else f" [{kld.mean_low:.4f}, {kld.mean_high:.4f}]"
        return (
            f"perplexity {quant.metrics[PPL_DELTA].text()}, KL {kld.mean:.4f}{bounds}, same top-1"
            f" {100 * quant.metrics[TOP1_AGREEMENT]:.1f} % on {self.evaluation.tokens_scored}"
            f" tokens of {_sources(self.evaluation)}"
        )


def check_sanity(
    base: Path,
    quantized: Path,
    data: Sequence[DataSource] = (),
    tokens: int = CHECK_TOKENS,
    hardware: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
    should_stop: ShouldStop = never,
) -> SanityCheck:
    """Compare a quantized model with its base model on a few thousand tokens.

    data: text files or sources; the bundled evaluation text if empty.
    tokens: limit on tokens.
    hardware, device, trust_remote_code: as in `EvaluationOptions`.
    progress, should_stop: as in `evaluate`.

    Raises the errors of `evaluate`, except that a quantized model with NaN or infinity is a problem
    in the result.
    """
    config = Checkpoint.open(base).config
    positions = (config.get("text_config") or config).get("max_position_embeddings")
    length = min(
        CHECK_LENGTH, positions if isinstance(positions, int) else CHECK_LENGTH, max(2, tokens)
    )
    options = EvaluationOptions(
        base,
        (quantized,),
        tuple(data) or (str(BUNDLED_EVALUATION),),
        length,
        tokens,
        hardware=hardware,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    started = time.monotonic()
    try:
        evaluation = evaluate(options, progress, should_stop)
    except NonFiniteError as error:
        if error.path != str(quantized):
            raise
        return SanityCheck(None, f"{error}", seconds=time.monotonic() - started)
    problem = _problem(evaluation.quants[0])
    return SanityCheck(evaluation, problem, seconds=time.monotonic() - started)


def _problem(quant: QuantResult) -> str:
    delta, kld = quant.metrics[PPL_DELTA], quant.metrics[KLD]
    # The whole interval must be beyond the bound: too little text is no reason to refuse.
    least_delta = delta.value if delta.low is None else delta.low
    least_kld = kld.mean if kld.mean_low is None else kld.mean_low
    exceeded = []
    if least_delta > MOST_PPL_DELTA_PCT:
        exceeded.append(
            f"perplexity changed by {delta.text()}; more than +{MOST_PPL_DELTA_PCT:g} % means a"
            " ruined model"
        )
    if least_kld > MOST_KLD:
        exceeded.append(
            f"the mean KL is {kld.mean:.3f}; more than {MOST_KLD:g} means a ruined model"
        )
    return "; ".join([*exceeded, _where(quant), _remedy(quant)]) if exceeded else ""


def worst_outputs(layers: Sequence[LayerError], shown: int = WORST_SHOWN) -> list[LayerDamage]:
    """The layers whose output has the lowest signal-to-quantization-noise ratio."""
    known = [(layer.output_sqnr_db, layer) for layer in layers if layer.output_sqnr_db is not None]
    worst = sorted(known, key=lambda each: each[0])[:shown]
    return [LayerDamage.of(layer) for _, layer in worst]


def _where(quant: QuantResult) -> str:
    worst = worst_outputs(quant.layers)
    if not worst:
        return (
            "no layer can be compared with the base model's, because algorithms changed all of them"
            " or none is quantized"
        )
    return f"the error is largest in {', '.join(layer.sentence() for layer in worst)}"


def _remedy(quant: QuantResult) -> str:
    worst = worst_outputs(quant.layers)
    by_inputs = sum(layer.blame == "inputs" for layer in worst) * 2 > len(worst)
    if by_inputs and "static" in quant.scheme:
        return "try a dynamic scheme, which computes input scales for each token"
    if by_inputs:
        return (
            "try FP8, which suffers less from outliers in inputs than INT8, or smoothquant, which"
            " moves them into weights"
        )
    return "skip these layers with `ignore`, or quantize their weights with gptq"


def _sources(evaluation: Evaluation) -> str:
    names = evaluation.data.sources
    if names == (str(BUNDLED_EVALUATION),):
        return "the bundled text"
    return Path(names[0]).name if len(names) == 1 else counted(len(names), "text")
