"""Rotation of a model, as a step of the block quantizer: the matrices, one block after the other,
and what calibration.json says of it.

`rotate_outer.py` rotates embedding and output head, `rotate_block.py` a block. All blocks are
tried on one short window before a calibration begins, so that a refusal costs no hours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.layer_group import Needs
from quantkit.algorithms.rotation import Rotation, rotation_matrix
from quantkit.calibration.block_run import BlockChanges, BlockRun
from quantkit.calibration.rotate_block import (
    RotatedBlock,
    RotationRefusal,
    require_on_disk,
    rotate_block,
)
from quantkit.calibration.rotate_outer import (
    TRIAL_POSITIONS,
    module_name,
    name_on_disk,
    rotated_outer,
)
from quantkit.calibration.scale_folding import BlockProbe
from quantkit.checkpoint.units import counted, format_bytes
from quantkit.errors import RecipeError
from quantkit.models.blockwise import BlockStep, BlockwiseModel
from quantkit.models.hidden_states import HiddenStates
from quantkit.schemes.algorithms import Description, Table
from quantkit.schemes.recipe import Algorithm


def make_rotation(settings: Algorithm, model: BlockwiseModel, seed: int) -> Rotation:
    """The matrices that a recipe's `rotation` entry asks for.

    Raises RecipeError where input and output embeddings are tied and the recipe doesn't say
    `untie: true`: after a rotation they differ. So does a residual stream of two stacks.
    """
    if settings["residual"] and len(model.stages) > 1:
        raise RecipeError(
            "rotation of the residual stream takes models with one stack of blocks, and this one"
            " has an encoder and a decoder; set residual: false"
        )
    config = model.model.config.get_text_config()
    untied: dict[str, str] = {}
    stream = head = None
    if settings["residual"]:
        embedding, output = (
            module_name(model.model, module())
            for module in (model.model.get_input_embeddings, model.model.get_output_embeddings)
        )
        if f"{output}.weight" in (getattr(model.model, "all_tied_weights_keys", None) or {}):
            if not settings["untie"]:
                weight = model.model.get_input_embeddings().weight
                extra = format_bytes(weight.numel() * weight.element_size())
                raise RecipeError(
                    f"rotation unties {embedding} and {output}, which share one tensor here: the"
                    f" checkpoint grows, {extra} more; accept that with rotation: {{untie: true}},"
                    " or rotate only heads with rotation: {residual: false}"
                )
            untied = {
                name_on_disk(model, f"{output}.weight"): name_on_disk(model, f"{embedding}.weight")
            }
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


# ---- One block.


def needs(settings: Algorithm) -> Needs:
    return Needs()


def change_block(block_run: BlockRun, settings: Algorithm) -> BlockChanges:
    """Rotate a block with the model's matrices, on rank 0 for all ranks."""
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


def describe(report: Mapping[str, Any]) -> Description:
    rotated = report["rotations"]
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
            "value projections",
            "relative change of its output",
        )
        tables = (("rotated", columns, rows, (1, 2, 3, 4)),)
    return Description(tuple(_remarks(rotated, report["untied"])), tables)


def _remarks(rotated: Sequence[Mapping[str, Any]], untied: Mapping[str, str]) -> Iterator[str]:
    heads = sum(len(entry["heads"]) for entry in rotated)
    what = [
        *(["the residual stream"] if any(entry["norms"] for entry in rotated) else []),
        *([counted(heads, "value projection")] if heads else []),
    ]
    worst = max((entry["change"] for entry in rotated), default=0.0)
    yield (
        f"rotation: rotated {' and '.join(what) or 'nothing'}; the output of every block is the"
        f" same up to {worst:.1e} of what it adds to its input"
    )
    for name, source in untied.items():
        yield f"rotation: {name} is untied from {source}, so the checkpoint grows by one tensor"


# ---- A trial of all blocks.


def try_rotation(
    model: BlockwiseModel,
    tokens: Tensor,
    rotation: Rotation,
    shapes: Mapping[str, tuple[int, ...]],
    on_block: Callable[[int], None],
) -> None:
    """Rotate every block on one short window and throw the result away, so that a model that can't
    be rotated is refused early. The model can't be used afterwards. Raises CalibrationError.

    tokens: [windows, positions].
    shapes: of the checkpoint's tensors, by name.
    on_block: called with each block's number before it is rotated.
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
    """Refuse a model whose layers outside the blocks can't be rotated. stream: [hidden size, hidden
    size].
    """
    unknown = [
        name for name in model.unexpected if len(shapes[name]) > 1 and len(stream) in shapes[name]
    ]
    if unknown:
        reason = (
            "transformers doesn't run it, so it is unknown whether it reads rotated hidden states"
        )
        raise RotationRefusal(reason).error(unknown[0])
    model.load_outer(with_head=True)
    rotated_outer(model, tokens, rotation)
    model.free_outer()
