"""Gates: conditions on a comparison, such as `ppl_delta_pct<=1.0`, that pass, fail, or can't be
decided on this much text.
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
    """The unit of each metric that a gate may ask for, by the gate's name: those of the tokens, and
    the candidate's size.
    """
    units = {gate.name: gate.unit for _, gate in metrics.gateable_metrics()}
    return units | {"size_ratio": "shares of the base's size"}


@dataclass(frozen=True)
class Gate:
    """A condition on a metric: passed where its whole interval holds it, failed where none of it
    does, else inconclusive.

    expr: as the user wrote it.
    metric: the gate's name of it.
    operator: <=, <, >= or >.
    bound: in the metric's unit.
    """

    expr: str
    metric: str
    operator: str
    bound: float

    @classmethod
    def parse(cls, expr: str) -> Gate:
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
        """ "pass" or "fail" where the whole interval lies on one side of the bound, else
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
    """What becomes of each gate. tokens: how many were scored, for an estimate of how many more
    would decide.

    more_tokens_needed: an interval's width shrinks with the square root of the text, so by the time
    it is as wide as the value is far from the bound, this many more are scored; None where one
    window gives no width to go by.
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
    """Of what a gate asks for."""
    for metric, gate in metrics.gateable_metrics():
        if gate.name == name:
            return gate.interval(quant.metrics[metric])
    return Interval(quant.size_ratio, quant.size_ratio, quant.size_ratio, "exact")


def _more_tokens(gate: Gate, interval: Interval, tokens: int) -> int | None:
    if interval.low is None or interval.high is None or gate.bound == interval.value:
        return None
    reach = (
        interval.high - interval.value
        if gate.bound > interval.value
        else interval.value - interval.low
    )
    return max(1, round(tokens * ((reach / abs(interval.value - gate.bound)) ** 2 - 1)))
