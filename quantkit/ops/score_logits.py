"""Scores of each token from logits that are computed in chunks of the vocabulary, for one model or
a pair.

    nll = log Σ exp(l) − l[target]
    KL(base‖candidate) = Σ p_base·(l_base − l_own) − log Σ exp(l_base) + log Σ exp(l_own)

Sums are relative to a running maximum, so each chunk is read once: the online softmax (Milakov &
Gimelshein 2018, "Online normalizer calculation for softmax"). This is the reference of
kernels/cpu/score_logits.cpp, whose logits never leave the cache. Sums are float32 within a chunk
of 1024 logits, and float64 over the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

VOCABULARY_PER_CHUNK = 1024

# What torch.ops.quantkit.score_logits returns: nll, index, confidence, own_nll, own_index, kld.
TokenScores = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# The chunk's first token; the base's logits [positions, size] float32; a function that computes the
# candidate's, or None without a candidate.
LogitsChunk = tuple[int, Tensor, Callable[[], Tensor] | None]


class _OnlineSoftmax:
    """One model's softmax at some positions, over the chunks of the vocabulary read so far.

    top: the largest logit, [positions] float32.
    index: its token, [positions] int64; the lowest of equal ones.
    total: Σ exp(logit − top), [positions] float64.
    """

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        self.top = torch.full(targets.shape, -torch.inf, device=targets.device)
        self.index = torch.zeros_like(targets)
        self.total = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        self._target_logit = torch.zeros_like(self.top)

    def update_top(self, logits: Tensor, start: int) -> Tensor:
        """Update the largest and the target's logit from a chunk that begins at token `start`.

        Returns the factor, [positions] float64, that rescales sums from the earlier `top` to the
        new one.
        """
        found = logits.amax(-1)
        higher = (found > self.top).nonzero()[:, 0]
        if len(higher):
            self.index[higher] = logits[higher].argmax(-1) + start
        # fmax skips NaN: it shows in the sums, and must not hide later logits from comparison.
        top = torch.fmax(self.top, found)
        factor = torch.where(top == self.top, 1.0, (self.top - top).exp())
        self.top, inside = top, self._targets - start
        here = ((inside >= 0) & (inside < logits.shape[-1])).nonzero()[:, 0]
        self._target_logit[here] = logits[here, inside[here]]
        return factor.double()

    def add(self, exponentials: Tensor, factor: Tensor) -> None:
        """Add a chunk to the total.

        exponentials: exp(logit − top), [positions, chunk].
        factor: from `update_top`.
        """
        self.total = self.total * factor + exponentials.sum(-1)

    @property
    def log_total(self) -> Tensor:
        """log Σ exp(logit), [positions] float64."""
        return self.top.double() + self.total.log()

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the target, [positions] float64."""
        return self.log_total - self._target_logit.double()


def score_parts(chunks: Iterable[LogitsChunk], targets: Tensor) -> TokenScores:
    """The results of the op `score_logits`, from chunks of logits.

    chunks: in order; their logits are modified in place.
    targets: [positions] int64.

    Without a candidate, own_nll, own_index and kld are empty.
    """
    base, own = _OnlineSoftmax(targets), _OnlineSoftmax(targets)
    divergence = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    is_pair = False
    for start, logits, make_own in chunks:
        factor = base.update_top(logits, start)
        exponentials = (logits - base.top[:, None]).exp_()
        base.add(exponentials, factor)
        if make_own is None:
            continue
        is_pair, own_logits = True, make_own()
        own_factor = own.update_top(own_logits, start)
        divergence = divergence * factor + torch.linalg.vecdot(
            exponentials, logits.sub_(own_logits)
        )
        own.add(own_logits.sub_(own.top[:, None]).exp_(), own_factor)
    confidence = 1 / base.total
    if not is_pair:
        nothing = targets.new_empty(0, dtype=torch.float64)
        return base.nll, base.index, confidence, nothing, targets.new_empty(0), nothing.clone()
    kld = divergence / base.total - base.log_total + own.log_total
    return base.nll, base.index, confidence, own.nll, own.index, kld
