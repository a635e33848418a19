"""torch.ops.quantkit.score_logits: from final hidden states to the figures of each token, for one
model or for two at a time.

    score_logits(hidden, packed, bias, targets, vocabulary, own_hidden, own_packed, own_bias) ->
    (nll, index, confidence, own_nll, own_index, kld)

hidden: [positions, hidden size] bfloat16; packed: `lm_head` of so many tokens as ops.pack_weight
arranges bfloat16; bias: [vocabulary] float32; targets: [positions] int64, what came next. own_*:
the candidate's, whose figures are empty without it. In float64: nll, of the target; confidence, the
probability of the likeliest token; kld, KL(base‖candidate). index: of the likeliest token, int64,
the lower of two alike.

    nll = log Σ exp(l) − l[target]        KL(base‖candidate) = Σ p_base·(l_base − l_own) − log Σ
    exp(l_base) + log Σ exp(l_own)

Kernel: kernels/cpu/score_logits.cpp, where no logit leaves the cache; sums of 1024 logits are
float32, over those float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from quantkit.ops import cpu, fallback
from quantkit.ops.arguments import pointer, rows_dense, side
from quantkit.ops.native import cpu_kernels

VOCABULARY_PER_CHUNK = 1024

_library = torch.library.Library("quantkit", "FRAGMENT")
_library.define(
    "score_logits(Tensor hidden, Tensor packed, Tensor? bias, Tensor targets, int vocabulary,"
    " Tensor? own_hidden=None, Tensor? own_packed=None, Tensor? own_bias=None) -> (Tensor, Tensor,"
    " Tensor, Tensor, Tensor, Tensor)"
)
Figures = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Distribution:
    """What is kept of one model's logits at some positions while the vocabulary goes by. Ties at
    the top go to the lower index.
    """

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        self.top = torch.full(targets.shape, -torch.inf, device=targets.device)
        self.index = torch.zeros_like(targets)
        # Σ exp(l − top)
        self.total = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        self._target = torch.zeros_like(self.top)

    def see(self, logits: Tensor, start: int) -> Tensor:
        """Look for the top and the target in a part of the vocabulary; returns what sums made with
        the earlier top are multiplied by.
        """
        found = logits.amax(-1)
        higher = (found > self.top).nonzero()[:, 0]
        if len(higher):
            self.index[higher] = logits[higher].argmax(-1) + start
        # fmax: a NaN shows in the sums, and must not hide what comes after it from the comparison
        # above.
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


def score_parts(
    parts: Iterable[tuple[int, Tensor, Callable[[], Tensor] | None]], targets: Tensor
) -> Figures:
    """The op's figures from logits [positions, size] float32 that come in parts of the vocabulary,
    which are changed.

    parts: where a part begins, the base's logits, and what makes the candidate's, or None.
    """
    base, quant = _Distribution(targets), _Distribution(targets)
    divergence = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    is_pair = False
    for start, logits, make_own in parts:
        factor = base.see(logits, start)
        exponentials = (logits - base.top[:, None]).exp_()
        base.add(exponentials, factor)
        if make_own is None:
            continue
        is_pair, theirs = True, make_own()
        own_factor = quant.see(theirs, start)
        divergence = divergence * factor + torch.linalg.vecdot(exponentials, logits.sub_(theirs))
        quant.add(theirs.sub_(quant.top[:, None]).exp_(), own_factor)
    own = (
        (quant.nll, quant.index, divergence / base.total - base.log_total + quant.log_total)
        if is_pair
        else _nothing(targets)
    )
    return base.nll, base.index, 1 / base.total, *own


def _nothing(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        targets.new_empty(0, dtype=torch.float64),
        targets.new_empty(0),
        targets.new_empty(0, dtype=torch.float64),
    )


def _reference_score_logits(
    hidden: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    vocabulary: int,
    own_hidden: Tensor | None = None,
    own_packed: Tensor | None = None,
    own_bias: Tensor | None = None,
) -> Figures:
    weight = fallback.unpack_weight(packed, "bf16", vocabulary, hidden.shape[1])
    own_weight = (
        None
        if own_hidden is None
        else fallback.unpack_weight(own_packed, "bf16", vocabulary, own_hidden.shape[1])
    )

    def logits(states: Tensor, rows: Tensor, shift: Tensor | None, part: slice) -> Tensor:
        return torch.nn.functional.linear(
            states.float(), rows[part].float(), None if shift is None else shift[part]
        )

    def parts() -> Iterable[tuple[int, Tensor, Callable[[], Tensor] | None]]:
        for start in range(0, vocabulary, VOCABULARY_PER_CHUNK):
            part = slice(start, start + VOCABULARY_PER_CHUNK)
            own = (
                None
                if own_hidden is None
                else lambda part=part: logits(own_hidden, own_weight, own_bias, part)
            )
            yield start, logits(hidden, weight, bias, part), own

    return score_parts(parts(), targets)


def _cpu_score_logits(
    hidden: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    vocabulary: int,
    own_hidden: Tensor | None = None,
    own_packed: Tensor | None = None,
    own_bias: Tensor | None = None,
) -> Figures:
    check_head(hidden, packed, vocabulary)
    if own_hidden is not None:
        check_head(own_hidden, own_packed, vocabulary)
    targets = side(targets, torch.int64, (hidden.shape[0],))
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < vocabulary):
        raise ValueError(
            f"a target is no token of the {vocabulary}: they are {int(targets.min())} to"
            f" {int(targets.max())}"
        )
    if (
        cpu_kernels() is None
        or not hidden.numel()
        or (own_hidden is not None and own_hidden.shape != hidden.shape)
    ):
        return _reference_score_logits(
            hidden, packed, bias, targets, vocabulary, own_hidden, own_packed, own_bias
        )
    positions = hidden.shape[0]
    pair = own_hidden is not None
    nll, confidence, index = (
        torch.empty(positions, dtype=dtype) for dtype in (torch.float64, torch.float64, torch.int64)
    )
    own_nll, kld, own_index = (
        torch.empty(positions if pair else 0, dtype=dtype)
        for dtype in (torch.float64, torch.float64, torch.int64)
    )
    bias, own_bias = (
        side(bias, torch.float32, (vocabulary,)),
        side(own_bias, torch.float32, (vocabulary,)),
    )
    hidden, own_hidden = rows_dense(hidden), None if own_hidden is None else rows_dense(own_hidden)

    def model(
        states: Tensor | None, weight: Tensor | None, shift: Tensor | None, *found: Tensor
    ) -> tuple[int | None, ...]:
        stride = 0 if states is None else max(states.stride(0), states.shape[1])
        return (
            pointer(states),
            stride,
            pointer(weight),
            pointer(shift),
            *(values.data_ptr() for values in found),
        )

    sizes, own = (
        (positions, hidden.shape[1], vocabulary),
        model(own_hidden, own_packed, own_bias, own_nll, own_index, kld),
    )
    cpu.ran(
        cpu_kernels().qk_score_logits(
            *sizes,
            targets.data_ptr(),
            *model(hidden, packed, bias, nll, index, confidence),
            *own,
            torch.get_num_threads(),
        )
    )
    return nll, index, confidence, own_nll, own_index, kld


def check_head(hidden: Tensor, packed: Tensor | None, vocabulary: int) -> None:
    """Refuse what a kernel would read beyond its end."""
    needed = fallback.packed_shape(vocabulary, hidden.shape[-1])
    if hidden.dim() != 2 or hidden.dtype != torch.bfloat16:
        raise ValueError(
            f"the hidden states are {hidden.dtype} {list(hidden.shape)}, not a matrix of bfloat16"
        )
    if (
        packed is None
        or tuple(packed.shape) != needed
        or packed.dtype != torch.bfloat16
        or not packed.is_contiguous()
    ):
        found = "missing" if packed is None else f"{packed.dtype} {list(packed.shape)}"
        raise ValueError(
            f"the packed lm_head is {found}; {vocabulary} tokens of {hidden.shape[-1]} hidden"
            f" features need {list(needed)}"
        )


def _fake_score_logits(
    hidden: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    vocabulary: int,
    own_hidden: Tensor | None = None,
    *_: Tensor | None,
) -> Figures:
    def empty(count: int) -> tuple[Tensor, Tensor]:
        return targets.new_empty(count, dtype=torch.float64), targets.new_empty(
            count, dtype=torch.int64
        )

    (nll, index), (confidence, _1) = empty(hidden.shape[0]), empty(hidden.shape[0])
    (own_nll, own_index), (kld, _2) = (
        empty(0 if own_hidden is None else hidden.shape[0]),
        empty(0 if own_hidden is None else hidden.shape[0]),
    )
    return nll, index, confidence, own_nll, own_index, kld


_library.impl("score_logits", _reference_score_logits, "CompositeExplicitAutograd")
_library.impl("score_logits", _cpu_score_logits, "CPU")
torch.library.register_fake("quantkit::score_logits", _fake_score_logits, lib=_library)
