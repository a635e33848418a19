"""Quantization schemes: how one layer's weight and inputs are quantized, and the catalogue of the
schemes that quantkit names.

To add a scheme, add a row to CATALOGUE at the end of this file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import RecipeError
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8
from quantkit.schemes.quant_spec import CHANNEL, TENSOR, TOKEN, QuantSpec, block, group, quoted
from quantkit.schemes.serving import HARDWARE, MULTIPLES_OF_128, NATIVE, WEIGHTS, YES, Support


@dataclass(frozen=True)
class QuantScheme:
    """How one layer is quantized: its weight, and its input activations unless they stay as they
    are.
    """

    name: str
    weight: QuantSpec
    input: QuantSpec | None = None

    def __post_init__(self) -> None:
        if self.weight.dynamic or self.weight.granularity.name == "token":
            raise RecipeError(
                f"scheme {self.name}: weights are fixed, so they can be neither dynamic nor per"
                " token"
            )
        if self.input is None:
            return
        if self.input.format != self.weight.format:
            raise RecipeError(
                f"scheme {self.name}: weights in {self.weight.format.name} and inputs in"
                f" {self.input.format.name} have no kernel; use one format for both"
            )
        if self.input.dynamic and self.input.granularity.name not in ("token", "group"):
            raise RecipeError(
                f"scheme {self.name}: dynamic inputs are per token or per group, not per"
                f" {self.input.granularity.name}"
            )
        if not self.input.dynamic and self.input.granularity != TENSOR:
            raise RecipeError(
                f"scheme {self.name}: static inputs are per tensor, not per"
                f" {self.input.granularity.name}"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether a static input scale has to be measured first."""
        return self.input is not None and not self.input.dynamic

    @property
    def row(self) -> CatalogueRow | None:
        """The catalogue's row that says how this scheme is served, whatever it is called; None
        where no row speaks of it.
        """
        rows = CATALOGUE.values()
        same = (row for row in rows if row.scheme.same_arithmetic == self.same_arithmetic)
        return next(same, None) or next((row for row in rows if row.covers(self)), None)

    @property
    def family(self) -> str:
        """The name of the scheme that runtimes treat this one as, or "unknown"."""
        row = self.row
        return row.scheme.name if row is not None else UNKNOWN

    @property
    def same_arithmetic(self) -> tuple[QuantSpec, QuantSpec | None]:
        """What decides codes and results; the name does not."""
        return self.weight, self.input

    @classmethod
    def parse(cls, description: Any, where: str = "scheme") -> QuantScheme:
        """A scheme from its name or alias, or from a mapping {weights: ..., input_activations:
        ...}.
        """
        if isinstance(description, QuantScheme):
            return description
        if isinstance(description, str):
            return _scheme_named(description)
        if not isinstance(description, Mapping) or "weights" not in description:
            raise RecipeError(
                f"{where} must be a scheme's name or a mapping with 'weights', not {description!r}"
            )
        unknown = set(description) - {"weights", "input_activations"}
        if unknown:
            raise RecipeError(
                f"{where} has the unknown key {quoted(unknown)}; allowed are 'weights' and"
                " 'input_activations'"
            )
        weight = QuantSpec.from_arguments(description["weights"], f"{where}: weights")
        inputs = description.get("input_activations")
        input_spec = (
            None
            if inputs is None
            else QuantSpec.from_arguments(inputs, f"{where}: input_activations")
        )
        return cls.of(weight, input_spec)

    @classmethod
    def of(cls, weight: QuantSpec, input_spec: QuantSpec | None) -> QuantScheme:
        """The scheme with this arithmetic, under its usual name where it has one."""
        for row in CATALOGUE.values():
            if row.scheme.same_arithmetic == (weight, input_spec):
                return row.scheme
        kind = f"{weight.format.kind.replace('float', 'fp')}{weight.format.bits}"
        shape = {"group": f"group{weight.granularity.columns}"}.get(
            weight.granularity.name, weight.granularity.name
        )
        mode = (
            "weight-only" if input_spec is None else "dynamic" if input_spec.dynamic else "static"
        )
        return cls(f"{kind}-{shape}-{mode}", weight, input_spec)

    def to_description(self) -> Any:
        """What `parse` reads back: the name where it says everything."""
        row = CATALOGUE.get(self.name)
        if row is not None and row.scheme == self:
            return self.name
        return {
            "weights": self.weight.to_arguments(),
            "input_activations": self.input and self.input.to_arguments(),
        }


