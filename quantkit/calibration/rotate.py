"""A model's rotation: what reads and what writes its residual stream, found by running its blocks
and not by a table of architectures, and each rotated block checked.

A norm reads the stream where its input is the block's input plus what Linears have put out so far;
these Linears write to it. Every rotated block, on rotated hidden states, must return the original's
output, rotated, up to float32's rounding. All blocks are tried on one short window before a
calibration begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.layer_group import Needs
from quantkit.algorithms.rotation import Rotation, rotated_reader, rotated_writer, rotation_matrix
from quantkit.calibration.block_run import BlockChanges, BlockRun
from quantkit.calibration.scale_folding import (
    STORED_TOLERANCE,
    TOLERANCE,
    BlockProbe,
    ScaleFolding,
    find_linear_foldings,
    find_norm_foldings,
)
from quantkit.checkpoint.units import counted, format_bytes
from quantkit.errors import CalibrationError, RecipeError
from quantkit.models.blockwise import BlockStep, BlockwiseModel
from quantkit.models.dataflow import KnownTensors, is_scaled_by_vector
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.hooks import EnoughSeen, capture
from quantkit.schemes.algorithms import Description, Table
from quantkit.schemes.recipe import Algorithm

# Positions of the window on which all blocks are tried first.
TRIAL_POSITIONS = 32
# Rows of an embedding that are rotated at a time.
ROWS_AT_ONCE = 8192


class RotationRefusal(Exception):
    """Why a block, or what stands around the blocks, can't be rotated."""


def make_rotation(settings: Algorithm, model: BlockwiseModel, seed: int) -> Rotation:
    """The matrices that a recipe's entry asks for. Raises RecipeError where embeddings would have
    to be untied and the recipe doesn't accept that.
    """
    config = model.model.config.get_text_config()
    untied: dict[str, str] = {}
    stream = head = None
    if settings["residual"]:
        embedding, output = (
            _name_of(model.model, module())
            for module in (model.model.get_input_embeddings, model.model.get_output_embeddings)
        )
        if f"{output}.weight" in (getattr(model.model, "all_tied_weights_keys", None) or {}):
            if not settings["untie"]:
                weight = model.model.get_input_embeddings().weight
                extra = format_bytes(weight.numel() * weight.element_size())
                raise RecipeError(
                    f"rotation gives {embedding} and {output}, which are one tensor here, values of"
                    f" their own: {extra} more; accept that with rotation: {{untie: true}}, or"
                    " rotate only heads with rotation: {residual: false}"
                )
            untied = {_on_disk(model, f"{output}.weight"): _on_disk(model, f"{embedding}.weight")}
        stream = rotation_matrix(config.hidden_size, torch.Generator().manual_seed(seed)).to(
            model.device
        )
    if settings["heads"]:
        size = next(
            (size for name in ("v_head_dim", "head_dim") if (size := getattr(config, name, None))),
            None,
        )
        size = size or config.hidden_size // getattr(config, "num_attention_heads", 1)
        head = rotation_matrix(size, torch.Generator().manual_seed(seed + 1)).to(model.device)
    return Rotation(stream, head, untied)


def _matrix(rotation: Tensor | None) -> Tensor:
    assert rotation is not None, "only what the recipe rotates is asked for"
    return rotation


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
    name = next((name for name, found in model.named_modules() if found is module), None)
    if name is None:
        raise CalibrationError(
            f"rotation: {type(model).__name__} has no embedding and output head of its own; leave"
            " rotation out of the recipe"
        )
    return name


def _on_disk(model: BlockwiseModel, parameter: str) -> str:
    """A parameter's name in the checkpoint; its own where the checkpoint doesn't hold it."""
    source = model.sources(parameter)
    return source.lists[0][0] if source else parameter


# ---- Before the blocks, and behind them.


@dataclass(frozen=True)
class _Outer:
    """Names of the embedding, the last norm and the output head in the module tree. norm_weight:
    what the norm multiplies by; neutral: its weight that does nothing.
    """

    embedding: str
    norm: str
    head: str
    norm_weight: Tensor
    neutral: float


