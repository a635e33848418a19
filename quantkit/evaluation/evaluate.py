"""`eval`: run the base model and the quantized models over the same windows and compare them.

1. Each model runs block by block over all windows. Only its final hidden states are stored: tokens
   × hidden size, never tokens × vocabulary. Those of the base model may come from the cache.
2. The logits of both models are computed from these states in float32, a part of the vocabulary at
   a time. They are reduced to scores per token and dropped.
3. The metrics are computed from the scores.

With torchrun, the windows are split over the processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.checkpoint.cache import directory_state
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.run_control import Progress, ShouldStop, never, silent
from quantkit.data.tokenizer import load_tokenizer
from quantkit.data.windows import Window, Windows
from quantkit.errors import EvaluationError
from quantkit.evaluation.checkpoint_facts import calibrated_on, elements, skipped_linears
from quantkit.evaluation.gates import Gate, gate_results
from quantkit.evaluation.hidden_state_cache import HiddenStateCache
from quantkit.evaluation.metrics import (
    MetricValues,
    NoiseFloor,
    WindowSums,
    bits_per_byte,
    perplexity,
)
from quantkit.evaluation.preflight import EvaluationOptions, prepare_evaluation
from quantkit.evaluation.result import (
    SCHEMA_VERSION,
    BaseResult,
    Evaluation,
    EvaluationProtocol,
    GateResult,
    LayerError,
    QuantResult,
    TextSources,
)
from quantkit.evaluation.scored_text import ScoredText
from quantkit.evaluation.token_scores import PairedScores, TokenScores
from quantkit.evaluation.token_statistics import per_window
from quantkit.models.distributed import Ranks, joined_ranks
from quantkit.models.hidden_states import peak_memory_bytes
from quantkit.models.machine import device_name, software_versions
from quantkit.models.task import CAUSAL, MASKED, task_of
from quantkit.ops.native import cpu_level
from quantkit.schemes.serving import HARDWARE

if TYPE_CHECKING:
    from quantkit.evaluation.final_hidden_states import FinalHiddenStates, Watch
    from quantkit.evaluation.masked_lm import Masking
    from quantkit.evaluation.quantized_model import QuantizedModel
    from quantkit.evaluation.scoring import ModelOutput, Scored, Scoring

# Increment this when a change of the code changes the final hidden states; it empties the cache.
STATES_VERSION = 2


def evaluate(
    options: EvaluationOptions, progress: Progress = silent, should_stop: ShouldStop = never
) -> Evaluation:
    """Compare the quantized models with the base model. With torchrun, every rank returns the
    result.

    progress: told of the blocks that are done of each model, and then of the scored positions.
    should_stop: asked before each block.

    Raises:
        EvaluationError: the options are unusable, or a model can't be evaluated.
        CheckpointError: a model is damaged.
        NotComparableError: the models differ in more than quantization.
        DataError: the text can't be read or is too short.
        Interrupted: it was stopped; nothing is kept.
    """
    gates = [Gate.parse(expr) for expr in options.gates]
    if gates and not options.quants:
        raise EvaluationError(
            "`gates` needs a quantized model to compare with the base",
            hint="give at least one of `quants`",
        )
    if options.hardware is not None and options.hardware not in HARDWARE:
        raise EvaluationError(
            f"unknown hardware '{options.hardware}'; choose one of {', '.join(HARDWARE)}"
        )

    import torch

    from quantkit.models.skeleton import pick_device

    with joined_ranks(pick_device(options.device)) as ranks:
        windows, seq_len, remarks = ranks.broadcast_from_first(
            lambda: prepare_evaluation(options, ranks.count)
        )
        run = _Run.of(options, ranks, windows, seq_len, progress, should_stop)
        with torch.inference_mode():
            return _evaluate(run, gates, remarks)


@dataclass(frozen=True)
class _Run:
    """One run of `eval` on one rank.

    options: the user's options.
    ranks: the processes that share the windows.
    text: the windows of all ranks.
    seq_len: tokens per window.
    base: checkpoint of the base model.
    task: what the base model predicts: CAUSAL, MASKED or SEQ2SEQ.
    masking: how tokens are masked; None unless the task is MASKED.
    scoring: scores this rank's windows.
    should_stop: asked before each block.
    """

    options: EvaluationOptions
    ranks: Ranks
    text: ScoredText
    seq_len: int
    base: Checkpoint
    task: str
    masking: Masking | None
    scoring: Scoring
    should_stop: ShouldStop

    @classmethod
    def of(
        cls,
        options: EvaluationOptions,
        ranks: Ranks,
        windows: Windows,
        seq_len: int,
        progress: Progress,
        should_stop: ShouldStop,
    ) -> _Run:
        from quantkit.evaluation.masked_lm import Masking
        from quantkit.evaluation.scoring import Scoring

        base = Checkpoint.open(options.base)
        tokenizer = load_tokenizer(options.base, options.trust_remote_code)
        task = task_of(base.config, options.base)
        own = {
            number: window
            for number, window in enumerate(windows.windows)
            if number % ranks.count == ranks.rank
        }
        return cls(
            options,
            ranks,
            ScoredText.of(windows, tokenizer, options.protocol),
            seq_len,
            base,
            task,
            Masking.of(tokenizer) if task == MASKED else None,
            Scoring(ranks, own, progress),
            should_stop,
        )

    @property
    def windows(self) -> Mapping[int, Window]:
        """This rank's windows, by number."""
        return self.scoring.windows

    @property
    def tokens(self) -> int:
        """The number of tokens that go through each model, on all ranks."""
        return sum(len(window.tokens) for window in self.text.windows.windows)


