"""The result of `eval`, as dataclasses. They are stored as JSON and read back.

The names of fields are the keys of the JSON, in order. A field with a default may be missing in a
file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.checkpoint.units import counted, format_bytes
from quantkit.errors import FaultsFound, Inconclusive
from quantkit.evaluation import json_values
from quantkit.evaluation.intervals import Difference
from quantkit.evaluation.json_values import INLINE, OMIT_NONE
from quantkit.evaluation.metrics import (
    FLIPS,
    KLD,
    PERPLEXITY,
    PPL_DELTA,
    TOP1_AGREEMENT,
    MetricValues,
    NoiseFloor,
    WindowSums,
)
from quantkit.evaluation.token_statistics import Divergence, Flips

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """How windows are cut and scored.

    name: "gptq", "llamacpp" or "lmeval"; the task's name if the model isn't causal.
    seq_len: tokens per window.
    bos: where the tokenizer's special tokens are, in words.
    unit: "word" if perplexity is per word.
    hash: hash of the fields above; results with equal hashes have the same protocol.
    """

    name: str | None = None
    seq_len: int | None = None
    bos: str = ""
    unit: str | None = field(default=None, metadata=OMIT_NONE)
    hash: str


@dataclass(frozen=True, kw_only=True)
class TextSources:
    """The text of an evaluation.

    sources: files or sources, as the user named them.
    sha256: hash of the source, or of the hashes of several.
    tokens_sha256: hash of the windows' tokens.
    """

    sources: tuple[str, ...] = ("?",)
    sha256: str = ""
    tokens_sha256: str


@dataclass(frozen=True, kw_only=True)
class BaseResult:
    """Results of the base model.

    path: its directory.
    fingerprint: hash of samples of its files.
    perplexity: per token, or per word with the protocol lmeval.
    top1_accuracy: share of tokens that it predicts as the most likely.
    bytes: size of its tensors.
    bits_per_weight: size of its tensors in bits / number of elements.
    bits_per_byte: NLL in bits / bytes of the scored text; None if the text is empty.
    tokens_per_second: throughput; with `from_cache`, that of the earlier run.
    from_cache: whether its hidden states were computed by an earlier run.
    window_nll: NLL summed over the tokens of each window, nats, [windows].
    token_perplexity: per token; None unless `perplexity` is per word.
    """

    path: str
    fingerprint: str | None = None
    perplexity: float
    top1_accuracy: float = 0.0
    bytes: int = 0
    bits_per_weight: float = 0.0
    bits_per_byte: float | None = None
    tokens_per_second: float = 0.0
    from_cache: bool = False
    window_nll: tuple[float, ...]
    token_perplexity: float | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True)
class ChannelSqnr:
    """Signal-to-quantization-noise ratio of channels.

    median: that of the median channel, dB.
    min: that of the worst channel, dB.
    """

    median: float
    min: float


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """The quantization error of one Linear. Values that weren't measured are None.

    name: its name in the checkpoint.
    weight_sqnr_db: signal-to-quantization-noise ratio of its weight, dB.
    weight_channel_sqnr_db: the same over output channels.
    weight_clipped: share of the weight's values beyond the number format's range.
    weight_underflowed: share of the weight's values that were rounded to zero.
    output_sqnr_db: signal-to-quantization-noise ratio of its output, for the inputs that it gets in
        the quantized model, dB.
    output_channel_sqnr_db: the same over output channels.
    input_sqnr_db: signal-to-quantization-noise ratio of its quantized inputs, dB.
    input_channel_sqnr_db: the same over input channels.
    input_clipped: share of the inputs' values beyond the number format's range.
    input_underflowed: share of the inputs' values that were rounded to zero.
    """

    name: str
    weight_sqnr_db: float
    weight_channel_sqnr_db: ChannelSqnr
    weight_clipped: float
    weight_underflowed: float
    output_sqnr_db: float | None = field(default=None, metadata=OMIT_NONE)
    output_channel_sqnr_db: ChannelSqnr | None = field(default=None, metadata=OMIT_NONE)
    input_sqnr_db: float | None = field(default=None, metadata=OMIT_NONE)
    input_channel_sqnr_db: ChannelSqnr | None = field(default=None, metadata=OMIT_NONE)
    input_clipped: float | None = field(default=None, metadata=OMIT_NONE)
    input_underflowed: float | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, kw_only=True)
class QuantResult:
    """Results of a quantized model, compared with the base model.

    path: its directory.
    scheme: name of its scheme; "mixed" with several, or the dtype of an unquantized model.
    metrics: its values of the metrics in metrics.METRICS.
    bytes: size of its tensors.
    bits_per_weight: size of its tensors in bits / number of elements of the base model.
    size_ratio: its bytes / bytes of the base model.
    tokens_per_second: throughput, with half of the time for scoring both models.
    peak_memory_bytes: peak memory of the process so far, the largest of all ranks.
    exec: arithmetic that ran: "kernel", "reference" or "mixed".
    kernels: kernel, or "reference" → number of Linears that ran through it.
    activations_quantized: whether Linears quantized their inputs: True, False or "partial".
    kv_cache_quantized: whether keys and values were quantized to FP8.
    windows_calibrated_on: number of windows with text that it was calibrated on.
    sources_calibrated_on: names of sources that it was calibrated on.
    linears_quantized: number of Linears that ran quantized.
    linears_left: the skipped Linears: those of the decoder blocks, and lm_head, that aren't
        quantized.
    weights_only_linears: Linears whose inputs stayed unquantized, against their scheme.
    unjudged_linears: Linears that aren't evaluated, because transformers doesn't build them.
    layers: error of each Linear, the worst first.
    window_sums: sums over the tokens of each window, for `compare`.
    """

    path: str
    scheme: str
    metrics: MetricValues = field(metadata=INLINE)
    bytes: int
    bits_per_weight: float = 0.0
    size_ratio: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    exec: str | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    activations_quantized: bool | str = "partial"
    kv_cache_quantized: bool = False
    windows_calibrated_on: int = 0
    sources_calibrated_on: tuple[str, ...] = ()
    linears_quantized: int = 0
    linears_left: tuple[str, ...] = ()
    weights_only_linears: tuple[str, ...] = ()
    unjudged_linears: tuple[str, ...] = ()
    layers: tuple[LayerError, ...] = ()
    window_sums: WindowSums = field(metadata=INLINE)

    @property
    def perplexity(self) -> float:
        """Per token, or per word with the protocol lmeval."""
        return self.metrics[PERPLEXITY]

    @property
    def ppl_delta_pct(self) -> Difference:
        """The change of perplexity compared with the base model: value, low and high of its 95 %
        interval, in per cent.
        """
        return self.metrics[PPL_DELTA]

    @property
    def kld(self) -> Divergence:
        """KL(base‖quant) over tokens, nats: mean, median, p90, p99, max."""
        return self.metrics[KLD]

    @property
    def top1_agreement(self) -> float:
        """Share of tokens for which both models predict the same most likely token, 0 to 1."""
        return self.metrics[TOP1_AGREEMENT]

    @property
    def flips(self) -> Flips:
        """Tokens that only one of the two models predicts rightly, with McNemar's p."""
        return self.metrics[FLIPS]

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"{self.path} ({self.scheme}): perplexity {self.perplexity:.3f},"
            f" {self.ppl_delta_pct.text()}; KL {self.kld.mean:.4f} nats; same top-1"
            f" {100 * self.top1_agreement:.1f} %; {format_bytes(self.bytes)}"
        )

    def __repr__(self) -> str:
        return f"<QuantResult {self}>"


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """The outcome of a gate on one quantized model.

    expr: the gate's expression, as the user wrote it.
    path: directory of the quantized model.
    value: value of the metric.
    low, high: its 95 % interval; None if there is only one window.
    result: "pass", "fail" or "inconclusive".
    more_tokens_needed: about how many more tokens would decide an inconclusive gate; None if that
        can't be estimated.
    """

    expr: str
    path: str
    value: float
    low: float | None
    high: float | None
    result: str
    more_tokens_needed: int | None = None

    def measured(self) -> str:
        """The value with its interval, in the metric's unit."""
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def to_json(self) -> dict[str, Any]:
        content = json_values.fields_to_json(self)
        if self.result != "inconclusive":
            del content["more_tokens_needed"]
        return content


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `eval`.

    schema_version: version of the JSON.
    quantkit_version: version of quantkit that wrote it.
    protocol: how windows are cut and scored.
    data: the text.
    tokens_scored: number of scored tokens.
    windows: number of windows.
    tokens_per_unit: tokens per word if perplexity is per word, else 1.
    device: "cpu" or "cuda".
    processes: number of processes that shared the windows.
    hardware: the hardware whose arithmetic was computed; None for the schemes' own.
    kernel_level: the CPU's instruction set, the GPU's architecture, or "reference".
    base: results of the base model.
    quants: results of each quantized model.
    noise_floor: effect of rounding noise on the base model; None if it wasn't measured.
    window_tokens: scored tokens of each window, [windows].
    gates: the outcome of each gate on each quantized model.
    peak_memory_bytes: peak memory of the largest process.
    remarks: sentences for the reader of the result.
    """

    schema_version: int
    quantkit_version: str | None = None
    protocol: EvaluationProtocol
    data: TextSources
    tokens_scored: int
    windows: int = 0
    tokens_per_unit: float = 1.0
    device: str | None = None
    processes: int = 1
    hardware: str | None = None
    kernel_level: str | None = None
    base: BaseResult
    quants: tuple[QuantResult, ...]
    noise_floor: NoiseFloor | None = None
    window_tokens: tuple[int, ...]
    gates: tuple[GateResult, ...] = ()
    peak_memory_bytes: int = 0
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `quantkit eval` writes as JSON; NaN and infinity are Python's."""
        return json_values.fields_to_json(self)

    def to_markdown(self) -> str:
        """A section for a model card."""
        from quantkit.evaluation.report import evaluation_markdown

        return evaluation_markdown(self)

    def to_html(self) -> str:
        """A self-contained page with plots. Raises EvaluationError if matplotlib is missing."""
        from quantkit.evaluation.html import evaluation_html

        return evaluation_html(self)

    def require_gates(self, strict: bool = False) -> None:
        """Raise FaultsFound if a gate failed.

        strict: also raise Inconclusive if the text is too short to decide a gate.
        """
        failed = [gate for gate in self.gates if gate.result == "fail"]
        undecided = [gate for gate in self.gates if gate.result == "inconclusive"]
        if failed:
            raise FaultsFound(
                f"the gate {failed[0].expr} failed on {failed[0].path}: {failed[0].measured()}"
            )
        if undecided and strict:
            more = undecided[0].more_tokens_needed
            raise Inconclusive(
                f"this text is too short to decide the gate {undecided[0].expr}",
                f"about {more} more tokens would do" if more else "give more text",
            )

    def __str__(self) -> str:
        """One line for each model."""
        base = (
            f"{self.base.path}: perplexity {self.base.perplexity:.3f} on {self.tokens_scored}"
            f" tokens in {counted(self.windows, 'window')}; {format_bytes(self.base.bytes)}"
        )
        return "\n".join([base, *map(str, self.quants)])

    def __repr__(self) -> str:
        return f"<Evaluation\n{self}>"

    def _repr_html_(self) -> str:
        from quantkit.evaluation.html import evaluation_fragment

        return evaluation_fragment(self)

    @classmethod
    def from_json(cls, content: Any) -> Evaluation:
        """Raises KeyError, TypeError or ValueError if `content` isn't the JSON of a result."""
        return json_values.fields_from_json(cls, content)