def rotated_outer(model: BlockwiseModel, tokens: Tensor, rotation: Rotation) -> dict[str, Tensor]:
    """The embedding, the last norm's weight and the output head as they will be stored, by their
    names on disk; the embedding is put in place.

    Needs `load_outer(with_head=True)`. tokens: [windows, positions], for the check. Raises
    CalibrationError.
    """
    stream = _matrix(rotation.stream)
    tokens = tokens[:1, :TRIAL_POSITIONS]
    model.capture(tokens)  # finds out what blocks return their hidden states in
    try:
        outer = _find_outer(model, tokens.to(model.device), stream)
    except RotationRefusal as refusal:
        raise _error("what stands around the blocks", refusal) from None
    embedding, head = (
        model.model.get_submodule(outer.embedding).weight,
        model.model.get_submodule(outer.head).weight,
    )
    norm = model.model.get_submodule(outer.norm).weight
    tensors = {
        _on_disk(model, f"{outer.head}.weight"): _rotated_rows(head, stream, outer.norm_weight),
        _on_disk(model, f"{outer.norm}.weight"): torch.full_like(norm, outer.neutral),
        _on_disk(model, f"{outer.embedding}.weight"): _rotated_rows(embedding, stream),
    }
    embedding.data = tensors[_on_disk(model, f"{outer.embedding}.weight")]
    return tensors


def put_outer(model: BlockwiseModel, tensors: Mapping[str, Tensor]) -> None:
    """Put in place the embedding that an earlier run rotated."""
    module = model.model.get_input_embeddings()
    module.weight.data = tensors[_on_disk(model, f"{_name_of(model.model, module)}.weight")].to(
        model.device
    )


def _rotated_rows(weight: Tensor, rotation: Tensor, norm: Tensor | None = None) -> Tensor:
    return torch.cat(
        [
            rotated_reader(rows, rotation, norm).to(weight.dtype)
            for rows in weight.data.split(ROWS_AT_ONCE)
        ]
    )


def _find_outer(model: BlockwiseModel, tokens: Tensor, rotation: Tensor) -> _Outer:
    """Which norm feeds the output head; run with rotated embeddings and that norm without weights,
    the head must get the same, rotated.
    """
    whole = model.model
    embedding, head = (
        _name_of(whole, whole.get_input_embeddings()),
        _name_of(whole, whole.get_output_embeddings()),
    )
    size = len(rotation)
    with _small_in_float32(model):
        norm, before = _run_to_head(model, tokens, embedding, head)
        if norm is None:
            raise RotationRefusal(f"{head} isn't fed by a norm with a weight for each channel")
        known = {f"{embedding}.weight", f"{norm}.weight", f"{norm}.bias", f"{head}.weight"}
        for name, parameter in model.outer_parameters():
            if name not in known and size in parameter.shape:
                raise RotationRefusal(f"{name} reads or writes the residual stream too")
        if getattr(whole.get_submodule(norm), "bias", None) is not None:
            raise RotationRefusal(f"{norm} adds a bias, as LayerNorm does")
        weight = whole.get_submodule(norm).weight
        original = weight.data.clone()
        for adds_one in (False, True):
            weight.data.fill_(0.0 if adds_one else 1.0)
            _, after = _run_to_head(model, tokens, embedding, head, rotation)
            weight.data.copy_(original)
            multiplies_by = original + 1 if adds_one else original
            if _differs(after @ rotation.T * multiplies_by, before) < TOLERANCE:
                return _Outer(embedding, norm, head, multiplies_by, 0.0 if adds_one else 1.0)
    raise RotationRefusal(
        f"with rotated embeddings {head} isn't given the same, rotated: {norm} subtracts a mean, or"
        " more than embeddings is added before the blocks"
    )


@contextmanager
def _small_in_float32(model: BlockwiseModel) -> Iterator[None]:
    """What stands around the blocks with its vectors in float32, so that hidden states can be."""
    small = [
        parameter
        for _, parameter in model.outer_parameters()
        if parameter.dim() == 1 and not parameter.is_meta
    ]
    stored = [parameter.data for parameter in small]
    try:
        for parameter in small:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, tensor in zip(small, stored):
            parameter.data = tensor


