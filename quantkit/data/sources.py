"""Reading a text source as documents, and the texts that come with quantkit.

A source is a text file, JSON lines, a parquet file, `dataset:NAME[:CONFIG[:SPLIT]]` on the hub, or
records in memory. A record has a `text`, or `messages` that the tokenizer's chat template renders.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.errors import DataError, brief

# Ends the message if a package for hub datasets or parquet files is missing.
_INSTALL_HUB_EXTRA = "install it with: pip install 'quantkit[hub]'"

# The texts that come with quantkit; texts/README.md says where they are from.
_TEXTS = Path(__file__).parent / "texts"
BUNDLED_CALIBRATION = _TEXTS / "calibration.jsonl"
BUNDLED_EVALUATION = _TEXTS / "evaluation.txt"


@dataclass(frozen=True)
class Records:
    """A source in memory. Raises DataError for records that aren't made of JSON's values.

    records: as lines of a .jsonl file hold them, each with a "text" or "messages".
    """

    records: tuple[Mapping[str, Any], ...]

    def __post_init__(self) -> None:
        try:
            self.sha256  # noqa: B018
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the texts in memory hold a value that JSON doesn't know ({brief(error)})"
            ) from None

    @cached_property
    def sha256(self) -> str:
        """A hash of the records."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(json.dumps(record, sort_keys=True).encode() + b"\0")
        return digest.hexdigest()

    def __str__(self) -> str:
        """The name of the source in results: sources with other records have another name."""
        count = len(self.records)
        return f"{count} text{'s' if count > 1 else ''} in memory ({self.sha256[:12]})"


def is_file(name: str) -> bool:
    """Whether there is a file of this name; a text that can't be a name is none."""
    try:
        return Path(name).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False


# A file, `dataset:NAME[:CONFIG[:SPLIT]]`, or records in memory. `str()` of it is its name.
DataSource = str | Records


@dataclass(frozen=True)
class Source:
    """One text source.

    name: as `str()` of the DataSource gives it.
    documents: its texts, in order; a text file is one document.
    sha256: hash of the file's bytes, or of the documents or records.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str


def require_source(source: DataSource) -> None:
    """Raise DataError if a source is the name of a file that doesn't exist."""
    if isinstance(source, Records) or source.startswith("dataset:"):
        return
    if not is_file(source):
        raise DataError(
            f"there is no data file {source}; give a .txt, .jsonl or .parquet file, or"
            " dataset:NAME[:CONFIG[:SPLIT]]"
        )


def repeated_source(names: Iterable[str]) -> str | None:
    """The first source that is named twice, or None. Its text would count twice."""
    seen: set[str] = set()
    for name in names:
        source = name if name.startswith("dataset:") else os.path.realpath(os.path.expanduser(name))
        if source in seen:
            return name
        seen.add(source)
    return None


def read_source(source: DataSource, tokenizer: Any) -> Source:
    """Read one source.

    tokenizer: renders chat messages.

    Raises DataError if there is no such file, or if its content can't be read as text.
    """
    if isinstance(source, Records):
        return _from_memory(source, tokenizer)
    require_source(source)
    name = source
    if name.startswith("dataset:"):
        return _hub_dataset(name, tokenizer)
    path = Path(name).expanduser()
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if path.suffix.lower() == ".parquet":
        return Source(name, tuple(_parquet_documents(path, tokenizer)), digest)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    # As in Python's text mode: every line ends in "\n", also in files with "\r\n" or "\r".
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return Source(name, tuple(_json_documents(name, text, tokenizer)), digest)
    return Source(name, (text,), digest)


def _from_memory(records: Records, tokenizer: Any) -> Source:
    documents = tuple(
        _record_text(record, f"record {number} of {records}", tokenizer)
        for number, record in enumerate(records.records, 1)
    )
    return Source(str(records), documents, records.sha256)


def _json_documents(name: str, text: str, tokenizer: Any) -> Iterable[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(
                f"line {number} of {name} is not JSON; each line must be an object with 'text' or"
                " 'messages'"
            ) from None
        yield _record_text(record, f"line {number} of {name}", tokenizer)


def _parquet_documents(path: Path, tokenizer: Any) -> Iterable[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow; {_INSTALL_HUB_EXTRA}") from None
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not readable as parquet: {error}") from None
    columns = [name for name in ("text", "messages") if name in table.column_names]
    if not columns:
        raise DataError(
            f"{path} has no column 'text' or 'messages'; it has {', '.join(table.column_names)}"
        )
    for number, record in enumerate(table.select(columns).to_pylist(), 1):
        yield _record_text(record, f"row {number} of {path}", tokenizer)


def _hub_dataset(name: str, tokenizer: Any) -> Source:
    """The source `dataset:NAME[:CONFIG[:SPLIT]]`; the default split is `train`."""
    parts = name.split(":")[1:]
    if not parts[0] or len(parts) > 3:
        raise DataError(
            f"'{name}' is not understood; write dataset:NAME, dataset:NAME:CONFIG or"
            " dataset:NAME:CONFIG:SPLIT"
        )
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"reading {name} needs the datasets package; {_INSTALL_HUB_EXTRA}"
        ) from None
    config = (parts[1] or None) if len(parts) > 1 else None
    split = parts[2] if len(parts) > 2 else "train"
    try:
        records = datasets.load_dataset(parts[0], config, split=split)
    except Exception as error:  # its backends raise exceptions of many kinds
        raise DataError(
            f"{name} can't be loaded ({brief(error)}); give a local file instead"
        ) from None
    documents = tuple(
        _record_text(record, f"record {number} of {name}", tokenizer)
        for number, record in enumerate(records, 1)
    )
    return Source(name, documents, hashlib.sha256("\0".join(documents).encode()).hexdigest())


def _record_text(record: Any, where: str, tokenizer: Any) -> str:
    """A record's text.

    where: names the record in messages.
    """
    if isinstance(record, Mapping) and isinstance(record.get("text"), str):
        return _require_text(record["text"], where)
    if isinstance(record, Mapping) and isinstance(record.get("messages"), (list, tuple)):
        try:
            rendered = tokenizer.apply_chat_template(list(record["messages"]), tokenize=False)
        except Exception as error:  # a Jinja template may raise anything
            raise DataError(
                f"the chat template can't render {where} ({brief(error)}); use records with 'text'"
            ) from None
        return _require_text(rendered, where)
    raise DataError(f"{where} has neither a 'text' string nor a 'messages' list")


def _require_text(text: str, where: str) -> str:
    """Return the text, or raise DataError if it holds half a surrogate pair.

    JSON can escape half a pair, but no encoding and no tokenizer accepts it.
    """
    half = re.search("[\ud800-\udfff]", text)
    if half is not None:
        raise DataError(
            f"{where} holds \\u{ord(half[0]):x}, half of a surrogate pair, which is no text; fix"
            " it or remove the record"
        )
    return text