def _evaluate(run: _Run, gates: Sequence[Gate], remarks: Sequence[str]) -> Evaluation:
    base = _base_output(run)
    try:
        quants, scored = _evaluate_candidates(run, base)
        noise = _noise_floor(run, base) if run.options.noise_floor else None
    finally:
        base.states.close()
    scored_tokens = run.text.windows.tokens_scored
    return _evaluation(
        run,
        _base_result(run, scored, base.states),
        quants,
        noise,
        [result for quant in quants for result in gate_results(gates, quant, scored_tokens)],
        [
            *remarks,
            *base.states.remarks,
            *(remark for quant in quants for remark in _remarks(quant)),
        ],
    )


def _evaluation(
    run: _Run,
    base: BaseResult,
    quants: Sequence[QuantResult],
    noise: NoiseFloor | None,
    gates: Sequence[GateResult],
    remarks: Sequence[str],
) -> Evaluation:
    options, windows = run.options, run.text.windows
    return Evaluation(
        schema_version=SCHEMA_VERSION,
        quantkit_version=__version__,
        protocol=_protocol(run),
        data=TextSources(
            sources=tuple(str(name) for name in options.data),
            sha256=windows.data_sha256,
            tokens_sha256=windows.tokens_sha256,
        ),
        tokens_scored=windows.tokens_scored,
        windows=len(windows.windows),
        tokens_per_unit=run.text.tokens_per_unit,
        device=run.ranks.device,
        processes=run.ranks.count,
        hardware=options.hardware,
        kernel_level=_kernel_level(run.ranks.device),
        base=base,
        quants=tuple(quants),
        noise_floor=noise,
        window_tokens=tuple(run.text.counts.tolist()),
        gates=tuple(gates),
        peak_memory_bytes=run.scoring.largest(peak_memory_bytes()),
        remarks=tuple(remarks),
    )


def _remarks(quant: QuantResult) -> list[str]:
    skipped = quant.unjudged_linears
    if not skipped:
        return []
    return [
        f"{quant.path}: {len(skipped)} Linears are not evaluated, because transformers doesn't"
        f" build them ({skipped[0]} is the first)"
    ]


def _protocol(run: _Run) -> EvaluationProtocol:
    content: dict[str, Any] = {
        "name": run.options.protocol if run.task == CAUSAL else run.task,
        "seq_len": run.seq_len,
        "bos": _bos_described(run),
    }
    if run.options.protocol == "lmeval":
        content["unit"] = "word"
    described = json.dumps(content, sort_keys=True)
    return EvaluationProtocol(**content, hash=hashlib.sha256(described.encode()).hexdigest()[:16])


