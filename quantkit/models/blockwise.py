"""A language model run one block at a time: the model is built without memory, and each block's
weights come from disk, meet all windows, and go again.

`BlockwiseModel.walk` is the one place where this happens. The model's own forward runs once per
batch with recorders in place of its blocks, which capture the block inputs (`block_stack.py`). Then
the blocks run from those inputs. At the end the forward runs again with the last hidden states in
place, for the norm after the blocks. An encoder and a decoder are two stages, one after the other.

On a CPU each batch goes through a block on one thread, and as many batches at once as there are
threads: that is faster than sharing one batch, and the result doesn't depend on the number of
threads. It equals the ordinary forward of the same batch on one thread to the last bit; where
`calibrate` observes a mixture of experts, the forward with transformers'
experts_implementation="eager", or where that can't be chosen (`experts.adopt_experts`) the ordinary
one up to the order of sums.
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
from quantkit.models.task import CAUSAL, TARGET, task_of
from quantkit.models.threads import StatefulModuleLock
from quantkit.models.weight_map import ParameterSource


class BlockwiseModel:
    """A model whose blocks come into memory one at a time. Each block can be run once.

    model: the module tree, without memory.
    weights: where its tensors come from.
    where: the checkpoint's path, for errors.
    device: where it computes.
    """

    def __init__(self, model: Any, weights: Weights, where: str, device: str = "cpu") -> None:
        self.model = model  # a PreTrainedModel
        self.device, self.where = torch.device(device), where
        self.task = task_of(self.model.config.to_dict(), where)
        self.stages: tuple[Stage, ...]
        if self.task == TARGET:
            self.stages = (EncoderStage(model), DecoderStage(model))
        else:
            name, _ = decoder_blocks(model)
            self.stages = (SingleStage(model, name, self.device, self.task == CAUSAL),)
        stacks = [stage.stack for stage in self.stages]
        self.loader = BlockLoader(model, weights, where, self.device, stacks)
        self._lock = StatefulModuleLock()

    # -- What it is made of.

    @property
    def block_count(self) -> int:
        return sum(len(stage.stack) for stage in self.stages)

    @property
    def blocks_name(self) -> str:
        """The path of the blocks in the module tree; of an encoder and a decoder, the decoder's."""
        return self.stages[-1].stack.name

    def block_name(self, number: int) -> str:
        return self.loader.block_name(number)

    def reads_encoder(self, number: int) -> bool:
        """Whether a block is called with what an encoder made of the text."""
        return len(self.stages) > 1 and len(self.stages[0].stack) <= number < self.block_count

    @property
    def has_side_outputs(self) -> bool:
        """Whether blocks read what those before them return after hidden states; known once inputs
        are captured.
        """
        return any(stage.stack.has_side_outputs for stage in self.stages)

    @property
    def states_dtype(self) -> torch.dtype:
        """What holds the hidden states between blocks without rounding them: Mamba's residual
        stream is float32 in a bfloat16 model.
        """
        config = self.model.config
        return torch.float32 if getattr(config, "residual_in_fp32", False) else config.dtype

    @property
    def unexpected(self) -> list[str]:
        """Tensors of the checkpoint that the model has no place for."""
        return self.loader.unexpected

    def is_not_in_model(self, name: str) -> bool:
        """Whether such a tensor belongs to what runtimes have and transformers leaves out: layers
        that predict further tokens.
        """
        for stage in self.stages:
            block = re.match(rf"{re.escape(stage.stack.name)}\.(\d+)\.", name)
            if block is not None and int(block[1]) >= len(stage.stack):
                return True
        left_out = self.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, name) for pattern in left_out)

    def sources(self, parameter: str) -> ParameterSource | None:
        """The tensors on disk that make a parameter of the module tree."""
        return self.loader.sources(parameter)

    @property
    def shared(self) -> dict[str, str]:
        """Parameters of blocks that are stored as another block's, parameter → that one."""
        return self.loader.shared

    def require_unshared(self) -> None:
        """Refuse to measure a Linear that several blocks run: what it reads is learnt one block at
        a time.
        """
        for target, source in self.shared.items():
            raise CheckpointError(
                f"{self.where} runs the weights of {source.removesuffix('.weight')} again in"
                f" {target.removesuffix('.weight')}, and quantkit measures Linears that one block"
                " runs; export it in a scheme that needs no calibration (fp8-dynamic,"
                " int8-dynamic), which eval judges"
            )

    # -- Weights.

    def load_outer(self, with_head: bool) -> None:
        """Bring in what is outside of the blocks: embeddings, norms, and the output head if it is
        asked for; nothing that sees or hears.
        """
        self.loader.load_outer(with_head)

    def free_outer(self) -> None:
        """Let go of what `load_outer` brought; buffers stay."""
        self.loader.free_outer()

    def outer_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is outside of the blocks, by its name in the module tree."""
        return self.loader.outer_parameters()

    def read_anew(self, parameter: str, read: Callable[[str], Tensor]) -> nn.Parameter:
        """A parameter of a block in memory as `read` gives its tensors on disk; the block keeps the
        one that it has.
        """
        return self.loader.read_anew(parameter, read)

    def block(self, number: int, prefetch: bool | None = None) -> AbstractContextManager[nn.Module]:
        """A block with its weights, for as long as the context lasts. On a GPU the next one loads
        meanwhile.
        """
        return self.loader.block(number, prefetch)

    # -- Running.

    def hidden_shape(self, tokens: Tensor) -> tuple[int, ...]:
        """The shape of the hidden states of a batch of tokens, [windows, positions], as the first
        block is given them; what is outside of the blocks has to be loaded.
        """
        return self.stages[0].hidden_shape(tokens)

    def capture(
        self, tokens: Tensor, cache: Any = None, stage: int = 0, encoded: Tensor | None = None
    ) -> Captured:
        """What a batch brings to a stage's blocks. tokens: [windows, positions]; encoded: the final
        hidden states of the stage before. What is outside of the blocks has to be loaded.
        """
        if encoded is not None:
            encoded = encoded.to(self.device)
        return self.stages[stage].capture(tokens.to(self.device), encoded, cache)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """The model with blocks that return the hidden states that they are given. After `capture`,
        which finds out what they return them in.
        """
        with ExitStack() as bypasses:
            for stage in self.stages:
                bypasses.enter_context(stage.stack.bypassed())
            yield

    def run_block(self, block: nn.Module, inputs: BlockInputs, hidden: Tensor) -> Tensor:
        """One batch through one block. hidden: [windows, positions, hidden size]."""
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
        """What a stage makes of its last block's output (its last norm). hidden: [windows,
        positions, hidden size].
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
        """Take batches through all blocks, one block after the other.

        batches: token ids by batch number, [windows, positions].
        states: empty; holds hidden states between two blocks, by batch number.
        on_block: runs a block on the batches, and puts each one's output (`BlockStep.advance`).
        cache: given to the model's forward, to see keys and values.
        load_outer: brings in what is outside of the blocks, if in another way than the model does.
        branches: numbers that `Walk.branch` may add, with the batch that each will come from.
        restore: puts what an earlier walk saved in place; returns the block to begin with.
        after_block: called with each block's number when its outputs are what `states` gives.
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


# ---- The walk.


class Walk:
    """One pass of batches through the blocks of a model.

    states: hidden states before the present block, by batch number.
    inputs: the captured block inputs, for each batch by block; None for blocks that are done, and
    for a decoder's while the encoder runs.
    encoded: what the encoder made of each batch, as long as decoder blocks are to come.
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
        """The numbers of those that go through, in the order in which they came."""
        return list(self._tokens)

    def branch(self, batch: int, into: int) -> None:
        """Let another batch go on from where this one is: with its tokens and its captured inputs.
        Its hidden states are put by the caller.
        """
        self._tokens[into] = self._tokens[batch]
        self.inputs[into] = list(self.inputs[batch])
        if batch in self.encoded:
            self.encoded[into] = self.encoded[batch]

    def begin_decoder(self, encoded: Mapping[int, Tensor]) -> None:
        """Go on after the encoder's last block, with what it made of each batch in an earlier walk
        (for `restore`).
        """
        self.model.load_outer(with_head=False)
        self._capture(1, encoded)
        self.model.free_outer()

    def finish(self, with_head: bool = True) -> Iterator[tuple[int, Tensor]]:
        """Each batch's final hidden states, which take the place of the last block's output in
        `states`. Leaves what is outside of the blocks in memory, with the output head if asked for.
        """
        self.model.load_outer(with_head=with_head)
        for number, tokens in self._tokens.items():
            final = self.model.finish(tokens, self.states.get(number), self._cache)
            yield number, final
            self.states.put(number, final)
        self.states.turn()

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
        self.states.turn()

    def _end_block(self, number: int) -> None:
        for inputs in self.inputs.values():
            inputs[number] = None
        self.states.turn()
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
    """A block in memory, and the batches that come to it.

    number: the block's, counted through all stages.
    """

    walk: Walk
    number: int
    block: nn.Module

    def inputs(self, batch: int) -> BlockInputs:
        """What else the block is called with."""
        inputs = self.walk.inputs[batch][self.number]
        assert inputs is not None, "a block's inputs are there until it is done"
        return inputs

    def hidden(self, batch: int) -> Tensor:
        """The hidden states before the block, on the model's device."""
        return self.walk.states.get(batch).to(self.walk.model.device)

    def run(self, batch: int) -> Tensor:
        """The block's output for a batch."""
        return self.walk.model.run_block(self.block, self.inputs(batch), self.hidden(batch))

    def put(self, batch: int, output: Tensor) -> None:
        """Give a batch to the next block with these hidden states."""
        self.walk.states.put(batch, output)

    def advance(self, batch: int) -> None:
        """Run the block on a batch, and give its output to the next block."""
        self.put(batch, self.run(batch))
