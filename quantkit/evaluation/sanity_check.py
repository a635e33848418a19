"""What `quantize` says of its own result: is this still the model? A few thousand tokens through
base and result, and a bound that only a ruined one exceeds.

It is no measure of quality: `eval` on text of your own is. Where the bound is exceeded it says
which layers did it, and whether by their weights or by their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.units import counted
from quantkit.data.bundled import BUNDLED_EVALUATION
from quantkit.errors import NonFiniteError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.report import interval_text

# Beyond these a result is ruined. On SmolLM2-135M, which shows every mistake, the worst of the
# sound recipes loses 5 % of perplexity at a mean KL of 0.038 (README), and static INT8, which its
# outliers ruin, 106 to 143 % at 0.9, depending on the text. Larger models lose less. Each bound
# lies between, nearer to the sound: a user may want what loses 8 %, nobody what loses 12. KL is
# asked too because perplexity may fall by chance where the model has become another one.
MOST_PPL_DELTA_PCT = 10.0
MOST_KLD = 0.15
JUDGE_TOKENS = 4096
JUDGE_LENGTH = 512  # tokens of a window: eight windows give an interval
WORST_SHOWN = 3


@dataclass(frozen=True)
class Judgement:
    """result: of `evaluate`, or None where the quantized model gives no finite numbers. problem:
    why it is ruined, or "".
    """

    result: dict[str, Any] | None
    problem: str

    @property
    def is_sane(self) -> bool:
        return not self.problem

    def to_json(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            "sane": self.is_sane,
            "problem": self.problem,
            "bounds": {"ppl_delta_pct": MOST_PPL_DELTA_PCT, "kld_mean": MOST_KLD},
        }
        if self.result is not None:
            quant = self.result["quants"][0]
            described |= {
                "tokens_scored": self.result["tokens_scored"],
                "data": self.result["data"],
                "protocol": self.result["protocol"],
            }
            described |= {
                key: quant[key]
                for key in (
                    "perplexity",
                    "ppl_delta_pct",
                    "kld",
                    "top1_agreement",
                    "activations_quantized",
                    "kv_cache_quantized",
                )
            }
            described["worst_layers"] = [damage(layer) for layer in worst_outputs(quant["layers"])]
        return described

    def sentence(self) -> str:
        """What was measured, in a line."""
        if self.result is None:
            return self.problem
        quant = self.result["quants"][0]
        kld = quant["kld"]
        bounds = (
            "" if kld["mean_low"] is None else f" [{kld['mean_low']:.4f}, {kld['mean_high']:.4f}]"
        )
        return (
            f"perplexity {interval_text(quant['ppl_delta_pct'])}, KL {kld['mean']:.4f}{bounds},"
            f" same top-1 {100 * quant['top1_agreement']:.1f} % on {self.result['tokens_scored']}"
            f" tokens of {_sources(self.result)}"
        )


def judge(
    base: Path,
    quantized: Path,
    data: Sequence[str] = (),
    tokens: int = JUDGE_TOKENS,
    hardware: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_progress: Callable[[str, float, float], None] = lambda name, done, total: None,
) -> Judgement:
    """data: sources, or none for a bundled text that no calibration has seen. Raises what
    `evaluate` raises where the two can't be judged.
    """
    positions = Checkpoint.open(base).config
    positions = (positions.get("text_config") or positions).get("max_position_embeddings")
    length = min(
        JUDGE_LENGTH, positions if isinstance(positions, int) else JUDGE_LENGTH, max(2, tokens)
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
    try:
        result = evaluate(options, on_progress)
    except NonFiniteError as error:
        if error.path != str(quantized):
            raise
        return Judgement(None, f"{error}")
    return Judgement(result, _problem(result))


def _problem(result: dict[str, Any]) -> str:
    quant = result["quants"][0]
    delta, kld = quant["ppl_delta_pct"], quant["kld"]
    # The whole interval must lie beyond: too little text is no reason to refuse.
    least_delta, least_kld = (
        value if low is None else low
        for value, low in ((delta["value"], delta["low"]), (kld["mean"], kld["mean_low"]))
    )
    exceeded = []
    if least_delta > MOST_PPL_DELTA_PCT:
        exceeded.append(
            f"perplexity is {interval_text(delta)}, and +{MOST_PPL_DELTA_PCT:g} % is more than a"
            " sound result loses"
        )
    if least_kld > MOST_KLD:
        exceeded.append(
            f"the mean KL is {kld['mean']:.3f}, and {MOST_KLD:g} is more than a sound result has"
        )
    return "; ".join([*exceeded, _where(quant), _remedy(quant)]) if exceeded else ""


def worst_outputs(
    layers: Sequence[dict[str, Any]], shown: int = WORST_SHOWN
) -> list[dict[str, Any]]:
    """The layers whose outputs are furthest from what the base's weight and unquantized inputs
    give.
    """
    return sorted(
        (layer for layer in layers if layer.get("output_sqnr_db") is not None),
        key=lambda layer: layer["output_sqnr_db"],
    )[:shown]


def damage(layer: dict[str, Any]) -> dict[str, Any]:
    """blame: "inputs" where their rounding is the larger error, else "weights"."""
    inputs = layer.get("input_sqnr_db")
    blame = "inputs" if inputs is not None and inputs < layer["weight_sqnr_db"] else "weights"
    return {
        key: layer.get(key) for key in ("name", "output_sqnr_db", "weight_sqnr_db", "input_sqnr_db")
    } | {"blame": blame}


def _where(quant: dict[str, Any]) -> str:
    worst = [damage(layer) for layer in worst_outputs(quant["layers"])]
    if not worst:
        return (
            "no layer can be compared with the base's, because algorithms changed them or none is"
            " quantized"
        )
    named = ", ".join(
        f"{layer['name']} (output {layer['output_sqnr_db']:.1f} dB, by its {layer['blame']}:"
        f" {layer['weight_sqnr_db' if layer['blame'] == 'weights' else 'input_sqnr_db']:.1f} dB)"
        for layer in worst
    )
    return f"the damage is worst in {named}"


def _remedy(quant: dict[str, Any]) -> str:
    worst = [damage(layer) for layer in worst_outputs(quant["layers"])]
    by_inputs = sum(layer["blame"] == "inputs" for layer in worst) * 2 > len(worst)
    if by_inputs and "static" in quant["scheme"]:
        return "a dynamic scheme measures inputs anew for each token"
    if by_inputs:
        return (
            "FP8 minds outliers in inputs less than INT8, and smoothquant moves them into weights"
        )
    return "leave these layers with --ignore, or let gptq choose their codes"


def _sources(result: dict[str, Any]) -> str:
    names = result["data"]["sources"]
    if names == [str(BUNDLED_EVALUATION)]:
        return "the bundled text"
    return Path(names[0]).name if len(names) == 1 else counted(len(names), "text")
