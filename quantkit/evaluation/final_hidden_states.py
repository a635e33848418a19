"""The final hidden states of a model over windows of text: computed block by block, or read from
the cache. Together with the output head, they are all that an evaluation needs of a model.

They are kept in memory if they fit into half of the free memory, else in a file: tokens × hidden
size, never tokens × vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.run_control import ShouldStop, never, stop_if_asked
from quantkit.data.windows import Window
from quantkit.errors import EvaluationError, NonFiniteError
from quantkit.evaluation.hidden_state_cache import CachedHiddenStates, HiddenStateCache
from quantkit.evaluation.masked_lm import Masking
from quantkit.evaluation.quantized_model import QuantizedModel
from quantkit.evaluation.scored_text import scored_states
from quantkit.models.blockwise import BlockStep
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.skeleton import body_name
from quantkit.models.task import CAUSAL
from quantkit.models.threads import each_batch


@dataclass(frozen=True)
class FinalHiddenStates:
    """The final hidden states of one model.

    windows: the windows that the model ran over, by number.
    states: the hidden states by window number, each [rows, tokens, hidden size]; rows is 1, or for
        a masked model the number of masked positions.
    seconds: time of the forward passes, without that of a watch; from the cache, the time of the
        run that computed them.
    is_from_cache: whether an earlier run computed them.
    remarks: sentences for the user, such as why they were not cached.
    masking: how tokens were masked; None unless the model is a masked language model.
    task: what the model predicts: CAUSAL, MASKED or SEQ2SEQ.
    """

    windows: Mapping[int, Window]
    states: HiddenStates | CachedHiddenStates
    seconds: float
    is_from_cache: bool = False
    remarks: tuple[str, ...] = ()
    masking: Masking | None = None
    task: str = CAUSAL

    def scored(self, number: int) -> Tensor:
        """The hidden states that predict the scored tokens of a window, [scored, hidden size]."""
        return scored_states(self.states.get(number), self.windows[number], self.task, self.masking)

    def close(self) -> None:
        """Free the memory or the file of computed hidden states."""
        if isinstance(self.states, HiddenStates):
            self.states.close()


@dataclass(frozen=True)
class Watch:
    """Callbacks that observe or change a model while it runs. The defaults do nothing.

    block: called with a block's number and the block before its first window; returns a function
        that is called after its last window.
    batch: called with a window's number; returns a context manager around the block's run on it.
    change: called with a block's number, a window's number and the block's output; returns the
        output to use instead.
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
    should_stop: ShouldStop = never,
) -> FinalHiddenStates:
    """Run the windows through all blocks of a model. Afterwards only its output head is in memory.

    windows: by number.
    seq_len: tokens that a window feeds into the model.
    on_progress: called with the blocks that are done, as a fraction, and the number of blocks.
    watch: observes or changes the run.
    masking: mask each token of a window in turn; a window of L tokens is L inputs.
    should_stop: asked before each block.

    Raises EvaluationError if the model has no output head, NonFiniteError if it computes NaN or
    infinity, and Interrupted if it was stopped.
    """
    started, watched, blocks = time.perf_counter(), 0.0, model.blocks
    _require_head(blocks.model)
    # Windows of the protocol lmeval have one token more, which is predicted but not an input.
    inputs = {
        number: (
            torch.tensor([window.tokens[:seq_len]]) if masking is None else masking.inputs(window)
        )
        for number, window in windows.items()
    }
    states = HiddenStates(device=blocks.device)

    def on_block(step: BlockStep) -> None:
        nonlocal watched
        stop_if_asked(
            should_stop,
            f"before block {step.number + 1} of {blocks.block_count} of"
            f" {model.checkpoint.path.name}",
            can_resume=False,
        )
        watched += _run_block(step, model, list(windows), on_progress, watch or Watch())

    try:
        walk = blocks.walk(inputs, states, on_block, cache=model.new_cache())
        for number, final in walk.finish():
            _require_finite(final, model, number, "after its last norm")
    except BaseException:
        states.close()
        raise
    seconds = time.perf_counter() - started - watched
    return FinalHiddenStates(dict(windows), states, seconds, masking=masking, task=blocks.task)


def _run_block(
    step: BlockStep,
    model: QuantizedModel,
    numbers: Sequence[int],
    on_progress: Callable[[float, float], None],
    watch: Watch,
) -> float:
    """Run one block over all windows. Returns the seconds that the watch took after the last."""
    finish = watch.block(step.number, step.block)
    blocks = model.blocks

    def run_window(number: int) -> None:
        with nullcontext() if watch.batch is None else watch.batch(number):
            output = step.run(number)
        name = blocks.block_name(step.number)
        _require_finite(output, model, number, f"first after {name}")
        if watch.change is not None:
            output = watch.change(step.number, number, output)
        step.put(number, output)

    ran = each_batch(run_window, numbers, blocks.device, torch.get_num_threads())
    with closing(ran):
        for done, _ in enumerate(ran, 1):
            on_progress(step.number + done / len(numbers), blocks.block_count)
    started = time.perf_counter()
    finish()
    return time.perf_counter() - started


def cached_or_made(
    cache: HiddenStateCache | None,
    made_from: Mapping[str, Any],
    windows: Mapping[int, Window],
    compute: Callable[[], FinalHiddenStates],
) -> FinalHiddenStates:
    """Read final hidden states from the cache; compute and store them if they are not there.

    cache: None computes them always.
    made_from: everything that they depend on, the key of the cache.
    windows: by number.
    compute: computes them.
    """
    if cache is None:
        return compute()
    cached = cache.find(made_from)
    if cached is not None and {str(number) for number in windows} == set(cached.tensors):
        return FinalHiddenStates(
            dict(windows), cached, float(cached.description.get("seconds", 0.0)), is_from_cache=True
        )
    computed = compute()
    problem = cache.store(
        made_from,
        list(windows),
        computed.states.get,
        {"seconds": computed.seconds, "made_from": dict(made_from)},
    )
    remarks = (f"the base model's hidden states were not cached: {problem}",) if problem else ()
    return replace(computed, remarks=remarks)


def _require_finite(hidden: Tensor, model: QuantizedModel, number: int, where: str) -> None:
    # The sum is ten times as fast as a check of each value, but may overflow where no value does.
    if not torch.isfinite(hidden.sum(dtype=torch.float32)) and not torch.isfinite(hidden).all():
        path = str(model.checkpoint.path)
        raise NonFiniteError(
            f"{path} gives NaN or infinity in window {number + 1}, {where}",
            path=path,
            hint=f"`quantkit.verify({path!r})` checks its files",
        )


def _require_head(model: Any) -> None:
    if body_name(model) is None or model.get_output_embeddings() is None:
        raise EvaluationError(
            f"{type(model).__name__} is not a language model with an output head, so eval can't"
            " evaluate it"
        )


# ---- The noise floor.


def rounding_noise(seed: int = 0) -> Watch:
    """A watch that adds the noise of one more rounding to bfloat16 to the output of each block. The
    KL that it causes is the noise floor of the model on this text.

    A 16-bit value moves one step up or down with a probability of 1/24 each. This has the variance
    of rounding to nearest, step²/12. A float32 value is rounded to bfloat16.
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
        # Zero has no step toward zero, and the largest finite value no step up.
        movable = (magnitude > 0) & (
            magnitude
            < torch.tensor(torch.finfo(output.dtype).max, dtype=output.dtype)
            .view(torch.int16)
            .item()
        )
        return torch.where(movable, bits + steps, bits).view(output.dtype)

    return Watch(change=change)
