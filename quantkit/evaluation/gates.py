"""Gates: conditions on a metric, such as `ppl_delta_pct<=1.0`. A gate passes, fails, or is
inconclusive if the text is too short to decide it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.errors import EvaluationError
from quantkit.evaluation import metrics
from quantkit.evaluation.intervals import Interval
from quantkit.evaluation.result import GateResult, QuantResult


def gate_units() -> dict[str, str]:
    """The metrics that a gate may test, name → unit: gateable rows of METRICS, and the size of the
    quantized model.
    """
    units = {gate.name: gate.unit for _, gate in metrics.gateable_metrics()}
    return units | {"size_ratio": "shares of the base's size"}


@dataclass(frozen=True)
class Gate:
    """A condition on a metric.

    expr: the expression, as the user wrote it.
    metric: name of the metric, one of `gate_units()`.
    operator: <=, <, >= or >.
    bound: the limit, in the metric's unit.
    """

    expr: str
    metric: str
    operator: str
    bound: float

    @classmethod
    def parse(cls, expr: str) -> Gate:
        """Raises EvaluationError if the expression is not METRIC OPERATOR NUMBER."""
        for operator in ("<=", ">=", "<", ">"):
            metric, found, bound = expr.partition(operator)
            if found:
                break
        else:
            raise EvaluationError(
                f"the gate '{expr}' has no comparison; write for example ppl_delta_pct<=1.0"
            )
        metric = metric.strip()
        units = gate_units()
        if metric.rstrip("=!") in units and metric not in units or bound.startswith("="):
            raise EvaluationError(f"the gate '{expr}' is not understood; write <=, >=, < or >")
        if metric not in units:
            raise EvaluationError(
                f"the gate '{expr}' names an unknown metric '{metric}'; choose one of"
                f" {', '.join(units)}"
            )
        try:
            number = float(bound)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise EvaluationError(
                f"the gate '{expr}' compares with '{bound.strip()}', which is no number; give"
                f" {units[metric]}"
            )
        return cls(expr, metric, operator, number)

    def outcome(self, interval: Interval) -> str:
        """ "pass" if the whole 95 % interval fulfils the condition, "fail" if none of it does, else
        "inconclusive".
        """
        low = interval.value if interval.low is None else interval.low
        high = interval.value if interval.high is None else interval.high
        if interval.method == "none":
            return "inconclusive"
        holds = [self._holds(low), self._holds(high)]
        return "pass" if all(holds) else "inconclusive" if any(holds) else "fail"

    def _holds(self, value: float) -> bool:
        return {
            "<=": value <= self.bound,
            "<": value < self.bound,
            ">=": value >= self.bound,
            ">": value > self.bound,
        }[self.operator]


def gate_results(gates: Sequence[Gate], quant: QuantResult, tokens: int) -> list[GateResult]:
    """Test each gate on one quantized model.

    tokens: number of scored tokens, from which `more_tokens_needed` is estimated.
    """
    results = []
    for gate in gates:
        interval = _interval(gate.metric, quant)
        outcome = gate.outcome(interval)
        more = _more_tokens(gate, interval, tokens) if outcome == "inconclusive" else None
        results.append(
            GateResult(
                expr=gate.expr,
                path=quant.path,
                value=interval.value,
                low=interval.low,
                high=interval.high,
                result=outcome,
                more_tokens_needed=more,
            )
        )
    return results


def _interval(name: str, quant: QuantResult) -> Interval:
    """The value of a gate's metric, with its interval."""
    for metric, gate in metrics.gateable_metrics():
        if gate.name == name:
            return gate.interval(quant.metrics[metric])
    return Interval(quant.size_ratio, quant.size_ratio, quant.size_ratio, "exact")


def _more_tokens(gate: Gate, interval: Interval, tokens: int) -> int | None:
    """How many more tokens would decide an inconclusive gate, about.

    The interval's width shrinks with the square root of the number of tokens. The gate is decided
    when the interval no longer reaches from the value to the bound. None if there is no interval.
    """
    if interval.low is None or interval.high is None or gate.bound == interval.value:
        return None
    reach = (
        interval.high - interval.value
        if gate.bound > interval.value
        else interval.value - interval.low
    )
    return max(1, round(tokens * ((reach / abs(interval.value - gate.bound)) ** 2 - 1)))
