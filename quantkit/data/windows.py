"""Text to token windows.

A source is a text file, JSON lines with `text` or `messages`, a parquet file, or
`dataset:NAME[:CONFIG[:SPLIT]]`. Evaluation cuts windows by a protocol (EVALUATION terms: `gptq`,
`llamacpp`, `lmeval`); calibration draws windows with a seed, evenly from all sources.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import DataError

PROTOCOLS = ("gptq", "llamacpp", "lmeval")
BUNDLED_CALIBRATION = Path(__file__).parent / "texts" / "calibration.jsonl"
# Fewer tokens at a source's end are no window of their own: most would be first positions and their
# neighbours.
MIN_REST = 32
# Windows are told apart by pieces of this many tokens, wherever in another window they stand.
PIECE = 32
BUNDLED_EVALUATION = Path(__file__).parent / "texts" / "evaluation.txt"


@dataclass(frozen=True)
class Source:
    """One text source: its documents, and the hash of what they were read from."""

    name: str
    documents: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Window:
    """Tokens that go through the model together; those from `first_scored` on are predicted and
    scored.
    """

    tokens: tuple[int, ...]
    first_scored: int = 1

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.first_scored


@dataclass(frozen=True)
class Windows:
    """Windows and what they were made of. `words` and `utf8_bytes` count the original text, for
    lmeval's figures.
    """

    windows: tuple[Window, ...]
    source_sha256: tuple[str, ...]
    words: int = 0
    utf8_bytes: int = 0

    @property
    def data_sha256(self) -> str:
        """The hash of the one source, or of all sources' hashes."""
        if len(self.source_sha256) == 1:
            return self.source_sha256[0]
        return hashlib.sha256("".join(self.source_sha256).encode()).hexdigest()

    @property
    def tokens_scored(self) -> int:
        return sum(window.scored for window in self.windows)

    @property
    def tokens_sha256(self) -> str:
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(f"{window.first_scored}:{','.join(map(str, window.tokens))};".encode())
        return digest.hexdigest()


