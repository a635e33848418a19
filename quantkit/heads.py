"""A model's last step: final hidden states to the figures of each token, without ever holding tokens × vocabulary.

`lm_head` gives float32 (bfloat16 logits alone would add a KL of 1e-4, and ties at the top in some percent of positions): through a kernel that multiplies bfloat16
and loses nothing, where hidden states and weights are of that type and there is one. The vocabulary comes in parts; base and candidate make the same part at
the same time, and what is left of it are a few sums for each position:

    nll = log Σ exp(l) − l[target]        KL(base‖quant) = Σ p_base·(l_base − l_quant) − log Σ exp(l_base) + log Σ exp(l_quant)

Sums within a part are float32, over the parts float64.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantkit import ops
from quantkit.model import body_name
from quantkit.native import cpu_kernels

POSITIONS_PER_CHUNK = 256
VOCABULARY_PER_CHUNK = 1024


class OutputHead:
    """Hidden states to float32 logits, a part of the vocabulary at a time, without the model's body.

    Where an architecture does something after `lm_head` (scaling, soft-capping), the model's own forward does it here too, with stand-ins for body and `lm_head`.
    parts: slices of the vocabulary, or [None] where it only comes as a whole.
    """

    def __init__(self, model: nn.Module, use_kernel: bool) -> None:
        head, name = model.get_output_embeddings(), body_name(model)  # asked first: without a body transformers finds none
        self._linear = _PartialLinear(head, use_kernel) if isinstance(head, nn.Linear) else None
        self._stand_in, self._part = _stand_in(getattr(model, name)), threading.local()
        if self._linear is not None:
            for path in [path for path, module in model.named_modules(remove_duplicate=False) if module is head]:
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, _Given(self._part))
        setattr(model, name, self._stand_in)
        model.config.output_router_logits = False
        self._model = model
        self.parts: list[slice | None] = [None]
        self._is_plain = False
        self._accepted = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self._prepares = False
        if self._linear is not None:
            self._probe(head)

    def _probe(self, head: nn.Linear) -> None:
        """Does the model change logits behind `lm_head`, and if so, each by itself?"""
        parts = [slice(start, start + VOCABULARY_PER_CHUNK) for start in range(0, head.weight.shape[0], VOCABULARY_PER_CHUNK)]
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, head.weight.shape[1], generator=generator).to(head.weight.device).to(head.weight.dtype)
        self._part.arrived = None
        self._finished(hidden, torch.zeros(2, head.weight.shape[0], device=hidden.device))
        self._prepares = self._part.arrived is not None and not torch.equal(self._part.arrived.reshape(hidden.shape).to(hidden.dtype), hidden)
        raw = torch.cat([self._linear(self._prepared(hidden), part) for part in parts], dim=-1)
        whole = self._finished(hidden, raw)
        self._is_plain = whole.shape == raw.shape and torch.equal(whole, raw)
        by_parts = torch.cat([self._finished(hidden, raw[:, part]) for part in parts], dim=-1) if not self._is_plain else whole
        if by_parts.shape == whole.shape and torch.allclose(by_parts, whole, rtol=1e-5, atol=1e-6):
            self.parts = parts

    def logits(self, hidden: Tensor, part: slice | None) -> Tensor:
        """hidden: [positions, hidden size]; returns [positions, size of the part] float32, for the caller to change."""
        if self._linear is None:
            return self._finished(hidden.float(), None)
        arriving = self._prepared(hidden)
        if part is None:
            return self._finished(hidden, torch.cat([self._linear(arriving, piece) for piece in self._linear.parts], dim=-1))
        raw = self._linear(arriving, part)
        return raw if self._is_plain else self._finished(hidden, raw)

    def _prepared(self, hidden: Tensor) -> Tensor:
        """What the model makes of hidden states before they arrive at its output head: nothing, or a transform of their own (BERT's), or a scaling."""
        if not self._prepares:
            return hidden
        if getattr(self._part, "prepared_from", None) is not hidden:  # once for all parts of the vocabulary
            self._finished(hidden, torch.zeros(hidden.shape[0], 1, device=hidden.device))
            self._part.prepared_from, self._part.prepared = hidden, self._part.arrived.reshape(hidden.shape)
        return self._part.prepared

    def _finished(self, hidden: Tensor, raw: Tensor | None) -> Tensor:
        """What the model makes of logits (or, without them, of hidden states)."""
        self._part.logits = None if raw is None else raw[None]
        self._stand_in.here.hidden = hidden[None]
        tokens = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        inputs = {"encoder_outputs": (hidden[None],), "decoder_input_ids": tokens} if self._model.config.is_encoder_decoder else {"input_ids": tokens}
        return self._model(**inputs, **self._accepted).logits[0].float()


class _Given(nn.Module):
    """In place of `lm_head`: keeps what arrives at it and returns the logits that were made already. weight: asked for by models that look at its dtype."""

    def __init__(self, here: threading.local) -> None:
        super().__init__()
        self._here = here
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, arrived: Tensor) -> Tensor:
        self._here.arrived = arrived
        return self._here.logits


