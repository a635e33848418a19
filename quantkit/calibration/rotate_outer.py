"""The layers outside the decoder blocks for a rotated residual stream: embedding, last norm, output
head.

The last norm is found by running the model, not by a table of architectures. With rotated
embeddings, the output head must get the same hidden states, rotated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.algorithms.rotation import Rotation, rotated_reader
from quantkit.calibration.rotate_block import RotationRefusal, relative_error
from quantkit.calibration.scale_folding import TOLERANCE
from quantkit.errors import CalibrationError
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.dataflow import KnownTensors, is_scaled_by_vector
from quantkit.models.hooks import EnoughSeen, capture

# Positions of the window on which a rotation is checked.
TRIAL_POSITIONS = 32
# Rows of an embedding that are rotated at a time, which bounds the memory.
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class _OuterLayers:
    """The layers outside the blocks. Names are those in the module tree.

    embedding: name of the input embedding.
    norm: name of the norm before the output head.
    head: name of the output head.
    norm_weight: what the norm multiplies by, [hidden size].
    neutral: the value of a norm weight that changes nothing, 0 or 1.
    """

    embedding: str
    norm: str
    head: str
    norm_weight: Tensor
    neutral: float


def rotated_outer(model: BlockwiseModel, tokens: Tensor, rotation: Rotation) -> dict[str, Tensor]:
    """The embedding, the last norm's weight and the output head as they will be stored, by their
    names on disk. The rotated embedding is put in place. Raises CalibrationError.

    model: after `load_outer(with_head=True)`.
    tokens: [windows, positions], on which the rotation is checked.
    """
    stream = rotation.stream_matrix
    tokens = tokens[:1, :TRIAL_POSITIONS]
    model.capture(tokens)  # finds out how blocks return their hidden states
    try:
        outer = _find_outer(model, tokens.to(model.device), stream)
    except RotationRefusal as refusal:
        raise refusal.error("the layers outside the decoder blocks") from None
    embedding, head = (
        model.model.get_submodule(outer.embedding).weight,
        model.model.get_submodule(outer.head).weight,
    )
    norm = model.model.get_submodule(outer.norm).weight
    tensors = {
        name_on_disk(model, f"{outer.head}.weight"): _rotated_rows(head, stream, outer.norm_weight),
        name_on_disk(model, f"{outer.norm}.weight"): torch.full_like(norm, outer.neutral),
        name_on_disk(model, f"{outer.embedding}.weight"): _rotated_rows(embedding, stream),
    }
    embedding.data = tensors[name_on_disk(model, f"{outer.embedding}.weight")]
    return tensors


def put_outer(model: BlockwiseModel, tensors: Mapping[str, Tensor]) -> None:
    """Put in place the embedding that an earlier run rotated. tensors: of `rotated_outer`."""
    module = model.model.get_input_embeddings()
    name = name_on_disk(model, f"{module_name(model.model, module)}.weight")
    module.weight.data = tensors[name].to(model.device)


def module_name(model: nn.Module, module: nn.Module | None) -> str:
    """The name of the embedding or output head in the module tree. Raises CalibrationError."""
    name = next((name for name, found in model.named_modules() if found is module), None)
    if name is None:
        raise CalibrationError(
            f"rotation: {type(model).__name__} has no embedding and output head of its own; leave"
            " rotation out of the recipe"
        )
    return name


def name_on_disk(model: BlockwiseModel, parameter: str) -> str:
    """A parameter's name in the checkpoint; its own where the checkpoint doesn't hold it."""
    source = model.sources(parameter)
    return source.lists[0][0] if source else parameter


def _rotated_rows(weight: Tensor, rotation: Tensor, norm: Tensor | None = None) -> Tensor:
    return torch.cat(
        [
            rotated_reader(rows, rotation, norm).to(weight.dtype)
            for rows in weight.data.split(ROWS_AT_ONCE)
        ]
    )


def _find_outer(model: BlockwiseModel, tokens: Tensor, rotation: Tensor) -> _OuterLayers:
    """Find the norm that feeds the output head. With rotated embeddings and without that norm's
    weight, the head must get the same hidden states, rotated.
    """
    whole = model.model
    embedding, head = (
        module_name(whole, whole.get_input_embeddings()),
        module_name(whole, whole.get_output_embeddings()),
    )
    size = len(rotation)
    with _vectors_in_float32(model):
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
            if relative_error(after @ rotation.T * multiplies_by, before) < TOLERANCE:
                return _OuterLayers(embedding, norm, head, multiplies_by, 0.0 if adds_one else 1.0)
    raise RotationRefusal(
        f"with rotated embeddings {head} isn't given the same, rotated: {norm} subtracts a mean, or"
        " more than embeddings is added before the blocks"
    )


@contextmanager
def _vectors_in_float32(model: BlockwiseModel) -> Iterator[None]:
    """Vectors outside the blocks (norm weights) in float32, so that hidden states may be float32
    there.
    """
    vectors = [
        parameter
        for _, parameter in model.outer_parameters()
        if parameter.dim() == 1 and not parameter.is_meta
    ]
    stored = [parameter.data for parameter in vectors]
    try:
        for parameter in vectors:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, tensor in zip(vectors, stored):
            parameter.data = tensor


def _run_to_head(
    model: BlockwiseModel, tokens: Tensor, embedding: str, head: str, rotation: Tensor | None = None
) -> tuple[str | None, Tensor]:
    """Run embeddings and the layers outside the blocks; each block returns its input.

    Returns the norm that feeds the output head (None if no norm does), and what the head is given,
    [positions, hidden size] float32. rotation: of the embeddings.
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
