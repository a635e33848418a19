"""Loading a model's weights: those outside of the blocks, and one block at a time.

The module tree is built on the meta device, and transformers' own loader fills the part that is
needed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CheckpointError, QuantkitError
from quantkit.models.block_stack import BlockStack
from quantkit.models.hidden_states import release_freed_memory
from quantkit.models.skeleton import Weights, put_tensor, require_no_missing
from quantkit.models.tensor_roles import is_of_other_tower
from quantkit.models.weight_check import require_complete
from quantkit.models.weight_map import ParameterSource, WeightMap


class _LazyTensor:
    """A tensor that is read when it is indexed, as transformers' loader does with a safetensors
    slice.
    """

    def __init__(self, read: Callable[[str], Tensor], name: str) -> None:
        self._read, self._name = read, name

    def __getitem__(self, _: Any) -> Tensor:
        return self._read(self._name)


class BlockLoader:
    """Loads the weights of one model.

    stacks: its lists of blocks, in the order in which they run.
    shared: parameter of a block → the parameter of another block as which it is stored. Each block
        gets its own copy while it is in memory, so transformers doesn't tie them.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        where: str,
        device: torch.device,
        stacks: Sequence[BlockStack],
    ) -> None:
        self._model: Any = model  # a PreTrainedModel
        self._weights, self._where, self._device, self._stacks = weights, where, device, stacks
        self._in_blocks = tuple(f"{stack.name}." for stack in stacks)
        shapes = weights.shapes()
        self._map = WeightMap(model, list(shapes))
        self.shared = self._shared_between_blocks()
        require_complete(model, self._map, shapes, self.shared, where)
        self._prefetcher: ThreadPoolExecutor | None = None
        self._prefetched: dict[int, Future[nn.Module]] = {}
        for name, buffer in list(model.named_buffers()):
            if not buffer.is_meta and device.type != "cpu":
                put_tensor(model, name, buffer.to(device))

    def _shared_between_blocks(self) -> dict[str, str]:
        shared = {
            target: source
            for target, source in self._map.shared.items()
            if target.startswith(self._in_blocks) and source.startswith(self._in_blocks)
        }
        if shared:
            self._model.all_tied_weights_keys = {
                target: source
                for target, source in self._model.all_tied_weights_keys.items()
                if target not in shared
            }
        return shared

    @property
    def unexpected(self) -> list[str]:
        """Tensors of the checkpoint that the model has no parameter for."""
        return self._map.unexpected

    def sources(self, parameter: str) -> ParameterSource | None:
        """The stored tensors from which a parameter of the module tree is made."""
        return self._map.sources.get(self.shared.get(parameter, parameter))

    # ---- Outside of the blocks.

    def load_outer(self, with_head: bool) -> None:
        """Load the weights outside of the blocks: embeddings and norms, but no vision or audio
        towers.

        with_head: load the output head too.
        """
        head = self._model.get_output_embeddings()
        head_names = {name for name, module in self._model.named_modules() if module is head}
        names = [
            name
            for name, target in self._map.target_of.items()
            if not target.startswith(self._in_blocks) and not is_of_other_tower(target)
        ]
        names = [
            name
            for name in names
            if with_head or self._map.target_of[name].rpartition(".")[0] not in head_names
        ]
        names = [name for name in names if self._is_parameter(self._map.target_of[name])]
        self._load(names)
        tied = self._model.all_tied_weights_keys
        self._model.tie_weights(
            missing_keys={*tied, *tied.values()} - {self._map.target_of[name] for name in names},
            recompute_mapping=False,
        )
        self._weights.finish(self._model, "")

    def outer_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters outside of the blocks, with their names in the module tree."""
        return (
            (name, parameter)
            for name, parameter in self._model.named_parameters()
            if not name.startswith(self._in_blocks)
        )

    def _is_parameter(self, name: str) -> bool:
        """Whether the module tree still has this parameter; another module may have replaced its
        owner.
        """
        module, _, leaf = name.rpartition(".")
        return leaf in self._model.get_submodule(module).state_dict()

    def free_outer(self) -> None:
        """Free the parameters outside of the blocks; buffers stay."""
        for module in self._model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta:
                    setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    # ---- Blocks.

    def place(self, number: int) -> tuple[BlockStack, int]:
        """The stack that holds a block, and the block's index in it.

        number: the block's number, counted through all stacks.
        """
        for stack in self._stacks:
            if number < len(stack):
                return stack, number
            number -= len(stack)
        raise IndexError(number)

    def block_name(self, number: int) -> str:
        """The path of a block in the module tree."""
        stack, place = self.place(number)
        return f"{stack.name}.{place}"

    @contextmanager
    def block(self, number: int, prefetch: bool | None = None) -> Iterator[nn.Module]:
        """A block with its weights, which are freed when the context ends. Each block can be loaded
        once.

        prefetch: load the stack's next block in the background; None does so on a GPU only.
        """
        prefetch = self._device.type == "cuda" if prefetch is None else prefetch
        prefetched = self._prefetched.pop(number, None)
        block = self.load_block(number) if prefetched is None else prefetched.result()
        stack, place = self.place(number)
        if prefetch and place + 1 < len(stack):
            self._prefetcher = self._prefetcher or ThreadPoolExecutor(1)
            self._prefetched[number + 1] = self._prefetcher.submit(
                self._load_in_background, number + 1
            )
        try:
            yield block
        finally:
            # Its weights are freed; its attributes stay, because the model's forward may read them.
            stack.blocks[place] = _without_weights(block)
            del block
            release_freed_memory()

    @contextmanager
    def first_block(self, stack: BlockStack) -> Iterator[None]:
        """A context in which a stack's first block has its weights, for models whose other blocks
        take its outputs.
        """
        # A block can be loaded only once, and this one will be loaded again for the walk.
        empty = copy.deepcopy(stack.blocks[0])
        before = itertools.takewhile(lambda other: other is not stack, self._stacks)
        self.load_block(sum(map(len, before)))
        try:
            yield
        finally:
            stack.blocks[0] = empty

    def close(self) -> None:
        """Cancel the loading of a prefetched block."""
        if self._prefetcher is not None:
            self._prefetcher.shutdown(wait=True, cancel_futures=True)
            self._prefetcher = None
            self._prefetched.clear()

    def _load_in_background(self, number: int) -> nn.Module:
        if self._device.type != "cuda":
            return self.load_block(number)
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            block = self.load_block(number)
        stream.synchronize()
        return block

    def load_block(self, number: int) -> nn.Module:
        """Load a block's weights, which stay in memory."""
        prefix = f"{self.block_name(number)}."
        shared: dict[str, str] = {}
        for name in self.shared:
            if name.startswith(prefix):
                source = self.sources(name)
                assert source is not None
                shared[name] = source.lists[0][0]
        names = [name for name, target in self._map.target_of.items() if target.startswith(prefix)]
        self._load(names, shared)
        stack, place = self.place(number)
        block = stack.blocks[place]
        self._weights.finish(self._model, self.block_name(number))
        empty = [
            name
            for name, tensor in itertools.chain(block.named_parameters(), block.named_buffers())
            if tensor.is_meta
        ]
        require_no_missing(self._where, [f"{self.block_name(number)}.{name}" for name in empty])
        return block

    def read_anew(self, parameter: str, read: Callable[[str], Tensor]) -> nn.Parameter:
        """A new value for a parameter of a loaded block; the block keeps the value that it has.

        read: name of a stored tensor → the tensor to use instead of the stored one.
        """
        module, _, leaf = parameter.rpartition(".")
        owner = self._model.get_submodule(module)
        before = getattr(owner, leaf)
        names = [name for names in self._map.sources[parameter].lists for name in names]
        self._load(names, read=read)
        anew = getattr(owner, leaf)
        setattr(owner, leaf, before)
        return anew

    def _load(
        self,
        names: Sequence[str],
        shared: Mapping[str, str] = MappingProxyType({}),
        read: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Load tensors through transformers.

        names: tensors of the checkpoint.
        shared: parameter → a tensor that makes it, in addition to the tensor's own parameter.
        read: name → tensor; None reads from the model's weights.

        Raises CheckpointError if transformers can't load them.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        if not names and not shared:
            return
        dtype = self._model.config.dtype
        settings = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self._model._get_dtype_plan(dtype),
            weight_mapping=copy.deepcopy(self._map.conversions),
            device_map={"": str(self._device)},
        )
        try:
            with _no_progress_bar():
                unread = {
                    name: _LazyTensor(read or self._weights.read, stored)
                    for name, stored in [*zip(names, names), *shared.items()]
                }
                found, _ = convert_and_load_state_dict_in_model(self._model, unread, settings)
        except QuantkitError:
            raise
        except Exception as error:  # transformers raises exceptions of every kind
            raise CheckpointError(
                f"transformers can't load {names[0]} and similar tensors from {self._where}:"
                f" {' '.join(str(error).split())[:300]}"
            ) from None
        problems = [*found.mismatched_keys, *found.conversion_errors.items(), *found.error_msgs]
        if problems:
            raise CheckpointError(
                f"{self._where} doesn't fit the model that its configuration describes:"
                f" {' '.join(str(problems[0]).split())[:200]}"
            )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Switch off transformers' progress bar: it would draw one for each block."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _without_weights(block: nn.Module) -> nn.Module:
    """The block without its weights, including tensors that replaced Linears hold as plain
    attributes.
    """
    for module in block.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, name, None)
    return block.to("meta")