def _stand_in(body: nn.Module) -> Any:
    """A module that returns the hidden states it was given, in place of the decoder; models ask it for the decoder's own numbers."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            """Router logits, cross attentions and the like, which some architectures pass on."""
            return

    class StandIn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.here = threading.local()
            self.__dict__["_numbers"] = {name: value for name, value in vars(body).items() if isinstance(value, (int, float))}

        def __getattr__(self, name: str) -> Any:
            numbers = self.__dict__["_numbers"]
            return numbers[name] if name in numbers else super().__getattr__(name)

        @property
        def decoder(self) -> Any:
            return self  # OPT calls model.decoder

        def forward(self, *_: Any, **__: Any) -> Any:
            return Output(last_hidden_state=self.here.hidden)

    return StandIn()


class _PartialLinear:
    """Rows of `lm_head`, with a float32 result: from a kernel where its operands are bfloat16, else converted a part at a time."""

    def __init__(self, linear: nn.Linear, use_kernel: bool) -> None:
        weight = linear.weight.detach()
        self.parts = [slice(start, start + VOCABULARY_PER_CHUNK) for start in range(0, weight.shape[0], VOCABULARY_PER_CHUNK)]
        self._bias = None if linear.bias is None else linear.bias.detach().float()
        ready = use_kernel and cpu_kernels() is not None and weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        self._shapes = {part.start: tuple(weight[part].shape) for part in self.parts}
        # One of the two: lm_head is the largest tensor of many a model.
        self._packed = {part.start: torch.ops.quantkit.pack_weight(weight[part], "bf16") for part in self.parts} if ready else None
        self._weight = None if ready else weight

    def __call__(self, hidden: Tensor, part: slice) -> Tensor:
        bias = None if self._bias is None else self._bias[part]
        low = hidden.bfloat16()
        if self._packed is not None and (hidden.dtype == torch.bfloat16 or torch.equal(low.float(), hidden.float())):
            return torch.ops.quantkit.matmul_bf16(low, self._packed[part.start], self._shapes[part.start][0], bias, torch.float32)
        rows = self._weight[part] if self._weight is not None else ops.unpack_weight(self._packed[part.start], "bf16", *self._shapes[part.start])
        return nn.functional.linear(hidden.float(), rows.float(), bias)


# ---- Figures of each token.


@dataclass(frozen=True)
class TokenFigures:
    """Per scored token, in order. Of a model judged alone: nll, hit and confidence; the rest needs a candidate beside the base.

    nll: of the base; hit: whether its likeliest token is the true one; confidence: the probability that it gives to its likeliest token.
    quant_nll, quant_hit: of the candidate; kld: KL(base‖quant) in nats; same_top1: whether both find the same token likeliest.
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
        columns = {column.name: [getattr(part, column.name) for part in parts] for column in fields(cls)}
        return cls(**{name: None if values[0] is None else np.concatenate(values) for name, values in columns.items()})

    def nonfinite(self) -> int:
        """How many tokens have a figure that is NaN or infinite."""
        finite = np.isfinite(self.nll)
        for values in (self.quant_nll, self.kld):
            if values is not None:
                finite &= np.isfinite(values)
        return int((~finite).sum())


class _Distribution:
    """What is kept of one model's logits at some positions while the vocabulary goes by. Ties at the top go to the lower index."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        self.top = torch.full(targets.shape, -torch.inf, device=targets.device)
        self.index = torch.zeros_like(targets)
        self.total = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)  # Σ exp(l − top)
        self._target = torch.zeros_like(self.top)

    def see(self, logits: Tensor, start: int) -> Tensor:
        """Look for the top and the target in a part of the vocabulary; returns what sums made with the earlier top are multiplied by."""
        found = logits.amax(-1)
        higher = (found > self.top).nonzero()[:, 0]
        if len(higher):
            self.index[higher] = logits[higher].argmax(-1) + start
        # fmax: a NaN shows in the sums, and must not hide what comes after it from the comparison above.
        top = torch.fmax(self.top, found)
        factor = torch.where(top == self.top, 1.0, (self.top - top).exp())
        self.top, inside = top, self._targets - start
        here = ((inside >= 0) & (inside < logits.shape[-1])).nonzero()[:, 0]
        self._target[here] = logits[here, inside[here]]
        return factor.double()

    def add(self, exponentials: Tensor, factor: Tensor) -> None:
        self.total = self.total * factor + exponentials.sum(-1)

    @property
    def log_total(self) -> Tensor:
        return self.top.double() + self.total.log()

    @property
    def nll(self) -> Tensor:
        return self.log_total - self._target.double()

    @property
    def hit(self) -> Tensor:
        return self.index == self._targets


def score(base_head: OutputHead, base_hidden: Tensor, targets: Tensor, head: OutputHead | None = None, hidden: Tensor | None = None) -> TokenFigures:
    """The figures of some positions. base_hidden, hidden: [positions, hidden size]; targets: [positions], what came next."""
    base, quant = _Distribution(targets), _Distribution(targets)
    divergence = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    # Logits of heads that don't come in the same parts can only be compared whole.
    parts = base_head.parts if head is None or head.parts == base_head.parts else [None]
    for part in parts:
        start = 0 if part is None else part.start
        logits = base_head.logits(base_hidden, part)
        factor = base.see(logits, start)
        exponentials = (logits - base.top[:, None]).exp_()
        base.add(exponentials, factor)
        if head is None:
            continue
        theirs = head.logits(hidden, part)
        own_factor = quant.see(theirs, start)
        divergence = divergence * factor + torch.linalg.vecdot(exponentials, logits.sub_(theirs))
        quant.add(theirs.sub_(quant.top[:, None]).exp_(), own_factor)
    arrays = {"nll": base.nll, "hit": base.hit, "confidence": 1 / base.total}
    if head is not None:
        kld = divergence / base.total - base.log_total + quant.log_total
        # A divergence is never negative; its rounding, about 1e-7, may be.
        arrays |= {"quant_nll": quant.nll, "quant_hit": quant.hit, "kld": kld.clamp(min=0), "same_top1": base.index == quant.index}
    return TokenFigures(**{name: values.cpu().numpy() for name, values in arrays.items()})
