"""A model's last step: final hidden states to the figures of each token, without ever holding
tokens × vocabulary.

`lm_head` gives float32 (bfloat16 logits alone would add a KL of 1e-4, and ties at the top in some
percent of positions): through a kernel that multiplies bfloat16 and loses nothing, where hidden
states and weights are of that type and there is one. The vocabulary comes in parts; base and
candidate make the same part at the same time, and what is left of it are a few sums for each
position (ops/score_logits.py); where nothing comes behind `lm_head`, a kernel makes those at once.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantkit import ops
from quantkit.errors import EvaluationError
from quantkit.models.skeleton import body_name
from quantkit.ops.native import cpu_kernels
from quantkit.ops.score_logits import VOCABULARY_PER_CHUNK, score_parts

POSITIONS_PER_CHUNK = 512
ROWS_PACKED = 16  # of a packed weight, side by side


class OutputHead:
    """Hidden states to float32 logits, a part of the vocabulary at a time, without the model's
    body.

    Where an architecture does something after `lm_head` (scaling, soft-capping), the model's own
    forward does it here too, with stand-ins for body and `lm_head`.
    parts: slices of the vocabulary, or [None] where it only comes as a whole. like: another
    model's, whose packed weight is shared if it is the same.
    """

    def __init__(self, model: nn.Module, use_kernel: bool, like: OutputHead | None = None) -> None:
        # asked first: without a body transformers finds none
        head, name = model.get_output_embeddings(), body_name(model)
        self._linear = (
            _PartialLinear(head, use_kernel, like._linear if like else None)
            if isinstance(head, nn.Linear)
            else None
        )
        self._stand_in, self._part = _stand_in(getattr(model, name)), threading.local()
        if self._linear is not None:
            for path in [
                path
                for path, module in model.named_modules(remove_duplicate=False)
                if module is head
            ]:
                model.set_submodule(path, _Given(self._part))
        setattr(model, name, self._stand_in)
        model.config.output_router_logits = False
        self._model = model
        self.parts: list[slice | None] = [None]
        self._is_plain = False
        self._accepted = (
            {"use_cache": False}
            if "use_cache" in inspect.signature(model.forward).parameters
            else {}
        )
        self._prepares = False
        if self._linear is not None:
            self._probe(head)

    def _probe(self, head: nn.Linear) -> None:
        """Does the model change logits behind `lm_head`, and if so, each by itself?"""
        parts = self._linear.parts
        hidden = self._probing_states(head)
        arrived = (
            None
            if self._part.arrived is None
            else self._part.arrived.reshape(2, -1).to(hidden.dtype)
        )
        self._prepares = arrived is not None and not torch.equal(arrived, hidden)
        raw = torch.cat([self._linear(self._prepared(hidden), part) for part in parts], dim=-1)
        whole = self._finished(hidden, raw)
        self._is_plain = whole.shape == raw.shape and torch.equal(whole, raw)
        by_parts = (
            torch.cat([self._finished(hidden, raw[:, part]) for part in parts], dim=-1)
            if not self._is_plain
            else whole
        )
        if by_parts.shape == whole.shape and torch.allclose(by_parts, whole, rtol=1e-5, atol=1e-6):
            self.parts = parts

    def _probing_states(self, head: nn.Linear) -> Tensor:
        """Two random hidden states that the model has taken: as wide as `lm_head`'s input, or
        (RemBERT) as what a transform before it reads.
        """
        config, weight = self._model.config.get_text_config(), head.weight
        generator = torch.Generator().manual_seed(0)
        for width in dict.fromkeys((weight.shape[1], config.hidden_size)):
            hidden = torch.randn(2, width, generator=generator).to(weight.device).to(weight.dtype)
            self._part.arrived = None
            try:
                self._finished(hidden, torch.zeros(2, weight.shape[0], device=hidden.device))
                return hidden
            except (
                RuntimeError,
                IndexError,
                TypeError,
                ValueError,
                AttributeError,
                KeyError,
            ) as error:
                reason = f"{type(error).__name__}: {error}"
        raise EvaluationError(
            f"{type(self._model).__name__} can't be judged: its logits come from more than the last"
            f" hidden states of its body ({reason})"
        )

    def packed(self, hidden: Tensor) -> PackedHead | None:
        """What a kernel takes that makes figures of these hidden states at once: where nothing
        comes behind `lm_head`, and bfloat16 holds them.
        """
        linear = self._linear
        if (
            not self._is_plain
            or self._prepares
            or linear is None
            or linear.packed is None
            or not is_exact_in_bfloat16(hidden)
        ):
            return None
        return PackedHead(linear.packed, linear.bias, linear.vocabulary)

    def logits(self, hidden: Tensor, part: slice | None) -> Tensor:
        """hidden: [positions, hidden size]; returns [positions, size of the part] float32, for the
        caller to change.
        """
        if self._linear is None:
            return self._finished(hidden.float(), None)
        arriving = self._prepared(hidden)
        if part is None:
            return self._finished(
                hidden,
                torch.cat([self._linear(arriving, piece) for piece in self._linear.parts], dim=-1),
            )
        raw = self._linear(arriving, part)
        return raw if self._is_plain else self._finished(hidden, raw)

    def _prepared(self, hidden: Tensor) -> Tensor:
        """What the model makes of hidden states before they arrive at its output head: nothing, or
        a transform of their own (BERT's), or a scaling.
        """
        if not self._prepares:
            return hidden
        # once for all parts of the vocabulary
        if getattr(self._part, "prepared_from", None) is not hidden:
            self._finished(hidden, torch.zeros(hidden.shape[0], 1, device=hidden.device))
            self._part.prepared_from, self._part.prepared = (
                hidden,
                self._part.arrived.reshape(hidden.shape[0], -1),
            )
        return self._part.prepared

    def _finished(self, hidden: Tensor, raw: Tensor | None) -> Tensor:
        """What the model makes of logits (or, without them, of hidden states)."""
        self._part.logits = None if raw is None else raw[None]
        self._stand_in.here.hidden = hidden[None]
        tokens = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        inputs = (
            {"encoder_outputs": (hidden[None],), "decoder_input_ids": tokens}
            if self._model.config.is_encoder_decoder
            else {"input_ids": tokens}
        )
        return self._model(**inputs, **self._accepted).logits[0].float()


class _Given(nn.Module):
    """In place of `lm_head`: keeps what arrives at it and returns the logits that were made
    already. weight: asked for by models that look at its dtype.
    """

    def __init__(self, here: threading.local) -> None:
        super().__init__()
        self._here = here
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, arrived: Tensor) -> Tensor:
        self._here.arrived = arrived
        return self._here.logits


def _stand_in(body: nn.Module) -> Any:
    """A module that returns the hidden states it was given, in place of the decoder; models ask it
    for the decoder's own numbers.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            """Router logits, cross attentions and the like, which some architectures pass on."""
            return

    class StandIn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.here = threading.local()
            self.__dict__["_numbers"] = {
                name: value for name, value in vars(body).items() if isinstance(value, (int, float))
            }

        def __getattr__(self, name: str) -> Any:
            numbers = self.__dict__["_numbers"]
            return numbers[name] if name in numbers else super().__getattr__(name)

        @property
        def decoder(self) -> Any:
            return self  # OPT calls model.decoder

        def forward(self, *_: Any, **__: Any) -> Any:
            return Output(last_hidden_state=self.here.hidden)

    return StandIn()


@dataclass(frozen=True)
class PackedHead:
    """`lm_head` as kernels multiply it. weight: as ops.pack_weight arranges bfloat16; bias:
    [vocabulary] float32 or None.
    """

    weight: Tensor
    bias: Tensor | None
    vocabulary: int


class _PartialLinear:
    """Rows of `lm_head`, with a float32 result: from a kernel where its operands are bfloat16, else
    converted a part at a time.
    """

    def __init__(self, linear: nn.Linear, use_kernel: bool, like: _PartialLinear | None) -> None:
        weight = linear.weight.detach()
        self.vocabulary, self._features = weight.shape
        self.parts = [
            slice(start, min(start + VOCABULARY_PER_CHUNK, self.vocabulary))
            for start in range(0, self.vocabulary, VOCABULARY_PER_CHUNK)
        ]
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        ready = (
            use_kernel
            and cpu_kernels() is not None
            and weight.device.type == "cpu"
            and weight.dtype == torch.bfloat16
        )
        # One of the two: lm_head is the largest tensor of many a model.
        self.packed = torch.ops.quantkit.pack_weight(weight, "bf16") if ready else None
        self._weight = None if ready else weight
        if (
            self.packed is not None
            and like is not None
            and like.packed is not None
            and torch.equal(self.packed, like.packed)
        ):
            self.packed = like.packed  # most schemes leave it alone: read once for both models

    def __call__(self, hidden: Tensor, part: slice) -> Tensor:
        bias = None if self.bias is None else self.bias[part]
        if self.packed is None:
            return nn.functional.linear(hidden.float(), self._weight[part].float(), bias)
        packed, rows = (
            self.packed[part.start // ROWS_PACKED :][: -(-(part.stop - part.start) // ROWS_PACKED)],
            part.stop - part.start,
        )
        if is_exact_in_bfloat16(hidden):
            return torch.ops.quantkit.matmul_bf16(
                hidden.bfloat16(), packed, rows, bias, torch.float32
            )
        return nn.functional.linear(
            hidden.float(), ops.unpack_weight(packed, "bf16", rows, self._features).float(), bias
        )


def is_exact_in_bfloat16(values: Tensor) -> bool:
    return values.dtype == torch.bfloat16 or torch.equal(values.bfloat16().float(), values.float())


# ---- Figures of each token.


@dataclass(frozen=True)
class TokenFigures:
    """Per scored token, in order. Of a model judged alone: nll, hit and confidence; the rest needs
    a candidate beside the base.

    nll: of the base; hit: whether its likeliest token is the true one; confidence: the probability
    that it gives to its likeliest token.
    quant_nll, quant_hit: of the candidate; kld: KL(base‖quant) in nats; same_top1: whether both
    find the same token likeliest.
    """

    nll: np.ndarray
    hit: np.ndarray
    confidence: np.ndarray
    quant_nll: np.ndarray | None = None
    quant_hit: np.ndarray | None = None
    kld: np.ndarray | None = None
    same_top1: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: list[TokenFigures]) -> TokenFigures:
        columns = {
            column.name: [getattr(part, column.name) for part in parts] for column in fields(cls)
        }
        return cls(
            **{
                name: None if values[0] is None else np.concatenate(values)
                for name, values in columns.items()
            }
        )

    def nonfinite(self) -> int:
        """How many tokens have a figure that is NaN or infinite."""
        finite = np.isfinite(self.nll)
        for values in (self.quant_nll, self.kld):
            if values is not None:
                finite &= np.isfinite(values)
        return int((~finite).sum())


def score(
    base_head: OutputHead,
    base_hidden: Tensor,
    targets: Tensor,
    head: OutputHead | None = None,
    hidden: Tensor | None = None,
) -> TokenFigures:
    """The figures of some positions. base_hidden, hidden: [positions, hidden size]; targets:
    [positions], what came next.
    """
    fused = base_head.packed(base_hidden)
    own = None if head is None else head.packed(hidden)
    if fused is not None and (
        head is None or (own is not None and own.vocabulary == fused.vocabulary)
    ):
        candidate = () if own is None else (hidden.bfloat16(), own.weight, own.bias)
        found = torch.ops.quantkit.score_logits(
            base_hidden.bfloat16(), fused.weight, fused.bias, targets, fused.vocabulary, *candidate
        )
    else:
        # Logits of heads that don't come in the same parts can only be compared whole.
        parts = base_head.parts if head is None or head.parts == base_head.parts else [None]
        logits = (
            (
                0 if part is None else part.start,
                base_head.logits(base_hidden, part),
                None if head is None else lambda part=part: head.logits(hidden, part),
            )
            for part in parts
        )
        found = score_parts(logits, targets)
    nll, index, confidence, quant_nll, quant_index, kld = found
    arrays = {"nll": nll, "hit": index == targets, "confidence": confidence}
    if head is not None:
        # A divergence is never negative; its rounding, about 1e-7, may be.
        arrays |= {
            "quant_nll": quant_nll,
            "quant_hit": quant_index == targets,
            "kld": kld.clamp(min=0),
            "same_top1": index == quant_index,
        }
    return TokenFigures(**{name: values.cpu().numpy() for name, values in arrays.items()})


def score_variants(
    head: OutputHead, base_hidden: Tensor, targets: Tensor, variants: Sequence[Tensor]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """KL(base‖variant) and nll of each variant's positions. All share one head. base_hidden and
    each variant: [positions, hidden size].
    """
    found = [score(head, base_hidden, targets, head, hidden) for hidden in variants]
    return [(figures.kld, figures.quant_nll) for figures in found]
