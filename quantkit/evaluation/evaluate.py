"""`eval`: base and quantized models over the same windows, from the exported files, and what the
difference is worth.

One model after the other goes block by block over all windows and leaves its final hidden states
(tokens × hidden size, never tokens × vocabulary); those of a base that was judged before come from
the cache. Logits of base and candidate are made from them side by side, in float32, compared and
dropped. With torchrun each process takes a share of the windows.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit import __version__
from quantkit.checkpoint.cache import directory_state
from quantkit.checkpoint.formats import stored_linears
from quantkit.checkpoint.output_dir import MANIFEST_FILE
from quantkit.checkpoint.reader import Checkpoint, read_json
from quantkit.data.windows import Window, Windows, count_known_windows, load_tokenizer
from quantkit.errors import CheckpointError, EvaluationError
from quantkit.evaluation import metrics
from quantkit.evaluation.gates import Gate, judged_gates
from quantkit.evaluation.intervals import Interval, paired_interval, perplexity_change_pct
from quantkit.evaluation.preflight import EvaluationOptions, prepare_evaluation
from quantkit.evaluation.state_cache import StateCache
from quantkit.exporter.runtimes import HARDWARE
from quantkit.models.distributed import Ranks, joined_ranks
from quantkit.models.hidden_states import peak_memory_bytes
from quantkit.models.machine import device_name, software_versions
from quantkit.models.task import CAUSAL, MASKED, task_of
from quantkit.models.tensor_roles import linears_of
from quantkit.ops.native import cpu_level

if TYPE_CHECKING:
    from quantkit.evaluation.final_states import FinalStates
    from quantkit.evaluation.logits import OutputHead, TokenFigures
    from quantkit.evaluation.masked_lm import Masking
    from quantkit.evaluation.quantized_model import ServedModel

SCHEMA_VERSION = 1
# What changes the hidden states that a version of this file makes of the same model and tokens.
STATES_VERSION = 2


# on_progress(model's name, blocks done, blocks in all)
Progress = Callable[[str, float, float], None]


def evaluate(
    options: EvaluationOptions, on_progress: Progress = lambda name, done, total: None
) -> dict[str, Any]:
    """Judge the candidates against the base; returns the result as DESIGN's JSON, which `report`
    prints. With torchrun every rank returns it.
    """
    gates = [Gate.parse(expr) for expr in options.gates]
    if gates and not options.quants:
        raise EvaluationError(
            "--gate compares a quantized model with the base; give at least one QUANT"
        )
    if options.hardware is not None and options.hardware not in HARDWARE:
        raise EvaluationError(
            f"unknown hardware '{options.hardware}'; choose one of {', '.join(HARDWARE)}"
        )

    from quantkit.models.skeleton import pick_device

    with joined_ranks(pick_device(options.device)) as ranks:
        windows, seq_len, remarks = ranks.broadcast_from_first(
            lambda: prepare_evaluation(options, ranks.count)
        )
        result = _Judgement(options, ranks, windows, seq_len, on_progress).result(gates)
        return result | {"remarks": [*remarks, *result["remarks"]]}


@dataclass(frozen=True)
class _Scored:
    """One candidate beside the base. seconds: of heads and losses of both."""

    tokens: TokenFigures
    seconds: float


class _Judgement:
    """One run of `eval` on one rank. counts: scored tokens of each window; tokens_per_unit: tokens
    per word where perplexity is per word.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        ranks: Ranks,
        windows: Windows,
        seq_len: int,
        on_progress: Progress,
    ) -> None:
        self.options, self.ranks, self.windows, self.seq_len, self.on_progress = (
            options,
            ranks,
            windows,
            seq_len,
            on_progress,
        )
        self.mine = {
            number: window
            for number, window in enumerate(windows.windows)
            if number % ranks.count == ranks.rank
        }
        self.base_checkpoint = Checkpoint.open(options.base)
        self.tokenizer = load_tokenizer(options.base, options.trust_remote_code)
        self.task = task_of(self.base_checkpoint.config, options.base)
        self.masking = self._masking()
        self.counts = np.array([window.scored for window in windows.windows])
        self.units = windows.words if options.protocol == "lmeval" else windows.tokens_scored
        self.tokens_per_unit = windows.tokens_scored / self.units
        self.remarks: list[str] = []
        self.utf8_bytes = _scored_bytes(windows, self.tokenizer, options.protocol)

    def _masking(self) -> Masking | None:
        if self.task != MASKED:
            return None
        from quantkit.evaluation.masked_lm import Masking

        return Masking.of(self.tokenizer)

    def result(self, gates: Sequence[Gate]) -> dict[str, Any]:
        import torch

        from quantkit.evaluation.logits import OutputHead

        with torch.inference_mode():
            served = self._load(self.options.base)
            finals = self._base_states(served)
            if finals.is_from_cache:
                served.blocks.load_outer(with_head=True)
            head = OutputHead(served.blocks.model, self.options.exec != "reference")
            del served
            try:
                quants, base_tokens, base_seconds, judged = self._judge_candidates(
                    gates, head, finals
                )
                noise = self._noise_floor(head, finals) if self.options.noise_floor else None
            finally:
                finals.close()
        described = self._described()
        described["base"] = self._base_result(base_tokens, finals, base_seconds)
        return described | {
            "quants": quants,
            "noise_floor": noise,
            "window_tokens": self.counts.tolist(),
            "gates": judged,
            "peak_memory_bytes": self._most(peak_memory_bytes()),
            "remarks": [*finals.remarks, *self.remarks],
        }

    def _load(self, path: Path) -> ServedModel:
        from quantkit.evaluation.quantized_model import load_served

        options = self.options
        return load_served(
            path, self.ranks.device, options.hardware, options.trust_remote_code, options.exec
        )

    def _base_states(self, served: ServedModel) -> FinalStates:
        from quantkit.evaluation.final_states import kept_or_made

        # Of a masked model there are as many hidden states as tokens squared; what is kept is read
        # as a decoder's.
        return kept_or_made(
            StateCache() if self.options.cache and self.task == CAUSAL else None,
            self._made_from(served),
            self.mine,
            lambda: self._states(served),
        )

    def _states(self, served: ServedModel, watch: Any = None, name: str = "") -> FinalStates:
        from quantkit.evaluation.final_states import make_final_states

        name = name or served.checkpoint.path.name
        return make_final_states(
            served,
            self.mine,
            self.seq_len,
            lambda done, total: self.on_progress(name, done, total),
            watch,
            self.masking,
        )

    def _made_from(self, served: ServedModel) -> dict[str, Any]:
        """All that decides the base's hidden states."""
        device = self.ranks.device
        return {
            "version": STATES_VERSION,
            "path": str(self.options.base.resolve()),
            "files": directory_state(self.options.base),
            "fingerprint": self.base_checkpoint.fingerprint(),
            "tokens": Windows(tuple(self.mine.values()), ()).tokens_sha256,
            "numbers": list(self.mine),
            "seq_len": self.seq_len,
            "arithmetic": (
                [self.options.exec, self.options.hardware, _kernel_level(device)]
                if served.quantized_linears
                else []
            ),
            "device": device_name(device),
            "versions": list(software_versions().values()),
        }

    # -- Candidates.

    def _judge_candidates(
        self, gates: Sequence[Gate], head: OutputHead, finals: FinalStates
    ) -> tuple[list[dict[str, Any]], TokenFigures, float, list[dict[str, Any]]]:
        """Each candidate's result, the base's figures and the seconds of its head, and the
        gates.
        """
        from quantkit.evaluation.layer_error import LayerProbe
        from quantkit.evaluation.logits import OutputHead

        quants, judged, base_tokens, base_seconds = [], [], None, 0.0
        for path in self.options.quants:
            served = self._load(path)
            probe = (
                LayerProbe(served, self.base_checkpoint, list(self.mine))
                if self.ranks.is_first
                else None
            )
            own = self._states(served, probe.watch if probe else None)
            try:
                scored = self._score(
                    head,
                    finals,
                    OutputHead(served.blocks.model, self.options.exec != "reference", like=head),
                    own,
                )
            finally:
                own.close()
            if base_tokens is None:
                base_tokens, base_seconds = scored.tokens, scored.seconds / 2
            # Half of the comparing is the base's.
            seconds = self._most(own.seconds) + scored.seconds / 2
            quant, intervals = self._quant_result(
                served, scored.tokens, probe.finish() if probe else [], seconds
            )
            quants.append(quant)
            if served.beyond:
                self.remarks.append(
                    f"{path}: {served.beyond[0]} and its like ({len(served.beyond)} Linears) are"
                    " not judged: transformers leaves them out"
                )
            judged += judged_gates(gates, intervals, str(path), self.windows.tokens_scored)
            del served, own
        if base_tokens is None:
            scored = self._score(head, finals)
            base_tokens, base_seconds = scored.tokens, scored.seconds
        return quants, base_tokens, base_seconds, judged

    def _score(
        self,
        head: OutputHead,
        finals: FinalStates,
        own_head: OutputHead | None = None,
        own: FinalStates | None = None,
    ) -> _Scored:
        """Figures of all tokens, from all ranks."""
        import torch

        from quantkit.evaluation.logits import POSITIONS_PER_CHUNK, TokenFigures, score
        from quantkit.models.threads import each_batch

        started = time.perf_counter()
        device = torch.device(self.ranks.device)
        pieces = [
            (number, start)
            for number, window in self.mine.items()
            for start in range(0, window.scored, POSITIONS_PER_CHUNK)
        ]

        def work(index: int) -> TokenFigures:
            number, start = pieces[index]
            part, window = slice(start, start + POSITIONS_PER_CHUNK), self.mine[number]
            targets = torch.tensor(window.tokens[window.first_scored :][part], device=device)
            theirs = None if own is None else own.scored(number)[part].to(device)
            # Probabilities below 1e-38 count nothing, and arithmetic with them is a hundred times
            # as slow.
            torch.set_flush_denormal(True)
            try:
                found = score(
                    head, finals.scored(number)[part].to(device), targets, own_head, theirs
                )
            finally:
                torch.set_flush_denormal(False)
            if found.nonfinite():
                raise EvaluationError(
                    f"the logits of window {number + 1} are not finite, first behind the output"
                    " head; `quantkit verify` tells whether the files are sound"
                )
            return found

        by_window: dict[int, list[TokenFigures]] = {}
        for done, found in enumerate(
            each_batch(work, range(len(pieces)), device, torch.get_num_threads())
        ):
            by_window.setdefault(pieces[done][0], []).append(found)
            self.on_progress("logits", done + 1, len(pieces))
        own_figures = {number: TokenFigures.joined(parts) for number, parts in by_window.items()}
        merged = {
            number: tokens
            for share in self.ranks.all_gather(own_figures)
            for number, tokens in share.items()
        }
        return _Scored(
            TokenFigures.joined([merged[number] for number in sorted(merged)]),
            self._most(time.perf_counter() - started),
        )

    def _most(self, value: float) -> float:
        """The largest of all ranks."""
        return max(self.ranks.all_gather(value))

    def _noise_floor(self, head: OutputHead, finals: FinalStates) -> dict[str, Any]:
        from quantkit.evaluation.final_states import rounding_noise

        noisy = self._states(self._load(self.options.base), rounding_noise(), "noise floor")
        try:
            tokens = self._score(head, finals, head, noisy).tokens
        finally:
            noisy.close()
        kld, _ = metrics.divergence_figures(tokens.kld, self.counts)
        differences = metrics.per_window(tokens.quant_nll - tokens.nll, self.counts)
        return {
            "kld": kld,
            "kld_histogram": metrics.histogram(tokens.kld),
            "top1_agreement": float(tokens.same_top1.mean()),
            "ppl_delta_pct": (
                perplexity_change_pct(differences, self.counts, self.tokens_per_unit).to_json()
            ),
        }

    # -- Results.

    def _described(self) -> dict[str, Any]:
        options, windows = self.options, self.windows
        protocol: dict[str, Any] = {
            "name": options.protocol if self.task == CAUSAL else self.task,
            "seq_len": self.seq_len,
            "bos": self._bos_described(),
        }
        if options.protocol == "lmeval":
            protocol["unit"] = "word"
        protocol["hash"] = hashlib.sha256(
            json.dumps(protocol, sort_keys=True).encode()
        ).hexdigest()[:16]
        return {
            "schema_version": SCHEMA_VERSION,
            "quantkit_version": __version__,
            "protocol": protocol,
            "data": {
                "sources": [str(name) for name in options.data],
                "sha256": windows.data_sha256,
                "tokens_sha256": windows.tokens_sha256,
            },
            "tokens_scored": windows.tokens_scored,
            "windows": len(windows.windows),
            "tokens_per_unit": self.tokens_per_unit,
            "device": self.ranks.device,
            "processes": self.ranks.count,
            "hardware": options.hardware,
            "kernel_level": _kernel_level(self.ranks.device),
        }

    def _bos_described(self) -> str:
        if self.task != CAUSAL:
            return "around each window" if self.task == MASKED else "none"
        return (
            "tokenizer's own, at the start"
            if self.options.protocol == "gptq"
            else "first token of each window"
        )

    def _base_result(
        self, tokens: TokenFigures, finals: FinalStates, head_seconds: float
    ) -> dict[str, Any]:
        checkpoint = self.base_checkpoint
        result = {
            "path": str(self.options.base),
            "fingerprint": checkpoint.fingerprint(),
            "perplexity": _perplexity(tokens.nll, self.units),
            "top1_accuracy": float(tokens.hit.mean()),
            "bytes": checkpoint.nbytes,
            "bits_per_weight": checkpoint.nbytes * 8 / _weights(checkpoint),
            "bits_per_byte": _bits_per_byte(tokens.nll, self.utf8_bytes),
            "tokens_per_second": self._tokens / (self._most(finals.seconds) + head_seconds),
            "from_cache": finals.is_from_cache,
            "window_nll": metrics.per_window(tokens.nll, self.counts).tolist(),
        }
        if self.options.protocol == "lmeval":
            result["token_perplexity"] = _perplexity(tokens.nll, self.windows.tokens_scored)
        return result

    @property
    def _tokens(self) -> int:
        return sum(len(window.tokens) for window in self.windows.windows)

    def _quant_result(
        self,
        served: ServedModel,
        tokens: TokenFigures,
        layers: list[dict[str, Any]],
        seconds: float,
    ) -> tuple[dict[str, Any], dict[str, Interval]]:
        """A candidate's figures, and the intervals that gates ask for."""
        checkpoint, counts, windows = served.checkpoint, self.counts, self.windows
        window_nll, base_nll = (
            metrics.per_window(values, counts) for values in (tokens.quant_nll, tokens.nll)
        )
        delta = perplexity_change_pct(window_nll - base_nll, counts, self.tokens_per_unit)
        kld, kld_interval = metrics.divergence_figures(tokens.kld, counts)
        top1_sums = metrics.per_window(tokens.same_top1, counts)
        top1 = paired_interval(top1_sums, counts)
        size_ratio = checkpoint.nbytes / self.base_checkpoint.nbytes
        positions = np.concatenate(
            [np.arange(window.first_scored, len(window.tokens)) for window in windows.windows]
        )
        result = {
            "path": str(checkpoint.path),
            "scheme": served.scheme,
            "perplexity": _perplexity(tokens.quant_nll, self.units),
            "ppl_delta_pct": delta.to_json() | {"smallest_resolvable": delta.half_width},
            "kld": (
                kld | {"max_at": _place(int(tokens.kld.argmax()), counts, windows, self.tokenizer)}
            ),
            "kld_histogram": metrics.histogram(tokens.kld),
            "kld_by_confidence": metrics.by_confidence(tokens.kld, tokens.confidence),
            "kld_by_position": metrics.by_position(
                tokens.kld,
                tokens.quant_nll - tokens.nll,
                positions,
                max(len(w.tokens) for w in windows.windows),
            ),
            "top1_agreement": top1.value,
            "top1": top1.to_json(),
            "flips": metrics.flips(tokens.hit, tokens.quant_hit),
            "delta_p": metrics.probability_change(tokens.nll, tokens.quant_nll),
            "bits_per_byte": _bits_per_byte(tokens.quant_nll, self.utf8_bytes),
            "nonfinite": tokens.nonfinite(),
            "bytes": checkpoint.nbytes,
            "bits_per_weight": checkpoint.nbytes * 8 / _weights(self.base_checkpoint),
            "size_ratio": size_ratio,
            "tokens_per_second": self._tokens / seconds,
            "peak_memory_bytes": self._most(peak_memory_bytes()),
            "exec": _exec(served.kernels),
            "kernels": served.kernels,
            "activations_quantized": served.activations_quantized,
            "kv_cache_quantized": served.kv_scales is not None,
            **_calibrated_on(checkpoint, self.options.data, windows),
            "linears_quantized": served.quantized_linears,
            "linears_left": _linears_left(checkpoint),
            "weights_only_linears": list(served.weights_only),
            "unjudged_linears": list(served.beyond),
            "layers": layers,
            "window_nll": window_nll.tolist(),
            "window_kld": metrics.per_window(tokens.kld, counts).tolist(),
            "window_same_top1": top1_sums.tolist(),
        }
        exact = Interval(size_ratio, size_ratio, size_ratio, "exact")
        return result, {
            "ppl_delta_pct": delta,
            "kld_mean": kld_interval,
            "top1": top1,
            "size_ratio": exact,
        }