UNKNOWN = "unknown"  # the family of a scheme that no row of the catalogue speaks of


def _nothing_else(scheme: QuantScheme) -> bool:
    return False


@dataclass(frozen=True)
class CatalogueRow:
    """One scheme: what it computes, what it is called, and where it is served.

    scheme: name, weight and input.
    runtimes: runtime → whether it loads the scheme.
    hardware: hardware → NATIVE, WEIGHTS, or the reason why vLLM can't serve the scheme there.
    aliases: other names that recipes and `--scheme` may use.
    refuses_experts: runtimes that load the scheme for Linears, but not for experts.
    covers: schemes that are no row of their own, and are served as this one is.
    default_rank: the place among schemes that are served equally widely, for `quantize` without a
        scheme. Speed and size come first, then loss. None: never a default, because its static
        scales need calibration.
    """

    scheme: QuantScheme
    runtimes: Mapping[str, Support]
    hardware: Mapping[str, str]
    aliases: tuple[str, ...] = ()
    refuses_experts: tuple[str, ...] = ()
    covers: Callable[[QuantScheme], bool] = _nothing_else
    default_rank: int | None = None


def _on_runtimes(**others: Support) -> dict[str, Support]:
    """Every runtime loads it, except `others`."""
    loads = {"vllm": YES, "sglang": YES, "tensorrt-llm": YES, "transformers": YES}
    return loads | {name.replace("_", "-"): support for name, support in others.items()}


def _on_hardware(**others: str) -> dict[str, str]:
    """All hardware computes it natively, except `others`."""
    return dict.fromkeys(HARDWARE, NATIVE) | others


def _is_int8_in_groups(scheme: QuantScheme) -> bool:
    weight = scheme.weight
    return (
        scheme.input is None
        and weight.format == INT8
        and weight.scale_format is None
        and weight.granularity.name == "group"
    )


_E4M3_CHANNEL, _INT8_CHANNEL = QuantSpec(FP8_E4M3, CHANNEL), QuantSpec(INT8, CHANNEL)
_E4M3_TENSOR, _INT8_TENSOR = QuantSpec(FP8_E4M3, TENSOR), QuantSpec(INT8, TENSOR)
_E4M3_TOKEN, _INT8_TOKEN = (
    QuantSpec(FP8_E4M3, TOKEN, dynamic=True),
    QuantSpec(INT8, TOKEN, dynamic=True),
)
# FP8 products need Ada or later; before it, vLLM keeps FP8 weights and leaves inputs alone.
_FP8_HARDWARE = _on_hardware(ampere=WEIGHTS, turing=WEIGHTS, cpu=WEIGHTS)
_STATIC_FP8_HARDWARE = _FP8_HARDWARE | {
    "cpu": "vLLM's CPU build does not start with static FP8 inputs"
}
_INT8_HARDWARE = _on_hardware(blackwell="vLLM has no INT8 kernel for Blackwell")
_TRT_NEEDS_INPUTS = Support(False, "needs quantized inputs")
_TRT_MISREADS_INT8 = Support(False, "reads INT8 as FP8 in silence")