def _run_to_head(
    model: BlockwiseModel, tokens: Tensor, embedding: str, head: str, rotation: Tensor | None = None
) -> tuple[str | None, Tensor]:
    """The module that returned what the output head is given, and that, [positions, hidden size]
    float32; blocks hand on what they are given.
    """
    returned = KnownTensors()
    given: list[Tensor] = []

    def embedded(_name: str, output: Tensor) -> Tensor:
        return output.float() if rotation is None else output.float() @ rotation

    def arrive(_name: str, hidden: Tensor) -> None:
        given.append(hidden)
        raise EnoughSeen

    modules = dict(model.model.named_modules())
    norms = {name: module for name, module in modules.items() if is_scaled_by_vector(module)}
    with (
        capture({embedding: modules[embedding]}, after=embedded),
        capture({head: modules[head]}, before=arrive),
        capture(norms, after=returned.remember),
        model.bypassed(),
        suppress(EnoughSeen),
        torch.inference_mode(),
    ):
        model.model(input_ids=tokens)
    if not given:
        raise RotationRefusal(f"{head} isn't called")
    return returned.name_of(given[0]), given[0].float().flatten(0, -2)


def _differs(found: Tensor, expected: Tensor) -> float:
    """The difference over the expected's norm."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


# ---- Blocks.


@dataclass(frozen=True)
class RotatedLinear:
    """What is done to a Linear's weight. norm: whose weight goes into it, with its inputs rotated
    as the stream is; adds_one: that norm multiplies by 1 + weight.

    writes: whether its outputs are rotated as the stream is. reads_heads, writes_heads: whether its
    inputs, or outputs, are rotated head by head.
    """

    norm: str = ""
    adds_one: bool = False
    writes: bool = False
    reads_heads: bool = False
    writes_heads: bool = False

    def apply(self, weight: Tensor, rotation: Rotation, norm_weight: Tensor | None) -> Tensor:
        """weight: [out_features, in_features]; norm_weight: the norm's, as the unrotated model has
        it. Returns float32.
        """
        weight = weight.float()
        if self.norm:
            assert norm_weight is not None, f"the weight of {self.norm} goes into this Linear"
            multiplies_by = norm_weight.float() + 1 if self.adds_one else norm_weight.float()
            weight = rotated_reader(weight, _matrix(rotation.stream), multiplies_by)
        if self.reads_heads:
            weight = rotated_reader(weight, _matrix(rotation.head))
        if self.writes:
            weight = rotated_writer(weight, _matrix(rotation.stream))
        return rotated_writer(weight, _matrix(rotation.head)) if self.writes_heads else weight


@dataclass(frozen=True)
class RotatedBlock:
    """parameters: those that change, float32, by their paths in the block. norms, writers, heads:
    paths of modules, for CALIB. change: of the block's output, as stored.

    linears: how each Linear that changes is rotated.
    """

    parameters: dict[str, Tensor]
    linears: dict[str, RotatedLinear]
    norms: tuple[str, ...]
    writers: tuple[str, ...]
    heads: tuple[str, ...]
    change: float


def rotate_block(
    probe: BlockProbe, rotation: Rotation, dtypes: Mapping[str, torch.dtype], name: str
) -> RotatedBlock:
    """A block's parameters for a rotated residual stream and rotated heads, checked. probe: the
    original on hidden states that aren't rotated.

    dtypes: of parameters that are stored as they are, not quantized. name: of the block, for
    errors. Raises CalibrationError.
    """
    try:
        return _rotate_block(probe, rotation, dtypes)
    except RotationRefusal as refusal:
        raise _error(name, refusal) from None


def _rotate_block(
    probe: BlockProbe, rotation: Rotation, dtypes: Mapping[str, torch.dtype]
) -> RotatedBlock:
    parameters = dict(probe.block.named_parameters())
    norms: dict[str, ScaleFolding] = {}
    writers: tuple[str, ...] = ()
    changed: dict[str, Tensor] = {}
    readers_of_heads = []
    if rotation.stream is not None:
        norms, writers, changed = _rotated_stream(probe, parameters, rotation.stream)
        with probe.changed(changed):
            change = probe.change(rotation.stream)
        if not change < TOLERANCE:
            raise RotationRefusal(
                "rotated, it returns something else (what it adds to its input changes by"
                f" {change:.1%}); more reads or writes the residual stream"
            )
    heads = []
    for folding in find_linear_foldings(probe) if rotation.head is not None else ():
        rotated = _rotated_heads(folding, {**parameters, **changed}, _matrix(rotation.head))
        if rotated is None:
            continue
        with probe.changed(changed | rotated):
            # What multiplies each channel by a number of its own, as a gate does, can't be rotated;
            # attention can.
            if probe.change(rotation.stream) < TOLERANCE:
                changed |= rotated
                heads.append(folding.producer)
                readers_of_heads.append(folding.consumers[0])
    changed = {
        path: tensor.to(dtypes.get(path, torch.float32)).float() for path, tensor in changed.items()
    }
    with probe.changed(changed):
        change = probe.change(rotation.stream)
    if not change < STORED_TOLERANCE:
        raise RotationRefusal(
            "with the weights as they are stored, what it adds to its input changes by"
            f" {change:.1%}"
        )
    folding_of = {linear: folding for folding in norms.values() for linear in folding.consumers}
    linears = {
        path: RotatedLinear(
            folding_of[path].producer if path in folding_of else "",
            path in folding_of and folding_of[path].adds_one,
            path in writers,
            path in readers_of_heads,
            path in heads,
        )
        for path in dict.fromkeys([*folding_of, *writers, *heads, *readers_of_heads])
    }
    return RotatedBlock(changed, linears, tuple(norms), writers, tuple(heads), change)


def _rotated_stream(
    probe: BlockProbe, parameters: Mapping[str, Tensor], rotation: Tensor
) -> tuple[dict[str, ScaleFolding], tuple[str, ...], dict[str, Tensor]]:
    """The norms that read the stream, each with the folding into the Linears behind it, the Linears
    that write to it, and all their parameters, rotated.
    """
    reading, writers = _readers_and_writers(probe)
    foldings, reasons = find_norm_foldings(probe)
    by_norm = {folding.producer: folding for folding in foldings}
    changed: dict[str, Tensor] = {}
    for norm, given in reading.items():
        folding = by_norm.get(norm)
        if folding is None:
            raise RotationRefusal(
                next(
                    (reason for reason in reasons.values() if f" {norm} " in reason),
                    f"{norm} reads the residual stream, and no Linear reads what it returns",
                )
            )
        if f"{norm}.bias" in parameters:
            raise RotationRefusal(f"{norm} adds a bias")
        weight = parameters[f"{norm}.weight"].float()
        neutral = torch.full_like(weight, 0.0 if folding.adds_one else 1.0)
        module = probe.block.get_submodule(norm)
        with probe.changed({f"{norm}.weight": neutral}):
            if not _differs(module(given @ rotation), module(given) @ rotation) < TOLERANCE:
                raise RotationRefusal(
                    f"{norm} is no root-mean-square norm (LayerNorm subtracts the mean), so a"
                    " rotation changes what it returns"
                )
        changed[f"{norm}.weight"] = neutral
        for linear in folding.consumers:
            changed[f"{linear}.weight"] = rotated_reader(
                parameters[f"{linear}.weight"], rotation, weight + 1 if folding.adds_one else weight
            )
    if not changed:
        raise RotationRefusal("no norm reads the residual stream before its Linears")
    for linear in writers:
        for path in (f"{linear}.weight", f"{linear}.bias"):
            if path in parameters:
                changed[path] = rotated_writer(changed.get(path, parameters[path]), rotation)
    return {norm: by_norm[norm] for norm in reading}, writers, changed


def _readers_and_writers(probe: BlockProbe) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Norms that are given the block's input plus outputs of Linears, with what they are given; and
    the Linears whose outputs are in what the block returns.
    """
    size = probe.hidden.shape[-1]
    outputs: dict[str, Tensor] = {}
    # norm, its input, how many outputs there were before it
    given: list[tuple[str, Tensor, int]] = []

    def arrive(name: str, tensor: Tensor) -> None:
        given.append((name, tensor, len(outputs)))

    modules = dict(probe.block.named_modules())
    linears = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and module.out_features == size
    }
    norms = {
        name: module
        for name, module in modules.items()
        if is_scaled_by_vector(module) and module.weight.numel() == size
    }
    with capture(linears, after=outputs.__setitem__), capture(norms, before=arrive):
        probe.run()
    shaped = {
        name: output for name, output in outputs.items() if output.numel() == probe.hidden.numel()
    }
    reading = {}
    for name, tensor, count in given:
        before = [output for output in list(outputs)[:count] if output in shaped]
        if (
            tensor.shape == probe.hidden.shape
            and _shares(tensor - probe.hidden, [shaped[output] for output in before], tensor)
            is not None
        ):
            reading[name] = tensor
    shares = _shares(probe.output - probe.hidden, list(shaped.values()), probe.output)
    if shares is None:
        between = next(
            (
                f"{norm} stands between {linear} and it"
                for norm, tensor, _ in reversed(given)
                for linear in shaped
                if tensor is outputs[linear]
            ),
            "",
        )
        raise RotationRefusal(
            "what it adds to the residual stream is no sum of what its Linears put"
            f" out{f': {between}' if between else ''}"
        )
    return reading, tuple(name for name, share in zip(shaped, shares) if abs(share) > TOLERANCE)


