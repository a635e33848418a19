"""Models of an encoder and a decoder, run one block at a time: the encoder's blocks, then the
decoder's, numbered through.

They are judged by the loss of a target. Of a window of text the first half is read by the encoder,
and the decoder predicts every token of the second half from that half so far and from all that the
encoder read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CheckpointError
from quantkit.models.block_calls import RUN_FIRST, Call, Interned, Tape
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.skeleton import Weights
from quantkit.models.task import TARGET, task_of


class Chain:
    """The encoder's blocks and the decoder's as one list."""

    def __init__(self, encoder: nn.ModuleList, decoder: nn.ModuleList) -> None:
        self.encoder, self.decoder = encoder, decoder

    def __len__(self) -> int:
        return len(self.encoder) + len(self.decoder)

    def _place(self, number: int) -> tuple[nn.ModuleList, int]:
        return (
            (self.encoder, number)
            if number < len(self.encoder)
            else (self.decoder, number - len(self.encoder))
        )

    def __getitem__(self, number: int) -> nn.Module:
        blocks, place = self._place(number)
        return blocks[place]

    def __setitem__(self, number: int, block: nn.Module) -> None:
        blocks, place = self._place(number)
        blocks[place] = block

    def __iter__(self) -> Iterator[nn.Module]:
        yield from self.encoder
        yield from self.decoder


def halves(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder reads and what the decoder predicts, of token ids [windows, positions]; an
    odd last one is left out.
    """
    half = tokens.shape[1] // 2
    return tokens[:, :half], tokens[:, half : 2 * half]


