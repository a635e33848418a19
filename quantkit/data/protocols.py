"""Evaluation windows: how a text is cut, and which tokens are scored, by a protocol.

`gptq`, `llamacpp` and `lmeval` are the procedures of GPTQ's perplexity script, of llama.cpp's
`perplexity` and of lm-evaluation-harness (rolling log-likelihood).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantkit.data.sources import Source, read_source
from quantkit.data.tokenizer import encode, leading_special_tokens, prepend
from quantkit.data.windows import Window, Windows
from quantkit.errors import DataError

PROTOCOLS = ("gptq", "llamacpp", "lmeval")


def evaluation_windows(
    names: Sequence[str], tokenizer: Any, protocol: str, seq_len: int, max_tokens: int | None = None
) -> Windows:
    """Cut the sources into windows by a protocol.

    `gptq`: all documents are one stream with the tokenizer's special tokens once at its start.
    Windows don't overlap, the tail is dropped, and every next token is scored.
    `llamacpp`: the same windows, but BOS replaces the first token, and only the second half is
    scored.
    `lmeval`: each document starts with BOS and has windows of its own. Every token is scored once,
    and the last window is filled up with earlier context.

    names: `--data` arguments.
    seq_len: tokens per window.
    max_tokens: stop after the windows that hold this many tokens.

    Raises DataError where the text is too short, or can't be read.
    """
    sources = [read_source(name, tokenizer) for name in names]
    if protocol == "lmeval":
        return _document_windows(sources, tokenizer, seq_len, max_tokens)
    windows = [Window(chunk) for chunk in _chunks(sources, tokenizer, seq_len, max_tokens)]
    if protocol == "llamacpp":
        bos = _bos(tokenizer)
        windows = [Window((bos, *window.tokens[1:]), seq_len // 2 + 1) for window in windows]
    if not any(window.scored for window in windows):
        raise DataError(f"{', '.join(names)} holds no token to score; give a longer text")
    return Windows(tuple(windows), tuple(source.sha256 for source in sources))


def _chunks(
    sources: Sequence[Source], tokenizer: Any, seq_len: int, max_tokens: int | None
) -> list[tuple[int, ...]]:
    """The stream of all documents in pieces of `seq_len` tokens, without its tail."""
    text = "\n\n".join(document for source in sources for document in source.documents)
    stream = prepend(leading_special_tokens(tokenizer), encode(tokenizer, text))
    chunks = [
        tuple(stream[start : start + seq_len])
        for start in range(0, len(stream) - seq_len + 1, seq_len)
    ]
    if not chunks:
        raise DataError(
            f"the text gives {len(stream)} tokens, less than one window of {seq_len}; give more"
            " text or a smaller --seq-len"
        )
    return chunks if max_tokens is None else chunks[: max(1, max_tokens // seq_len)]


def _document_windows(
    sources: Sequence[Source], tokenizer: Any, seq_len: int, max_tokens: int | None
) -> Windows:
    """lmeval's windows of whole documents. `max_tokens` never cuts a document, because its words
    are counted.
    """
    windows: list[Window] = []
    scored: list[str] = []
    total = 0
    bos = _bos(tokenizer)
    for document in (document for source in sources for document in source.documents):
        tokens = prepend([bos], encode(tokenizer, document))[1:]
        if max_tokens is not None and total + len(tokens) > max_tokens:
            if not scored:
                raise DataError(
                    f"the first document has {len(tokens)} tokens, more than --max-tokens"
                    f" {max_tokens}, and lmeval scores whole documents; give .jsonl with shorter"
                    " ones"
                )
            break
        total += len(tokens)
        scored.append(document)
        windows += _rolling_windows(tokens, bos, seq_len)
    words = sum(len(document.split()) for document in scored)
    if not words:
        names = ", ".join(source.name for source in sources)
        raise DataError(f"{names} holds no word to score; give a longer text")
    hashes = tuple(source.sha256 for source in sources)
    return Windows(tuple(windows), hashes, words, sum(len(text.encode()) for text in scored))


def _rolling_windows(tokens: list[int], prefix: int, seq_len: int) -> list[Window]:
    """Windows that score every token once. The first is [BOS, t0 … t(n−2)] predicting t0 … t(n−1).
    Later ones see one token of context; the last is filled up to full length with earlier tokens.
    """
    stream, windows, done = [prefix, *tokens], [], 0
    while done < len(tokens):
        end = min(done + seq_len, len(tokens))
        start = max(0, end - seq_len)
        windows.append(Window(tuple(stream[start : end + 1]), done - start + 1))
        done = end
    return windows


def _bos(tokenizer: Any) -> int:
    """The token that starts a window: BOS, else EOS; DataError where there is neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise DataError(
        "the tokenizer has neither a BOS nor an EOS token, which this protocol puts first; use"
        " --protocol gptq"
    )