def _bos_described(run: _Run) -> str:
    if run.task != CAUSAL:
        return "around each window" if run.task == MASKED else "none"
    if run.options.protocol == "gptq":
        return "tokenizer's own, at the start"
    return "first token of each window"


# ---- Running a model.


def _load(run: _Run, path: Path) -> QuantizedModel:
    from quantkit.evaluation.quantized_model import load_quantized_model

    options = run.options
    return load_quantized_model(
        path, run.ranks.device, options.hardware, options.trust_remote_code, options.exec
    )


def _run_blocks(
    run: _Run, model: QuantizedModel, watch: Watch | None = None, name: str = ""
) -> FinalHiddenStates:
    """Compute the final hidden states of this rank's windows.

    name: the model's name in progress messages; by default, its directory's.
    """
    from quantkit.evaluation.final_hidden_states import make_final_hidden_states

    name = name or model.checkpoint.path.name
    return make_final_hidden_states(
        model,
        run.windows,
        run.seq_len,
        lambda done, total: run.scoring.progress(name, done, total),
        watch,
        run.masking,
        run.should_stop,
    )


# ---- The base model.


def _base_output(run: _Run) -> ModelOutput:
    from quantkit.evaluation.final_hidden_states import cached_or_made
    from quantkit.evaluation.logits import OutputHead
    from quantkit.evaluation.scoring import ModelOutput

    model = _load(run, run.options.base)
    # Only causal models use the cache: a masked model has hidden states for each masked position,
    # tokens² of them.
    states = cached_or_made(
        HiddenStateCache() if run.options.cache and run.task == CAUSAL else None,
        _made_from(run, model),
        run.windows,
        lambda: _run_blocks(run, model),
    )
    if states.is_from_cache:
        model.blocks.load_outer(with_head=True)
    head = OutputHead.of(model.blocks.model, run.options.exec != "reference")
    return ModelOutput(head, states)


def _made_from(run: _Run, model: QuantizedModel) -> dict[str, Any]:
    """Everything that the base model's hidden states depend on: the key of the cache."""
    options, device = run.options, run.ranks.device
    return {
        "version": STATES_VERSION,
        "path": str(options.base.resolve()),
        "files": directory_state(options.base),
        "fingerprint": run.base.fingerprint(),
        "tokens": Windows(tuple(run.windows.values()), ()).tokens_sha256,
        "numbers": list(run.windows),
        "seq_len": run.seq_len,
        "arithmetic": (
            [options.exec, options.hardware, _kernel_level(device)]
            if model.quantized_linears
            else []
        ),
        "device": device_name(device),
        "versions": list(software_versions().values()),
    }


def _base_result(run: _Run, scored: Scored[TokenScores], states: FinalHiddenStates) -> BaseResult:
    nll, text = scored.tokens.nll, run.text
    by_word = run.options.protocol == "lmeval"
    return BaseResult(
        path=str(run.options.base),
        fingerprint=run.base.fingerprint(),
        perplexity=perplexity(nll, text.units),
        top1_accuracy=float(scored.tokens.hit.mean()),
        bytes=run.base.nbytes,
        bits_per_weight=run.base.nbytes * 8 / elements(run.base),
        bits_per_byte=bits_per_byte(nll, text.utf8_bytes),
        tokens_per_second=run.tokens / (run.scoring.largest(states.seconds) + scored.seconds),
        from_cache=states.is_from_cache,
        window_nll=tuple(per_window(nll, text.counts).tolist()),
        token_perplexity=perplexity(nll, text.windows.tokens_scored) if by_word else None,
    )


