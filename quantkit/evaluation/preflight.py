"""The options of `eval`, and the checks before a model runs: sound files, the same tokenizer, the
same model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.formats import read_quantization_config
from quantkit.checkpoint.reader import Checkpoint
from quantkit.data.protocols import evaluation_windows
from quantkit.data.sources import DataSource
from quantkit.data.tokenizer import load_tokenizer
from quantkit.data.windows import Windows, targets_of
from quantkit.errors import CheckpointError, EvaluationError, NotComparableError, QuantkitError
from quantkit.exporter.runtimes import as_computed
from quantkit.models.task import CAUSAL, MASKED, SEQ2SEQ, task_of
from quantkit.models.text import tokenizer_and_length

SAMPLE_WINDOWS = 4  # the windows on whose text tokenizers are compared


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `eval`.

    base: directory of the base model.
    quants: directories of the quantized models.
    data: text files, or names of sources.
    seq_len: tokens per window; None for the model's default.
    max_tokens: limit on tokens; None for the whole text.
    protocol: "gptq", "llamacpp" or "lmeval".
    exec: "auto" runs kernels where there are any, "kernel" requires them, "reference" uses none.
    hardware: compute as this hardware would, one of `serving.HARDWARE`; None for the scheme's own
        arithmetic.
    device: "cpu", "cuda" or "auto".
    gates: gates' expressions, as `Gate.parse` reads them.
    trust_remote_code: allow models with code of their own.
    noise_floor: also measure the effect of rounding noise on the base model.
    cache: read the base model's hidden states from the cache, and store them there.
    """

    base: Path
    quants: tuple[Path, ...]
    data: tuple[DataSource, ...]
    seq_len: int | None = None
    max_tokens: int | None = None
    protocol: str = "gptq"
    exec: str = "auto"
    hardware: str | None = None
    device: str = "auto"
    gates: tuple[str, ...] = ()
    trust_remote_code: bool = False
    noise_floor: bool = False
    cache: bool = True


def prepare_evaluation(
    options: EvaluationOptions, processes: int
) -> tuple[Windows, int, list[str]]:
    """Check everything that can be checked before a model runs, and cut the text into windows.

    processes: number of processes that share the windows.

    Returns the windows, tokens per window, and remarks for the report. Raises EvaluationError,
    CheckpointError, NotComparableError or DataError, as `evaluate` does.
    """
    base = _check_candidate(options.base, Checkpoint.open(options.base), options.hardware)
    candidates = [_check_candidate(path, base, options.hardware) for path in options.quants]
    task = task_of(base.config, options.base)
    if task != CAUSAL and options.protocol != "gptq":
        raise EvaluationError(
            f"`protocol={options.protocol!r}` is for models that predict the next token of a text,"
            f" which {options.base} doesn't",
            hint="leave it out",
        )
    tokenizer, windows, seq_len = _cut_windows(options, task)
    if len(windows.windows) < processes:
        raise EvaluationError(
            f"{len(windows.windows)} windows can't be shared by {processes} processes; start fewer,"
            " or give more text"
        )
    sample = tokenizer.decode(
        [token for window in windows.windows[:SAMPLE_WINDOWS] for token in window.tokens]
    )
    for checkpoint in candidates:
        _require_same_tokenizer(tokenizer, checkpoint.path, options, sample)
    return (
        windows,
        seq_len,
        [remark for checkpoint in candidates for remark in _require_sound(checkpoint)],
    )


def _cut_windows(options: EvaluationOptions, task: str) -> tuple[Any, Windows, int]:
    """The tokenizer, the windows as the task needs them, and tokens per window."""
    limits: dict[str, int] = {}
    if task == MASKED:
        from quantkit.evaluation.masked_lm import DEFAULT_LENGTH, RESERVED_POSITIONS, Masking

        limits = {"default": DEFAULT_LENGTH, "reserved": RESERVED_POSITIONS}
    tokenizer, seq_len = tokenizer_and_length(
        options.base, options.seq_len, options.trust_remote_code, **limits
    )
    if seq_len < 2:
        raise EvaluationError(
            "`seq_len` must be at least 2: a window's first token is not predicted"
        )
    windows = evaluation_windows(
        options.data, tokenizer, options.protocol, seq_len, options.max_tokens
    )
    if task == MASKED:
        Masking.of(tokenizer)
        windows = Masking.windows(windows)
    elif task == SEQ2SEQ:
        windows = targets_of(windows)
    return tokenizer, windows, seq_len


def _require_sound(checkpoint: Checkpoint) -> list[str]:
    """Raise CheckpointError if `verify` finds faults; returns remarks otherwise."""
    from quantkit.exporter.verify import verify

    if read_quantization_config(checkpoint.config) is None:
        return []
    found, path = verify(checkpoint.path, as_stored=True), checkpoint.path
    if found.faults:
        raise CheckpointError(
            f"{path} has faults: {found.first_fault}",
            hint=f"`quantkit.verify({str(path)!r})` lists them",
        )
    if found.unequal:
        tensor, message = found.unequal[0]
        return [
            f"Warning: {path} is evaluated as it is stored, but {tensor} {message}: they round the"
            " weights again, so the served model differs"
        ]
    return []


def _check_candidate(path: Path, base: Checkpoint, hardware: str | None) -> Checkpoint:
    """Open a model that is to be evaluated.

    Raises CheckpointError if it has codes without a config, RuntimeLimitError if the hardware can't
    run its schemes, NotComparableError if it isn't the base model, quantized.
    """
    checkpoint = Checkpoint.open(path)
    config = read_quantization_config(checkpoint.config)
    codes = [
        name
        for name, info in checkpoint.tensors.items()
        if info.dtype in ("I8", "F8_E4M3", "F8_E5M2")
    ]
    if config is None and codes:
        raise CheckpointError(
            f"{codes[0]} of {path} holds codes, but config.json has no quantization_config",
            hint=f"`quantkit.verify({str(path)!r})` lists all faults",
        )
    if hardware is not None:
        for scheme in config.schemes if config else ():
            as_computed(scheme, hardware)
    for key in ("vocab_size", "hidden_size"):
        ours, theirs = base.config.get(key), checkpoint.config.get(key)
        if ours != theirs:
            raise NotComparableError(
                f"{path} has {key} {theirs} and the base {ours}: it is not a quantized version of"
                " that model; give its own base"
            )
    return checkpoint


def _require_same_tokenizer(
    tokenizer: Any, path: Path, options: EvaluationOptions, sample: str
) -> None:
    """Raise NotComparableError if a model's tokenizer differs from the base model's, in vocabulary
    or in the tokens of the sample: merges may differ where vocabularies don't.
    """
    try:
        other = load_tokenizer(path, options.trust_remote_code)
    except QuantkitError:
        return  # a checkpoint without a tokenizer is evaluated with the base model's
    tokens, others = (
        each(sample, add_special_tokens=False, verbose=False).input_ids
        for each in (tokenizer, other)
    )
    if other.get_vocab() != tokenizer.get_vocab() or tokens != others:
        raise NotComparableError(
            f"the tokenizer of {path} differs from the base's, so their perplexities can't be"
            " compared; copy the base's tokenizer into it"
        )
