"""One decoder block for a rotated residual stream and rotated heads of values.

Which modules read and write the residual stream is found by running the block, not by a table of
architectures. A norm reads the stream if its input is the block's input plus outputs of Linears. A
Linear writes to it if its output is a summand of the block's output.

A rotated block must return the original's output, rotated, up to float32's rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantkit.algorithms.rotation import Rotation, rotated_reader, rotated_writer
from quantkit.calibration.scale_folding import (
    STORED_TOLERANCE,
    TOLERANCE,
    BlockProbe,
    ScaleFolding,
    find_linear_foldings,
    find_norm_foldings,
)
from quantkit.errors import CalibrationError
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.dataflow import is_scaled_by_vector
from quantkit.models.hooks import capture


class RotationRefusal(Exception):
    """Why a block, or the layers outside the blocks, can't be rotated."""

    def error(self, where: str) -> CalibrationError:
        """The error for users. where: the block or tensor that can't be rotated."""
        return CalibrationError(
            f"rotation can't be done in {where}: {self}; leave rotation out of the recipe"
        )


@dataclass(frozen=True)
class RotatedLinear:
    """How a Linear's weight is rotated.

    norm: path of the norm whose weight is multiplied into it; its inputs are rotated as the stream
        is. "" where no norm reads the stream for it.
    adds_one: that norm multiplies by 1 + weight.
    writes: its outputs are rotated as the stream is.
    reads_heads: its inputs are rotated head by head.
    writes_heads: its outputs are rotated head by head.
    """

    norm: str = ""
    adds_one: bool = False
    writes: bool = False
    reads_heads: bool = False
    writes_heads: bool = False

    def apply(self, weight: Tensor, rotation: Rotation, norm_weight: Tensor | None) -> Tensor:
        """The rotated weight, [out_features, in_features] float32.

        weight: [out_features, in_features].
        norm_weight: of `norm` in the unrotated model, [in_features]; None where there is none.
        """
        weight = weight.float()
        if self.norm:
            assert norm_weight is not None, f"the weight of {self.norm} goes into this Linear"
            multiplies_by = norm_weight.float() + 1 if self.adds_one else norm_weight.float()
            weight = rotated_reader(weight, rotation.stream_matrix, multiplies_by)
        if self.reads_heads:
            weight = rotated_reader(weight, rotation.head_matrix)
        if self.writes:
            weight = rotated_writer(weight, rotation.stream_matrix)
        return rotated_writer(weight, rotation.head_matrix) if self.writes_heads else weight


@dataclass(frozen=True)
class RotatedBlock:
    """A block after its rotation. All names are paths in the block.

    parameters: those that change, float32.
    linears: how each Linear that changes is rotated.
    norms: norms that read the residual stream.
    writers: Linears that write to it.
    heads: Linears whose outputs are rotated head by head (values).
    change: how far the output with parameters as they are stored is from the original's, relative
        to what the block adds to its input.
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
    """Rotate a block's parameters and check its output. Raises CalibrationError.

    probe: the original block on hidden states that aren't rotated.
    dtypes: of parameters that are stored unquantized, by path.
    name: of the block, for errors.
    """
    try:
        return _rotate_block(probe, rotation, dtypes)
    except RotationRefusal as refusal:
        raise refusal.error(name) from None


def require_on_disk(model: BlockwiseModel, prefix: str, paths: Sequence[str]) -> None:
    """Refuse where a parameter that changes isn't one tensor of the checkpoint."""
    for path in paths:
        source = model.sources(f"{prefix}.{path}")
        if source is None or sum(map(len, source.lists)) != 1:
            raise RotationRefusal(f"{path} isn't one tensor on disk").error(prefix)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _rotate_block(
    probe: BlockProbe, rotation: Rotation, dtypes: Mapping[str, torch.dtype]
) -> RotatedBlock:
    parameters = dict(probe.block.named_parameters())
    stream = _RotatedStream()
    if rotation.stream is not None:
        stream = _rotate_stream(probe, parameters, rotation.stream)
    changed = dict(stream.changed)
    heads: list[ScaleFolding] = []
    if rotation.head is not None:
        heads = _rotate_all_heads(probe, parameters, rotation, changed)
    changed = {
        path: tensor.to(dtypes.get(path, torch.float32)).float() for path, tensor in changed.items()
    }
    with probe.changed(changed):
        change = probe.change(rotation.stream)
    if not change < STORED_TOLERANCE:
        raise RotationRefusal(
            f"with weights rounded to the dtype that is stored, its output changes by {change:.1%}"
            " of what it adds to its input"
        )
    return RotatedBlock(
        changed,
        _rotated_linears(stream, heads),
        tuple(stream.norms),
        stream.writers,
        tuple(folding.producer for folding in heads),
        change,
    )


def _rotated_linears(
    stream: _RotatedStream, heads: Sequence[ScaleFolding]
) -> dict[str, RotatedLinear]:
    norm_of = {linear: norm for norm in stream.norms.values() for linear in norm.consumers}
    writers_of_heads = [folding.producer for folding in heads]
    readers_of_heads = [folding.consumers[0] for folding in heads]
    return {
        path: RotatedLinear(
            norm_of[path].producer if path in norm_of else "",
            path in norm_of and norm_of[path].adds_one,
            path in stream.writers,
            path in readers_of_heads,
            path in writers_of_heads,
        )
        for path in dict.fromkeys([*norm_of, *stream.writers, *writers_of_heads, *readers_of_heads])
    }


# ---- The residual stream.


