"""Convert frozen dataclasses to JSON and back. Keys are the names of fields, in order.

Metadata of a field changes how it is stored:

    OMIT_NONE   without its key if the value is None
    INLINE      its items are merged into the keys of the dataclass; None has no items
    key(name)   under another name
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

OMIT_NONE = {"omit_none": True}
INLINE = {"inline": True}


def key(name: str) -> dict[str, str]:
    """Metadata for a key that can't be the name of a field, such as "from"."""
    return {"key": name}


def to_json(value: Any) -> Any:
    """The JSON of a dataclass, a mapping, a sequence, or a plain JSON value."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return fields_to_json(value)
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def fields_to_json(value: Any) -> dict[str, Any]:
    """The JSON of a dataclass, field by field. Its own `to_json` is not called."""
    content: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if field.metadata.get("inline"):
            content |= to_json(item) if item is not None else {}
        elif item is not None or not field.metadata.get("omit_none"):
            content[_key(field)] = to_json(item)
    return content


def from_json(kind: Any, content: Any) -> Any:
    """The value of type `kind` that `to_json` converted. A missing key takes its field's default. A
    float that is null becomes NaN, because JSON can't store numbers that aren't finite.

    Raises KeyError, TypeError or ValueError for other content.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _from_union(arguments, content)
    if origin is tuple:
        return tuple(from_json(arguments[0], item) for item in _checked(list, content))
    if origin is not None and issubclass(origin, Mapping):
        items = _checked(dict, content).items()
        return {name: from_json(arguments[1], item) for name, item in items}
    if hasattr(kind, "from_json"):
        return kind.from_json(content)
    if dataclasses.is_dataclass(kind):
        return fields_from_json(kind, content)
    if kind is float:
        return math.nan if content is None else float(_checked((int, float), content))
    return _checked(kind, content)


def fields_from_json(kind: Any, content: Any) -> Any:
    """A dataclass, field by field. Its own `from_json` is not called."""
    content, hints = _checked(dict, content), _hints(kind)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name = _key(field)
        if field.metadata.get("inline"):
            values[field.name] = _from_inline(hints[field.name], content)
        elif name in content:
            values[field.name] = from_json(hints[field.name], content[name])
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise KeyError(name)
    return kind(**values)


def _key(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("key", field.name)


def _from_inline(kind: Any, content: dict[str, Any]) -> Any:
    """None if `kind` allows it, and the content has none of its keys."""
    kinds = typing.get_args(kind)
    if types.NoneType in kinds:
        others = [each for each in kinds if each is not types.NoneType]
        keys = {_key(field) for each in others for field in dataclasses.fields(each)}
        if not keys & content.keys():
            return None
    return from_json(kind, content)


def _from_union(kinds: tuple[Any, ...], content: Any) -> Any:
    if content is None and types.NoneType in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not types.NoneType]
    for kind in others:
        if isinstance(content, kind):
            return content
    return from_json(last, content)


def _checked(kind: Any, content: Any) -> Any:
    if not isinstance(content, kind) or (isinstance(content, bool) and kind is not bool):
        raise TypeError(f"{content!r} is no {kind}")
    return content


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
