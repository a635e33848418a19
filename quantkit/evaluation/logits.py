"""A model's last step: from final hidden states to the scores of each token, without ever holding
tokens × vocabulary.

`lm_head` gives float32 (bfloat16 logits alone would add a KL of 1e-4, and ties at the top in some
percent of positions): through a kernel that multiplies bfloat16 and loses nothing, where hidden
states and weights are of that type and there is one. The vocabulary comes in parts; base and
candidate make the same part at the same time, and a few sums for each position are all that stays
of it (ops/score_logits.py); where nothing comes after `lm_head`, a kernel makes those at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantkit import ops
from quantkit.errors import EvaluationError
from quantkit.evaluation.token_scores import PairedScores, TokenScores
from quantkit.models.skeleton import body_name
from quantkit.ops.native import cpu_kernels
from quantkit.ops.score_logits import VOCABULARY_PER_CHUNK, score_parts

POSITIONS_PER_CHUNK = 512
ROWS_PACKED = 16  # of a packed weight, side by side


@dataclass(frozen=True)
class HeadPlan:
    """How a model makes logits of its last hidden states, as probing it showed.

    parts: slices of the vocabulary, or [None] where it only comes as a whole.
    is_plain: whether logits are `lm_head`'s own.
    prepares: whether something comes between the body and `lm_head`: a transform (BERT's), or a
    scaling.
    """

    parts: Sequence[slice | None] = (None,)
    is_plain: bool = False
    prepares: bool = False


@dataclass(frozen=True)
class OutputHead:
    """Hidden states to float32 logits, a part of the vocabulary at a time, without the model's
    body.

    linear: `lm_head`, or None where a model has something else.
    shell: the model without its body and `lm_head`.
    plan: how the shell is used.
    """

    linear: PartialLinear | None
    shell: ModelShell
    plan: HeadPlan

    @classmethod
    def of(
        cls,
        model: nn.Module,
        use_kernel: bool,
        like: OutputHead | None = None,
        part_size: int = VOCABULARY_PER_CHUNK,
    ) -> OutputHead:
        """The model loses its body and `lm_head` to this: their memory is freed. like: another
        model's head, whose packed weight is shared if it is the same. part_size: rows of `lm_head`
        at a time.
        """
        # asked first: without a body transformers finds none
        lm_head = output_embeddings(model)
        if not isinstance(lm_head, nn.Linear):
            return cls(None, ModelShell.of(model, None), HeadPlan())
        linear = PartialLinear(lm_head, use_kernel, part_size, like.linear if like else None)
        shell = ModelShell.of(model, lm_head)
        return cls(linear, shell, _probe(shell, linear, lm_head.weight))

    @property
    def parts(self) -> Sequence[slice | None]:
        return self.plan.parts

    def packed(self, hidden: Tensor) -> PackedHead | None:
        """What a kernel takes that makes scores of these hidden states at once: where logits are
        `lm_head`'s own, and bfloat16 holds them.
        """
        linear = self.linear
        if (
            not self.plan.is_plain
            or self.plan.prepares
            or linear is None
            or linear.packed is None
            or not is_exact_in_bfloat16(hidden)
        ):
            return None
        return PackedHead(linear.packed, linear.bias, linear.vocabulary)

    def logits_of(self, hidden: Tensor) -> Callable[[slice | None], Tensor]:
        """hidden: [positions, hidden size]. Returns what makes logits of a part of the vocabulary,
        or of all of it: [positions, size of the part] float32, for the caller to change.
        """
        linear, shell, plan = self.linear, self.shell, self.plan
        if linear is None:
            return lambda part: shell.logits(hidden.float(), None).logits
        arriving = shell.arriving(hidden) if plan.prepares else hidden

        def logits(part: slice | None) -> Tensor:
            if part is None:
                whole = torch.cat([linear(arriving, piece) for piece in linear.parts], dim=-1)
                return shell.logits(hidden, whole).logits
            raw = linear(arriving, part)
            return raw if plan.is_plain else shell.logits(hidden, raw).logits

        return logits


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """What transformers calls the model's output embeddings: `lm_head`."""
    get: Any = model.get_output_embeddings
    return get()


# ---- Probing.


def _probe(shell: ModelShell, linear: PartialLinear, weight: Tensor) -> HeadPlan:
    """Does the model change logits after `lm_head`, and if so, each by itself? weight: `lm_head`'s,
    [vocabulary, width].
    """
    hidden, arrived = _accepted_states(shell, weight)
    prepares = arrived is not None and not torch.equal(arrived, hidden)
    arriving = shell.arriving(hidden) if prepares else hidden
    raw = torch.cat([linear(arriving, part) for part in linear.parts], dim=-1)
    whole = shell.logits(hidden, raw).logits
    if whole.shape == raw.shape and torch.equal(whole, raw):
        return HeadPlan(linear.parts, True, prepares)
    by_parts = torch.cat(
        [shell.logits(hidden, raw[:, part]).logits for part in linear.parts], dim=-1
    )
    each_by_itself = by_parts.shape == whole.shape and torch.allclose(
        by_parts, whole, rtol=1e-5, atol=1e-6
    )
    return HeadPlan(linear.parts if each_by_itself else (None,), False, prepares)


def _accepted_states(shell: ModelShell, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Two random hidden states that the model takes, and what of them arrives at `lm_head`: as wide
    as its input, or (RemBERT) as what a transform before it reads.
    """
    generator = torch.Generator().manual_seed(0)
    reason = ""
    for width in dict.fromkeys((weight.shape[1], shell.config.get_text_config().hidden_size)):
        hidden = torch.randn(2, width, generator=generator).to(weight.device).to(weight.dtype)
        try:
            call = shell.logits(hidden, torch.zeros(2, weight.shape[0], device=hidden.device))
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if call.arrived is None:
            return hidden, None
        return hidden, call.arrived.reshape(2, -1).to(hidden.dtype)
    raise EvaluationError(
        f"{type(shell.model).__name__} can't be evaluated: its logits come from more than the last"
        f" hidden states of its body ({reason})"
    )


# ---- The model without its body and `lm_head`.


@dataclass
class _Call:
    """One run of a shell.

    hidden: what the body returns, [1, positions, hidden size].
    given: what `lm_head` returns, [1, positions, size of the part].
    arrived: what reached `lm_head`.
    """

    hidden: Tensor
    given: Tensor | None
    arrived: Tensor | None = None


_call: ContextVar[_Call] = ContextVar("call of a model shell")


@contextmanager
def _calling(call: _Call) -> Iterator[None]:
    """The call that stand-ins see, on this thread."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


@dataclass(frozen=True)
class ShellOutput:
    """logits: [positions, size of the part] float32; arrived: what reached `lm_head`, or None."""

    logits: Tensor
    arrived: Tensor | None


@dataclass(frozen=True)
class ModelShell:
    """A model with stand-ins for its body and `lm_head`: its own forward does what comes after them
    (scaling, soft-capping). Several threads may call it.

    model: with the stand-ins.
    takes_cache: whether its forward has an argument use_cache.
    """

    model: nn.Module
    takes_cache: bool

    @classmethod
    def of(cls, model: nn.Module, lm_head: nn.Module | None) -> ModelShell:
        name = body_name(model)
        assert name is not None, type(model).__name__
        body = getattr(model, name)
        if lm_head is not None:
            modules = model.named_modules(remove_duplicate=False)
            for path in [path for path, module in modules if module is lm_head]:
                model.set_submodule(path, _StandInHead())
        setattr(model, name, _stand_in_body(body))
        shell = cls(model, "use_cache" in inspect.signature(model.forward).parameters)
        shell.config.output_router_logits = False
        return shell

    @property
    def config(self) -> Any:
        return self.model.config

    def logits(self, hidden: Tensor, given: Tensor | None) -> ShellOutput:
        """What the model makes of hidden states [positions, hidden size] whose `lm_head` returns
        `given` [positions, size of the part]; None where it has no `lm_head`.
        """
        tokens = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        inputs: dict[str, Any] = (
            {"encoder_outputs": (hidden[None],), "decoder_input_ids": tokens}
            if self.config.is_encoder_decoder
            else {"input_ids": tokens}
        )
        if self.takes_cache:
            inputs["use_cache"] = False
        call = _Call(hidden[None], None if given is None else given[None])
        with _calling(call):
            logits = self.model(**inputs).logits[0].float()
        return ShellOutput(logits, call.arrived)

    def arriving(self, hidden: Tensor) -> Tensor:
        """What the model makes of hidden states before they arrive at `lm_head`, [positions,
        width].
        """
        given = torch.zeros(hidden.shape[0], 1, device=hidden.device)
        arrived = self.logits(hidden, given).arrived
        assert arrived is not None
        return arrived.reshape(hidden.shape[0], -1)


class _StandInHead(nn.Module):
    """In place of `lm_head`. weight: asked for by models that look at its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, arrived: Tensor) -> Tensor | None:
        call = _call.get()
        call.arrived = arrived
        return call.given


def _stand_in_body(body: nn.Module) -> nn.Module:
    """A module that returns the hidden states of the call; models ask it for the body's own
    numbers.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            """Router logits, cross attentions and the like, which some architectures pass on."""
            return

    class StandIn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["_numbers"] = {
                name: value for name, value in vars(body).items() if isinstance(value, (int, float))
            }

        def __getattr__(self, name: str) -> Any:
            numbers = self.__dict__["_numbers"]
            return numbers[name] if name in numbers else super().__getattr__(name)

        @property
        def decoder(self) -> nn.Module:
            return self  # OPT calls model.decoder

        def forward(self, *_: Any, **__: Any) -> Output:
            return Output(last_hidden_state=_call.get().hidden)

    return StandIn()


@dataclass(frozen=True)
class PackedHead:
    """`lm_head` as kernels multiply it. weight: as ops.pack_weight arranges bfloat16; bias:
    [vocabulary] float32 or None.
    """

    weight: Tensor
    bias: Tensor | None
    vocabulary: int


class PartialLinear:
    """Rows of `lm_head`, with a float32 result: from a kernel where its operands are bfloat16, else
    converted a part at a time.
    """

    def __init__(
        self, linear: nn.Linear, use_kernel: bool, part_size: int, like: PartialLinear | None
    ) -> None:
        weight = linear.weight.detach()
        self.vocabulary, self._features = weight.shape
        self.parts = [
            slice(start, min(start + part_size, self.vocabulary))
            for start in range(0, self.vocabulary, part_size)
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
            assert self._weight is not None
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


# ---- Scores of each token.


def score(head: OutputHead, hidden: Tensor, targets: Tensor) -> TokenScores:
    """The base's scores of some positions. hidden: [positions, hidden size]; targets: [positions],
    the tokens that came next.
    """
    fused = head.packed(hidden)
    if fused is not None:
        found = torch.ops.quantkit.score_logits(
            hidden.bfloat16(), fused.weight, fused.bias, targets, fused.vocabulary
        )
    else:
        logits_of = head.logits_of(hidden)
        found = score_parts(((_start(part), logits_of(part), None) for part in head.parts), targets)
    nll, index, confidence, *_ = found
    return TokenScores(*(values.cpu().numpy() for values in (nll, index == targets, confidence)))


def score_pair(
    base_head: OutputHead, base_hidden: Tensor, targets: Tensor, head: OutputHead, hidden: Tensor
) -> PairedScores:
    """The scores of some positions by base and candidate. base_hidden, hidden: [positions, hidden
    size]; targets: [positions], the tokens that came next.
    """
    fused, own = base_head.packed(base_hidden), head.packed(hidden)
    if fused is not None and own is not None and own.vocabulary == fused.vocabulary:
        found = torch.ops.quantkit.score_logits(
            base_hidden.bfloat16(),
            fused.weight,
            fused.bias,
            targets,
            fused.vocabulary,
            hidden.bfloat16(),
            own.weight,
            own.bias,
        )
    else:
        # Logits of heads that don't come in the same parts can only be compared whole.
        parts = base_head.parts if list(head.parts) == list(base_head.parts) else [None]
        base_logits, logits = base_head.logits_of(base_hidden), head.logits_of(hidden)
        found = score_parts(
            (
                (_start(part), base_logits(part), lambda part=part: logits(part))  # type: ignore[misc]
                for part in parts
            ),
            targets,
        )
    nll, index, confidence, quant_nll, quant_index, kld = found
    arrays = (
        nll,
        index == targets,
        confidence,
        quant_nll,
        quant_index == targets,
        # A divergence is never negative; its rounding, about 1e-7, may be.
        kld.clamp(min=0),
        index == quant_index,
    )
    return PairedScores(*(values.cpu().numpy() for values in arrays))


def _start(part: slice | None) -> int:
    return 0 if part is None else part.start


def score_variants(
    head: OutputHead, base_hidden: Tensor, targets: Tensor, variants: Sequence[Tensor]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """KL(base‖variant) and nll of each variant's positions. All share one head. base_hidden and
    each variant: [positions, hidden size].
    """
    found = [score_pair(head, base_hidden, targets, head, hidden) for hidden in variants]
    return [(scores.kld, scores.quant_nll) for scores in found]