def _shares(difference: Tensor, outputs: Sequence[Tensor], whole: Tensor) -> list[float] | None:
    """How often each output is in the difference, by least squares; None where they don't make it
    up. whole: what the difference was taken from, for its rounding.
    """
    left = difference.flatten().double()
    shares: list[float] = []
    if outputs:
        columns = torch.stack([output.flatten().double() for output in outputs])
        gram = columns @ columns.T
        shares = (torch.linalg.pinv(gram) @ (columns @ left)).tolist()
        left = left - torch.tensor(shares, dtype=left.dtype, device=left.device) @ columns
    bound = 0.1 * TOLERANCE * float(difference.double().norm()) + 1e-6 * float(
        whole.double().norm()
    )
    return shares if float(left.norm()) <= bound else None


def _rotated_heads(
    folding: ScaleFolding, parameters: Mapping[str, Tensor], rotation: Tensor
) -> dict[str, Tensor] | None:
    """The weights of a Linear and of its consumer with each head rotated; None where the channels
    don't come in heads. rotation: [head size, head size].
    """
    producer, (consumer,), channels = folding.producer, folding.consumers, folding.channels
    assert channels is not None, "the folding of a Linear says which channels it scales"
    size = len(rotation)
    weight = parameters[f"{producer}.weight"]
    if weight.shape[0] % size or len(channels) % size:
        return None
    heads = channels.unflatten(0, (-1, size))
    if (
        not torch.equal(heads, heads[:, :1] + torch.arange(size, device=heads.device))
        or (heads[:, 0] % size).any()
    ):
        return None
    changed = {f"{consumer}.weight": rotated_reader(parameters[f"{consumer}.weight"], rotation)}
    for path in (f"{producer}.weight", f"{producer}.bias"):
        if path in parameters:
            changed[path] = rotated_writer(parameters[path], rotation)
    return changed


