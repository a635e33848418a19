"""Which runtimes can load a checkpoint, and how hardware runs a scheme.

`schemes.scheme.CATALOGUE` says which runtimes support a scheme, and `checkpoint.formats` which
support a format. All other limits of runtimes are rules in RULES: functions that find problems in a
`Deployment`.

To add a rule, write a function and add it to RULES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from quantkit.checkpoint.formats import DEFAULT_FORMAT, FORMATS, Format
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError, RuntimeLimitError
from quantkit.models.assignment import QuantizedLinearInfo
from quantkit.models.experts import Restacked
from quantkit.models.skeleton import build_skeleton
from quantkit.models.tensor_roles import fused_layers
from quantkit.schemes.scheme import QuantScheme
from quantkit.schemes.serving import NATIVE, WEIGHTS


@dataclass(frozen=True)
class Deployment:
    """A checkpoint that is to be loaded by a runtime.

    runtime: one of `serving.RUNTIMES`.
    linears: the quantized Linears.
    skipped: names of the Linears that aren't quantized.
    file_format: the checkpoint format.
    checkpoint: the files, for rules that build the model's skeleton; None disables those rules.
    by_name: module name → quantized Linear.
    """

    runtime: str
    linears: tuple[QuantizedLinearInfo, ...]
    skipped: tuple[str, ...]
    file_format: Format
    checkpoint: Checkpoint | None = None
    by_name: dict[str, QuantizedLinearInfo] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {linear.name: linear for linear in self.linears})

    @property
    def schemes(self) -> list[QuantScheme]:
        """The schemes of all Linears, without duplicates."""
        return list(dict.fromkeys(linear.scheme for linear in self.linears))


Rule = Callable[[Deployment], Iterator[str]]


def runtime_problems(
    runtime: str,
    quantized: Iterable[QuantizedLinearInfo],
    skipped: Iterable[str],
    file_format: str = DEFAULT_FORMAT,
    checkpoint: Checkpoint | None = None,
) -> list[str]:
    """Why a runtime would refuse or misread a checkpoint, one sentence each; empty if it loads.

    The arguments are the fields of `Deployment`, with the format by name.
    """
    deployment = Deployment(
        runtime, tuple(quantized), tuple(skipped), FORMATS[file_format], checkpoint
    )
    return [problem for rule in RULES for problem in rule(deployment)]


# ---- Schemes.


def scheme_is_loaded(deployment: Deployment) -> Iterator[str]:
    """The runtime supports each scheme, in this checkpoint format."""
    runtime, file_format = deployment.runtime, deployment.file_format
    for scheme in deployment.schemes:
        row = scheme.row
        if row is None:
            yield (
                f"{runtime} is not known to load {scheme.name} ({scheme.weight}, inputs"
                f" {scheme.input or 'as they are'}); choose one of quantkit's schemes"
            )
            continue
        of_format = file_format.runtimes
        support = (row.runtimes if of_format is None else of_format)[runtime]
        if not support.loads:
            form = "" if of_format is None else f" in the format {file_format.name}"
            yield f"{runtime} can't load {scheme.name}{form}: it {support.note}"


# ---- How weights are stored.

# vLLM is missing here because it transposes each `weight` of such a model when it loads it, codes
# too: its CPU build computes the same probabilities for an INT8 GPT-2 as eval.
_TRANSPOSED = {
    "sglang": (
        "is not known to load quantized weights that are stored as [in_features, out_features]"
    ),
    "tensorrt-llm": (
        "is not known to load quantized weights that are stored as [in_features, out_features]"
    ),
    "transformers": (
        "silently uses the codes of weights that are stored as [in_features, out_features] as"
        " weights"
    ),
}


def no_transposed_weights(deployment: Deployment) -> Iterator[str]:
    """No quantized weight is stored transposed, as GPT-2's Conv1D is."""
    transposed = [linear for linear in deployment.linears if linear.is_transposed]
    if transposed and deployment.runtime in _TRANSPOSED:
        yield (
            f"{deployment.runtime} {_TRANSPOSED[deployment.runtime]} ({transposed[0].name} and the"
            " others, which are Conv1D)"
        )


# ---- Kinds of layers.


def no_mamba_mixers_in_vllm(deployment: Deployment) -> Iterator[str]:
    """vLLM doesn't quantize the Linears of Mamba 1 mixers."""
    if deployment.runtime != "vllm":
        return
    mixers = [
        name
        for name in deployment.by_name
        if name.endswith(".x_proj")
        and f"{name.removesuffix('x_proj')}in_proj" in deployment.by_name
    ]
    if mixers:
        yield (
            f"vllm has no quantized Mamba 1 mixers ({mixers[0].rpartition('.')[0]} and others);"
            " skip them with `ignore`"
        )


def scheme_is_loaded_for_experts(deployment: Deployment) -> Iterator[str]:
    """The runtime supports the schemes of experts for experts."""
    refused = {
        scheme
        for scheme in deployment.schemes
        if (row := scheme.row) is not None and deployment.runtime in row.refuses_experts
    }
    for linear in deployment.linears:
        if ".experts." in linear.name and linear.scheme in refused:
            yield (
                f"{deployment.runtime} can't load experts in {linear.scheme.name} ({linear.name}"
                " and the others); use fp8-dynamic"
            )
            return


