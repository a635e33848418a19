"""What each runtime and each kind of hardware can do with each scheme, as data. `verify`,
`schemes`, `export` and `eval` read it.

Read from the sources of vLLM 0.32, SGLang 0.5.23, TensorRT-LLM and transformers 5.23. Formats are
those of `formats.FORMATS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError, RuntimeLimitError
from quantkit.models.assignment import QuantizedLinearInfo
from quantkit.models.experts import Restacked
from quantkit.models.skeleton import build_skeleton
from quantkit.models.tensor_roles import fused_sets
from quantkit.schemes.number_formats import INT8
from quantkit.schemes.scheme import SCHEMES, QuantScheme

RUNTIMES = ("vllm", "sglang", "tensorrt-llm", "transformers")


@dataclass(frozen=True)
class Support:
    """loads: whether the runtime loads the scheme and computes what it says. note: the condition,
    or why not.
    """

    loads: bool
    note: str = ""


_YES = Support(True)
_TRT_CHANNEL = Support(False, "takes channel scales only with per-token inputs")
_TRT_INT8 = Support(False, "reads INT8 as FP8 in silence")

SUPPORT: dict[str, dict[str, Support]] = {
    "fp8-dynamic": {"vllm": _YES, "sglang": _YES, "tensorrt-llm": _YES, "transformers": _YES},
    "fp8-static": {
        "vllm": _YES,
        "sglang": _YES,
        "tensorrt-llm": _TRT_CHANNEL,
        "transformers": _YES,
    },
    "fp8-tensor": {
        "vllm": _YES,
        "sglang": _YES,
        "tensorrt-llm": Support(False, "raises on per-tensor weights"),
        "transformers": _YES,
    },
    "fp8-block": {
        "vllm": Support(True, "128-multiples"),
        "sglang": Support(True, "128-multiples"),
        "tensorrt-llm": _YES,
        "transformers": Support(True, "128-multiples"),
    },
    "mxfp8": {
        "vllm": _YES,
        "sglang": Support(False, "has no MXFP8"),
        "tensorrt-llm": Support(False, "is not known to load it"),
        "transformers": _YES,
    },
    "fp8-weight-only": {
        "vllm": _YES,
        "sglang": _YES,
        "tensorrt-llm": Support(False, "needs quantized inputs"),
        "transformers": _YES,
    },
    "int8-dynamic": {
        "vllm": _YES,
        "sglang": Support(True, "dense models"),
        "tensorrt-llm": _TRT_INT8,
        "transformers": _YES,
    },
    "int8-static": {
        "vllm": _YES,
        "sglang": Support(False, "ignores static input scales"),
        "tensorrt-llm": _TRT_INT8,
        "transformers": _YES,
    },
    "int8-weight-only": {
        "vllm": _YES,
        "sglang": _YES,
        "tensorrt-llm": Support(False, "needs quantized inputs"),
        "transformers": _YES,
    },
}

# The same for the formats other than compressed-tensors, each with the one scheme that it holds.
FORMAT_SUPPORT: dict[str, dict[str, Support]] = {
    "fp8": {
        "vllm": Support(True, "128-multiples"),
        "sglang": Support(True, "128-multiples"),
        "tensorrt-llm": _YES,
        "transformers": Support(True, "128-multiples"),
    },
    "modelopt": {
        "vllm": _YES,
        "sglang": _YES,
        "tensorrt-llm": _YES,
        "transformers": Support(False, "reads ModelOpt's codes as weights in silence"),
    },
}
FORMAT_SCHEMES = {"fp8": "fp8-block", "modelopt": "fp8-tensor"}

# What vLLM runs on each hardware: "native" (as the scheme says), "weights" (codes are stored,
# inputs stay bf16), or why it can't.
HARDWARE = ("blackwell", "hopper", "ada", "ampere", "turing", "cpu")
_NO_CPU_STATIC = "vLLM's CPU build does not start with static FP8 inputs"


def scheme_family(scheme: QuantScheme) -> str:
    """The row of the tables above that a scheme belongs to, whatever it is called."""
    if scheme.weight.format is INT8:
        return (
            "int8-weight-only"
            if scheme.input is None
            else "int8-dynamic"
            if scheme.input.dynamic
            else "int8-static"
        )
    if scheme.weight.scale_format is not None:
        return "mxfp8"
    if scheme.input is None:
        return "fp8-weight-only"
    if scheme.weight.granularity.name in ("block", "group"):
        return "fp8-block"
    if scheme.input.dynamic:
        return "fp8-dynamic"
    return "fp8-tensor" if scheme.weight.granularity.name == "tensor" else "fp8-static"


def _is_known(scheme: QuantScheme) -> bool:
    """Whether the tables speak of this arithmetic: one of the nine schemes, or INT8 weights in
    groups.
    """
    grouped = (
        scheme.input is None
        and scheme.weight.format is INT8
        and scheme.weight.scale_format is None
        and scheme.weight.granularity.name == "group"
    )
    return grouped or any(
        scheme.same_arithmetic == known.same_arithmetic for known in SCHEMES.values()
    )


def hardware_mode(scheme: QuantScheme, hardware: str) -> str:
    """ "native", "weights", or the reason why this hardware can't serve the scheme."""
    family = scheme_family(scheme)
    if family in ("int8-dynamic", "int8-static"):
        return "vLLM has no INT8 kernel for Blackwell" if hardware == "blackwell" else "native"
    if family == "int8-weight-only":
        return (
            "vLLM's CPU build has no kernel for packed INT8 weights"
            if hardware == "cpu"
            else "native"
        )
    if family == "fp8-weight-only":
        return (
            "vLLM's CPU build has no kernel for FP8 weights with unquantized inputs"
            if hardware == "cpu"
            else "native"
        )
    if family == "mxfp8":
        if hardware == "cpu":
            return "vLLM's CPU build has no kernel for MXFP8"
        return "native" if hardware == "blackwell" else "weights"
    if hardware in ("blackwell", "hopper", "ada"):
        return "native"
    if hardware == "cpu" and family in ("fp8-static", "fp8-tensor"):
        return _NO_CPU_STATIC
    return "weights"