class EncoderDecoderModel(BlockwiseModel):
    """A BlockwiseModel whose decoder blocks come after its encoder blocks."""

    def __init__(
        self, skeleton: nn.Module, weights: Weights, where: str, device: str = "cpu"
    ) -> None:
        super().__init__(skeleton, weights, where, device)
        names = {id(module): name for name, module in skeleton.named_modules()}
        stacks = [
            max(_lists(side), key=_parameters, default=None)
            for side in (skeleton.get_encoder(), skeleton.get_decoder())
        ]
        if None in stacks:
            raise CheckpointError(
                f"{type(skeleton).__name__} has no lists of encoder and of decoder blocks, so it"
                " can't be run block by block"
            )
        self._names = [names[id(stack)] for stack in stacks]
        self._blocks = Chain(*stacks)
        self._outer_names = [
            name
            for name, target in self._map.target_of.items()
            if not target.startswith(tuple(f"{name}." for name in self._names))
        ]
        self.encoded: dict[int, Tensor] = {}  # by batch, as long as decoder blocks are to come

    def block_name(self, number: int) -> str:
        first = len(self._blocks.encoder)
        return (
            f"{self._names[0]}.{number}" if number < first else f"{self._names[1]}.{number - first}"
        )

    def reads_encoder(self, number: int) -> bool:
        return number >= len(self._blocks.encoder)

    def states_shape(self, tokens: Tensor) -> tuple[int, ...]:
        return (*halves(tokens)[0].shape, self.model.config.hidden_size)

    def _read_by_decoder(self, target: Tensor) -> Tensor:
        """The target behind the token with which such a model begins to write."""
        config = self.model.config
        starts = (
            getattr(config, name, None)
            for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id")
        )
        start = next((token for token in starts if token is not None), 0)
        return torch.cat([torch.full_like(target[:, :1], start), target[:, :-1]], dim=1)

    def record(
        self,
        batches: Sequence[Tensor],
        states: HiddenStates,
        cache: Any = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Call | None]]:
        calls, known = [], Interned()
        with _FirstBlock(self, 0):
            for number, tokens in zip(
                numbers if numbers is not None else range(len(batches)), batches
            ):
                source = halves(tokens)[0].to(self.device)
                hidden, batch_calls = self._record_stack(
                    self._blocks.encoder, source, input_ids=source
                )
                states.put(number, hidden)
                calls.append(
                    [
                        *(known.call(call) for call in batch_calls),
                        *[None] * len(self._blocks.decoder),
                    ]
                )
                known.forget_identities()
        states.turn()
        return calls

    def _record_stack(
        self, blocks: nn.ModuleList, tokens: Tensor, **keywords: Any
    ) -> tuple[Tensor, list[Call]]:
        side = (
            self.model.get_encoder() if blocks is self._blocks.encoder else self.model.get_decoder()
        )
        return self._record_through(
            blocks, tokens.shape, lambda: self._call(side, **keywords), (0, 1, 2, RUN_FIRST)
        )

    def pass_on(
        self,
        number: int,
        batches: Mapping[int, Tensor],
        states: HiddenStates,
        calls: Mapping[int, list[Call | None]],
    ) -> None:
        """Behind the encoder's last block the decoder begins: each of its blocks is called with
        what the encoder made.
        """
        if number + 1 == len(self._blocks):
            self.encoded.clear()
        if number + 1 != len(self._blocks.encoder):
            return
        self.load_outer(with_head=False)
        encoded = {}
        for batch, tokens in batches.items():
            source = halves(tokens.to(self.device))[0]
            encoded[batch] = self._behind(
                self._blocks.encoder, source, states.get(batch), input_ids=source
            )
        self._begin_decoder(encoded, batches, states, calls)
        self.free_outer()

    def begin_decoder(
        self,
        encoded: Mapping[int, Tensor],
        batches: Mapping[int, Tensor],
        states: HiddenStates,
        calls: Mapping[int, list[Call | None]],
    ) -> None:
        """As `pass_on` behind the encoder's last block, with what an earlier run's encoder made of
        each batch.
        """
        self.load_outer(with_head=False)
        self._begin_decoder(encoded, batches, states, calls)
        self.free_outer()

    def _begin_decoder(
        self,
        encoded: Mapping[int, Tensor],
        batches: Mapping[int, Tensor],
        states: HiddenStates,
        calls: Mapping[int, list[Call | None]],
    ) -> None:
        first, known = len(self._blocks.encoder), Interned()
        with _FirstBlock(self, first):
            for batch, tokens in batches.items():
                read, self.encoded[batch] = (
                    self._read_by_decoder(halves(tokens.to(self.device))[1]),
                    encoded[batch].to(self.device),
                )
                keywords = {
                    "input_ids": read,
                    "encoder_hidden_states": self.encoded[batch],
                    "use_cache": False,
                }
                hidden, batch_calls = self._record_stack(self._blocks.decoder, read, **keywords)
                calls[batch][first:] = [known.call(call) for call in batch_calls]
                known.forget_identities()
                states.put(batch, hidden)
        states.turn()

    def _behind(
        self, blocks: nn.ModuleList, tokens: Tensor, hidden: Tensor, **keywords: Any
    ) -> Tensor:
        """What a stack makes of its last block's output."""
        side = (
            self.model.get_encoder() if blocks is self._blocks.encoder else self.model.get_decoder()
        )
        with self._recorders(blocks, Tape(tokens.shape), self._outputs, hidden.to(self.device)):
            return self._call(side, **keywords)

    def finish(self, tokens: Tensor, hidden: Tensor, cache: Any = None) -> Tensor:
        read = self._read_by_decoder(halves(tokens.to(self.device))[1])
        # The blocks have seen what the encoder made; here they only pass on what they made of it.
        encoded = torch.zeros_like(hidden, device=self.device)
        return self._behind(
            self._blocks.decoder,
            read,
            hidden,
            input_ids=read,
            encoder_hidden_states=encoded,
            use_cache=False,
        )


def open_blockwise(
    skeleton: nn.Module, weights: Weights, where: str, device: str = "cpu"
) -> BlockwiseModel:
    """The model that runs a skeleton block by block."""
    kind = (
        EncoderDecoderModel
        if task_of(skeleton.config.to_dict(), where) == TARGET
        else BlockwiseModel
    )
    return kind(skeleton, weights, where, device)


class _FirstBlock:
    """A stack's first block with its weights, for models whose later blocks take what it
    returns.
    """

    def __init__(self, model: EncoderDecoderModel, number: int) -> None:
        self._model, self._number = model, number

    def __enter__(self) -> None:
        # A block can be loaded once: this one's turn is still to come.
        self._empty = copy.deepcopy(self._model._blocks[self._number])
        self._model._load_block(self._number)

    def __exit__(self, *_: Any) -> None:
        self._model._blocks[self._number] = self._empty


def _lists(side: nn.Module) -> list[nn.ModuleList]:
    return [module for module in side.modules() if isinstance(module, nn.ModuleList)]


def _parameters(blocks: nn.ModuleList) -> int:
    return sum(parameter.numel() for parameter in blocks.parameters())
