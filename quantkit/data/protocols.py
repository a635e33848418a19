"""Evaluation windows: a protocol decides how a text is cut, and which tokens are scored.

The protocols follow other tools: `gptq` GPTQ's perplexity script, `llamacpp` llama.cpp's
`perplexity`, and `lmeval` the rolling log-likelihood of lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantkit.data.sources import DataSource, Source, read_source
from quantkit.data.tokenizer import encode, leading_special_tokens, prepend
from quantkit.data.windows import Window, Windows
from quantkit.errors import DataError

PROTOCOLS = ("gptq", "llamacpp", "lmeval")


def evaluation_windows(
    data: Sequence[DataSource],
    tokenizer: Any,
    protocol: str,
    seq_len: int,
    max_tokens: int | None = None,
) -> Windows:
    """Cut the sources into windows by a protocol.

    `gptq`: all documents form one stream, with the tokenizer's special tokens once at its start.
        Windows don't overlap, an incomplete last one is dropped, and every token but the first is
        scored.
    `llamacpp`: the same windows, but BOS replaces the first token, and only the second half is
        scored.
    `lmeval`: each document starts with BOS and has windows of its own. Every token is scored once.
        The last window begins earlier, so that it is full too.

    data: text sources.
    seq_len: tokens per window.
    max_tokens: number of tokens to use at most; None uses all.

    Raises DataError if the text is too short or can't be read.
    """
    sources = [read_source(source, tokenizer) for source in data]
    if protocol == "lmeval":
        return _document_windows(sources, tokenizer, seq_len, max_tokens)
    windows = [Window(chunk) for chunk in _chunks(sources, tokenizer, seq_len, max_tokens)]
    if protocol == "llamacpp":
        bos = _bos(tokenizer)
        windows = [Window((bos, *window.tokens[1:]), seq_len // 2 + 1) for window in windows]
    if not any(window.scored for window in windows):
        raise DataError(f"{', '.join(map(str, data))} holds no token to score; give a longer text")
    return Windows(tuple(windows), tuple(source.sha256 for source in sources))


def _chunks(
    sources: Sequence[Source], tokenizer: Any, seq_len: int, max_tokens: int | None
) -> list[tuple[int, ...]]:
    """The stream of all documents in chunks of `seq_len` tokens, without a shorter last one."""
    text = "\n\n".join(document for source in sources for document in source.documents)
    stream = prepend(leading_special_tokens(tokenizer), encode(tokenizer, text))
    chunks = [
        tuple(stream[start : start + seq_len])
        for start in range(0, len(stream) - seq_len + 1, seq_len)
    ]
    if not chunks:
        raise DataError(
            f"the text gives {len(stream)} tokens, less than one window of {seq_len}",
            hint="give more text or a smaller `seq_len`",
        )
    return chunks if max_tokens is None else chunks[: max(1, max_tokens // seq_len)]


def _document_windows(
    sources: Sequence[Source], tokenizer: Any, seq_len: int, max_tokens: int | None
) -> Windows:
    """lmeval's windows.

    Documents are used whole, because lmeval's metrics count their words; `max_tokens` never cuts
    one.
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
                    f"the first document has {len(tokens)} tokens, more than"
                    f" `max_tokens={max_tokens}`, and lmeval scores whole documents",
                    hint="give .jsonl with shorter ones",
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
    """Windows that score every token once.

    The first window is [BOS, t0 … t(n−2)] and predicts t0 … t(n−1). Later windows see one token of
    context before their own. The last one gets as many earlier tokens as it needs to be full.
    """
    stream, windows, done = [prefix, *tokens], [], 0
    while done < len(tokens):
        end = min(done + seq_len, len(tokens))
        start = max(0, end - seq_len)
        windows.append(Window(tuple(stream[start : end + 1]), done - start + 1))
        done = end
    return windows


def _bos(tokenizer: Any) -> int:
    """The first token of a window: BOS, else EOS. Raises DataError if the tokenizer has neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise DataError(
        "the tokenizer has neither a BOS nor an EOS token, which this protocol puts first",
        hint="use `protocol='gptq'`",
    )
