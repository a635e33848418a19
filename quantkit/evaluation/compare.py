"""`compare`: a paired comparison of quantized models, from the per-window sums in two stored
results of `eval`. No model is loaded.

Two results are comparable if they have the same tokens, the same protocol and the same base model.
Otherwise `compare` refuses and says what differs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import EvaluationError, NotComparableError
from quantkit.evaluation import json_values
from quantkit.evaluation.json_values import INLINE
from quantkit.evaluation.metrics import PERPLEXITY, Deltas
from quantkit.evaluation.result import (
    SCHEMA_VERSION,
    Evaluation,
    EvaluationProtocol,
    QuantResult,
    TextSources,
)


@dataclass(frozen=True)
class ComparedBase:
    """The base model of both results.

    path: its directory, as in the first result.
    perplexity: per token, or per word with the protocol lmeval.
    """

    path: str
    perplexity: float


@dataclass(frozen=True)
class ComparedQuant:
    """One quantized model of a pair.

    path: its directory.
    scheme: the name of its scheme.
    perplexity: per token, or per word with the protocol lmeval.
    bytes: size of its tensors.
    """

    path: str
    scheme: str
    perplexity: float
    bytes: int

    @classmethod
    def of(cls, quant: QuantResult) -> ComparedQuant:
        return cls(quant.path, quant.scheme, quant.metrics[PERPLEXITY], quant.bytes)


@dataclass(frozen=True)
class Pair:
    """Two quantized models, compared.

    a: the model from the first result.
    b: the model from the second result.
    deltas: the difference B − A of each paired metric.
    size_ratio: bytes of B / bytes of A.
    """

    a: ComparedQuant
    b: ComparedQuant
    deltas: Deltas = field(metadata=INLINE)
    size_ratio: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. The fields are the keys of its JSON, in order.

    schema_version: version of the JSON.
    a: path of the first result.
    b: path of the second result.
    protocol: how windows were cut and scored in both results.
    data: the text of both results.
    tokens_scored: number of scored tokens.
    windows: number of windows.
    base: the base model of both results.
    pairs: each quantized model of B with each of A.
    remarks: settings that differ and may affect the metrics, one sentence each.
    """

    schema_version: int
    a: str
    b: str
    protocol: EvaluationProtocol
    data: TextSources
    tokens_scored: int
    windows: int
    base: ComparedBase
    pairs: tuple[Pair, ...]
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return json_values.fields_to_json(self)


def read_result(path: Path) -> Evaluation:
    """Read a stored result of `eval`.

    Raises EvaluationError if the file is missing, damaged, of another schema version, or without a
    quantized model.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(
            f"there is no file {path}", hint="store the result of an evaluation as JSON first"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(
            f"{path} can't be read as JSON ({' '.join(str(error).split())[:100]})",
            hint="give a stored result of eval",
        ) from None
    if not isinstance(content, dict) or "schema_version" not in content or "quants" not in content:
        raise EvaluationError(f"{path} is no stored result of eval")
    if content["schema_version"] != SCHEMA_VERSION:
        raise EvaluationError(
            f"{path} has schema version {content['schema_version']}; this quantkit reads"
            f" {SCHEMA_VERSION}: evaluate again with it"
        )
    try:
        result = Evaluation.from_json(content)
        _require_whole(result)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise EvaluationError(f"{path} is damaged or incomplete", hint="evaluate again") from None
    if not result.quants:
        raise EvaluationError(
            f"{path} has results of the base model only", hint="evaluate quantized models too"
        )
    return result


def _require_whole(result: Evaluation) -> None:
    """Raise ValueError if window sums, names or counts are missing or make no sense."""
    windows = len(result.window_tokens)
    sums = [
        result.window_tokens,
        result.base.window_nll,
        *(each for quant in result.quants for each in quant.window_sums.values.values()),
    ]
    if not windows or any(
        len(values) != windows or not np.isfinite(np.array(values, np.float64)).all()
        for values in sums
    ):
        raise ValueError("sums")
    paths = [result.base.path, *(quant.path for quant in result.quants)]
    if not all([result.protocol.hash, result.data.tokens_sha256, *paths]):
        raise ValueError("names")
    if min(result.window_tokens) < 1 or not all(
        quant.bytes > 0 and quant.metrics[PERPLEXITY] > 0 for quant in result.quants
    ):
        raise ValueError("counts")


def compare(first: Path, second: Path) -> Comparison:
    """Compare each quantized model of `second` with each of `first`.

    Raises EvaluationError if a file can't be used, NotComparableError if the results differ in
    protocol, tokens or base model.
    """
    a, b = read_result(first), read_result(second)
    _require_comparable(a, b, first, second)
    counts = np.array(a.window_tokens)
    return Comparison(
        SCHEMA_VERSION,
        str(first),
        str(second),
        a.protocol,
        a.data,
        a.tokens_scored,
        len(counts),
        ComparedBase(a.base.path, a.base.perplexity),
        tuple(
            Pair(
                ComparedQuant.of(ours),
                ComparedQuant.of(theirs),
                Deltas.of(ours.window_sums, theirs.window_sums, counts, a.tokens_per_unit),
                theirs.bytes / ours.bytes,
            )
            for ours in a.quants
            for theirs in b.quants
        ),
        tuple(_differences(a, b)),
    )


def _require_comparable(a: Evaluation, b: Evaluation, first: Path, second: Path) -> None:
    if a.protocol.hash != b.protocol.hash:
        described = " and ".join(
            f"{result.protocol.name}, windows of {result.protocol.seq_len}" for result in (a, b)
        )
        raise NotComparableError(
            f"{first} and {second} were made by different protocols ({described})",
            hint="evaluate both with the same `protocol` and `seq_len`",
        )
    if a.data.tokens_sha256 != b.data.tokens_sha256 or a.window_tokens != b.window_tokens:
        described = " and ".join(
            f"{', '.join(result.data.sources)}, {result.tokens_scored} tokens" for result in (a, b)
        )
        raise NotComparableError(
            f"{first} and {second} were made on different tokens ({described})",
            hint="evaluate both on the same `data` and `max_tokens`",
        )
    fingerprints = a.base.fingerprint, b.base.fingerprint
    same = (
        fingerprints[0] == fingerprints[1]
        if all(fingerprints)
        else a.base.window_nll == b.base.window_nll
    )
    if not same:
        raise NotComparableError(
            f"{first} and {second} have different bases ({a.base.path} and {b.base.path});"
            " evaluate both against the same one"
        )


def _differences(a: Evaluation, b: Evaluation) -> list[str]:
    """Other settings that differ and may affect the metrics, one sentence each."""
    settings = {
        "`hardware`": (a.hardware, b.hardware),
        "kernels": (a.kernel_level, b.kernel_level),
        "device": (a.device, b.device),
        "quantkit": (a.quantkit_version, b.quantkit_version),
    }
    found = [
        f"A and B ran with different {name}: {ours} and {theirs}"
        for name, (ours, theirs) in settings.items()
        if ours != theirs
    ]
    ran = [sorted({str(quant.exec) for quant in result.quants}) for result in (a, b)]
    if ran[0] != ran[1]:
        found.append(
            "A and B ran with different arithmetic (`exec`):"
            f" {' and '.join(', '.join(each) for each in ran)}"
        )
    return found