def _noise_floor(run: _Run, base: ModelOutput) -> NoiseFloor:
    from quantkit.evaluation.final_hidden_states import rounding_noise
    from quantkit.evaluation.scoring import ModelOutput

    # The model isn't kept: its embeddings and head would stay in memory while scores are computed.
    noisy = _run_blocks(run, _load(run, run.options.base), rounding_noise(), "noise floor")
    try:
        scored = run.scoring.pair(base, ModelOutput(base.head, noisy))
    finally:
        noisy.close()
    return NoiseFloor.of(scored.tokens, run.text)


# ---- The quantized models.


def _evaluate_candidates(
    run: _Run, base: ModelOutput
) -> tuple[list[QuantResult], Scored[TokenScores]]:
    """The result of each quantized model, and the scores of the base model with their time."""
    from quantkit.evaluation.scoring import Scored

    quants, of_base = [], None
    for path in run.options.quants:
        quant, scored = _evaluate_candidate(run, base, path)
        quants.append(quant)
        if of_base is None:
            # A pair is scored at once; half of the time counts as the base model's.
            of_base = Scored[TokenScores](scored.tokens, scored.seconds / 2)
    return quants, of_base or run.scoring.base(base)


def _evaluate_candidate(
    run: _Run, base: ModelOutput, path: Path
) -> tuple[QuantResult, Scored[PairedScores]]:
    from quantkit.evaluation.layer_error import LayerProbe
    from quantkit.evaluation.logits import OutputHead
    from quantkit.evaluation.scoring import ModelOutput

    model = _load(run, path)
    probe = LayerProbe(model, run.base, list(run.windows)) if run.ranks.is_first else None
    states = _run_blocks(run, model, probe.watch if probe else None)
    try:
        head = OutputHead.of(model.blocks.model, run.options.exec != "reference", like=base.head)
        scored = run.scoring.pair(base, ModelOutput(head, states))
    finally:
        states.close()
    # A pair is scored at once; half of the time counts as the base model's.
    seconds = run.scoring.largest(states.seconds) + scored.seconds / 2
    layers = probe.finish() if probe else []
    return _quant_result(run, model, scored.tokens, layers, seconds), scored


def _quant_result(
    run: _Run,
    model: QuantizedModel,
    scores: PairedScores,
    layers: Sequence[LayerError],
    seconds: float,
) -> QuantResult:
    checkpoint = model.checkpoint
    known_windows, known_sources = calibrated_on(
        checkpoint, [str(source) for source in run.options.data], run.text.windows
    )
    return QuantResult(
        path=str(checkpoint.path),
        scheme=model.scheme,
        metrics=MetricValues.of(scores, run.text),
        bytes=checkpoint.nbytes,
        bits_per_weight=checkpoint.nbytes * 8 / elements(run.base),
        size_ratio=checkpoint.nbytes / run.base.nbytes,
        tokens_per_second=run.tokens / seconds,
        peak_memory_bytes=run.scoring.largest(peak_memory_bytes()),
        exec=_arithmetic(model.kernels),
        kernels=model.kernels,
        activations_quantized=model.activations_quantized,
        kv_cache_quantized=model.kv_scales is not None,
        windows_calibrated_on=known_windows,
        sources_calibrated_on=known_sources,
        linears_quantized=model.quantized_linears,
        linears_left=skipped_linears(checkpoint),
        weights_only_linears=tuple(model.weights_only),
        unjudged_linears=tuple(model.not_in_model),
        layers=tuple(layers),
        window_sums=WindowSums.of(scores, run.text),
    )


def _arithmetic(kernels: Mapping[str, int]) -> str:
    """Which arithmetic the Linears ran with: "kernel", "reference" or "mixed".

    kernels: kernel, or "reference" → number of Linears.
    """
    if not kernels or "reference" not in kernels:
        return "kernel" if kernels else "reference"
    return "mixed" if len(kernels) > 1 else "reference"


def _kernel_level(device: str) -> str:
    """The kernels' variant on a device: the CPU's instruction set, the GPU's architecture, or
    "reference" where there are no kernels.
    """
    if str(device) == "cpu":
        return cpu_level()
    from quantkit.ops import cuda

    return "reference" if cuda.missing_reason(device) else cuda.level(device)
