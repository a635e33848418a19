"""What the public functions take: models, data, recipes and sizes, as users have them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from quantkit.checkpoint.hub import resolve_model
from quantkit.checkpoint.units import parse_bytes
from quantkit.data.sources import DataSource, Records, is_file, repeated_source, require_source
from quantkit.errors import ArgumentError, DataError, OutputError, RecipeError
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

# A directory with safetensors files, a hub id or a .gguf file; also a result with a path.
Model = str | os.PathLike[str]
# A file name or `dataset:NAME[:CONFIG[:SPLIT]]`, several of them, texts, conversations, or records
# with "text" or "messages", such as those of a datasets.Dataset.
Data = str | os.PathLike[str] | Iterable[Any]

_TEXT_FILES = (".txt", ".jsonl", ".ndjson", ".parquet")
_RECIPE_FILES = (".yaml", ".yml")


def model_path(model: Model) -> Path:
    """The directory of a model; a hub id is downloaded, a .gguf file converted.

    Raises CheckpointError if that fails, ArgumentError for anything but a name.
    """
    return resolve_model(model_name(model))


def model_name(model: Model) -> str:
    """The name of a model. Raises ArgumentError for anything else, such as a torch module."""
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise ArgumentError(
            f"a model is given as {type(model).__name__}; give a directory, a hub id or a .gguf"
            " file: models are read from disk, a part at a time"
        )
    return os.fspath(model)


def path_of(name: str, value: str | os.PathLike[str]) -> Path:
    """A file or directory that a parameter names; `~` is the home directory.

    Raises ArgumentError for anything but a name.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentError(f"`{name}` is {value!r}; give a path")
    path = Path(os.path.expanduser(os.fspath(value)))
    if not path.name:
        raise ArgumentError(f"`{name}` is '{os.fspath(value)}'; give a path that ends in a name")
    return path


def require_flags(**values: bool) -> None:
    """Raise ArgumentError for a parameter that isn't True or False: "no" would count as True."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"`{name}` is {value!r}; give True or False")


def require_callables(**values: Callable[..., Any] | None) -> None:
    """Raise ArgumentError for a parameter that is neither None nor callable."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise ArgumentError(f"`{name}` is {value!r}; give a function")


