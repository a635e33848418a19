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
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8, NumberFormat
from quantkit.schemes.quant_spec import CHANNEL, TENSOR, TOKEN, QuantSpec, block, group, quoted
from quantkit.schemes.serving import HARDWARE, MULTIPLES_OF_128, NATIVE, WEIGHTS, YES, Support


@dataclass(frozen=True)
class QuantScheme:
    """How one layer is quantized.

    name: name of the scheme; it has no effect on arithmetic.
    weight: how the weight is quantized.
    input: how the input activations are quantized; None if they stay unquantized.

    Raises RecipeError for combinations that no kernel computes.
    """

    name: str
    weight: QuantSpec
    input: QuantSpec | None = None

    def __post_init__(self) -> None:
        if self.weight.dynamic or self.weight.granularity.name == "token":
            raise RecipeError(
                f"scheme {self.name}: weights are constant, so they can be neither dynamic nor per"
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
        """Whether it has a static input scale, which calibration measures."""
        return self.input is not None and not self.input.dynamic

    @property
    def row(self) -> CatalogueRow | None:
        """The row of the catalogue with the same arithmetic, or one that covers this scheme; None
        if there is none.
        """
        rows = CATALOGUE.values()
        same = (row for row in rows if row.scheme.same_arithmetic == self.same_arithmetic)
        return next(same, None) or next((row for row in rows if row.covers(self)), None)

    @property
    def hardware(self) -> Mapping[str, str]:
        """Hardware → NATIVE, WEIGHTS, or the reason why vLLM can't run the scheme there.

        Kernels depend on the number format and on how inputs are scaled, not on the sizes of
        groups and blocks: a scheme without a row runs like the first row that agrees in these.
        """
        rows = [row for row in CATALOGUE.values() if _kernel(row.scheme) == _kernel(self)]
        row = self.row or (rows[0] if rows else None)
        unknown = f"it is not known how vLLM serves {self.weight} there"
        return row.hardware if row is not None else dict.fromkeys(HARDWARE, unknown)

    @property
    def same_arithmetic(self) -> tuple[QuantSpec, QuantSpec | None]:
        """The parts that determine codes and results: all but the name."""
        return self.weight, self.input

    @classmethod
    def parse(cls, description: Any, where: str = "scheme") -> QuantScheme:
        """Read a scheme from a recipe.

        description: a name, an alias, or a mapping {weights: ..., input_activations: ...}.
        where: names the description in errors.

        Raises RecipeError for an unknown name or arguments that quantkit doesn't support.
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
        """The scheme with these specs: the catalogue's if it has one, else one with a new name."""
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
        """The name if the catalogue has this scheme, else a mapping; `parse` reads both."""
        row = CATALOGUE.get(self.name)
        if row is not None and row.scheme == self:
            return self.name
        return {
            "weights": self.weight.to_arguments(),
            "input_activations": self.input and self.input.to_arguments(),
        }


def _kernel(scheme: QuantScheme) -> tuple[NumberFormat, str]:
    """What decides which kernel runs a scheme."""
    if scheme.weight.scale_format is not None:
        return scheme.weight.format, "power-of-two scales"
    if scheme.input is None:
        return scheme.weight.format, "unquantized inputs"
    return scheme.weight.format, "dynamic inputs" if scheme.input.dynamic else "static inputs"


def _nothing_else(scheme: QuantScheme) -> bool:
    return False


@dataclass(frozen=True)
class CatalogueRow:
    """A scheme of the catalogue.

    scheme: its name and arithmetic.
    runtimes: runtime → whether it supports the scheme.
    hardware: hardware → NATIVE, WEIGHTS, or the reason why vLLM can't run the scheme there.
    aliases: other names for it.
    refuses_experts: runtimes that load the scheme for Linears, but not for experts.
    covers: whether a scheme without a row is supported like this one.
    default_rank: rank among schemes with equal support, when `quantize` chooses one: first by speed
        and size, then by loss. None: never chosen, because static scales need calibration.
    """

    scheme: QuantScheme
    runtimes: Mapping[str, Support]
    hardware: Mapping[str, str]
    aliases: tuple[str, ...] = ()
    refuses_experts: tuple[str, ...] = ()
    covers: Callable[[QuantScheme], bool] = _nothing_else
    default_rank: int | None = None


def _on_runtimes(**others: Support) -> dict[str, Support]:
    """Runtime → support: YES, except for `others`, whose `_` stands for `-`."""
    loads = {"vllm": YES, "sglang": YES, "tensorrt-llm": YES, "transformers": YES}
    return loads | {name.replace("_", "-"): support for name, support in others.items()}


def _on_hardware(**others: str) -> dict[str, str]:
    """Hardware → NATIVE, except for `others`."""
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
# FP8 matrix products need Ada or later; on older hardware, vLLM runs FP8 weights as W8A16.
_FP8_HARDWARE = _on_hardware(ampere=WEIGHTS, turing=WEIGHTS, cpu=WEIGHTS)
_STATIC_FP8_HARDWARE = _FP8_HARDWARE | {
    "cpu": "vLLM's CPU build does not start with static FP8 inputs"
}
_INT8_HARDWARE = _on_hardware(blackwell="vLLM has no INT8 kernel for Blackwell")
_TRT_NEEDS_INPUTS = Support(False, "needs quantized inputs")
_TRT_MISREADS_INT8 = Support(False, "silently reads INT8 as FP8")

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
    """The scheme of a name or alias, in any case. Raises RecipeError for an unknown name."""
    spelled = name.strip().lower()
    names = {key: row.scheme for key, row in CATALOGUE.items()}
    names |= {alias.lower(): row.scheme for row in CATALOGUE.values() for alias in row.aliases}
    for candidate in (spelled, spelled.replace("_", "-"), spelled.replace("-", "_")):
        if candidate in names:
            return names[candidate]
    close = difflib.get_close_matches(spelled.replace("_", "-"), list(names), n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise RecipeError(f"unknown scheme '{name}'; {hint}the schemes are {', '.join(CATALOGUE)}")