CATALOGUE: dict[str, CatalogueRow] = {
    row.scheme.name: row
    for row in (
        CatalogueRow(
            QuantScheme("fp8-dynamic", _E4M3_CHANNEL, _E4M3_TOKEN),
            _on_runtimes(),
            _FP8_HARDWARE,
            aliases=("FP8_DYNAMIC",),
            default_rank=0,
        ),
        CatalogueRow(
            QuantScheme("fp8-static", _E4M3_CHANNEL, _E4M3_TENSOR),
            _on_runtimes(
                tensorrt_llm=Support(False, "takes channel scales only with per-token inputs")
            ),
            _STATIC_FP8_HARDWARE,
            aliases=("FP8_STATIC",),
            refuses_experts=("vllm",),
        ),
        CatalogueRow(
            QuantScheme("fp8-tensor", _E4M3_TENSOR, _E4M3_TENSOR),
            _on_runtimes(tensorrt_llm=Support(False, "raises on per-tensor weights")),
            _STATIC_FP8_HARDWARE,
            aliases=("FP8",),
        ),
        CatalogueRow(
            QuantScheme(
                "fp8-block",
                QuantSpec(FP8_E4M3, block(128, 128)),
                QuantSpec(FP8_E4M3, group(128), dynamic=True),
            ),
            _on_runtimes(
                vllm=MULTIPLES_OF_128, sglang=MULTIPLES_OF_128, transformers=MULTIPLES_OF_128
            ),
            _FP8_HARDWARE,
            aliases=("FP8_BLOCK",),
            refuses_experts=("transformers",),
            default_rank=2,
        ),
        CatalogueRow(
            QuantScheme(
                "mxfp8",
                QuantSpec(FP8_E4M3, group(32), scale_format=E8M0),
                QuantSpec(FP8_E4M3, group(32), True, E8M0),
            ),
            _on_runtimes(
                sglang=Support(False, "has no MXFP8"),
                tensorrt_llm=Support(False, "is not known to load it"),
            ),
            dict.fromkeys(HARDWARE, WEIGHTS)
            | {"blackwell": NATIVE, "cpu": "vLLM's CPU build has no kernel for MXFP8"},
            aliases=("MXFP8",),
            refuses_experts=("transformers",),
            default_rank=5,
        ),
        CatalogueRow(
            QuantScheme("fp8-weight-only", _E4M3_CHANNEL),
            _on_runtimes(tensorrt_llm=_TRT_NEEDS_INPUTS),
            _on_hardware(
                cpu="vLLM's CPU build has no kernel for FP8 weights with unquantized inputs"
            ),
            refuses_experts=("vllm",),
            default_rank=4,
        ),
        CatalogueRow(
            QuantScheme("int8-dynamic", _INT8_CHANNEL, _INT8_TOKEN),
            _on_runtimes(sglang=Support(True, "dense models"), tensorrt_llm=_TRT_MISREADS_INT8),
            _INT8_HARDWARE,
            aliases=("W8A8", "INT8"),
            refuses_experts=("sglang", "transformers"),
            default_rank=1,
        ),
        CatalogueRow(
            QuantScheme("int8-static", _INT8_CHANNEL, _INT8_TENSOR),
            _on_runtimes(
                sglang=Support(False, "ignores static input scales"),
                tensorrt_llm=_TRT_MISREADS_INT8,
            ),
            _INT8_HARDWARE,
            refuses_experts=("vllm", "sglang", "transformers"),
        ),
        CatalogueRow(
            QuantScheme("int8-weight-only", _INT8_CHANNEL),
            _on_runtimes(tensorrt_llm=_TRT_NEEDS_INPUTS),
            _on_hardware(cpu="vLLM's CPU build has no kernel for packed INT8 weights"),
            aliases=("W8A16",),
            refuses_experts=("transformers",),
            covers=_is_int8_in_groups,
            default_rank=3,
        ),
    )
}
SCHEMES: dict[str, QuantScheme] = {name: row.scheme for name, row in CATALOGUE.items()}


def _scheme_named(name: str) -> QuantScheme:
    spelled = name.strip().lower()
    names = {key: row.scheme for key, row in CATALOGUE.items()}
    names |= {alias.lower(): row.scheme for row in CATALOGUE.values() for alias in row.aliases}
    for candidate in (spelled, spelled.replace("_", "-"), spelled.replace("-", "_")):
        if candidate in names:
            return names[candidate]
    close = difflib.get_close_matches(spelled.replace("_", "-"), list(names), n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise RecipeError(f"unknown scheme '{name}'; {hint}the schemes are {', '.join(CATALOGUE)}")