def recipe_of(recipe: Recipe | str | os.PathLike[str]) -> Recipe:
    """A recipe, by itself, by the name of its scheme, or from its YAML file.

    Raises RecipeError for an unknown scheme and for a file that is no recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, (str, os.PathLike)):
        raise RecipeError(f"`recipe` is {recipe!r}; give a Recipe, a scheme's name or a .yaml file")
    text = os.fspath(recipe)
    if isinstance(recipe, os.PathLike) or text.endswith(_RECIPE_FILES):
        return Recipe.load(path_of("recipe", text))
    try:
        return Recipe(QuantScheme.parse(text))
    except RecipeError as error:
        if is_file(text):
            return Recipe.load(path_of("recipe", text))
        raise RecipeError(str(error), "or give a recipe's .yaml file") from None


def size_of(size: int | str, name: str) -> int:
    """A number of bytes, also as text such as "5GB".

    Raises ArgumentError if it isn't a size of at least one byte.
    """
    try:
        count = parse_bytes(size) if isinstance(size, str) else size
    except OutputError:
        count = 0
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ArgumentError(f"`{name}` is {size!r}; give a size above 0, such as '5GB' or '500MB'")
    return count


def require_choice(name: str, value: str | None, allowed: Iterable[str]) -> None:
    """Raise ArgumentError unless a parameter is None or one of the allowed values."""
    if value is not None and value not in (choices := tuple(allowed)):
        raise ArgumentError(f"`{name}` is {value!r}; choose one of {', '.join(choices)}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_whole(name: str, value: int) -> None:
    """Raise ArgumentError unless a parameter is a whole number."""
    if not _is_whole(value):
        raise ArgumentError(f"`{name}` is {value!r}; it must be a whole number")


def require_at_least(least: int, **values: int | None) -> None:
    """Raise ArgumentError for a parameter that is neither None nor a whole number ≥ `least`."""
    for name, value in values.items():
        if value is None:
            continue
        if not _is_whole(value) or value < least:
            raise ArgumentError(f"`{name}` is {value!r}; it must be a whole number from {least} up")


def require_list(name: str, values: Iterable[str]) -> tuple[str, ...]:
    """The values of a parameter. Raises ArgumentError for one text, whose letters would count."""
    is_list = isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping))
    found = tuple(values) if is_list else ()
    if not is_list or not all(isinstance(value, str) for value in found):
        raise ArgumentError(f"`{name}` must be a list of texts, not {values!r}")
    return found


def data_sources(data: Data | None) -> tuple[DataSource, ...]:
    """Text sources of a `data` argument; none for None.

    One text is a file name. A list holds either file names or texts: it holds file names if each is
    a path, exists, begins with "dataset:", or is one word that ends like a text file.

    Raises DataError if a file doesn't exist, a source is given twice, or a record has no text.
    """
    if data is None:
        return ()
    if isinstance(data, (str, os.PathLike)):
        return _files([data])
    if isinstance(data, (bytes, set, frozenset)) or not isinstance(data, Iterable):
        raise DataError(
            f"`data` is {type(data).__name__}; give file names, a list of texts, or records in an"
            " order"
        )
    if isinstance(data, Mapping):
        raise DataError(
            "`data` is a mapping; give one split of a dataset, a list of texts, or a list of"
            " records with 'text' or 'messages'"
        )
    rows = list(data)
    if not rows:
        return ()
    if not all(isinstance(row, (str, os.PathLike)) for row in rows):
        return (Records(tuple(_conversation_or_records(rows))),)
    named = [_is_file_name(row) for row in rows]
    if all(named):
        return _files(rows)
    if any(named):
        raise DataError(
            f"`data` holds both files ({rows[named.index(True)]}) and texts; give one kind"
        )
    return (Records(tuple({"text": row} for row in rows)),)


def _files(names: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    texts = tuple(os.fspath(name) for name in names)
    for text in texts:
        if len(texts) == 1 and isinstance(names[0], str) and _looks_like_text(text):
            raise DataError(
                f"`data` is a text of {len(text)} characters; put it into a list: one string alone"
                " is a file name"
            )
        require_source(text)
    twice = repeated_source(texts)
    if twice is not None:
        raise DataError(f"{twice} is given twice; name each source once")
    return texts


def _looks_like_text(text: str) -> bool:
    return "\n" in text or len(text) > 1000


def _is_file_name(row: str | os.PathLike[str]) -> bool:
    if isinstance(row, os.PathLike):
        return True
    if row.startswith("dataset:"):
        return True
    if _looks_like_text(row):
        return False
    return (row.lower().endswith(_TEXT_FILES) and len(row.split()) == 1) or is_file(row)


def _conversation_or_records(rows: Sequence[Any]) -> Iterable[Mapping[str, Any]]:
    """Records of rows; a list of messages is one conversation."""
    if all(isinstance(row, Mapping) and "role" in row for row in rows):
        return [{"messages": [dict(row) for row in rows]}]
    return [_record(row, number) for number, row in enumerate(rows, 1)]


def _record(row: Any, number: int) -> Mapping[str, Any]:
    """Other columns than the text of a row are left out: they may hold images and dates."""
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, (list, tuple)) and all(isinstance(message, Mapping) for message in row):
        return {"messages": [dict(message) for message in row]}
    if isinstance(row, Mapping):
        for key in ("text", "messages"):
            if row.get(key) is not None:
                return {key: row[key]}
        columns = f"it has {', '.join(map(str, row))}" if row else "it is empty"
        raise DataError(f"record {number} of `data` has neither 'text' nor 'messages'; {columns}")
    raise DataError(
        f"record {number} of `data` is {type(row).__name__}; give texts, lists of messages, or"
        " records with 'text' or 'messages'"
    )
