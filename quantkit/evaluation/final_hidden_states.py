"""A model's final hidden states over windows of text: made block by block, or taken from the cache.
The judge needs nothing else of a model but its head.

They lie in memory while they fit half of what is spare, else in a file, or where the cache keeps
them: tokens × hidden size, never tokens × vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.data.windows import Window
from quantkit.errors import EvaluationError, NonFiniteError
from quantkit.evaluation.hidden_state_cache import CachedHiddenStates, HiddenStateCache
from quantkit.evaluation.masked_lm import Masking
from quantkit.evaluation.quantized_model import QuantizedModel
from quantkit.models.blockwise import BlockStep
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.skeleton import body_name
from quantkit.models.task import CAUSAL, SEQ2SEQ
from quantkit.models.threads import each_batch


@dataclass(frozen=True)
class FinalHiddenStates:
    """Of one model. windows: what went through, by number; seconds: what making them took without a
    watch's own work (or took then, where they come from the cache).
    """

    windows: Mapping[int, Window]
    states: HiddenStates | CachedHiddenStates
    seconds: float
    is_from_cache: bool = False
    remarks: tuple[str, ...] = ()
    masking: Masking | None = None
    task: str = CAUSAL

    def scored(self, number: int) -> Tensor:
        """The hidden states that predict a window's scored tokens, [scored, hidden size]."""
        if self.masking is not None:
            return self.masking.scored(self.states.get(number))
        window = self.windows[number]
        if self.task == SEQ2SEQ:
            return self.states.get(number)[0]
        return self.states.get(number)[0, window.first_scored - 1 : len(window.tokens) - 1]

    def close(self) -> None:
        if isinstance(self.states, HiddenStates):
            self.states.close()


@dataclass(frozen=True)
class Watch:
    """What an observer may do while a model runs; nothing, as it stands.

    block: called with a block's number and the block before its windows, returns what is called
    after them. batch: around each window. change: what becomes of a block's output, from the
    block's number, the window's and the output.
    """

    block: Callable[[int, nn.Module], Callable[[], None]] = field(
        default=lambda number, block: lambda: None
    )
    batch: Callable[[int], Any] | None = None
    change: Callable[[int, int, Tensor], Tensor] | None = None


def make_final_hidden_states(
    model: QuantizedModel,
    windows: Mapping[int, Window],
    seq_len: int,
    on_progress: Callable[[float, float], None] = lambda done, total: None,
    watch: Watch | None = None,
    masking: Masking | None = None,
) -> FinalHiddenStates:
    """Run the windows through the blocks, with `masking` each as many times as it has tokens.
    Leaves the model with its output head in memory and without its blocks. on_progress(blocks done,
    blocks).
    """
    started, watched, blocks = time.perf_counter(), 0.0, model.blocks
    watch = watch or Watch()
    numbers = list(windows)
    # lmeval's windows carry one token more, which is predicted but not read.
    batches = {
        number: (
            torch.tensor([window.tokens[:seq_len]]) if masking is None else masking.inputs(window)
        )
        for number, window in windows.items()
    }
    _require_head(blocks.model)
    states = HiddenStates(device=blocks.device)

    def on_block(step: BlockStep) -> None:
        nonlocal watched
        finish = watch.block(step.number, step.block)

        def work(number: int) -> None:
            with nullcontext() if watch.batch is None else watch.batch(number):
                output = step.run(number)
            name = blocks.block_name(step.number)
            _require_finite(output, model, number, f"first behind {name}")
            if watch.change is not None:
                output = watch.change(step.number, number, output)
            step.put(number, output)

        for done, _ in enumerate(
            each_batch(work, numbers, blocks.device, torch.get_num_threads()), 1
        ):
            on_progress(step.number + done / len(numbers), blocks.block_count)
        ran = time.perf_counter()
        finish()
        watched += time.perf_counter() - ran

    try:
        walk = blocks.walk(batches, states, on_block, cache=model.new_cache())
        for number, final in walk.finish():
            _require_finite(final, model, number, "behind its last norm")
    except BaseException:
        states.close()
        raise
    return FinalHiddenStates(
        dict(windows),
        states,
        time.perf_counter() - started - watched,
        masking=masking,
        task=blocks.task,
    )


def cached_or_made(
    cache: HiddenStateCache | None,
    made_from: Mapping[str, Any],
    windows: Mapping[int, Window],
    make: Callable[[], FinalHiddenStates],
) -> FinalHiddenStates:
    """From the cache where they are there, else made and put there."""
    if cache is None:
        return make()
    kept = cache.find(made_from)
    if kept is not None and {str(number) for number in windows} == set(kept.tensors):
        return FinalHiddenStates(
            dict(windows), kept, float(kept.description.get("seconds", 0.0)), is_from_cache=True
        )
    made = make()
    problem = cache.keep(
        made_from,
        list(windows),
        made.states.get,
        {"seconds": made.seconds, "made_from": dict(made_from)},
    )
    remarks = (
        (f"the base's hidden states weren't kept for another time: {problem}",) if problem else ()
    )
    return FinalHiddenStates(made.windows, made.states, made.seconds, remarks=remarks)


def _require_finite(hidden: Tensor, model: QuantizedModel, number: int, where: str) -> None:
    # A sum costs a tenth of asking each value; it may overflow where no value does.
    if not torch.isfinite(hidden.sum(dtype=torch.float32)) and not torch.isfinite(hidden).all():
        path = str(model.checkpoint.path)
        raise NonFiniteError(
            f"{path} gives NaN or infinity in window {number + 1}, {where}; `quantkit verify` tells"
            " whether its files are sound",
            path,
        )


def _require_head(model: Any) -> None:
    if body_name(model) is None or model.get_output_embeddings() is None:
        raise EvaluationError(
            f"{type(model).__name__} is no causal language model with an output head, which is what"
            " eval judges"
        )


# ---- The noise floor.


def rounding_noise(seed: int = 0) -> Watch:
    """What one more rounding to bfloat16 behind each block would change: the measure of what a KL
    means on this model and text.

    A value that is stored in 16 bits goes one step up or down with a probability of 1/24 each,
    which has the variance of a rounding (a twelfth of a step squared); a float32 value is rounded
    to bfloat16.
    """

    def change(block: int, window: int, output: Tensor) -> Tensor:
        if output.dtype == torch.float32:
            return output.bfloat16().float()
        generator = torch.Generator().manual_seed(seed + 1_000_003 * block + 7919 * window)
        draws = torch.randint(0, 24, output.shape, generator=generator, dtype=torch.uint8).to(
            output.device
        )
        steps = (draws == 0).to(torch.int16) - (draws == 1).to(torch.int16)
        bits = output.contiguous().view(torch.int16)
        magnitude = bits & 0x7FFF
        # Zero has no step below it, and the largest finite values none above.
        movable = (magnitude > 0) & (
            magnitude
            < torch.tensor(torch.finfo(output.dtype).max, dtype=output.dtype)
            .view(torch.int16)
            .item()
        )
        return torch.where(movable, bits + steps, bits).view(output.dtype)

    return Watch(change=change)
