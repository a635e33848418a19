"""`quantkit.evaluate`."""

from __future__ import annotations

import os
from collections.abc import Iterable

from quantkit.api.inputs import (
    Data,
    Model,
    data_sources,
    model_path,
    require_at_least,
    require_callables,
    require_choice,
    require_flags,
    require_list,
)
from quantkit.api.one_run import one_run
from quantkit.checkpoint.run_control import Progress, ShouldStop, never, silent
from quantkit.data.protocols import PROTOCOLS
from quantkit.errors import ArgumentError, DataError
from quantkit.evaluation.evaluate import evaluate as run_evaluation
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.result import Evaluation
from quantkit.schemes.serving import EXECUTIONS, HARDWARE


def evaluate(
    base: Model,
    quants: Model | Iterable[Model],
    data: Data,
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    protocol: str = "gptq",
    gates: Iterable[str] = (),
    exec: str = "auto",
    hardware: str | None = None,
    noise_floor: bool = False,
    cache: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Evaluation:
    """Compare quantized checkpoints with their base model on the same text.

    The exported files are evaluated, whoever wrote them, with the arithmetic of a runtime. Only one
    decoder block of each model is in memory at a time.

    base: the original model: directory, hub id, or .gguf file.
    quants: one quantized checkpoint or several; none gives the base model's perplexity.
    data: file name (.txt, .jsonl, .parquet), "dataset:NAME[:CONFIG[:SPLIT]]", a list of these, a
        list of texts or of conversations, or a datasets.Dataset. It should be text that
        calibration didn't use.
    seq_len: tokens per window; None for 2048 (masked language models: 64), or fewer if the model
        has fewer positions.
    max_tokens: tokens to evaluate at most, in whole windows; None for the whole text.
    protocol: how the text is cut and scored: "gptq", "llamacpp" or "lmeval".
    gates: conditions such as "ppl_delta_pct<=1.0", on ppl_delta_pct (per cent), kld_mean (nats),
        top1 (share of tokens) or size_ratio. `require_gates()` of the result raises if one failed.
    exec: "auto" runs compiled kernels where there are any, "kernel" requires them, "reference"
        uses none.
    hardware: compute what this hardware computes, such as "hopper", "ampere" or "cpu"; None for
        the schemes' own arithmetic.
    noise_floor: also measure the effect of one more rounding after each block.
    cache: reuse the base model's hidden states of an earlier run, and store them.
    device: "auto", "cpu", "cuda" or "cuda:N".
    trust_remote_code: run Python code from the checkpoints.
    progress: called with what is being done, steps done and steps in all.
    should_stop: asked between two blocks; True ends the run.

    Returns an Evaluation: `quants[0].ppl_delta_pct` has value, low and high of a 95 % interval,
    in per cent; `quants[0].kld` is in nats.

    Raises:
        EvaluationError: a model can't be evaluated, or computes NaN.
        CheckpointError: a model is damaged.
        NotComparableError: the models differ in more than quantization.
        DataError: the text can't be read or is too short.
        RuntimeLimitError: `hardware` can't run a scheme.
        Interrupted: `should_stop` ended the run.
    """
    require_callables(progress=progress, should_stop=should_stop)
    require_flags(noise_floor=noise_floor, cache=cache, trust_remote_code=trust_remote_code)
    require_choice("protocol", protocol, PROTOCOLS)
    require_choice("exec", exec, EXECUTIONS)
    require_choice("hardware", hardware, HARDWARE)
    require_at_least(1, max_tokens=max_tokens)
    require_at_least(2, seq_len=seq_len)
    sources = data_sources(data)
    if not sources:
        raise DataError("`data` holds no text; give a file or a list of texts")
    if not isinstance(quants, (str, os.PathLike, Iterable)):
        raise ArgumentError(f"`quants` is {quants!r}; give a checkpoint or a list of them")
    named = [quants] if isinstance(quants, (str, os.PathLike)) else list(quants)
    options = EvaluationOptions(
        model_path(base),
        tuple(model_path(quant) for quant in named),
        sources,
        seq_len=seq_len,
        max_tokens=max_tokens,
        protocol=protocol,
        exec=exec,
        hardware=hardware,
        device=device,
        gates=require_list("gates", gates),
        trust_remote_code=trust_remote_code,
        noise_floor=noise_floor,
        cache=cache,
    )
    with one_run():
        return run_evaluation(options, progress or silent, should_stop or never)