def as_computed(scheme: QuantScheme, hardware: str | None) -> QuantScheme:
    """The scheme whose arithmetic this hardware runs: without input quantization where it has no
    such kernel.
    """
    if hardware is None:
        return scheme
    mode = hardware_mode(scheme, hardware)
    if mode == "native":
        return scheme
    if mode == "weights":
        return replace(scheme, input=None)
    raise RuntimeLimitError(
        f"{scheme.name} can't be computed as on {hardware}: {mode}; choose another --hardware or"
        " leave it out"
    )


# vLLM turns every `weight` of such a model as it loads it, codes too: an INT8 GPT-2 gives its CPU
# build the probabilities that eval computes.
_CONV1D = {
    "sglang": (
        "is not known to load quantized weights that are stored as [in_features, out_features]"
    ),
    "tensorrt-llm": (
        "is not known to load quantized weights that are stored as [in_features, out_features]"
    ),
    "transformers": (
        "reads the codes of weights that are stored as [in_features, out_features] as weights, in"
        " silence"
    ),
}


# Schemes that a runtime takes of Linears, but not of experts.
_NOT_OF_EXPERTS = {
    "vllm": ("fp8-static", "fp8-weight-only", "int8-static"),
    "sglang": ("int8-dynamic", "int8-static"),
    "transformers": ("fp8-block", "mxfp8", "int8-dynamic", "int8-static", "int8-weight-only"),
}


