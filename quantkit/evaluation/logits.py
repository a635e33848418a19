"""The last step of a model: from final hidden states to scores per token, without a tensor of
tokens × vocabulary.

Logits are float32, because bfloat16 logits would add a KL of 1e-4, and ties for the most likely
token at some percent of the positions. There are three ways, the fastest first:

1. If logits are the output of `lm_head` and everything is bfloat16, one kernel computes the scores.
2. If the logits of a part of the vocabulary can be computed alone, both models compute a part at a
   time. The logits are reduced to a few sums per position (ops/score_logits.py).
3. Otherwise the logits of some positions are computed for the whole vocabulary.
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
ROWS_PACKED = 16  # rows that `pack_weight` interleaves


@dataclass(frozen=True)
class HeadPlan:
    """How a model computes logits from its final hidden states, as probing it showed.

    parts: slices of the vocabulary; [None] if logits must be computed for the whole vocabulary.
    is_plain: whether the output of `lm_head` are the logits.
    prepares: whether hidden states change before `lm_head`, by a transform (BERT's) or a scaling.
    """

    parts: Sequence[slice | None] = (None,)
    is_plain: bool = False
    prepares: bool = False


@dataclass(frozen=True)
class OutputHead:
    """A model's output head: final hidden states → float32 logits, a part of the vocabulary at a
    time.

    linear: `lm_head`; None if it isn't an nn.Linear.
    shell: the model without its body and `lm_head`.
    plan: how logits are computed with the two.
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
        """Take the head from a model. The model's body and `lm_head` are replaced by stand-ins, so
        that their memory is freed.

        use_kernel: compute with kernels where there are any.
        like: another model's head, whose packed weight is shared if it is equal.
        part_size: tokens of the vocabulary at a time.

        Raises EvaluationError if logits depend on more than the final hidden states.
        """
        # Before the body is replaced: transformers looks for the embeddings in it.
        lm_head = output_embeddings(model)
        if not isinstance(lm_head, nn.Linear):
            return cls(None, ModelShell.of(model, None), HeadPlan())
        linear = PartialLinear(lm_head, use_kernel, part_size, like.linear if like else None)
        shell = ModelShell.of(model, lm_head)
        return cls(linear, shell, _probe(shell, linear, lm_head.weight))

    @property
    def parts(self) -> Sequence[slice | None]:
        """The parts of the vocabulary, as in `HeadPlan`."""
        return self.plan.parts

    def packed(self, hidden: Tensor) -> PackedHead | None:
        """`lm_head` for the kernel that computes scores from hidden states; None if that kernel
        can't be used for these.

        hidden: [positions, hidden size].
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
        """A function that computes the logits of one part of the vocabulary, or of all if it is
        None: [positions, size of the part] float32. The caller may change them in place.

        hidden: [positions, hidden size].
        """
        linear, shell, plan = self.linear, self.shell, self.plan
        if linear is None:
            return lambda part: shell.logits(hidden.float(), None).logits
        prepared = shell.prepare(hidden) if plan.prepares else hidden

        def logits(part: slice | None) -> Tensor:
            if part is None:
                whole = torch.cat([linear(prepared, piece) for piece in linear.parts], dim=-1)
                return shell.logits(hidden, whole).logits
            raw = linear(prepared, part)
            return raw if plan.is_plain else shell.logits(hidden, raw).logits

        return logits


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The model's `lm_head`, or what is in its place."""
    get: Any = model.get_output_embeddings
    return get()


# ---- Probing.


def _probe(shell: ModelShell, linear: PartialLinear, weight: Tensor) -> HeadPlan:
    """Find out, with random hidden states, what the model does before and after `lm_head`: whether
    it changes the hidden states, the logits, and each logit independently of the others.

    weight: that of `lm_head`, [vocabulary, width].
    """
    hidden, head_input = _accepted_states(shell, weight)
    prepares = head_input is not None and not torch.equal(head_input, hidden)
    prepared = shell.prepare(hidden) if prepares else hidden
    raw = torch.cat([linear(prepared, part) for part in linear.parts], dim=-1)
    whole = shell.logits(hidden, raw).logits
    if whole.shape == raw.shape and torch.equal(whole, raw):
        return HeadPlan(linear.parts, True, prepares)
    by_parts = torch.cat(
        [shell.logits(hidden, raw[:, part]).logits for part in linear.parts], dim=-1
    )
    is_elementwise = by_parts.shape == whole.shape and torch.allclose(
        by_parts, whole, rtol=1e-5, atol=1e-6
    )
    return HeadPlan(linear.parts if is_elementwise else (None,), False, prepares)


def _accepted_states(shell: ModelShell, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Two random hidden states of a width that the model accepts, and the input of `lm_head` for
    them. The width is that of `lm_head`'s input, or (RemBERT) of a transform before it.

    Returns hidden states [2, width] and the input of `lm_head` [2, width]; None if it isn't called.
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
        if call.head_input is None:
            return hidden, None
        return hidden, call.head_input.reshape(2, -1).to(hidden.dtype)
    raise EvaluationError(
        f"{type(shell.model).__name__} can't be evaluated: its logits depend on more than the final"
        f" hidden states of its body ({reason})"
    )


# ---- The model without its body and `lm_head`.


@dataclass
class _Call:
    """One forward pass of a shell.

    hidden: the output of the body's stand-in, [1, positions, hidden size].
    head_output: the output of `lm_head`'s stand-in, [1, positions, size of the part].
    head_input: the input of `lm_head`'s stand-in, written by it.
    """

    hidden: Tensor
    head_output: Tensor | None
    head_input: Tensor | None = None


_call: ContextVar[_Call] = ContextVar("call of a model shell")


@contextmanager
def _calling(call: _Call) -> Iterator[None]:
    """Make this the call that the stand-ins see on this thread."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


@dataclass(frozen=True)
class ShellOutput:
    """The result of a shell's forward pass.

    logits: [positions, size of the part] float32.
    head_input: the input of `lm_head`; None if it wasn't called.
    """

    logits: Tensor
    head_input: Tensor | None


@dataclass(frozen=True)
class ModelShell:
    """A model whose body and `lm_head` are replaced by stand-ins. Its own forward then runs only
    the rest, such as scaling or soft-capping of logits. Several threads may call it.

    model: the model with the stand-ins.
    takes_cache: whether its forward has an argument `use_cache`.
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

    def logits(self, hidden: Tensor, head_output: Tensor | None) -> ShellOutput:
        """The model's logits, given the outputs of its body and of `lm_head`.

        hidden: [positions, hidden size].
        head_output: [positions, size of the part]; None if the model has no `lm_head`.
        """
        tokens = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        inputs: dict[str, Any] = (
            {"encoder_outputs": (hidden[None],), "decoder_input_ids": tokens}
            if self.config.is_encoder_decoder
            else {"input_ids": tokens}
        )
        if self.takes_cache:
            inputs["use_cache"] = False
        call = _Call(hidden[None], None if head_output is None else head_output[None])
        with _calling(call):
            logits = self.model(**inputs).logits[0].float()
        return ShellOutput(logits, call.head_input)

    def prepare(self, hidden: Tensor) -> Tensor:
        """The input of `lm_head` for these hidden states, [positions, width].

        hidden: [positions, hidden size].
        """
        head_output = torch.zeros(hidden.shape[0], 1, device=hidden.device)
        head_input = self.logits(hidden, head_output).head_input
        assert head_input is not None
        return head_input.reshape(hidden.shape[0], -1)


class _StandInHead(nn.Module):
    """Replaces `lm_head`: records its input and returns the given output.

    weight: empty; some models read its dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, head_input: Tensor) -> Tensor | None:
        call = _call.get()
        call.head_input = head_input
        return call.head_output


def _stand_in_body(body: nn.Module) -> nn.Module:
    """A module that replaces the body and returns the hidden states of the call. It has the body's
    numeric attributes, because some models read them.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            """None for all other outputs, such as router logits, which some models pass on."""
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
            return self  # OPT's forward calls model.decoder

        def forward(self, *_: Any, **__: Any) -> Output:
            return Output(last_hidden_state=_call.get().hidden)

    return StandIn()


@dataclass(frozen=True)
class PackedHead:
    """`lm_head` in the format of the kernels.

    weight: bfloat16, as ops.pack_weight arranges it.
    bias: [vocabulary] float32, or None.
    vocabulary: number of tokens in the vocabulary.
    """

    weight: Tensor
    bias: Tensor | None
    vocabulary: int


class PartialLinear:
    """`lm_head`, computed for a part of the vocabulary, with a float32 result. A kernel multiplies
    bfloat16 exactly; otherwise a part of the weight is converted to float32 at a time.

    vocabulary: number of tokens in the vocabulary.
    parts: slices of the vocabulary.
    bias: [vocabulary] float32, or None.
    packed: the weight, packed for kernels; None if they aren't used.
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
        # Only one of the two is kept, because lm_head is often the largest tensor of a model.
        self.packed = torch.ops.quantkit.pack_weight(weight, "bf16") if ready else None
        self._weight = None if ready else weight
        if (
            self.packed is not None
            and like is not None
            and like.packed is not None
            and torch.equal(self.packed, like.packed)
        ):
            self.packed = like.packed  # most schemes don't quantize it: both models share it

    def __call__(self, hidden: Tensor, part: slice) -> Tensor:
        """[positions, size of the part] float32. hidden: [positions, width]."""
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
    """Whether converting to bfloat16 changes no value."""
    return values.dtype == torch.bfloat16 or torch.equal(values.bfloat16().float(), values.float())


# ---- Scores of each token.


def score(head: OutputHead, hidden: Tensor, targets: Tensor) -> TokenScores:
    """The base model's scores of some positions.

    hidden: final hidden states, [positions, hidden size].
    targets: the true tokens, [positions].
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
    """The scores of some positions by a base and a quantized model.

    base_head, head: output heads of the base and the quantized model.
    base_hidden, hidden: their final hidden states, [positions, hidden size].
    targets: the true tokens, [positions].
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
        # Heads with different parts are compared over the whole vocabulary.
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
        # KL is never negative, but its rounding error of about 1e-7 may make it so.
        kld.clamp(min=0),
        index == quant_index,
    )
    return PairedScores(*(values.cpu().numpy() for values in arrays))


def _start(part: slice | None) -> int:
    """The first token of a part of the vocabulary."""
    return 0 if part is None else part.start


def score_variants(
    head: OutputHead, base_hidden: Tensor, targets: Tensor, variants: Sequence[Tensor]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """KL(base‖variant) and NLL of several variants of a model, which share the output head.

    base_hidden: final hidden states of the base model, [positions, hidden size].
    targets: the true tokens, [positions].
    variants: final hidden states of each variant, [positions, hidden size].

    Returns for each variant its KL and its NLL, each [positions], nats.
    """
    found = [score_pair(head, base_hidden, targets, head, hidden) for hidden in variants]
    return [(scores.kld, scores.quant_nll) for scores in found]
