"""Schemas that check calibration.json.

A schema maps each key of an object to the name of a kind (KINDS below), or to another schema. A
list with one schema stands for a list of such objects. A kind that ends in ", or absent" may be
missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FLOAT32_MAX = 3.4028234663852886e38

Schema = Mapping[str, Any]


class Damage(Exception):
    """calibration.json isn't as `calibrate` wrote it; the text says what is wrong."""


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    wanted: what a value should be, for messages.
    accepts: whether a value is of this kind.
    """

    wanted: str
    accepts: Callable[[Any], bool]


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_magnitude(value: Any) -> bool:
    """Whether a value is a number that is finite and not negative in float32."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value <= FLOAT32_MAX


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(accepts, value))


def _is_rotated_linear(value: Any) -> bool:
    kinds = {
        "norm": str,
        "adds_one": bool,
        "writes": bool,
        "reads_heads": bool,
        "writes_heads": bool,
    }
    return (
        isinstance(value, dict)
        and value.keys() == kinds.keys()
        and all(isinstance(value[key], kind) for key, kind in kinds.items())
    )


_IS_TEXTS, _IS_MAGNITUDES = _is_list_of(is_text), _is_list_of(is_magnitude)
KINDS: dict[str, Kind] = {
    "count": Kind("a count", is_count),
    "counts": Kind("a list of counts", _is_list_of(is_count)),
    "magnitude": Kind("a finite magnitude", is_magnitude),
    "four magnitudes": Kind(
        "four magnitudes", lambda value: _IS_MAGNITUDES(value) and len(value) == 4
    ),
    "whole number": Kind(
        "a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)
    ),
    "flag": Kind("true or false", lambda value: isinstance(value, bool)),
    "text": Kind("text", is_text),
    "texts": Kind("a list of texts", lambda value: _IS_TEXTS(value) and bool(value)),
    "texts, maybe none": Kind("a list of texts", _IS_TEXTS),
    "object": Kind("an object", lambda value: isinstance(value, dict)),
    "objects": Kind("a list of objects", _is_list_of(lambda value: isinstance(value, dict))),
    "texts by name": Kind(
        "an object of texts",
        lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
    ),
    "rotated linears": Kind(
        "how Linears are rotated",
        lambda value: isinstance(value, dict) and all(map(_is_rotated_linear, value.values())),
    ),
}
OPTIONAL = ", or absent"


def require(content: Mapping[str, Any], schema: Schema) -> None:
    """Raise Damage unless an object matches its schema. Keys that the schema lacks are ignored."""
    for key, wanted in schema.items():
        if isinstance(wanted, str):
            if wanted.endswith(OPTIONAL) and key not in content:
                continue
            require_kind(content, key, KINDS[wanted.removesuffix(OPTIONAL)])
        elif isinstance(wanted, list):
            for entry in require_kind(content, key, KINDS["objects"]):
                require(entry, wanted[0])
        else:
            require(require_kind(content, key, KINDS["object"]), wanted)


def require_kind(content: Mapping[str, Any], key: str, kind: Kind) -> Any:
    if key not in content:
        raise Damage(f"'{key}' is missing")
    if not kind.accepts(content[key]):
        raise Damage(f"'{key}' is {repr(content[key])[:60]}, not {kind.wanted}")
    return content[key]