# ---- Fused layers: Linears that vLLM and SGLang merge into one.

_MERGING = ("vllm", "sglang")


def one_scheme_per_fused_layer(deployment: Deployment) -> Iterator[str]:
    """Fused layers have the same scheme, or are all unquantized."""
    if deployment.runtime not in _MERGING:
        return
    by_name = deployment.by_name
    scheme_of = {name: linear.scheme for name, linear in by_name.items()}
    for members in fused_layers([*by_name, *dict.fromkeys(deployment.skipped)]):
        schemes = [scheme_of.get(member) for member in members]
        if len(set(schemes)) > 1:
            named = ", ".join(
                f"{member.rsplit('.', 1)[-1]} {scheme.name if scheme else 'unquantized'}"
                for member, scheme in zip(members, schemes)
            )
            yield (
                f"{deployment.runtime} merges Linears of {members[0].rpartition('.')[0]}: {named};"
                " give them one scheme, or skip all of them"
            )


def whole_blocks_in_fused_layers(deployment: Deployment) -> Iterator[str]:
    """No scale block reaches over the boundary of fused layers."""
    if deployment.runtime not in _MERGING:
        return
    # In vLLM, the last member may end within a block; SGLang requires whole blocks of all.
    end = -1 if deployment.runtime == "vllm" else None
    members = [
        deployment.by_name[member]
        for fused in fused_layers(deployment.by_name)
        for member in fused[:end]
    ]
    yield from _uneven_blocks(deployment.runtime, members, 0)


def whole_blocks_in_transformers(deployment: Deployment) -> Iterator[str]:
    """In transformers, in_features is a multiple of the block size."""
    if deployment.runtime == "transformers":
        yield from _uneven_blocks(deployment.runtime, deployment.linears, 1)


def _uneven_blocks(
    runtime: str, linears: Iterable[QuantizedLinearInfo], axis: int
) -> Iterator[str]:
    """One sentence for all Linears whose out_features (axis 0) or in_features (axis 1) aren't a
    multiple of the block size.
    """
    uneven = []
    for linear in linears:
        granularity = linear.scheme.weight.granularity
        size = (granularity.rows, granularity.columns)[axis]
        if granularity.name == "block" and size and linear.shape[axis] % size:
            uneven.append((linear, size))
    if uneven:
        first, size = uneven[0]
        more = f" and {len(uneven) - 1} more" if len(uneven) > 1 else ""
        yield (
            f"{runtime} can't load {first.scheme.name} here:"
            f" {('out_features', 'in_features')[axis]} {first.shape[axis]} of {first.name}{more} is"
            f" not a multiple of {size}; use fp8-dynamic instead"
        )


# ---- Rules that build the model's skeleton.


def experts_are_found_by_transformers(deployment: Deployment) -> Iterator[str]:
    """transformers finds the experts' tensors under their names."""
    if deployment.runtime == "transformers" and deployment.checkpoint is not None:
        problem = not_found_by_transformers(deployment.checkpoint, deployment.by_name)
        if problem:
            yield problem


def not_found_by_transformers(checkpoint: Checkpoint, linears: Iterable[str]) -> str:
    """Why transformers' loader wouldn't find a checkpoint's experts; "" if it finds them.

    linears: names of the quantized Linears on disk.
    """
    linears = list(linears)
    if not any(".experts." in name for name in linears):
        return ""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    try:
        model = build_skeleton(checkpoint)
    except CheckpointError:
        return ""  # a model with code of its own, or one that transformers doesn't know
    if any(
        type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION for module in model.modules()
    ):
        return ""  # transformers splits these itself in a quantized checkpoint (Llama 4)
    dropped = sorted(Restacked.of(model, linears).parts())
    if not dropped:
        return ""
    return (
        f"transformers expects these experts as a stack and would give them random weights"
        f" ({dropped[0]} and {len(dropped) - 1} more); skip them with `ignore`"
    )


# Problems are reported in this order. An export for a runtime reports only the first.
RULES: list[Rule] = [
    scheme_is_loaded,
    no_transposed_weights,
    no_mamba_mixers_in_vllm,
    scheme_is_loaded_for_experts,
    one_scheme_per_fused_layer,
    whole_blocks_in_fused_layers,
    whole_blocks_in_transformers,
    experts_are_found_by_transformers,
]


# ---- Hardware.


def hardware_mode(scheme: QuantScheme, hardware: str) -> str:
    """NATIVE, WEIGHTS, or the reason why vLLM can't run the scheme on this hardware."""
    return scheme.hardware[hardware]


def as_computed(scheme: QuantScheme, hardware: str | None) -> QuantScheme:
    """The scheme that vLLM computes on this hardware: without input quantization if the hardware
    runs it as W8A16. None for `hardware` returns the scheme itself.

    Raises RuntimeLimitError if the hardware can't run the scheme.
    """
    if hardware is None:
        return scheme
    mode = hardware_mode(scheme, hardware)
    if mode == NATIVE:
        return scheme
    if mode == WEIGHTS:
        return replace(scheme, input=None)
    raise RuntimeLimitError(
        f"{hardware} can't run {scheme.name}: {mode}",
        hint="choose another `hardware` or leave it out",
    )