@dataclass(frozen=True)
class _RotatedStream:
    """A block's rotation for a rotated residual stream.

    norms: norms that read the stream, each with its folding into the Linears that it feeds.
    writers: Linears that write to the stream.
    changed: their parameters, rotated, float32.
    """

    norms: Mapping[str, ScaleFolding] = field(default_factory=dict)
    writers: tuple[str, ...] = ()
    changed: Mapping[str, Tensor] = field(default_factory=dict)


def _rotate_stream(
    probe: BlockProbe, parameters: Mapping[str, Tensor], rotation: Tensor
) -> _RotatedStream:
    """Rotate what reads and writes the residual stream, and check the block's output. rotation:
    [hidden size, hidden size].
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
        changed |= _rotated_norm(probe, parameters, folding, given, rotation)
    if not changed:
        raise RotationRefusal("no norm reads the residual stream before its Linears")
    for linear in writers:
        for path in (f"{linear}.weight", f"{linear}.bias"):
            if path in parameters:
                changed[path] = rotated_writer(changed.get(path, parameters[path]), rotation)
    with probe.changed(changed):
        change = probe.change(rotation)
    if not change < TOLERANCE:
        raise RotationRefusal(
            f"rotated, it returns something else: its output changes by {change:.1%} of what it"
            " adds to its input; more modules read or write the residual stream"
        )
    return _RotatedStream({norm: by_norm[norm] for norm in reading}, writers, changed)


def _rotated_norm(
    probe: BlockProbe,
    parameters: Mapping[str, Tensor],
    folding: ScaleFolding,
    given: Tensor,
    rotation: Tensor,
) -> dict[str, Tensor]:
    """A norm without its weight, and the Linears that it feeds with that weight and the rotation.

    folding: of the norm into its Linears. given: what the norm is given, [windows, positions,
    hidden size].
    """
    norm = folding.producer
    if f"{norm}.bias" in parameters:
        raise RotationRefusal(f"{norm} adds a bias")
    weight = parameters[f"{norm}.weight"].float()
    neutral = torch.full_like(weight, 0.0 if folding.adds_one else 1.0)
    module = probe.block.get_submodule(norm)
    with probe.changed({f"{norm}.weight": neutral}):
        if not relative_error(module(given @ rotation), module(given) @ rotation) < TOLERANCE:
            raise RotationRefusal(
                f"{norm} is no root-mean-square norm (LayerNorm subtracts the mean), so a"
                " rotation changes what it returns"
            )
    multiplies_by = weight + 1 if folding.adds_one else weight
    linears = {
        f"{linear}.weight": rotated_reader(parameters[f"{linear}.weight"], rotation, multiplies_by)
        for linear in folding.consumers
    }
    return {f"{norm}.weight": neutral, **linears}


def _readers_and_writers(probe: BlockProbe) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The norms that read the residual stream, each with its input, and the Linears that write to
    the stream.
    """
    size = probe.hidden.shape[-1]
    outputs: dict[str, Tensor] = {}  # of each Linear that ran
    # norm, its input, how many Linears ran before it
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
        before = [shaped[output] for output in list(outputs)[:count] if output in shaped]
        is_whole = tensor.shape == probe.hidden.shape
        if is_whole and _weights_in(tensor - probe.hidden, before, tensor) is not None:
            reading[name] = tensor
    weights = _weights_in(probe.output - probe.hidden, list(shaped.values()), probe.output)
    if weights is None:
        between = next(
            (
                f": {norm} stands between {linear} and it"
                for norm, tensor, _ in reversed(given)
                for linear in shaped
                if tensor is outputs[linear]
            ),
            "",
        )
        raise RotationRefusal(
            f"what it adds to the residual stream is no sum of what its Linears put out{between}"
        )
    return reading, tuple(name for name, weight in zip(shaped, weights) if abs(weight) > TOLERANCE)


def _weights_in(difference: Tensor, outputs: Sequence[Tensor], whole: Tensor) -> list[float] | None:
    """The weights of the sum of outputs that is nearest to a difference, by least squares; None
    where none is near.

    whole: the tensor that the difference was taken from; its rounding is allowed for.
    """
    residual = difference.flatten().double()
    weights: list[float] = []
    if outputs:
        columns = torch.stack([output.flatten().double() for output in outputs])
        gram = columns @ columns.T
        weights = (torch.linalg.pinv(gram) @ (columns @ residual)).tolist()
        fitted = torch.tensor(weights, dtype=residual.dtype, device=residual.device) @ columns
        residual = residual - fitted
    bound = 0.1 * TOLERANCE * float(difference.double().norm())
    bound += 1e-6 * float(whole.double().norm())
    return weights if float(residual.norm()) <= bound else None


# ---- Heads of values.


def _rotate_all_heads(
    probe: BlockProbe,
    parameters: Mapping[str, Tensor],
    rotation: Rotation,
    changed: dict[str, Tensor],
) -> list[ScaleFolding]:
    """Rotate each head between two Linears wherever the block's output stays, and return these
    foldings. changed: parameters rotated so far; the new ones are added.
    """
    rotated_heads = []
    for folding in find_linear_foldings(probe):
        rotated = _rotated_heads(folding, {**parameters, **changed}, rotation.head_matrix)
        if rotated is None:
            continue
        with probe.changed(changed | rotated):
            # A gate multiplies each channel by a number of its own, so up and down can't be
            # rotated; attention weighs whole heads.
            if probe.change(rotation.stream) < TOLERANCE:
                changed |= rotated
                rotated_heads.append(folding)
    return rotated_heads


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
