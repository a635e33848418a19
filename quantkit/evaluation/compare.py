"""`compare`: quant against quant, paired, from the per-window sums that two runs of `eval -o`
stored. No model is needed any more.

Two results are comparable when the same tokens went through the same protocol against the same
base; everything else is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import EvaluationError, NotComparableError
from quantkit.evaluation.evaluate import SCHEMA_VERSION
from quantkit.evaluation.intervals import Interval, paired_interval, perplexity_change_pct

_SUMS = ("window_nll", "window_kld", "window_same_top1")


def read_result(path: Path) -> dict[str, Any]:
    """A result of `eval -o`, whole and of a version that this one knows."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(
            f"there is no file {path}; write one with: quantkit eval BASE QUANT --data FILE -o"
            f" {path.name}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(
            f"{path} can't be read as JSON ({' '.join(str(error).split())[:100]}); give a file that"
            " `quantkit eval -o` wrote"
        ) from None
    if not isinstance(result, dict) or "schema_version" not in result or "quants" not in result:
        raise EvaluationError(f"{path} is no result of `quantkit eval -o`")
    if result["schema_version"] != SCHEMA_VERSION:
        raise EvaluationError(
            f"{path} has schema version {result['schema_version']}; this quantkit reads"
            f" {SCHEMA_VERSION}: judge again with it"
        )
    try:
        _require_whole(result)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise EvaluationError(
            f"{path} is damaged or incomplete; judge again with: quantkit eval … -o {path.name}"
        ) from None
    if not result["quants"]:
        raise EvaluationError(
            f"{path} holds a base alone; give quantized models to `quantkit eval` too"
        )
    return result


def _require_whole(result: dict[str, Any]) -> None:
    windows = len(result["window_tokens"])
    sums = [
        result["window_tokens"],
        result["base"]["window_nll"],
        *(quant[name] for quant in result["quants"] for name in _SUMS),
    ]
    needed = [
        result["protocol"]["hash"],
        result["data"]["tokens_sha256"],
        result["base"]["path"],
        *(quant["path"] for quant in result["quants"]),
    ]
    if (
        not windows
        or any(
            len(values) != windows or not np.isfinite(np.array(values, np.float64)).all()
            for values in sums
        )
        or not all(needed)
    ):
        raise ValueError
    if min(result["window_tokens"]) < 1 or any(
        quant["bytes"] <= 0 or quant["perplexity"] <= 0 for quant in result["quants"]
    ):
        raise ValueError


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Each quant of `second` against each of `first`."""
    a, b = read_result(first), read_result(second)
    _require_comparable(a, b, first, second)
    counts, per_unit = np.array(a["window_tokens"]), float(a.get("tokens_per_unit", 1.0))
    return {
        "schema_version": SCHEMA_VERSION,
        "a": str(first),
        "b": str(second),
        "protocol": a["protocol"],
        "data": a["data"],
        "tokens_scored": a["tokens_scored"],
        "windows": len(counts),
        "base": {"path": a["base"]["path"], "perplexity": a["base"]["perplexity"]},
        "pairs": [
            _pair(ours, theirs, counts, per_unit) for ours in a["quants"] for theirs in b["quants"]
        ],
        "remarks": _differences(a, b),
    }


def _require_comparable(a: dict[str, Any], b: dict[str, Any], first: Path, second: Path) -> None:
    if a["protocol"]["hash"] != b["protocol"]["hash"]:
        described = " and ".join(
            f"{result['protocol'].get('name')}, windows of {result['protocol'].get('seq_len')}"
            for result in (a, b)
        )
        raise NotComparableError(
            f"{first} and {second} were made by different protocols ({described}); judge both with"
            " the same --protocol and --seq-len"
        )
    if (
        a["data"]["tokens_sha256"] != b["data"]["tokens_sha256"]
        or a["window_tokens"] != b["window_tokens"]
    ):
        described = " and ".join(
            f"{', '.join(map(str, result['data'].get('sources', ['?'])))},"
            f" {result['tokens_scored']} tokens"
            for result in (a, b)
        )
        raise NotComparableError(
            f"{first} and {second} were made on different tokens ({described}); judge both on the"
            " same --data and --max-tokens"
        )
    fingerprints = a["base"].get("fingerprint"), b["base"].get("fingerprint")
    same = (
        fingerprints[0] == fingerprints[1]
        if all(fingerprints)
        else a["base"]["window_nll"] == b["base"]["window_nll"]
    )
    if not same:
        raise NotComparableError(
            f"{first} and {second} have different bases ({a['base']['path']} and"
            f" {b['base']['path']}); judge both against the same one"
        )


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What else was not the same, and may show in the figures."""
    what = {
        "hardware": "--hardware",
        "kernel_level": "kernels",
        "device": "device",
        "quantkit_version": "quantkit",
    }
    found = [
        f"A and B ran with different {name}: {a.get(key)} and {b.get(key)}"
        for key, name in what.items()
        if a.get(key) != b.get(key)
    ]
    ran = [sorted({str(quant.get("exec")) for quant in result["quants"]}) for result in (a, b)]
    return (
        found
        if ran[0] == ran[1]
        else [
            *found,
            (
                "A and B ran with different arithmetic (--exec):"
                f" {' and '.join(', '.join(each) for each in ran)}"
            ),
        ]
    )


def _pair(
    a: dict[str, Any], b: dict[str, Any], counts: np.ndarray, tokens_per_unit: float
) -> dict[str, Any]:
    nll, kld, top1 = (np.array(b[name]) - np.array(a[name]) for name in _SUMS)
    delta = perplexity_change_pct(nll, counts, tokens_per_unit)

    def described(interval: Interval) -> dict[str, Any]:
        return interval.to_json() | {"smallest_resolvable": interval.half_width}

    keys = ("path", "scheme", "perplexity", "bytes")
    return {
        "a": {key: a[key] for key in keys},
        "b": {key: b[key] for key in keys},
        "ppl_delta_pct": described(delta),
        "kld_delta": described(paired_interval(kld, counts)),
        "top1_delta": described(paired_interval(top1, counts)),
        "size_ratio": b["bytes"] / a["bytes"],
    }
