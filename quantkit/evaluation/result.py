"""What `eval` found: a tree of values that becomes the JSON of `eval -o` and is read back from it.

The fields' names are the JSON's keys, in its order. A field with a default may be missing in a
file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.evaluation import json_values
from quantkit.evaluation.json_values import INLINE, OMIT_NONE
from quantkit.evaluation.metrics import MetricValues, NoiseFloor, WindowSums

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """How windows are cut and scored.

    name: "gptq", "llamacpp" or "lmeval"; of other than causal models the task's.
    seq_len: tokens per window.
    bos: where the first token of a text stands, in words.
    unit: "word" where perplexity is per word.
    hash: of the fields above; equal hashes mean the same protocol.
    """

    name: str | None = None
    seq_len: int | None = None
    bos: str = ""
    unit: str | None = field(default=None, metadata=OMIT_NONE)
    hash: str


@dataclass(frozen=True, kw_only=True)
class TextSources:
    """The text.

    sources: as the user named them.
    sha256: of the one source, or of all sources' hashes.
    tokens_sha256: of the windows' tokens.
    """

    sources: tuple[str, ...] = ("?",)
    sha256: str = ""
    tokens_sha256: str


@dataclass(frozen=True, kw_only=True)
class BaseResult:
    """The base alone.

    path: its directory.
    fingerprint: of its files.
    perplexity: per token, or per word under lmeval.
    top1_accuracy: the share of tokens that it finds likeliest.
    bytes: of its tensors.
    bits_per_weight: bytes by elements of all tensors.
    bits_per_byte: of the scored text, None without any.
    tokens_per_second: of the whole run, or of the earlier one where from_cache.
    from_cache: whether its hidden states are an earlier run's.
    window_nll: sums over each window's tokens, nats, [windows].
    token_perplexity: per token, where perplexity is per word.
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
    """Signal to noise over output channels, dB: the median channel and the worst."""

    median: float
    min: float


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What quantization did to one Linear. Values that weren't measured are None.

    name: in the checkpoint.
    weight_sqnr_db, weight_channel_sqnr_db: of its weight against the base's, dB.
    weight_clipped, weight_underflowed: shares of the weight's values.
    output_sqnr_db, output_channel_sqnr_db: of its output for the inputs that reach it, dB.
    input_sqnr_db, input_channel_sqnr_db: of these inputs, quantized, dB.
    input_clipped, input_underflowed: shares of the inputs' values.
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
    """A candidate compared with the base.

    path: its directory.
    scheme: its name, "mixed" with several, or the dtype of an unquantized model.
    metrics: the rows of metrics.METRICS.
    bytes: of its tensors.
    bits_per_weight: bytes by elements of the base's tensors.
    size_ratio: its bytes by the base's.
    tokens_per_second: with half of the time that comparing logits took.
    peak_memory_bytes: of the process so far, the largest of all ranks.
    exec: "kernel", "reference" or "mixed".
    kernels: how many Linears ran through each kernel.
    activations_quantized: True, False or "partial".
    kv_cache_quantized: whether keys and values went through FP8.
    windows_calibrated_on: how many windows hold text that its scales were made with.
    sources_calibrated_on: which sources, likewise.
    linears_quantized: how many were evaluated quantized.
    linears_left: Linears of the decoder blocks, and lm_head, that are not quantized.
    weights_only_linears: those that ran with unquantized inputs against the scheme.
    unjudged_linears: those that transformers leaves out of the model.
    layers: error of each Linear, the worst first.
    window_sums: for `compare`.
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


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """What became of a gate.

    expr: as the user wrote it.
    path: the candidate's directory.
    value, low, high: of the metric, with its interval.
    result: "pass", "fail" or "inconclusive".
    more_tokens_needed: an estimate for an inconclusive gate; None where one window gives none.
    """

    expr: str
    path: str
    value: float
    low: float | None
    high: float | None
    result: str
    more_tokens_needed: int | None = None

    def to_json(self) -> dict[str, Any]:
        content = json_values.fields_to_json(self)
        if self.result != "inconclusive":
            del content["more_tokens_needed"]
        return content


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `eval`.

    schema_version: of the JSON.
    quantkit_version: that made it.
    protocol: how windows are cut and scored.
    data: the text.
    tokens_scored, windows: how many.
    tokens_per_unit: tokens per word where perplexity is per word, else 1.
    device: "cpu" or "cuda".
    processes: ranks that shared the windows.
    hardware: whose arithmetic was computed, None for the scheme's own.
    kernel_level: the CPU's instruction set, the GPU's architecture, or "reference".
    base: the base alone.
    quants: each candidate compared with the base.
    noise_floor: None where it wasn't measured.
    window_tokens: scored tokens of each window.
    gates: one for each gate and candidate.
    peak_memory_bytes: of the largest process.
    remarks: sentences that a reader must know.
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
        return json_values.fields_to_json(self)

    @classmethod
    def from_json(cls, content: Any) -> Evaluation:
        """Raises KeyError, TypeError or ValueError where `content` is no result."""
        return json_values.fields_from_json(cls, content)