def runtime_problems(
    runtime: str,
    quantized: Iterable[QuantizedLinearInfo],
    left: Iterable[str],
    layout: str = "compressed-tensors",
) -> list[str]:
    """Why this runtime would refuse or misread such a checkpoint; empty when it loads. left:
    Linears that stay unquantized.
    """
    quantized = list(quantized)
    by_name = {linear.name: linear for linear in quantized}
    problems = []
    for scheme in dict.fromkeys(linear.scheme for linear in quantized):
        if not _is_known(scheme):
            problems.append(
                f"{runtime} is not known to load {scheme.name} ({scheme.weight}, inputs"
                f" {scheme.input or 'as they are'}); choose one of quantkit's schemes"
            )
            continue
        support = (
            FORMAT_SUPPORT[layout][runtime]
            if layout in FORMAT_SUPPORT
            else SUPPORT[scheme_family(scheme)][runtime]
        )
        if not support.loads:
            form = f" in the format {layout}" if layout in FORMAT_SUPPORT else ""
            problems.append(f"{runtime} can't load {scheme.name}{form}: it {support.note}")
    transposed = [linear for linear in quantized if linear.is_transposed]
    if transposed and runtime in _CONV1D:
        problems.append(
            f"{runtime} {_CONV1D[runtime]} ({transposed[0].name} and the others, which are Conv1D)"
        )
    mixers = [
        name
        for name in by_name
        if name.endswith(".x_proj") and f"{name.removesuffix('x_proj')}in_proj" in by_name
    ]
    if mixers and runtime == "vllm":
        problems.append(
            f"vllm keeps Mamba's first kind of mixer unquantized ({mixers[0].rpartition('.')[0]}"
            " and its like); leave them with --ignore"
        )
    experts = [linear for linear in quantized if ".experts." in linear.name]
    for linear in [
        linear
        for linear in experts
        if scheme_family(linear.scheme) in _NOT_OF_EXPERTS.get(runtime, ())
    ][:1]:
        problems.append(
            f"{runtime} can't load experts in {linear.scheme.name} ({linear.name} and the others);"
            " use fp8-dynamic"
        )
    if runtime in ("vllm", "sglang"):
        left = set(left)
        for members in fused_sets([*by_name, *left]):
            schemes = {by_name[m].scheme if m in by_name else None for m in members}
            if len(schemes) > 1:
                named = ", ".join(
                    f"{m.rsplit('.', 1)[-1]}"
                    f" {by_name[m].scheme.name if m in by_name else 'unquantized'}"
                    for m in members
                )
                problems.append(
                    f"{runtime} merges {members[0].rpartition('.')[0]}: {named}; give them one"
                    " scheme, or leave all of them"
                )
        # vLLM lets the last of a merged set end within a block; SGLang's check takes every member.
        end = -1 if runtime == "vllm" else None
        uneven = [
            by_name[m]
            for members in fused_sets(by_name)
            for m in members[:end]
            if by_name[m].scheme.weight.granularity.name == "block"
        ]
        problems += _uneven(
            runtime,
            [
                linear
                for linear in uneven
                if linear.shape[0] % linear.scheme.weight.granularity.rows
            ],
            0,
        )
    if runtime == "transformers":
        blocks = [
            linear for linear in quantized if linear.scheme.weight.granularity.name == "block"
        ]
        problems += _uneven(
            runtime,
            [
                linear
                for linear in blocks
                if linear.shape[1] % linear.scheme.weight.granularity.columns
            ],
            1,
        )
    return problems


def _uneven(runtime: str, linears: list[QuantizedLinearInfo], axis: int) -> list[str]:
    if not linears:
        return []
    first = linears[0]
    size = (first.scheme.weight.granularity.rows, first.scheme.weight.granularity.columns)[axis]
    what = ("out_features", "in_features")[axis]
    more = f" and {len(linears) - 1} more" if len(linears) > 1 else ""
    return [
        f"{runtime} can't load {first.scheme.name} here: {what} {first.shape[axis]} of"
        f" {first.name}{more} is no multiple of {size}; use fp8-dynamic instead"
    ]


def not_found_by_transformers(checkpoint: Checkpoint, linears: Iterable[str]) -> str:
    """Why transformers' loader would leave a checkpoint's experts random, or "". linears: the
    quantized ones, by their names on disk.
    """
    linears = list(linears)
    if not any(".experts." in name for name in linears):
        return ""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    try:
        model = build_skeleton(checkpoint)
    except (
        CheckpointError
    ):  # a model of remote code, or one that transformers doesn't know and so doesn't load
        return ""
    if any(
        type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION for module in model.modules()
    ):
        return ""  # it takes these apart itself where a checkpoint is quantized (Llama 4's)
    dropped = sorted(Restacked.of(model, linears).parts())
    if not dropped:
        return ""
    return (
        f"transformers looks for these experts stacked and gives them random weights ({dropped[0]}"
        f" and {len(dropped) - 1} more); leave them with --ignore"
    )