def require_on_disk(model: BlockwiseModel, prefix: str, paths: Sequence[str]) -> None:
    """Refuse where a parameter that changes isn't one tensor of the checkpoint."""
    for path in paths:
        source = model.sources(f"{prefix}.{path}")
        if source is None or sum(map(len, source.lists)) != 1:
            raise _error(prefix, RotationRefusal(f"{path} isn't one tensor on disk"))


def _error(where: str, refusal: RotationRefusal) -> CalibrationError:
    return CalibrationError(
        f"rotation can't be done in {where}: {refusal}; leave rotation out of the recipe"
    )


# ---- As a step of the block quantizer.


def needs(settings: Algorithm) -> Needs:
    return Needs()


def change_block(block_run: BlockRun, settings: Algorithm) -> BlockChanges:
    """Rotate a block as the whole model is rotated; rank 0 does it for all."""
    rotation = block_run.rotation
    assert rotation is not None, "a recipe with rotation has its matrices"

    def find() -> RotatedBlock:
        found = rotate_block(
            block_run.probe(rotation.stream), rotation, block_run.stored_dtypes(), block_run.name
        )
        require_on_disk(block_run.model, block_run.name, list(found.parameters))
        return found

    found = block_run.ranks.on_first(find)
    entry = block_run.ranks.broadcast_from_first(lambda: _entry(block_run.name, found))
    parameters = block_run.ranks.broadcast_tensors(found.parameters if found else None)
    return BlockChanges(parameters, {"rotations": [entry]})