def _perplexity(nll: np.ndarray, units: int) -> float:
    return float(np.exp(nll.sum() / units))


def _scored_bytes(windows: Windows, tokenizer: Any, protocol: str) -> int:
    """UTF-8 bytes of the text whose tokens are scored. Where windows cut it, from the tokens' own
    text: a character that is cut in two counts as it is shown.
    """
    if protocol == "lmeval":
        return windows.utf8_bytes

    def text(window: Window) -> str:
        return tokenizer.decode(
            list(window.tokens[window.first_scored :]),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    return sum(len(text(window).encode("utf-8", "replace")) for window in windows.windows)


def _bits_per_byte(nll: np.ndarray, utf8_bytes: int) -> float | None:
    return float(nll.sum() / math.log(2) / utf8_bytes) if utf8_bytes else None


def _exec(kernels: Mapping[str, int]) -> str:
    """What ran: "kernel", "reference", or "mixed"."""
    if not kernels or "reference" not in kernels:
        return "kernel" if kernels else "reference"
    return "mixed" if len(kernels) > 1 else "reference"


def _place(token: int, counts: np.ndarray, windows: Windows, tokenizer: Any) -> dict[str, Any]:
    """Where the largest divergence is: window, position, the text that led there and the token that
    came.
    """
    ends = np.cumsum(counts)
    number = int(np.searchsorted(ends, token, side="right"))
    window = windows.windows[number]
    position = window.first_scored + token - int(ends[number] - counts[number])
    context, came = (
        tokenizer.decode(window.tokens[max(0, position - 16) : position]),
        tokenizer.decode([window.tokens[position]]),
    )
    return {"window": number, "position": position, "context": context, "token": came}


def _weights(checkpoint: Checkpoint) -> int:
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def _linears_left(checkpoint: Checkpoint) -> list[str]:
    """Linears of the decoder blocks, and lm_head, that are not quantized."""
    stored = stored_linears(checkpoint.tensors)
    left = [
        name for name in linears_of(checkpoint).modules("linear", "lm_head") if name not in stored
    ]
    return left if "lm_head" in left or "lm_head" in stored else [*left, "lm_head"]


def _calibrated_on(
    checkpoint: Checkpoint, names: Sequence[str], windows: Windows
) -> dict[str, Any]:
    """How many of these windows hold text that the checkpoint's scales were made with, and which
    sources, by its own manifest.

    A source is known by its hash: calibration windows shorter than a piece leave no other trace.
    """
    manifest = checkpoint.path / MANIFEST_FILE
    calibrated_on = read_json(manifest, "").get("calibrated_on") if manifest.is_file() else None
    if not calibrated_on:
        return {"windows_calibrated_on": 0, "sources_calibrated_on": []}
    try:
        # files of earlier versions have none
        known = frozenset(calibrated_on.get("source_sha256", ()))
        return {
            "windows_calibrated_on": count_known_windows(windows, calibrated_on["token_pieces"]),
            "sources_calibrated_on": [
                name for name, sha256 in zip(names, windows.source_sha256) if sha256 in known
            ],
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{manifest} is damaged (calibrated_on); export again") from None


def _kernel_level(device: str) -> str:
    """What runs on a device: the CPU's instruction set, a GPU's architecture, or "reference"."""
    if str(device) == "cpu":
        return cpu_level()
    from quantkit.ops import cuda

    return "reference" if cuda.missing_reason(device) else cuda.level(device)
