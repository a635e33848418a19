"""A causal language model run one decoder block at a time: the model is built without memory, and
each block's weights come from disk, meet all windows, and go again.

What a block is called with is not guessed: the model's own forward runs once per batch with
recorders in place of its blocks, which keep their arguments (masks, position embeddings, caches)
and return the hidden states unchanged. Then the blocks are run from those records, and at the end
the forward runs again with the last hidden states in place, for whatever comes after the blocks.

On a CPU each batch goes through a block on one thread, and as many batches at once as there are
threads: that is faster than sharing one batch, and the result doesn't depend on the number of
threads. It equals the ordinary forward of the same batch on one thread to the last bit; where
`calibrate` observes a mixture of experts, the forward with transformers'
experts_implementation="eager", or where that can't be chosen (`experts.adopt_experts`) the ordinary
one up to the order of sums.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import quantkit.ops  # noqa: F401 (declares the op)
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.models.block_calls import (
    RUN_FIRST,
    WAYS,
    Call,
    Interned,
    Recorder,
    RunningRecorder,
    Tape,
    WrongReturn,
)
from quantkit.models.hidden_states import HiddenStates, release_freed_memory
from quantkit.models.skeleton import Weights, decoder_blocks, require_no_missing
from quantkit.models.task import CAUSAL, task_of
from quantkit.models.tensor_roles import is_of_other_tower
from quantkit.models.threads import Turns, one_thread
from quantkit.models.weight_map import ParameterSource, WeightMap

PROBED = (2, 3)  # windows and positions whose hidden states show their shape


# ---- The model.


class _Unread:
    """A tensor that is read when it is looked into, which is how transformers' loader takes its
    turn.
    """

    def __init__(self, weights: Weights, name: str) -> None:
        self._weights, self._name = weights, name

    def __getitem__(self, _: Any) -> Tensor:
        return self._weights.read(self._name)


class BlockwiseModel:
    """A model whose decoder blocks come into memory one at a time. Each block can be run once."""

    def __init__(
        self, skeleton: nn.Module, weights: Weights, where: str, device: str = "cpu"
    ) -> None:
        self.model, self.device, self.where = skeleton, torch.device(device), where
        self._weights = weights
        self.task = task_of(skeleton.config.to_dict(), where)
        self._takes_cache = self.task == CAUSAL
        self.blocks_name, self._blocks = decoder_blocks(skeleton)
        shapes = weights.shapes()
        self._map = WeightMap(skeleton, list(shapes))
        self.shared = self._shared_between_blocks()
        self._require_whole(shapes)
        self._outer_names = [
            name
            for name, target in self._map.target_of.items()
            if not target.startswith(f"{self.blocks_name}.")
        ]
        self._loader: ThreadPoolExecutor | None = None
        self._turns = Turns()
        self._outputs = 0  # of a recorder: a tensor, or a tuple of this length
        self._probed_shape: tuple[int, ...] | None = None
        # whether blocks are called with what the one before returns beside hidden states; known
        # once calls are recorded
        self.hands_on = False
        self._looked_at: nn.ModuleList | None = None
        for name, buffer in list(skeleton.named_buffers()):
            if not buffer.is_meta and self.device.type != "cpu":
                module, _, leaf = name.rpartition(".")
                setattr(skeleton.get_submodule(module), leaf, buffer.to(self.device))

    def _shared_between_blocks(self) -> dict[str, str]:
        """Parameters of blocks that are stored as another block's; each block gets its own while it
        is in memory, so transformers mustn't tie them.
        """
        prefix = f"{self.blocks_name}."
        shared = {
            target: source
            for target, source in self._map.shared.items()
            if target.startswith(prefix) and source.startswith(prefix)
        }
        if shared:
            self.model.all_tied_weights_keys = {
                target: source
                for target, source in self.model.all_tied_weights_keys.items()
                if target not in shared
            }
        return shared

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

    @property
    def states_dtype(self) -> torch.dtype:
        """What holds the hidden states between blocks without rounding them: Mamba's residual
        stream is float32 in a bfloat16 model.
        """
        return (
            torch.float32
            if getattr(self.model.config, "residual_in_fp32", False)
            else self.model.config.dtype
        )

    @property
    def block_count(self) -> int:
        return len(self._blocks)

    def states_shape(self, tokens: Tensor) -> tuple[int, ...]:
        """Of the hidden states of a batch of tokens, [windows, positions]: as blocks are given
        them, so what is outside of the blocks has to be loaded.

        Some models have several streams of them: [streams, windows, positions, hidden size] (Gemma
        3n), or behind the positions (DeepSeek V4). CPM-Ant has more positions than tokens; what is
        returned for it is too small.
        """
        if self._probed_shape is None:
            self._probed_shape = tuple(
                self._record(torch.zeros(PROBED, dtype=torch.long, device=self.device), None)[
                    0
                ].shape
            )
        found = self._probed_shape
        place = next(
            (place for place in range(len(found)) if found[place : place + 2] == PROBED), None
        )
        return (
            (*tokens.shape, found[-1])
            if place is None
            else (*found[:place], *tokens.shape, *found[place + 2 :])
        )

    def pass_on(
        self,
        number: int,
        batches: Mapping[int, Tensor],
        states: HiddenStates,
        calls: Mapping[int, list[Call | None]],
    ) -> None:
        """Called when all batches are behind a block: nothing to do, except between an encoder's
        last and a decoder's first.
        """

    def reads_encoder(self, number: int) -> bool:
        """Whether a block is called with what an encoder made of the text."""
        return False

    def block_name(self, number: int) -> str:
        return f"{self.blocks_name}.{number}"

    @property
    def unexpected(self) -> list[str]:
        """Tensors of the checkpoint that the model has no place for."""
        return self._map.unexpected

    def is_beyond(self, name: str) -> bool:
        """Whether such a tensor belongs to what runtimes have and transformers leaves out: layers
        that predict further tokens.
        """
        block = re.match(rf"{re.escape(self.blocks_name)}\.(\d+)\.", name)
        left_out = self.model._keys_to_ignore_on_load_unexpected or ()
        return (
            block is not None
            and int(block[1]) >= len(self._blocks)
            or any(re.search(pattern, name) for pattern in left_out)
        )

    def sources(self, parameter: str) -> ParameterSource | None:
        """The tensors on disk that make a parameter of the module tree."""
        return self._map.sources.get(self.shared.get(parameter, parameter))

    def _require_whole(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse now what would otherwise be found when its block's turn comes, hours from here."""
        expected = self.model.state_dict()
        tied = {*(getattr(self.model, "all_tied_weights_keys", None) or {}), *self.shared}
        ignored = self.model._keys_to_ignore_on_load_missing or ()
        missing = [
            name
            for name in expected
            if not self._map.is_made(name)
            and name not in tied
            and not any(re.search(pattern, name) for pattern in ignored)
        ]
        require_no_missing(self.where, missing)
        for target, source in self._map.sources.items():
            counts = {len(names) for names in source.lists}
            if len(counts) > 1:
                raise CheckpointError(
                    f"{self.where} lacks some of the tensors that make {target}: {sorted(counts)}"
                    " are there; fetch or export it again"
                )
            for names in source.lists:
                usual = Counter(shapes[name] for name in names).most_common(1)[0][0]
                odd = next((name for name in names if shapes[name] != usual), None)
                if odd is not None:
                    raise CheckpointError(
                        f"{odd} in {self.where} has the shape {list(shapes[odd])}, others of its"
                        f" kind {list(usual)}; fetch it again"
                    )
            if self._map.is_split(target):
                continue
            name, wanted = source.lists[0][0], expected[target].shape
            found = sum(math.prod(shapes[name]) for names in source.lists for name in names)
            # Transposed or merged, but as many numbers; a tensor that is only renamed has the same
            # shape.
            if found != wanted.numel() or (
                self._map.is_plain(target) and shapes[name] != tuple(wanted)
            ):
                described = (
                    f"{name} has the shape {list(shapes[name])}"
                    if len(source.lists[0]) == 1
                    else f"{len(source.lists[0])} tensors make"
                )
                raise CheckpointError(
                    f"in {self.where} {described}, {target} needs {list(wanted)} by the model's"
                    " configuration; fetch it again"
                )

    # -- Weights.

    def load_outer(self, with_head: bool) -> None:
        """Bring in what is outside of the blocks: embeddings, norms, and the output head if it is
        asked for; nothing that sees or hears.
        """
        head = self.model.get_output_embeddings()
        head_names = {name for name, module in self.model.named_modules() if module is head}
        names = [
            name for name in self._outer_names if not is_of_other_tower(self._map.target_of[name])
        ]
        names = [
            name
            for name in names
            if with_head or self._map.target_of[name].rpartition(".")[0] not in head_names
        ]
        names = [name for name in names if self._is_parameter(self._map.target_of[name])]
        self._load(names)
        tied = self.model.all_tied_weights_keys
        self.model.tie_weights(
            missing_keys={*tied, *tied.values()} - {self._map.target_of[name] for name in names},
            recompute_mapping=False,
        )
        self._weights.finish(self.model, "")

    def outer_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is outside of the blocks, by its name in the module tree."""
        return (
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if not name.startswith(f"{self.blocks_name}.")
        )

    def _is_parameter(self, name: str) -> bool:
        """False where another module has taken the place of the one that had it."""
        module, _, leaf = name.rpartition(".")
        return leaf in self.model.get_submodule(module).state_dict()

    def free_outer(self) -> None:
        """Let go of what `load_outer` brought; buffers stay."""
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta:
                    setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _block_names(self, number: int) -> list[str]:
        prefix = f"{self.block_name(number)}."
        return [name for name, target in self._map.target_of.items() if target.startswith(prefix)]

    def _load(self, names: Sequence[str], shared: Mapping[str, str] = MappingProxyType({})) -> None:
        """names: tensors of the checkpoint; shared: parameter → the tensor that makes it as well as
        its own.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        if not names and not shared:
            return
        dtype = self.model.config.dtype
        settings = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=copy.deepcopy(self._map.conversions),
            device_map={"": str(self.device)},
        )
        try:
            with _no_progress_bar():
                unread = {
                    name: _Unread(self._weights, stored)
                    for name, stored in [*zip(names, names), *shared.items()]
                }
                found, _ = convert_and_load_state_dict_in_model(self.model, unread, settings)
        except QuantkitError:
            raise
        except Exception as error:  # transformers raises every kind
            raise CheckpointError(
                f"transformers can't load {names[0]} and its like from {self.where}:"
                f" {' '.join(str(error).split())[:300]}"
            ) from None
        problems = [*found.mismatched_keys, *found.conversion_errors.items(), *found.error_msgs]
        if problems:
            raise CheckpointError(
                f"{self.where} doesn't fit the model that its configuration describes:"
                f" {' '.join(str(problems[0]).split())[:200]}"
            )

    def _load_block(self, number: int) -> nn.Module:
        prefix = f"{self.block_name(number)}."
        self._load(
            self._block_names(number),
            {
                name: self.sources(name).lists[0][0]
                for name in self.shared
                if name.startswith(prefix)
            },
        )
        block = self._blocks[number]
        self._weights.finish(self.model, self.block_name(number))
        empty = [
            name
            for name, tensor in itertools.chain(block.named_parameters(), block.named_buffers())
            if tensor.is_meta
        ]
        require_no_missing(self.where, [f"{self.block_name(number)}.{name}" for name in empty])
        return block

    def read_anew(self, parameter: str) -> nn.Parameter:
        """A parameter of a block in memory as `weights` gives it now; the block keeps the one that
        it has.
        """
        module, _, leaf = parameter.rpartition(".")
        owner = self.model.get_submodule(module)
        before = getattr(owner, leaf)
        self._load([name for names in self._map.sources[parameter].lists for name in names])
        made = getattr(owner, leaf)
        setattr(owner, leaf, before)
        return made

    # -- Running.

    def record(
        self,
        batches: Sequence[Tensor],
        states: HiddenStates,
        cache: Any = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Call | None]]:
        """Run what comes before the blocks: fills `states`, returns each batch's calls of each
        block.

        batches: token ids, [windows, positions]; numbers: what they are called in `states`, unless
        0, 1, 2 ...
        """
        known = Interned()
        calls: list[list[Call | None]] = []
        for number, tokens in zip(numbers if numbers is not None else itertools.count(), batches):
            hidden, batch_calls = self._record(tokens.to(self.device), cache)
            states.put(number, hidden)
            calls.append([known.call(call) for call in batch_calls])
            known.forget_identities()
        states.turn()
        return calls

    def _record(self, tokens: Tensor, cache: Any) -> tuple[Tensor, list[Call]]:
        try:
            return self._record_through(
                self._blocks, tokens.shape, lambda: self._forward(tokens, cache), WAYS
            )
        except CheckpointError:
            if not getattr(cache, "may_be_left_out", False):
                raise
        # Some take no cache but one of their own, and keep no keys and values that could be
        # measured.
        self._takes_cache = False
        return self._record_through(
            self._blocks, tokens.shape, lambda: self._forward(tokens, None), WAYS
        )

    def _record_through(
        self,
        blocks: nn.ModuleList,
        shape: torch.Size,
        forward: Callable[[], Tensor],
        ways: Sequence[int],
    ) -> tuple[Tensor, list[Call]]:
        """ways: which to try, in this order; RUN_FIRST needs the first block's weights."""
        reason = "its blocks pass on more than hidden states"
        for outputs in dict.fromkeys((self._outputs, *ways)):
            hands_on = self.hands_on and blocks is self._looked_at
            tape = Tape(shape)
            try:
                with self._recorders(blocks, tape, outputs, hands_on=hands_on):
                    tape.require_end(forward())
            except WrongReturn as wrong:
                reason = str(wrong) or reason
                continue
            if len(tape.calls) != len(blocks):
                raise self._unusual(f"its forward calls {len(tape.calls)} of {len(blocks)} blocks")
            self._outputs = outputs
            if blocks is not self._looked_at:
                tape = self._handing_on(blocks, shape, forward) or tape
                self._looked_at, self.hands_on = blocks, tape.is_handed_on
            return tape.first, tape.calls
        raise self._unusual(reason)

    def _handing_on(
        self, blocks: nn.ModuleList, shape: torch.Size, forward: Callable[[], Tensor]
    ) -> Tape | None:
        """The same calls, with places for what blocks hand on, if they do."""
        tape = Tape(shape)
        if self._outputs not in (2, 3):
            return None
        try:
            with self._recorders(blocks, tape, self._outputs, hands_on=True):
                tape.require_end(forward())
        except (WrongReturn, QuantkitError, RuntimeError):  # a model that computes with them
            if tape.is_handed_on:
                raise self._unusual(
                    "each hands on more than hidden states to the next, in a way of its own"
                ) from None
        return tape if tape.is_handed_on else None

    def _unusual(self, why: str) -> CheckpointError:
        return CheckpointError(f"{type(self.model).__name__} can't be run block by block: {why}")

    def _forward(self, tokens: Tensor, cache: Any) -> Tensor:
        body = self.model.get_submodule(self.blocks_name.rpartition(".")[0])
        accepted = inspect.signature(body.forward).parameters
        if "input_ids" not in accepted:  # an encoder, whose embeddings are beside it
            body = self.model.get_submodule(self.blocks_name.rpartition(".")[0].rpartition(".")[0])
            accepted = inspect.signature(body.forward).parameters
        keywords: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        if cache is not None and "past_key_values" in accepted and self._takes_cache:
            keywords = {"past_key_values": cache, "use_cache": True}
        return self._call(body, input_ids=tokens, **keywords)

    @staticmethod
    def _call(body: nn.Module, **keywords: Any) -> Tensor:
        with one_thread(), torch.inference_mode():
            try:
                return body(**keywords)[0]
            except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
                # A loop that takes its blocks' outputs apart otherwise than a recorder returns
                # them.
                raise WrongReturn(f"{type(error).__name__}: {error}") from error

    @contextmanager
    def _recorders(
        self,
        places: nn.ModuleList,
        tape: Tape,
        outputs: int,
        final: Tensor | None = None,
        hands_on: bool = False,
    ) -> Iterator[None]:
        blocks, last = list(places), len(places) - 1
        for number, block in enumerate(blocks):
            arrive = (lambda *_: final) if final is not None and number == last else tape.arrive
            runs = outputs == RUN_FIRST and not number and final is None
            places[number] = (
                RunningRecorder(block, arrive, outputs)
                if runs
                else Recorder(block, arrive, outputs, hands_on)
            )
        try:
            yield
        finally:
            for number, block in enumerate(blocks):
                places[number] = block

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """The model with blocks that hand on what they are given. After `record`, which finds out
        what they return it in.
        """
        with self._recorders(self._blocks, Tape(torch.Size()), self._outputs):
            yield

    @contextmanager
    def block(self, number: int, prefetch: bool | None = None) -> Iterator[nn.Module]:
        """A block with its weights, for as long as the context lasts. On a GPU the next one loads
        meanwhile.
        """
        prefetch = self.device.type == "cuda" if prefetch is None else prefetch
        if prefetch and self._loader is None:
            self._loader = ThreadPoolExecutor(1)
            self._coming = self._loader.submit(self._load_block_aside, number)
        block = self._coming.result() if prefetch else self._load_block(number)
        if prefetch and number + 1 < len(self._blocks):
            self._coming = self._loader.submit(self._load_block_aside, number + 1)
        try:
            yield block
        finally:
            # Its weights go; what the model's forward may ask it for (its kind) stays.
            self._blocks[number] = _empty(block)
            del block
            release_freed_memory()

    def _load_block_aside(self, number: int) -> nn.Module:
        if self.device.type != "cuda":
            return self._load_block(number)
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            block = self._load_block(number)
        stream.synchronize()
        return block

    def run_block(self, block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
        """One batch through one block. hidden: [windows, positions, hidden size]."""
        given = call.given()
        arguments, keywords = given.arguments, given.keywords
        if call.hidden_name:
            keywords = keywords | {call.hidden_name: hidden}
        else:
            arguments = (hidden, *arguments)
        with self._turns.of(block):
            output = block(*arguments, **keywords)
        if not isinstance(output, (tuple, list)):
            return output
        call.hand_on(output[1:])
        return output[0]

    def finish(self, tokens: Tensor, hidden: Tensor, cache: Any = None) -> Tensor:
        """What the model makes of the last block's output (its last norm). hidden: [windows,
        positions, hidden size].
        """
        with self._recorders(
            self._blocks, Tape(tokens.shape), self._outputs, hidden.to(self.device)
        ):
            return self._forward(tokens.to(self.device), cache)

    def close(self) -> None:
        if self._loader is not None:
            self._loader.shutdown(wait=True, cancel_futures=True)
            self._loader = None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one for each load, which here is each block."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _empty(block: nn.Module) -> nn.Module:
    """The block without its weights, also those that replaced Linears keep outside of
    parameters.
    """
    for module in block.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, name, None)
    return block.to("meta")
