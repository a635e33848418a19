"""Which Linears of a checkpoint a recipe quantizes, and in which scheme, decided from names, shapes
and dtypes alone.

`calibrate` and `export` both use this decision, so an export can always use a calibration of the
same recipe. A recipe that doesn't fit the model raises an error of one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantkit.checkpoint.formats import DEFAULT_FORMAT, FORMATS, Format, read_quantization_config
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.shard_plan import TensorPlan
from quantkit.checkpoint.stream import block_scales
from quantkit.errors import CheckpointError, RecipeError
from quantkit.models.linear_views import as_stored_where_skipped, find_stacks
from quantkit.models.task import task_of
from quantkit.models.tensor_roles import ModelTensors, ModuleInfo, fused_layers, linears_of
from quantkit.schemes.pattern import Pattern
from quantkit.schemes.quant_spec import TENSOR
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

FLOATS = ("BF16", "F16", "F32")
# How the reasons of two kinds of skipped tensors begin.
IGNORED = "ignored by"
SHAPE = "skipped because of its shape"


@dataclass(frozen=True)
class QuantizedLinearInfo:
    """A quantized Linear, as an export plans it or a checkpoint stores it.

    name: its module.
    shape: [out_features, in_features].
    scheme: how it is quantized.
    is_transposed: whether its `weight` is stored as [in_features, out_features], as in the original
        checkpoint (Conv1D).
    """

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme
    is_transposed: bool = False

    def tensors(self, file_format: Format) -> list[TensorPlan]:
        """The tensors that a checkpoint format stores for it."""
        tensors = dict(file_format.tensors(self.scheme, self.shape))
        if self.is_transposed and "weight" in tensors:
            dtype, shape = tensors["weight"]
            tensors["weight"] = (dtype, shape[::-1])
        return [
            TensorPlan(f"{self.name}.{suffix}", dtype, shape)
            for suffix, (dtype, shape) in tensors.items()
        ]


@dataclass(frozen=True)
class Assignment:
    """The decision about each tensor of a checkpoint.

    checkpoint: quantized weights as views [out_features, in_features], everything else as stored.
    roles: tensor of `checkpoint` → its role; the block scales of an FP8-block model have none.
    linears: module → the Linear, for each one that is quantized.
    reasons: tensor → why it isn't quantized, unless a general rule skips it.
    block_scales: weight → the tensor of its block scales, if the model is in FP8 blocks already.
    """

    checkpoint: Checkpoint
    roles: Mapping[str, ModuleInfo]
    linears: Mapping[str, QuantizedLinearInfo]
    reasons: Mapping[str, str]
    block_scales: Mapping[str, str]


def assign_layers(
    checkpoint: Checkpoint,
    recipe: Recipe,
    file_format: str = DEFAULT_FORMAT,
    allow_unreached: bool = False,
) -> Assignment:
    """Assign a scheme to each Linear that the recipe quantizes.

    file_format: name of one of `checkpoint.formats.FORMATS`.
    allow_unreached: skip weights that quantkit doesn't support, instead of refusing the model.

    Raises CheckpointError or RecipeError if the recipe doesn't fit the model.
    """
    task_of(checkpoint.config, checkpoint.path)
    form = FORMATS[file_format]
    source = read_quantization_config(checkpoint.config)
    if source is not None and not source.file_format.is_source:
        raise CheckpointError(
            f"{checkpoint.path} is quantized already ({source.file_format.name}); use the original"
            " model, or one in FP8 blocks"
        )
    obstacle = form.obstacle(recipe.schemes, recipe.kv_cache is not None)
    if obstacle:
        raise RecipeError(obstacle)
    tensors = linears_of(checkpoint)
    scales = block_scales(tensors.checkpoint)
    scale_tensors = set(scales.values())
    roles = {name: role for name, role in tensors.roles.items() if name not in scale_tensors}
    if not allow_unreached:
        _refuse_unreached(recipe, roles)
    stack_of = _stack_names(checkpoint)
    _require_matching_patterns(recipe, tensors, roles, stack_of)
    schemes, reasons = _assign(recipe, roles, stack_of, form)
    _require_one_scheme_in_fused_layers(tensors, schemes)
    if not schemes:
        raise RecipeError(
            f"this recipe quantizes nothing in {checkpoint.path}:"
            f" {next(iter(reasons.values()), 'it has no Linear in numbered decoder blocks')}"
        )
    mixed, whole = as_stored_where_skipped(
        checkpoint, tensors.checkpoint, {f"{module}.weight" for module in schemes}
    )
    roles = {
        name: (
            roles.get(name)
            or replace(
                roles[whole[name]], name=name.removesuffix(".weight"), tensor=name, shape=info.shape
            )
        )
        for name, info in mixed.tensors.items()
        if name not in scale_tensors
    }
    reasons |= {name: reasons[part] for name, part in whole.items() if part in reasons}
    linears = {}
    for module, scheme in schemes.items():
        rows, columns = mixed.tensors[f"{module}.weight"].shape
        linears[module] = QuantizedLinearInfo(
            module, (rows, columns), scheme, tensors.is_transposed(module)
        )
    assignment = Assignment(mixed, roles, linears, reasons, scales)
    _refuse_dtypes(assignment)
    _refuse_clashes(assignment, form)
    return assignment


def _refuse_unreached(recipe: Recipe, roles: Mapping[str, ModuleInfo]) -> None:
    """Raise CheckpointError if an unsupported weight isn't ignored by name: a half-quantized model
    is no result.
    """
    unreached = [
        role
        for role in roles.values()
        if role.kind == "unreached" and _ignored_by(recipe, role.tensor, role.name) is None
    ]
    if unreached:
        raise CheckpointError(
            f"{unreached[0].tensor} can't be quantized by this version:"
            f" {unreached[0].reason}{more(len(unreached))}",
            hint="add it to `ignore`, or pass `allow_unreached=True` to skip all such weights",
        )


def _ignored_by(recipe: Recipe, *names: str) -> Pattern | None:
    return next((pattern for pattern in recipe.ignore if any(map(pattern.matches, names))), None)


def _stack_names(stored: Checkpoint) -> dict[str, str]:
    """Name of an expert's Linear → name of the stack that holds it, by which it can be ignored
    too.
    """
    stacks = find_stacks({name: info.shape for name, info in stored.tensors.items()})
    return {
        stack.linear(expert, leaf): name.removesuffix(".weight")
        for name, stack in stacks.items()
        for expert in range(stack.shape[0])
        for leaf in stack.leaves
    }


def _require_matching_patterns(
    recipe: Recipe,
    tensors: ModelTensors,
    roles: Mapping[str, ModuleInfo],
    stack_of: Mapping[str, str],
) -> None:
    """Raise RecipeError for a pattern that matches nothing: a typo would quantize, or skip, the
    wrong layers.
    """
    modules = tensors.modules()
    is_tied = "lm_head" not in modules and bool(tensors.stored.config.get("tie_word_embeddings"))
    for pattern in recipe.ignore:
        # A tied lm_head has no tensor of its own, but recipes name it to be safe.
        pattern.require_match(
            [*modules, *roles, *stack_of.values(), *(["lm_head"] if is_tied else [])], "ignore"
        )
    for pattern, _ in recipe.layers:
        if (
            is_tied
            and pattern.matches("lm_head")
            and not any(pattern.matches(name) for name in modules)
        ):
            raise RecipeError(
                f"the layer pattern '{pattern.text}' means lm_head, which is tied to the embedding"
                " here and has no weight of its own; leave the entry out"
            )
        pattern.require_match(modules, "layer")


def _assign(
    recipe: Recipe,
    roles: Mapping[str, ModuleInfo],
    stack_of: Mapping[str, str],
    file_format: Format,
) -> tuple[dict[str, QuantScheme], dict[str, str]]:
    """Module → scheme of each quantized Linear, and tensor → reason of each one that is skipped.

    stack_of: an expert's Linear → the stack that holds it.
    """
    schemes: dict[str, QuantScheme] = {}
    reasons: dict[str, str] = {}
    used: set[Pattern] = set()
    for tensor, role in roles.items():
        ignored = _ignored_by(recipe, role.name, tensor, stack_of.get(role.name, role.name))
        if role.kind == "unreached":
            reasons[tensor] = (
                f"{IGNORED} '{ignored.text}', and unsupported: {role.reason}"
                if ignored
                else f"unsupported: {role.reason}"
            )
        elif not tensor.endswith(".weight"):
            continue
        elif ignored is not None:
            reasons[tensor] = f"{IGNORED} '{ignored.text}'"
        elif (choice := _scheme_for(role, recipe)) is not None:
            scheme, pattern = choice
            if pattern is not None:
                used.add(pattern)
            obstacle = file_format.shape_obstacle(scheme, role.shape)
            if obstacle:
                reasons[tensor] = f"{SHAPE}: {obstacle}"
            else:
                schemes[role.name] = scheme
    for pattern, _ in recipe.layers:
        if pattern not in used:
            raise RecipeError(
                f"the layer pattern '{pattern.text}' never applies: an earlier entry or 'ignore'"
                " takes all that it matches; reorder them or leave it out"
            )
    return schemes, reasons


def _scheme_for(role: ModuleInfo, recipe: Recipe) -> tuple[QuantScheme, Pattern | None] | None:
    """The scheme of a weight and the `layers` pattern that gives it, or None if the recipe skips
    the weight.
    """
    pattern, scheme = next(
        ((pattern, scheme) for pattern, scheme in recipe.layers if pattern.matches(role.name)),
        (None, recipe.scheme),
    )
    if role.kind != "linear":
        if pattern is None:
            return None
        if (
            role.kind not in ("lm_head", "router", "outside the blocks", "other tower")
            or len(role.shape) != 2
        ):
            raise RecipeError(
                f"the layer pattern '{pattern.text}' matches {role.name}, which is no Linear"
                f" ({role.reason}); narrow the pattern"
            )
    if 0 in role.shape:
        raise CheckpointError(
            f"{role.tensor} has the empty shape {list(role.shape)}, so it can't be quantized; leave"
            " it out of the recipe's layers"
        )
    return scheme, pattern


def _require_one_scheme_in_fused_layers(
    tensors: ModelTensors, schemes: Mapping[str, QuantScheme]
) -> None:
    """Raise RecipeError if fused layers that need one shared scale have different schemes."""
    for members in fused_layers(tensors.modules("linear")):
        theirs = {schemes.get(member) for member in members}
        one_scale = any(
            scheme and (scheme.needs_calibration or scheme.weight.granularity == TENSOR)
            for scheme in theirs
        )
        if one_scale and len(theirs) > 1:
            raise RecipeError(
                f"runtimes merge {', '.join(members)} and give them one scale; give them one scheme"
            )


def _refuse_dtypes(assignment: Assignment) -> None:
    """Raise CheckpointError for weights in a dtype that quantkit can't quantize."""
    tensors, scales = assignment.checkpoint.tensors, assignment.block_scales
    for name in assignment.linears:
        dtype = tensors[f"{name}.weight"].dtype
        if dtype not in FLOATS and f"{name}.weight" not in scales:
            raise CheckpointError(
                f"{name}.weight is stored as {dtype}; quantkit quantizes bfloat16, float16 and"
                " float32 weights, and FP8 in blocks"
            )
    for tensor in assignment.roles:
        if tensors[tensor].dtype.startswith("F8_") and tensor not in scales:
            raise CheckpointError(
                f"{tensor} holds FP8 codes, but config.json has no quantization_config that says"
                " how; export from the original model"
            )


def _refuse_clashes(assignment: Assignment, file_format: Format) -> None:
    """Raise CheckpointError if the checkpoint already has a tensor with the name of a new one."""
    linears = assignment.linears.values()
    made = {plan.name for linear in linears for plan in linear.tensors(file_format)}
    refuse_taken_names(assignment, made)


def refuse_taken_names(assignment: Assignment, made: set[str]) -> None:
    """Raise CheckpointError if an export would overwrite a tensor that it keeps.

    made: names of the tensors that the export adds.
    """
    kept = (
        set(assignment.checkpoint.tensors)
        - {f"{name}.weight" for name in assignment.linears}
        - set(assignment.block_scales.values())
    )
    for name in sorted(made & kept):
        raise CheckpointError(
            f"{assignment.checkpoint.path} holds a tensor {name} already; export from the original"
            " model"
        )


def more(count: int) -> str:
    """ " (and N more)" after the first of several things in a message; empty for one."""
    return f" (and {count - 1} more)" if count > 1 else ""
