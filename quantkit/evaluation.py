"""`eval`: base and quantized models over the same windows, from the exported files, and what the difference is worth.

The base goes first and leaves its final hidden states (tokens × hidden size, never tokens × vocabulary). Each candidate then
runs over the same windows; logits of both are made from hidden states in chunks of positions, in float32, compared and dropped.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit import __version__
from quantkit.checkpoint import Checkpoint, read_json
from quantkit.data import Windows, count_known_windows, evaluation_windows, load_tokenizer, window_length
from quantkit.errors import CheckpointError, EvaluationError, NotComparableError, QuantkitError
from quantkit.layouts import QuantizationLayout, decode_linear, stored_linears
from quantkit.model import classify_tensors
from quantkit.native import cpu_kernels, cpu_level
from quantkit.output import MANIFEST_FILE
from quantkit.runtimes import HARDWARE, as_computed
from quantkit.states import HiddenStates, peak_memory_bytes
from quantkit.statistics import Interval, paired_interval, perplexity_change_pct

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantkit.served import ServedModel

SCHEMA_VERSION = 1
POSITIONS_PER_CHUNK = 256
VOCABULARY_PER_CHUNK = 16384


@dataclass(frozen=True)
class EvaluationOptions:
    base: Path
    quants: tuple[Path, ...]
    data: tuple[str, ...]
    seq_len: int | None = None
    max_tokens: int | None = None
    protocol: str = "gptq"
    exec: str = "auto"
    hardware: str | None = None
    device: str = "auto"
    gates: tuple[str, ...] = ()
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Gate:
    """A condition on a result, such as `ppl_delta_pct<=1.0`."""

    expr: str
    metric: str
    operator: str
    bound: float

    METRICS = ("ppl_delta_pct", "kld_mean", "top1", "size_ratio")

    @classmethod
    def parse(cls, expr: str) -> Gate:
        for operator in ("<=", ">=", "<", ">"):
            metric, found, bound = expr.partition(operator)
            if found:
                break
        else:
            raise EvaluationError(f"the gate '{expr}' has no comparison; write for example ppl_delta_pct<=1.0")
        metric = metric.strip()
        if metric not in cls.METRICS:
            raise EvaluationError(f"the gate '{expr}' names an unknown figure '{metric}'; choose one of {', '.join(cls.METRICS)}")
        try:
            number = float(bound)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise EvaluationError(f"the gate '{expr}' compares with '{bound.strip()}', which is no number")
        return cls(expr, metric, operator, number)

    def judge(self, interval: Interval) -> str:
        """ "pass" or "fail" where the whole interval lies on one side of the bound, else "inconclusive"."""
        low = interval.value if interval.low is None else interval.low
        high = interval.value if interval.high is None else interval.high
        if interval.method == "none":
            return "inconclusive"
        holds = [self._holds(low), self._holds(high)]
        return "pass" if all(holds) else "inconclusive" if any(holds) else "fail"

    def _holds(self, value: float) -> bool:
        return {"<=": value <= self.bound, "<": value < self.bound, ">=": value >= self.bound, ">": value > self.bound}[self.operator]


@dataclass
class _TokenFigures:
    """Per scored token, in order."""

    nll: list[np.ndarray] = field(default_factory=list)
    kld: list[np.ndarray] = field(default_factory=list)
    same_top1: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class _Judged:
    """One model over all windows. nll, kld, same_top1: [tokens scored]."""

    nll: np.ndarray
    seconds: float
    tokens: int
    kld: np.ndarray | None = None
    same_top1: np.ndarray | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def evaluate(options: EvaluationOptions, on_progress: Callable[[str, float, float], None] = lambda name, done, total: None) -> dict[str, Any]:
    """Judge the candidates against the base; returns the result as DESIGN's JSON, which `report` prints.

    on_progress(model's name, blocks done, blocks in all).
    """
    gates = [Gate.parse(expr) for expr in options.gates]
    if gates and not options.quants:
        raise EvaluationError("--gate compares a quantized model with the base; give at least one QUANT")
    if options.hardware is not None and options.hardware not in HARDWARE:
        raise EvaluationError(f"unknown hardware '{options.hardware}'; choose one of {', '.join(HARDWARE)}")
    base_checkpoint = _check_candidate(options.base, Checkpoint.open(options.base), options.hardware)
    candidates = [_check_candidate(path, base_checkpoint, options.hardware) for path in options.quants]

    from quantkit.model import auto_config, pick_device

    config = auto_config(options.base, options.trust_remote_code)
    tokenizer = load_tokenizer(options.base, options.trust_remote_code)
    seq_len = window_length(options.seq_len, getattr(config.get_text_config(), "max_position_embeddings", None))
    if seq_len < 2:
        raise EvaluationError("--seq-len must be at least 2: a window's first token is not predicted")
    windows = evaluation_windows(options.data, tokenizer, options.protocol, seq_len, options.max_tokens)
    for checkpoint in candidates:
        _require_same_tokenizer(tokenizer, checkpoint.path, options)
    device = pick_device(options.device)
    return _judge_all(options, gates, base_checkpoint, candidates, tokenizer, windows, seq_len, device, on_progress)


def _judge_all(
    options: EvaluationOptions, gates: Sequence[Gate], base_checkpoint: Checkpoint, candidates: Sequence[Checkpoint],
    tokenizer: Any, windows: Windows, seq_len: int, device: str, on_progress: Callable[[str, float, float], None],
) -> dict[str, Any]:  # fmt: skip
    import torch

    from quantkit.served import load_served

    counts = np.array([window.scored for window in windows.windows])
    units = windows.words if options.protocol == "lmeval" else windows.tokens_scored
    tokens_per_unit = windows.tokens_scored / units
    with torch.inference_mode():
        base = load_served(options.base, device, options.hardware, options.trust_remote_code, options.exec)
        hidden, seconds = _hidden_states(base, windows, seq_len, on_progress)
        base_head = _Head(base.blocks.model, options.exec != "reference")
        del base
        base_judged = _judge(windows, base_head, hidden, seconds, None, None)
        base_nll = _per_window(base_judged.nll, counts)
        quants = []
        for checkpoint in candidates:
            served = load_served(checkpoint.path, device, options.hardware, options.trust_remote_code, options.exec)
            own_hidden, seconds = _hidden_states(served, windows, seq_len, on_progress)
            head = _Head(served.blocks.model, options.exec != "reference")
            judged = _judge(windows, head, own_hidden, seconds, base_head, hidden)
            quants.append(_quant_result(options, gates, base_checkpoint, served, judged, base_judged, counts, tokens_per_unit, tokenizer, windows))
            del served, head, own_hidden
    protocol = {
        "name": options.protocol,
        "seq_len": seq_len,
        "bos": "tokenizer's own, at the start" if options.protocol == "gptq" else "first token of each window",
    }
    if options.protocol == "lmeval":
        protocol["unit"] = "word"
    protocol["hash"] = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    result = {
        "schema_version": SCHEMA_VERSION,
        "quantkit_version": __version__,
        "protocol": protocol,
        "data": {"sources": [str(name) for name in options.data], "sha256": windows.data_sha256, "tokens_sha256": windows.tokens_sha256},
        "tokens_scored": windows.tokens_scored,
        "windows": len(windows.windows),
        "device": device,
        "hardware": options.hardware,
        "kernel_level": _kernel_level(device),
        "base": {
            "path": str(options.base),
            "perplexity": _perplexity(base_judged.nll, units),
            "bytes": base_checkpoint.nbytes,
            "bits_per_weight": base_checkpoint.nbytes * 8 / _weights(base_checkpoint),
            "tokens_per_second": base_judged.tokens_per_second,
            "window_nll": base_nll.tolist(),
        },
        "quants": [quant for quant, _ in quants],
        "window_tokens": counts.tolist(),
        "gates": [gate for _, judged_gates in quants for gate in judged_gates],
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if windows.utf8_bytes and options.protocol == "lmeval":
        result["base"]["bits_per_byte"] = float(base_judged.nll.sum() / math.log(2) / windows.utf8_bytes)
        result["base"]["token_perplexity"] = _perplexity(base_judged.nll, windows.tokens_scored)
    return result


def _check_candidate(path: Path, base: Checkpoint, hardware: str | None) -> Checkpoint:
    """Refuse early what can't be judged: before the base has run for an hour."""
    checkpoint = Checkpoint.open(path)
    layout = QuantizationLayout.read(checkpoint.config)
    codes = [name for name, info in checkpoint.tensors.items() if info.dtype in ("I8", "F8_E4M3", "F8_E5M2")]
    if layout is None and codes:
        raise CheckpointError(
            f"{codes[0]} of {path} holds codes, but config.json has no quantization_config; `quantkit verify {shlex.quote(str(path))}` lists all faults"
        )
    if hardware is not None:
        for scheme in layout.schemes if layout else ():
            as_computed(scheme, hardware)
    for key in ("vocab_size", "hidden_size"):
        ours, theirs = base.config.get(key), checkpoint.config.get(key)
        if ours != theirs:
            raise NotComparableError(f"{path} has {key} {theirs} and the base {ours}: it is not the same model, quantized; give its own base")
    return checkpoint


def _require_same_tokenizer(tokenizer: Any, path: Path, options: EvaluationOptions) -> None:
    try:
        other = load_tokenizer(path, options.trust_remote_code)
    except QuantkitError:
        return  # a checkpoint without one is judged with the base's
    if other.get_vocab() != tokenizer.get_vocab():
        raise NotComparableError(f"the tokenizer of {path} differs from the base's, so their perplexities can't be compared; copy the base's tokenizer into it")


def _hidden_states(served: ServedModel, windows: Windows, seq_len: int, on_progress: Callable[[str, float, float], None]) -> tuple[list[Tensor], float]:
    """Final hidden states of the scored positions' predecessors, one [scored, hidden] tensor per window, and the seconds it took.

    Leaves the model with its output head in memory and without its blocks.
    """
    import torch

    from quantkit.blockwise import each_batch

    started, blocks = time.perf_counter(), served.blocks
    # lmeval's windows carry one token more, which is predicted but not read.
    batches = [torch.tensor([window.tokens[:seq_len]]) for window in windows.windows]
    _require_head(blocks.model)
    config, numbers = blocks.model.config, range(len(batches))
    states = HiddenStates(device=blocks.device)
    try:
        states.expect({number: (*tokens.shape, config.get_text_config().hidden_size) for number, tokens in enumerate(batches)}, blocks.states_dtype)
        blocks.load_outer(with_head=False)
        calls = blocks.record(batches, states, served.new_cache())
        blocks.free_outer()
        for number in range(blocks.block_count):
            with blocks.block(number) as block:

                def work(batch: int, block: nn.Module = block, number: int = number) -> None:
                    states.put(batch, blocks.run_block(block, calls[batch][number], states.get(batch).to(blocks.device)))

                for batch, _ in enumerate(each_batch(work, numbers, blocks.device, torch.get_num_threads()), 1):
                    on_progress(served.checkpoint.path.name, number + batch / len(batches), blocks.block_count)
            states.turn()
        blocks.load_outer(with_head=True)
        kept = []
        for number, window in enumerate(windows.windows):
            final = blocks.finish(batches[number], states.get(number), served.new_cache())
            kept.append(final[0, window.first_scored - 1 : len(window.tokens) - 1].clone())
            if not torch.isfinite(kept[-1]).all():
                raise EvaluationError(
                    f"{served.checkpoint.path} gives NaN or infinity in window {number + 1}; `quantkit verify` tells whether its files are sound"
                )
    finally:
        states.close()
        blocks.close()
    return kept, time.perf_counter() - started


def _require_head(model: nn.Module) -> None:
    body = getattr(model, model.base_model_prefix, None)
    if body is None or body is model or model.get_output_embeddings() is None:
        raise EvaluationError(f"{type(model).__name__} is no causal language model with an output head, which is what eval judges")


class _Head:
    """A model's last step, hidden states to float32 logits, without its body.

    The model's own forward runs with a stand-in for the body, so whatever the architecture does after `lm_head` (scaling, soft-capping)
    is done here too. `lm_head` itself gives float32 (bfloat16 logits alone would add a KL of 1e-4): through a kernel that multiplies bfloat16 and loses
    nothing, where hidden states and weights are of that type and there is one.
    """

    def __init__(self, model: nn.Module, use_kernel: bool) -> None:
        from torch import nn

        output_embedding = model.get_output_embeddings()  # asked first: without a body transformers finds none
        if isinstance(output_embedding, nn.Linear):
            model.set_output_embeddings(_float32_linear(output_embedding, use_kernel))
        self._stand_in = _stand_in()
        setattr(model, model.base_model_prefix, self._stand_in)
        model.config.output_router_logits = False
        self._model = model

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden: [positions, hidden size]; returns [positions, vocabulary] float32."""
        import torch

        self._stand_in.hidden = hidden[None].float()
        tokens = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        return self._model(input_ids=tokens, use_cache=False).logits[0]


def _stand_in() -> Any:
    """A module that returns the hidden states it was given, in place of the decoder."""
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            """Router logits, cross attentions and the like, which some architectures pass on."""
            return

    class StandIn(nn.Module):
        hidden: Any = None

        @property
        def decoder(self) -> Any:
            return self  # OPT calls model.decoder

        def forward(self, *_: Any, **__: Any) -> Any:
            return Output(last_hidden_state=self.hidden)

    return StandIn()


def _float32_linear(linear: nn.Module, use_kernel: bool) -> nn.Module:
    """The same Linear with a float32 result: from a kernel where its operands are bfloat16, else its weight converted a slice of the vocabulary at a time."""
    import torch
    from torch import nn

    from quantkit import ops  # noqa: F401  (declares matmul_bf16)

    class Float32Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias
            ready = use_kernel and cpu_kernels() is not None and self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16
            self.packed = torch.ops.quantkit.pack_weight(self.weight.detach(), "bf16") if ready else None

        def forward(self, hidden: Tensor) -> Tensor:
            low = hidden.bfloat16()
            if self.packed is not None and torch.equal(low.float(), hidden):
                bias = None if self.bias is None else self.bias.float()
                logits = torch.ops.quantkit.matmul_bf16(low.flatten(0, -2), self.packed, self.weight.shape[0], bias, torch.float32)
                return logits.reshape(*hidden.shape[:-1], -1)
            logits = torch.empty(*hidden.shape[:-1], self.weight.shape[0], device=hidden.device)
            for start in range(0, self.weight.shape[0], VOCABULARY_PER_CHUNK):
                part = slice(start, start + VOCABULARY_PER_CHUNK)
                bias = None if self.bias is None else self.bias[part].float()
                logits[..., part] = nn.functional.linear(hidden, self.weight[part].float(), bias)
            return logits

    return Float32Linear()


def _judge(windows: Windows, head: _Head, hidden: Sequence[Tensor], seconds: float, base_head: _Head | None, base_hidden: Sequence[Tensor] | None) -> _Judged:
    """Score one model's hidden states; with a base, compare distributions position by position."""
    import torch

    figures = _TokenFigures()
    for number, window in enumerate(windows.windows):
        targets = torch.tensor(window.tokens[window.first_scored :], device=hidden[number].device)
        for start in range(0, window.scored, POSITIONS_PER_CHUNK):
            part = slice(start, start + POSITIONS_PER_CHUNK)
            started = time.perf_counter()
            log_probabilities = head(hidden[number][part]).log_softmax(-1)
            nll = -log_probabilities.gather(1, targets[part, None])[:, 0]
            seconds += time.perf_counter() - started
            if not torch.isfinite(nll).all():
                raise EvaluationError(f"the logits of window {number + 1} are not finite; `quantkit verify` tells whether the files are sound")
            figures.nll.append(nll.double().cpu().numpy())
            if base_head is None:
                continue
            base_log_probabilities = base_head(base_hidden[number][part]).log_softmax(-1)
            divergence = (base_log_probabilities.exp() * (base_log_probabilities - log_probabilities)).sum(-1, dtype=torch.float64)
            figures.kld.append(divergence.cpu().numpy())
            figures.same_top1.append((log_probabilities.argmax(-1) == base_log_probabilities.argmax(-1)).cpu().numpy())
    joined = [np.concatenate(parts) if parts else None for parts in (figures.nll, figures.kld, figures.same_top1)]
    tokens = sum(len(window.tokens) for window in windows.windows)
    return _Judged(joined[0], seconds, tokens, joined[1], joined[2])


def _per_window(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values.astype(np.float64), np.concatenate([[0], np.cumsum(counts)[:-1]]))


def _perplexity(nll: np.ndarray, units: int) -> float:
    return float(np.exp(nll.sum() / units))


def _quant_result(
    options: EvaluationOptions, gates: Sequence[Gate], base: Checkpoint, served: ServedModel, judged: _Judged, base_judged: _Judged,
    counts: np.ndarray, tokens_per_unit: float, tokenizer: Any, windows: Windows,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    checkpoint = served.checkpoint
    window_nll, base_nll = _per_window(judged.nll, counts), _per_window(base_judged.nll, counts)
    delta = perplexity_change_pct(window_nll - base_nll, counts, tokens_per_unit)
    kld_sums, top1_sums = _per_window(judged.kld, counts), _per_window(judged.same_top1, counts)
    kld, top1 = paired_interval(kld_sums, counts), paired_interval(top1_sums, counts)
    size_ratio = checkpoint.nbytes / base.nbytes
    worst = int(judged.kld.argmax())
    quantiles = np.quantile(judged.kld, [0.5, 0.9, 0.99, 0.999])
    result = {
        "path": str(checkpoint.path),
        "scheme": served.scheme,
        "perplexity": _perplexity(judged.nll, round(windows.tokens_scored / tokens_per_unit)),
        "ppl_delta_pct": delta.to_json() | {"smallest_resolvable": delta.half_width},
        "kld": {
            "mean": kld.value, "mean_low": kld.low, "mean_high": kld.high,
            "median": float(quantiles[0]), "p90": float(quantiles[1]), "p99": float(quantiles[2]), "p99_9": float(quantiles[3]),
            "max": float(judged.kld[worst]), "max_at": _place(worst, counts, windows, tokenizer),
        },
        "top1_agreement": top1.value,
        "bytes": checkpoint.nbytes,
        "bits_per_weight": checkpoint.nbytes * 8 / _weights(base),
        "size_ratio": size_ratio,
        "tokens_per_second": judged.tokens_per_second,
        "exec": _exec(served.kernels),
        "kernels": served.kernels,
        "activations_quantized": served.activations_quantized,
        "kv_cache_quantized": served.kv_scales is not None,
        **_calibrated_on(checkpoint, options.data, windows),
        "linears_quantized": served.quantized_linears,
        "linears_left": _linears_left(checkpoint),
        "weights_only_linears": list(served.weights_only),
        "layers": _layer_figures(base, checkpoint),
        "window_nll": window_nll.tolist(),
        "window_kld": kld_sums.tolist(),
        "window_same_top1": top1_sums.tolist(),
    }  # fmt: skip
    figures = {"ppl_delta_pct": delta, "kld_mean": kld, "top1": top1, "size_ratio": Interval(size_ratio, size_ratio, size_ratio, "exact")}
    judged_gates = []
    for gate in gates:
        interval = figures[gate.metric]
        outcome = gate.judge(interval)
        entry = {"expr": gate.expr, "path": str(checkpoint.path), "value": interval.value, "low": interval.low, "high": interval.high, "result": outcome}
        if outcome == "inconclusive" and interval.half_width and gate.bound != interval.value:
            # The half-width shrinks with the square root of the text.
            factor = (interval.half_width / abs(interval.value - gate.bound)) ** 2
            entry["more_tokens_needed"] = max(0, round(windows.tokens_scored * (factor - 1)))
        judged_gates.append(entry)
    return result, judged_gates


def _kernel_level(device: str) -> str:
    if device == "cpu":
        return cpu_level()
    from quantkit import cuda_ops

    return "reference" if cuda_ops.missing_reason(device) else cuda_ops.level(device)


def _exec(kernels: Mapping[str, int]) -> str:
    """What ran: "kernel", "reference", or "mixed"."""
    if not kernels or "reference" not in kernels:
        return "kernel" if kernels else "reference"
    return "mixed" if len(kernels) > 1 else "reference"


def _place(token: int, counts: np.ndarray, windows: Windows, tokenizer: Any) -> dict[str, Any]:
    """Where the largest divergence is: window, position, and the text that led there."""
    ends = np.cumsum(counts)
    number = int(np.searchsorted(ends, token, side="right"))
    window = windows.windows[number]
    position = window.first_scored + token - int(ends[number] - counts[number])
    return {"window": number, "position": position, "context": tokenizer.decode(window.tokens[max(0, position - 16) : position])}


def _weights(checkpoint: Checkpoint) -> int:
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def _linears_left(checkpoint: Checkpoint) -> list[str]:
    """Linears of the decoder blocks, and lm_head, that are not quantized."""
    stored = stored_linears(checkpoint.tensors)
    infos = classify_tensors({name: info.shape for name, info in checkpoint.tensors.items()})
    left = [info.name for info in infos.values() if info.kind in ("linear", "lm_head") and info.name not in stored and info.tensor.endswith(".weight")]
    return left if "lm_head" in left or "lm_head" in stored else [*left, "lm_head"]


def _calibrated_on(checkpoint: Checkpoint, names: Sequence[str], windows: Windows) -> dict[str, Any]:
    """How many of these windows hold text that the checkpoint's scales were made with, and which sources, by its own manifest.

    A source is known by its hash: calibration windows shorter than a piece leave no other trace.
    """
    manifest = checkpoint.path / MANIFEST_FILE
    calibrated_on = read_json(manifest, "").get("calibrated_on") if manifest.is_file() else None
    if not calibrated_on:
        return {"windows_calibrated_on": 0, "sources_calibrated_on": []}
    try:
        known = frozenset(calibrated_on.get("source_sha256", ()))  # files of earlier versions have none
        return {
            "windows_calibrated_on": count_known_windows(windows, calibrated_on["token_pieces"]),
            "sources_calibrated_on": [name for name, sha256 in zip(names, windows.source_sha256) if sha256 in known],
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{manifest} is damaged (calibrated_on); export again") from None


def _layer_figures(base: Checkpoint, quant: Checkpoint) -> list[dict[str, Any]]:
    """Weight SQNR of each quantized Linear against the base's weight, worst first; empty where the base is quantized itself."""
    from quantkit.quantize import sqnr_db

    layout = QuantizationLayout.read(quant.config)
    if layout is None:
        return []
    rows = []
    for module, suffixes in stored_linears(quant.tensors).items():
        original = base.tensors.get(f"{module}.weight")
        scheme = layout.scheme_of(module)
        if original is None or scheme is None or f"{module}.weight_scale" in base.tensors:
            continue
        weight, _ = decode_linear({suffix: quant.read(f"{module}.{suffix}") for suffix in suffixes}, scheme, module)
        if original.shape == tuple(weight.qdata.shape):
            rows.append({"name": module, "weight_sqnr_db": float(sqnr_db(base.read(original.name), weight.dequantize()))})
    return sorted(rows, key=lambda row: row["weight_sqnr_db"])
