"""The windows of text that variants run on. A decoder predicts each next token, a masked language
model each token from all others, a model of encoder and decoder the second half of a window from
the first. The loss is the same as in `eval`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.data.sampling import calibration_windows
from quantkit.data.sources import BUNDLED_CALIBRATION
from quantkit.data.windows import Windows, targets_of
from quantkit.errors import EvaluationError
from quantkit.evaluation import masked_lm
from quantkit.evaluation.masked_lm import Masking
from quantkit.evaluation.scored_text import scored_states
from quantkit.layer_sensitivity.options import SensitivityOptions
from quantkit.models.task import MASKED, SEQ2SEQ, task_of
from quantkit.models.text import tokenizer_and_length

# Short, so that there are several windows and thus intervals, but long enough for attention.
DEFAULT_LENGTH = 256


@dataclass(frozen=True)
class ScoringText:
    """The windows, and how the model reads them.

    windows: with the tokens that are scored.
    seq_len: tokens of a window.
    task: what the model predicts, one of models.task.
    masking: how a masked language model's windows become inputs, None for others.
    """

    windows: Windows
    seq_len: int
    task: str
    masking: Masking | None = None

    def inputs(self, number: int) -> Tensor:
        """Token ids of a window, [1, positions].

        For a masked language model: one row for each masked token, [rows, positions].
        """
        window = self.windows.windows[number]
        if self.masking is not None:
            return self.masking.inputs(window)
        return torch.tensor([window.tokens])

    def targets(self, number: int) -> Tensor:
        """The tokens that are predicted, [scored]."""
        window = self.windows.windows[number]
        return torch.tensor(window.tokens[window.first_scored :])

    def scored(self, states: Tensor, number: int) -> Tensor:
        """The final hidden states that predict the targets, [scored, hidden size].

        states: those of all inputs of the window.
        """
        return scored_states(states, self.windows.windows[number], self.task, self.masking)


def open_text(options: SensitivityOptions, processes: int) -> ScoringText:
    """Raises EvaluationError if there are fewer windows than processes."""
    task = task_of(Checkpoint.open(options.model).config, options.model)
    default, reserved = DEFAULT_LENGTH, 0
    if task == MASKED:
        default, reserved = masked_lm.DEFAULT_LENGTH, masked_lm.RESERVED_POSITIONS
    tokenizer, seq_len = tokenizer_and_length(
        options.model, options.seq_len, options.trust_remote_code, default, reserved
    )
    masking = Masking.of(tokenizer) if task == MASKED else None
    names = options.data or (str(BUNDLED_CALIBRATION),)
    windows = calibration_windows(
        names, tokenizer, max(len(names), options.max_tokens // seq_len), seq_len, options.seed
    )
    if len(windows.windows) < processes:
        raise EvaluationError(
            f"{len(windows.windows)} windows can't be shared by {processes} processes",
            hint="start fewer, or raise `max_tokens`",
        )
    if masking is not None:
        windows = masking.windows(windows)
    elif task == SEQ2SEQ:
        windows = targets_of(windows)
    return ScoringText(windows, seq_len, task, masking)
