"""Running a language model one block at a time, so that only one block's weights are in memory.

The module tree is built on the meta device. Each block's weights are read from disk, used for all
windows, and freed. `BlockwiseModel.walk` is the one place where this happens:

1. The model's own forward runs once per batch, with recorders in place of its blocks. They capture
the block inputs (`block_stack.py`).
2. The blocks run from those inputs, one after the other.
3. The forward runs again with the last block's output in place, for the norm after the blocks.

An encoder-decoder model has two stages, which run one after the other.

On a CPU each batch goes through a block on one thread, and as many batches run at once as there are
threads. That is faster than sharing one batch, and the result doesn't depend on the number of
threads. It equals the ordinary forward of the batch on one thread bit for bit. A mixture of experts
that `calibrate` observes is an exception: it equals the forward with transformers'
experts_implementation="eager". If that can't be selected (`experts.adopt_experts`), only the order
of sums differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import quantkit.ops  # noqa: F401 (declares the op)
from quantkit.errors import CheckpointError
from quantkit.models.block_inputs import BlockInputs, SharedTensors
from quantkit.models.block_loader import BlockLoader
from quantkit.models.block_stack import Captured, SingleStage, Stage
from quantkit.models.encoder_decoder import DecoderStage, EncoderStage
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.skeleton import Weights, decoder_blocks
from quantkit.models.task import CAUSAL, SEQ2SEQ, task_of
from quantkit.models.threads import StatefulModuleLock
from quantkit.models.weight_map import ParameterSource


class BlockwiseModel:
    """A model whose blocks are loaded one at a time. Each block can be run once.

    model: the module tree on the meta device, a PreTrainedModel.
    weights: where its tensors are read from.
    where: path of the checkpoint, for messages.
    device: where it computes.

    Raises CheckpointError if the model can't be run block by block, or if a weight is missing.
    """

    def __init__(self, model: Any, weights: Weights, where: str, device: str = "cpu") -> None:
        self.model = model
        self.device, self.where = torch.device(device), where
        self.task = task_of(self.model.config.to_dict(), where)
        self.stages: tuple[Stage, ...]
        if self.task == SEQ2SEQ:
            self.stages = (EncoderStage(model), DecoderStage(model))
        else:
            name, _ = decoder_blocks(model)
            self.stages = (SingleStage(model, name, self.device, self.task == CAUSAL),)
        stacks = [stage.stack for stage in self.stages]
        self.loader = BlockLoader(model, weights, where, self.device, stacks)
        self._lock = StatefulModuleLock()

    # ---- Structure.

    @property
    def block_count(self) -> int:
        """The number of blocks in all stages."""
        return sum(len(stage.stack) for stage in self.stages)

    @property
    def blocks_name(self) -> str:
        """The path of the blocks in the module tree; for an encoder-decoder model, of the decoder's
        blocks.
        """
        return self.stages[-1].stack.name

    def block_name(self, number: int) -> str:
        """See `BlockLoader.block_name`."""
        return self.loader.block_name(number)

    def reads_encoder(self, number: int) -> bool:
        """Whether a block is called with the encoder's final hidden states."""
        return len(self.stages) > 1 and len(self.stages[0].stack) <= number < self.block_count

    @property
    def has_side_outputs(self) -> bool:
        """Whether blocks read outputs of earlier blocks besides hidden states; known after the
        first capture.
        """
        return any(stage.stack.has_side_outputs for stage in self.stages)

    @property
    def states_dtype(self) -> torch.dtype:
        """The dtype that holds hidden states between blocks without rounding.

        It differs from the model's for Mamba, whose residual stream is float32 in a bfloat16 model.
        """
        config = self.model.config
        return torch.float32 if getattr(config, "residual_in_fp32", False) else config.dtype

    @property
    def unexpected(self) -> list[str]:
        """Tensors of the checkpoint that the model has no parameter for."""
        return self.loader.unexpected

    def is_omitted_by_transformers(self, name: str) -> bool:
        """Whether an unexpected tensor is of a layer that runtimes have and transformers omits
        (multi-token prediction).
        """
        for stage in self.stages:
            block = re.match(rf"{re.escape(stage.stack.name)}\.(\d+)\.", name)
            if block is not None and int(block[1]) >= len(stage.stack):
                return True
        left_out = self.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, name) for pattern in left_out)

    def sources(self, parameter: str) -> ParameterSource | None:
        """See `BlockLoader.sources`."""
        return self.loader.sources(parameter)

    @property
    def shared(self) -> dict[str, str]:
        """See `BlockLoader.shared`."""
        return self.loader.shared

    def require_unshared(self) -> None:
        """Raise CheckpointError if several blocks share a Linear: its inputs are observed one block
        at a time.
        """
        for target, source in self.shared.items():
            raise CheckpointError(
                f"{self.where} runs the weights of {source.removesuffix('.weight')} again in"
                f" {target.removesuffix('.weight')}, and quantkit measures Linears that one block"
                " runs; export it in a scheme that needs no calibration (fp8-dynamic,"
                " int8-dynamic), which eval supports"
            )

    # ---- Weights.

    def load_outer(self, with_head: bool) -> None:
        """See `BlockLoader.load_outer`."""
        self.loader.load_outer(with_head)

    def free_outer(self) -> None:
        """See `BlockLoader.free_outer`."""
        self.loader.free_outer()

    def outer_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See `BlockLoader.outer_parameters`."""
        return self.loader.outer_parameters()

    def read_anew(self, parameter: str, read: Callable[[str], Tensor]) -> nn.Parameter:
        """See `BlockLoader.read_anew`."""
        return self.loader.read_anew(parameter, read)

    def block(self, number: int, prefetch: bool | None = None) -> AbstractContextManager[nn.Module]:
        """See `BlockLoader.block`."""
        return self.loader.block(number, prefetch)

    # ---- Running.

    def hidden_shape(self, tokens: Tensor) -> tuple[int, ...]:
        """The shape of the hidden states before the first block. The weights outside of the blocks
        must be loaded.

        tokens: token ids [windows, positions].
        """
        return self.stages[0].hidden_shape(tokens)

    def capture(
        self, tokens: Tensor, cache: Any = None, stage: int = 0, encoded: Tensor | None = None
    ) -> Captured:
        """The inputs of a stage's blocks for one batch. The weights outside of the blocks must be
        loaded.

        tokens: token ids [windows, positions].
        cache: given to the forward as `past_key_values`, or None.
        encoded: final hidden states of the stage before, or None.
        """
        if encoded is not None:
            encoded = encoded.to(self.device)
        return self.stages[stage].capture(tokens.to(self.device), encoded, cache)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """A context in which all blocks return their hidden states unchanged. Use it after
        `capture`.
        """
        with ExitStack() as bypasses:
            for stage in self.stages:
                bypasses.enter_context(stage.stack.bypassed())
            yield

    def run_block(self, block: nn.Module, inputs: BlockInputs, hidden: Tensor) -> Tensor:
        """A block's output for one batch.

        hidden: [windows, positions, hidden size] in most models.
        """
        given = inputs.resolved()
        arguments, keywords = given.arguments, given.keywords
        if inputs.hidden_name:
            keywords = keywords | {inputs.hidden_name: hidden}
        else:
            arguments = (hidden, *arguments)
        with self._lock.held_for(block):
            output = block(*arguments, **keywords)
        if not isinstance(output, (tuple, list)):
            return output
        inputs.keep_side_outputs(output[1:])
        return output[0]

    def finish(self, tokens: Tensor, hidden: Tensor, cache: Any = None, stage: int = -1) -> Tensor:
        """A stage's final hidden states (after its last norm).

        tokens: token ids [windows, positions].
        hidden: output of the stage's last block.
        """
        return self.stages[stage].finish(tokens.to(self.device), hidden.to(self.device), cache)

    def walk(
        self,
        batches: Mapping[int, Tensor],
        states: HiddenStates,
        on_block: Callable[[BlockStep], None],
        *,
        cache: Any = None,
        load_outer: Callable[[], None] | None = None,
        branches: Mapping[int, int] | None = None,
        restore: Callable[[Walk], int] | None = None,
        after_block: Callable[[int, Walk], None] | None = None,
        prefetch: bool | None = None,
    ) -> Walk:
        """Run batches through all blocks, one block after the other.

        batches: batch number → token ids [windows, positions].
        states: empty; holds the hidden states between two blocks, by batch number.
        on_block: runs a block on the batches, and stores each output (`BlockStep.advance`).
        cache: given to the forward as `past_key_values`, to observe keys and values.
        load_outer: loads the weights outside of the blocks, in place of
            `BlockwiseModel.load_outer`.
        branches: batch number that `Walk.branch` may add → the batch from which it will branch.
        restore: restores the state that an earlier walk saved; returns the number of the first
            block.
        after_block: called with each block's number once `states` returns that block's outputs.
        prefetch: see `block`.
        """
        if load_outer is None:
            self.load_outer(with_head=False)
        else:
            load_outer()
        shapes = {number: self.hidden_shape(tokens) for number, tokens in batches.items()}
        shapes |= {number: shapes[batch] for number, batch in (branches or {}).items()}
        states.expect(shapes, self.states_dtype)
        walk = Walk(self, batches, states, cache)
        try:
            walk._capture(0, {})
            self.free_outer()
            first = 0 if restore is None else restore(walk)
            for inputs in walk.inputs.values():
                inputs[:first] = [None] * first
            for number in range(first, self.block_count):
                with self.block(number, prefetch) as block:
                    on_block(BlockStep(walk, number, block))
                walk._end_block(number)
                if after_block is not None:
                    after_block(number, walk)
        finally:
            self.loader.close()
        return walk


class Walk:
    """One pass of batches through the blocks of a model.

    states: hidden states before the current block, by batch number.
    inputs: batch number → captured block inputs by block; None for finished blocks, and for the
        decoder's blocks while the encoder runs.
    encoded: batch number → the encoder's final hidden states, until the last decoder block has run.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        batches: Mapping[int, Tensor],
        states: HiddenStates,
        cache: Any = None,
    ) -> None:
        self.model, self.states = model, states
        self.inputs: dict[int, list[BlockInputs | None]] = {}
        self.encoded: dict[int, Tensor] = {}
        self._tokens, self._cache = dict(batches), cache

    @property
    def batches(self) -> list[int]:
        """The batch numbers, in the order in which they were added."""
        return list(self._tokens)

    def branch(self, batch: int, into: int) -> None:
        """Add a batch that continues from an existing one, with its tokens and captured inputs.

        The caller puts the hidden states of the new batch.
        """
        self._tokens[into] = self._tokens[batch]
        self.inputs[into] = list(self.inputs[batch])
        if batch in self.encoded:
            self.encoded[into] = self.encoded[batch]

    def begin_decoder(self, encoded: Mapping[int, Tensor]) -> None:
        """Continue after the encoder's last block, for `restore`.

        encoded: batch number → the encoder's final hidden states, saved by an earlier walk.
        """
        self.model.load_outer(with_head=False)
        self._capture(1, encoded)
        self.model.free_outer()

    def finish(self, with_head: bool = True) -> Iterator[tuple[int, Tensor]]:
        """Each batch's number and final hidden states, which also replace the last block's outputs
        in `states`.

        The weights outside of the blocks are in memory afterwards, with the output head if
        `with_head`.
        """
        self.model.load_outer(with_head=with_head)
        for number, tokens in self._tokens.items():
            final = self.model.finish(tokens, self.states.get(number), self._cache)
            yield number, final
            self.states.put(number, final)
        self.states.swap()

    def _capture(self, stage: int, encoded: Mapping[int, Tensor]) -> None:
        stack, known = self.model.stages[stage].stack, SharedTensors()
        first = sum(len(before.stack) for before in self.model.stages[:stage])
        loads = self.model.stages[stage].loads_first_block
        with self.model.loader.first_block(stack) if loads else nullcontext():
            for number, tokens in self._tokens.items():
                if stage:
                    self.encoded[number] = encoded[number].to(self.model.device)
                captured = self.model.capture(tokens, self._cache, stage, self.encoded.get(number))
                self.states.put(number, captured.hidden)
                inputs = self.inputs.setdefault(number, [None] * self.model.block_count)
                inputs[first : first + len(stack)] = known.of_batch(captured.inputs)
        self.states.swap()

    def _end_block(self, number: int) -> None:
        for inputs in self.inputs.values():
            inputs[number] = None
        self.states.swap()
        if number + 1 == self.model.block_count:
            self.encoded.clear()
        elif self.model.reads_encoder(number + 1) and not self.model.reads_encoder(number):
            self.model.load_outer(with_head=False)
            encoded = {
                batch: self.model.finish(tokens, self.states.get(batch), stage=0)
                for batch, tokens in self._tokens.items()
            }
            self._capture(1, encoded)
            self.model.free_outer()


@dataclass(frozen=True)
class BlockStep:
    """A loaded block, and the batches to run through it.

    walk: the walk that this is a step of.
    number: the block's number, counted through all stages.
    block: the module.
    """

    walk: Walk
    number: int
    block: nn.Module

    def inputs(self, batch: int) -> BlockInputs:
        """The block's other arguments for a batch."""
        inputs = self.walk.inputs[batch][self.number]
        assert inputs is not None, "a block's inputs are kept until it has run"
        return inputs

    def hidden(self, batch: int) -> Tensor:
        """The hidden states before the block, on the model's device."""
        return self.walk.states.get(batch).to(self.walk.model.device)

    def run(self, batch: int) -> Tensor:
        """The block's output for a batch."""
        return self.walk.model.run_block(self.block, self.inputs(batch), self.hidden(batch))

    def put(self, batch: int, output: Tensor) -> None:
        """Set a batch's hidden states for the next block."""
        self.walk.states.put(batch, output)

    def advance(self, batch: int) -> None:
        """Run the block on a batch, and set its output as the hidden states for the next block."""
        self.put(batch, self.run(batch))
