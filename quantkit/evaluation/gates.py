"""Gates: conditions on a comparison, such as `ppl_delta_pct<=1.0`, that pass, fail, or can't be
decided on this much text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.errors import EvaluationError
from quantkit.evaluation.intervals import Interval


@dataclass(frozen=True)
class Gate:
    """A condition on a figure: passed where its whole interval holds it, failed where none of it
    does, else inconclusive.
    """

    expr: str
    metric: str
    operator: str
    bound: float

    METRICS = ("ppl_delta_pct", "kld_mean", "top1", "size_ratio")

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
        if metric not in cls.METRICS:
            raise EvaluationError(
                f"the gate '{expr}' names an unknown figure '{metric}'; choose one of"
                f" {', '.join(cls.METRICS)}"
            )
        try:
            number = float(bound)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise EvaluationError(
                f"the gate '{expr}' compares with '{bound.strip()}', which is no number"
            )
        return cls(expr, metric, operator, number)

    def judge(self, interval: Interval) -> str:
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


def judged_gates(
    gates: Sequence[Gate], figures: Mapping[str, Interval], path: str, tokens: int
) -> list[dict[str, Any]]:
    """What becomes of each gate. tokens: how many were scored, for an estimate of how many more
    would decide.

    more_tokens_needed: an interval's width shrinks with the square root of the text, so by the time
    it is as wide as the value is far from the bound, this many more are scored; null where one
    window gives no width to go by.
    """
    judged = []
    for gate in gates:
        interval = figures[gate.metric]
        outcome = gate.judge(interval)
        entry = {
            "expr": gate.expr,
            "path": path,
            "value": interval.value,
            "low": interval.low,
            "high": interval.high,
            "result": outcome,
        }
        if outcome == "inconclusive":
            entry["more_tokens_needed"] = _more_tokens(gate, interval, tokens)
        judged.append(entry)
    return judged


def _more_tokens(gate: Gate, interval: Interval, tokens: int) -> int | None:
    if interval.low is None or interval.high is None or gate.bound == interval.value:
        return None
    reach = (
        interval.high - interval.value
        if gate.bound > interval.value
        else interval.value - interval.low
    )
    return max(1, round(tokens * ((reach / abs(interval.value - gate.bound)) ** 2 - 1)))