def load_tokenizer(path: Any, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies beside a model."""
    present = [
        name
        for name in (
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "vocab.json",
            "vocab.txt",
            "spiece.model",
        )
        if (Path(path) / name).is_file()
    ]
    advice = "copy the tokenizer's files from where the model comes from"
    if not present:
        raise DataError(
            f"{path} has no tokenizer (tokenizer.json), which is needed to read text; {advice}"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers and its backends raise plain Exceptions here
        raise DataError(
            f"the tokenizer in {path} can't be loaded ({_brief(error)}); {advice}"
        ) from None


def _brief(error: Exception, limit: int = 200) -> str:
    """What a library says, on one line and no longer than this: whole sentences where one fits,
    else whole words.
    """
    text = " ".join(str(error).split())
    if len(text) <= limit:
        return text
    sentences = re.match(rf".{{1,{limit - 1}}}[.!?](?= )", text)
    return sentences[0] if sentences else text[:limit].rpartition(" ")[0] + " …"


def read_source(name: str, tokenizer: Any) -> Source:
    """Read one `--data` argument."""
    if name.startswith("dataset:"):
        return _hub_dataset(name, tokenizer)
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f"there is no data file {name}; give a .txt, .jsonl or .parquet file, or"
            " dataset:NAME[:CONFIG[:SPLIT]]"
        )
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
    # As Python reads text files everywhere: a line ends in "\n", however the file spells it.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return Source(name, tuple(_json_documents(name, text, tokenizer)), digest)
    return Source(name, (text,), digest)


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


def _record_text(record: Any, where: str, tokenizer: Any) -> str:
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return _require_text(record["text"], where)
    if isinstance(record, dict) and isinstance(record.get("messages"), (list, tuple)):
        try:
            rendered = tokenizer.apply_chat_template(list(record["messages"]), tokenize=False)
        except Exception as error:  # Jinja templates raise what they like
            raise DataError(
                f"the chat template can't render {where} ({_brief(error)}); use records with 'text'"
            ) from None
        return _require_text(rendered, where)
    raise DataError(f"{where} has neither a 'text' string nor a 'messages' list")


def _require_text(text: str, where: str) -> str:
    """JSON can hold half of a surrogate pair as an escape; no encoding can, and no tokenizer takes
    it.
    """
    half = re.search("[\ud800-\udfff]", text)
    if half is not None:
        raise DataError(
            f"{where} holds \\u{ord(half[0]):x}, half of a surrogate pair, which is no text; mend"
            " it or leave the record out"
        )
    return text


def _parquet_documents(path: Path, tokenizer: Any) -> Iterable[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"reading {path} needs pyarrow; install it with: pip install 'quantkit[hub]'"
        ) from None
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
            f"reading {name} needs the datasets package; install it with: pip install"
            " 'quantkit[hub]'"
        ) from None
    config, split = (
        (parts[1] or None) if len(parts) > 1 else None,
        parts[2] if len(parts) > 2 else "train",
    )
    try:
        records = datasets.load_dataset(parts[0], config, split=split)
    except Exception as error:  # its many backends raise many kinds
        raise DataError(
            f"{name} can't be loaded ({_brief(error)}); give a local file instead"
        ) from None
    documents = tuple(
        _record_text(record, f"record {number} of {name}", tokenizer)
        for number, record in enumerate(records, 1)
    )
    return Source(name, documents, hashlib.sha256("\0".join(documents).encode()).hexdigest())


def _leading_special_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text (BOS), without what it puts after one."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    wrapped = tokenizer("a").input_ids
    for start in range(len(wrapped) - len(plain) + 1):
        if wrapped[start : start + len(plain)] == plain:
            return wrapped[:start]
    return []


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _behind(prefix: list[int], tokens: list[int]) -> list[int]:
    """The tokens behind the prefix, once: many chat templates write BOS themselves."""
    return tokens if tokens[: len(prefix)] == prefix else prefix + tokens


def evaluation_windows(
    names: Sequence[str], tokenizer: Any, protocol: str, seq_len: int, max_tokens: int | None = None
) -> Windows:
    """Cut the sources into windows by a protocol.

    `gptq`: one stream, the tokenizer's special tokens once at its start, windows that don't
    overlap, the tail dropped, every next token scored.
    `llamacpp`: the same chunks with the first token replaced by BOS and only the second half
    scored.
    `lmeval`: each document by itself behind a BOS, every token scored once, the last window filled
    up with earlier context.
    max_tokens: stop after the windows that hold this many tokens.
    """
    sources = [read_source(name, tokenizer) for name in names]
    documents = [document for source in sources for document in source.documents]
    hashes = tuple(source.sha256 for source in sources)
    if protocol == "lmeval":
        return _document_windows(names, documents, hashes, tokenizer, seq_len, max_tokens)
    stream = _behind(_leading_special_tokens(tokenizer), _encode(tokenizer, "\n\n".join(documents)))
    chunks = [
        stream[start : start + seq_len] for start in range(0, len(stream) - seq_len + 1, seq_len)
    ]
    if not chunks:
        raise DataError(
            f"the text gives {len(stream)} tokens, less than one window of {seq_len}; give more"
            " text or a smaller --seq-len"
        )
    if max_tokens is not None:
        chunks = chunks[: max(1, max_tokens // seq_len)]
    if protocol == "llamacpp":
        bos = _bos(tokenizer)
        windows = [Window((bos, *chunk[1:]), seq_len // 2 + 1) for chunk in chunks]
    else:
        windows = [Window(tuple(chunk)) for chunk in chunks]
    if not any(window.scored for window in windows):
        raise DataError(f"{', '.join(names)} holds no token to score; give a longer text")
    return Windows(tuple(windows), hashes)


def targets_of(windows: Windows) -> Windows:
    """The same windows for a model of encoder and decoder: the first half is read, every token of
    the second is predicted; an odd last one goes.
    """
    halved = [
        Window(window.tokens[: len(window.tokens) // 2 * 2], len(window.tokens) // 2)
        for window in windows.windows
    ]
    return Windows(tuple(halved), windows.source_sha256)


def _document_windows(
    names: Sequence[str],
    documents: Sequence[str],
    hashes: tuple[str, ...],
    tokenizer: Any,
    seq_len: int,
    max_tokens: int | None,
) -> Windows:
    """lmeval's windows of whole documents; `max_tokens` never cuts one, since its words are
    counted.
    """
    windows: list[Window] = []
    kept: list[str] = []
    total = 0
    bos = _bos(tokenizer)
    for document in documents:
        tokens = _behind([bos], _encode(tokenizer, document))[1:]
        if max_tokens is not None and total + len(tokens) > max_tokens:
            if not kept:
                raise DataError(
                    f"the first document has {len(tokens)} tokens, more than --max-tokens"
                    f" {max_tokens}, and lmeval scores whole documents; give .jsonl with shorter"
                    " ones"
                )
            break
        total += len(tokens)
        kept.append(document)
        windows += _rolling_windows(tokens, bos, seq_len)
    words = sum(len(document.split()) for document in kept)
    if not words:
        raise DataError(f"{', '.join(names)} holds no word to score; give a longer text")
    return Windows(tuple(windows), hashes, words, sum(len(document.encode()) for document in kept))


def _bos(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise DataError(
        "the tokenizer has neither a BOS nor an EOS token, which this protocol puts first; use"
        " --protocol gptq"
    )


def _rolling_windows(tokens: list[int], prefix: int, seq_len: int) -> list[Window]:
    """Every token scored once: the first window is [BOS, t0 … t(n−2)] predicting t0 … t(n−1); later
    ones see one token of context, the last one is filled up to full length with earlier tokens.
    """
    stream, windows, done = [prefix, *tokens], [], 0
    while done < len(tokens):
        end = min(done + seq_len, len(tokens))
        start = max(0, end - seq_len)
        windows.append(Window(tuple(stream[start : end + 1]), done - start + 1))
        done = end
    return windows


def calibration_windows(
    names: Sequence[str], tokenizer: Any, num_samples: int, seq_len: int, seed: int
) -> Windows:
    """Draw `num_samples` windows of `seq_len` tokens, evenly from all sources, each source's
    windows without overlap.

    Where the text holds fewer, the rest of each source is a shorter window of its own; with these
    too, fewer may come back. None is an error.
    """
    if num_samples < len(names):
        raise DataError(
            f"--num-samples {num_samples} leaves some of the {len(names)} sources of --data without"
            f" a window; ask for {len(names)} or more"
        )
    prefix = _leading_special_tokens(tokenizer)
    sources = [read_source(name, tokenizer) for name in names]
    available, rests = [], []
    for source in sources:
        stream = [
            token
            for document in source.documents
            for token in _behind(prefix, _encode(tokenizer, document))
        ]
        windows = [
            Window(tuple(stream[start : start + seq_len]))
            for start in range(0, len(stream) - seq_len + 1, seq_len)
        ]
        if not windows:
            raise DataError(
                f"{source.name} gives {len(stream)} tokens, less than one window of {seq_len}; give"
                " more text or a smaller --seq-len"
            )
        random.Random(f"{seed}:{source.sha256}").shuffle(windows)
        available.append(windows)
        rest = stream[len(stream) - len(stream) % seq_len :]
        if len(rest) >= min(seq_len, MIN_REST):
            rests.append(Window(tuple(rest)))
    chosen: list[Window] = []
    while len(chosen) < num_samples and any(available):
        chosen += [windows.pop() for windows in available if windows][: num_samples - len(chosen)]
    chosen += rests[: num_samples - len(chosen)]
    return Windows(tuple(chosen), tuple(source.sha256 for source in sources))


def token_pieces(windows: Windows) -> str:
    """Hashes of the windows' successive pieces of PIECE tokens, base64 of little-endian 64-bit
    numbers: what `count_known_windows` looks for.
    """
    import numpy as np

    hashes = [_piece_hashes(np.array(window.tokens), PIECE) for window in windows.windows]
    kept = (
        np.unique(np.concatenate([window[::PIECE] for window in hashes]))
        if hashes
        else np.zeros(0, "<u8")
    )
    return base64.b64encode(kept.astype("<u8").tobytes()).decode()


def count_known_windows(windows: Windows, pieces: str) -> int:
    """How many of the windows hold a piece of the text that `pieces` were made of, at any place."""
    import numpy as np

    known = np.frombuffer(base64.b64decode(pieces), "<u8")
    return sum(
        bool(np.isin(_piece_hashes(np.array(window.tokens), PIECE), known).any())
        for window in windows.windows
    )


def _piece_hashes(tokens: Any, length: int) -> Any:
    """A polynomial hash modulo 2^64 of each run of `length` tokens, by the position where it
    begins; none where there are fewer.
    """
    import numpy as np

    if len(tokens) < length:
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        # Mixed first: token ids are small numbers, and sums of their multiples would meet too
        # often.
        mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        hashes = np.zeros(len(tokens) - length + 1, np.uint64)
        for offset in range(length):
            hashes = hashes * np.uint64(0xBF58476D1CE4E5B9) + mixed[offset : offset + len(hashes)]
        return hashes ^ (hashes >> np.uint64(32))


def window_length(requested: int | None, model_limit: int | None, default: int = 2048) -> int:
    """The window length: what was asked for, else the default, within the positions the model
    has.
    """
    if model_limit is not None and model_limit < 1:
        model_limit = None  # XLNet's -1
    if requested is None:
        return min(default, model_limit or default)
    if model_limit is not None and requested > model_limit:
        raise DataError(
            f"--seq-len {requested} is more than the {model_limit} positions of this model; use"
            f" {model_limit} or less"
        )
    return requested