def _entry(name: str, found: RotatedBlock | None) -> dict[str, Any]:
    assert found is not None, "rank 0 has rotated the block, and it alone asks"
    return {
        "block": name,
        "norms": list(found.norms),
        "writers": list(found.writers),
        "heads": list(found.heads),
        "change": found.change,
        "linears": {path: asdict(linear) for path, linear in found.linears.items()},
    }


def describe(chosen: Mapping[str, Any]) -> Description:
    rotated = chosen["rotations"]
    tables: tuple[Table, ...] = ()
    if rotated:
        rows = [
            [
                entry["block"],
                *(str(len(entry[key])) for key in ("norms", "writers", "heads")),
                f"{entry['change']:.1e}",
            ]
            for entry in rotated
        ]
        columns = (
            "block",
            "norms that read the stream",
            "Linears that write to it",
            "projections of values",
            "change of what it adds",
        )
        tables = (("rotated", columns, rows, (1, 2, 3, 4)),)
    return Description(tuple(_remarks(rotated, chosen["untied"])), tables)


def _remarks(rotated: Sequence[Mapping[str, Any]], untied: Mapping[str, str]) -> Iterator[str]:
    heads = sum(len(entry["heads"]) for entry in rotated)
    what = [
        *(["the residual stream"] if any(entry["norms"] for entry in rotated) else []),
        *([f"{counted(heads, 'projection')} of values"] if heads else []),
    ]
    worst = max((entry["change"] for entry in rotated), default=0.0)
    yield (
        f"rotation: {' and '.join(what) or 'nothing'} rotated; every block returns what it did,"
        f" up to {worst:.1e} of what it adds to its input"
    )
    for name, source in untied.items():
        yield f"rotation: {name} is no longer {source}, so the checkpoint grows by one of them"


# ---- Before hours are spent.


def try_rotation(
    model: BlockwiseModel,
    tokens: Tensor,
    rotation: Rotation,
    shapes: Mapping[str, tuple[int, ...]],
    on_block: Callable[[int], None],
) -> None:
    """Rotate every block on one short window and throw the result away: what can't be rotated is
    refused now. The model can't be used afterwards.

    tokens: [windows, positions]. shapes: of the checkpoint's tensors. on_block(number) is called
    before each block.
    """
    tokens = tokens[:1, :TRIAL_POSITIONS]
    if rotation.stream is not None:
        _try_outer(model, tokens, rotation, rotation.stream, shapes)
    states = HiddenStates(device=model.device)

    def rotate(step: BlockStep) -> None:
        on_block(step.number)
        name = model.block_name(step.number)
        with torch.inference_mode():
            probe = BlockProbe(model, step.block, step.inputs(0), step.hidden(0))
            found = rotate_block(probe, rotation, {}, name)
            require_on_disk(model, name, list(found.parameters))
            step.advance(0)

    try:
        model.walk({0: tokens}, states, rotate)
    finally:
        states.close()


def _try_outer(
    model: BlockwiseModel,
    tokens: Tensor,
    rotation: Rotation,
    stream: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse what can't be rotated outside of the blocks. stream: [hidden size, hidden size]."""
    unknown = [
        name for name in model.unexpected if len(shapes[name]) > 1 and len(stream) in shapes[name]
    ]
    if unknown:
        raise _error(
            unknown[0],
            RotationRefusal(
                "transformers doesn't run it, so nobody knows whether it reads what is rotated"
            ),
        )
    model.load_outer(with_head=True)
    rotated_outer(model, tokens, rotation)
    model.free_outer()
