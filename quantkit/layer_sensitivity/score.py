"""`sensitivity`: the loss from quantizing each layer group, and the best choices within a budget.

For each group, the model runs with this group alone quantized. The group's loss is
KL(model‖variant) over some text. Weights are quantized as `export` does it, and inputs as a server
does it. The errors of different groups are nearly independent, so their KLs nearly add up. A budget
is solved with the sums, and the error of the sums is measured.

KLs this small contain the noise floor: any change, however small, makes some later activations
round differently to the model's dtype. The noise floor is subtracted before KLs are added.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from quantkit import __version__
from quantkit.checkpoint.files import write_json
from quantkit.checkpoint.run_control import Progress, ShouldStop, never, silent
from quantkit.errors import EvaluationError
from quantkit.evaluation.result import TextSources
from quantkit.layer_sensitivity.choices import Choices, open_choices
from quantkit.layer_sensitivity.layer_sqnr import LayerSqnr
from quantkit.layer_sensitivity.measure import VariantScorer
from quantkit.layer_sensitivity.options import SensitivityOptions
from quantkit.layer_sensitivity.passes import first_pass, open_layer_groups, second_pass
from quantkit.layer_sensitivity.progress import ResumeState, finished_result
from quantkit.layer_sensitivity.result import SCHEMA_VERSION, ScoredModel, Sensitivity
from quantkit.layer_sensitivity.scoring_text import ScoringText, open_text
from quantkit.models.distributed import joined_ranks
from quantkit.models.hidden_states import peak_memory_bytes
from quantkit.models.machine import device_identity, software_versions
from quantkit.models.skeleton import pick_device
from quantkit.ops.native import cpu_level


def score_sensitivity(
    options: SensitivityOptions, progress: Progress = silent, should_stop: ShouldStop = never
) -> Sensitivity:
    """The KLs of layer groups and of all together, and a budget's solution.

    With torchrun the ranks share the windows, and each returns the whole result.

    progress: told of the runs of blocks that are done, and then of the scored windows.
    should_stop: asked after each block, and each round of scored windows.
    """
    started = time.monotonic()
    if options.max_kld is not None and not options.max_kld > 0:
        raise EvaluationError("`max_kld` must be more than 0")
    output = options.resumable_output
    if options.resume and output is None:
        raise EvaluationError(
            "`resume=True` continues an interrupted run", hint="give the same `output` as before"
        )
    with joined_ranks(pick_device(options.device)) as ranks:
        choices, remarks = ranks.first_then_others(lambda: open_choices(options))
        text = ranks.broadcast_from_first(lambda: open_text(options, ranks.count))
        fingerprint = ranks.broadcast_from_first(
            lambda: _fingerprint(options, choices, text, ranks.device)
        )
        budget = {"max_size": str(options.max_size or ""), "max_kld": str(options.max_kld or "")}
        if options.resume and output is not None:
            finished = ranks.broadcast_from_first(
                lambda: finished_result(output, fingerprint | budget, options.overwrite)
            )
            if finished is not None:
                return replace(finished, was_finished=True)
        resume_state = ranks.first_then_others(
            lambda: ResumeState.open(
                ranks, should_stop, output, fingerprint, options.resume, options.overwrite
            )
        )
        scorer = VariantScorer(options, choices, text, ranks, resume_state, progress)
        result = _result(scorer, fingerprint | budget, remarks)
        if options.output is not None and ranks.is_first:
            write_json(options.output, result.to_json())
        resume_state.clear()
    return replace(
        result, seconds=time.monotonic() - started, peak_memory_bytes=peak_memory_bytes()
    )


def _result(
    scorer: VariantScorer, fingerprint: dict[str, str], remarks: Sequence[str]
) -> Sensitivity:
    options, choices, text, ranks = scorer.options, scorer.choices, scorer.text, scorer.ranks
    plan = choices.recipe
    with torch.inference_mode():
        model = ranks.first_then_others(
            lambda: open_layer_groups(choices, options.trust_remote_code, ranks.device)
        )
        sqnr = LayerSqnr(ranks, scorer.resume_state.layers())
        found = second_pass(scorer, model, sqnr, first_pass(scorer, model, sqnr))
    return Sensitivity(
        schema_version=SCHEMA_VERSION,
        quantkit_version=__version__,
        model=ScoredModel(
            path=str(options.model), fingerprint=plan.fingerprint["model"], bytes=plan.bytes_before
        ),
        base_recipe=options.recipe,
        alternatives=tuple(choices.allowed),
        calibration=str(options.calibration) if options.calibration else None,
        data=TextSources(
            sources=tuple(str(source) for source in options.data) or ("bundled",),
            sha256=text.windows.data_sha256,
            tokens_sha256=text.windows.tokens_sha256,
        ),
        seq_len=text.seq_len,
        windows=len(text.windows.windows),
        tokens_scored=text.windows.tokens_scored,
        fingerprint=fingerprint,
        scores=found.scores,
        order=found.order,
        pareto=found.pareto,
        solution=found.solution,
        remarks=(*remarks, *found.remarks),
        block_runs=scorer.block_runs,
        block_runs_without_sharing=scorer.block_runs_without_sharing,
    )


def _fingerprint(
    options: SensitivityOptions, choices: Choices, text: ScoringText, device: str
) -> dict[str, str]:
    """Everything that the scores depend on. A budget isn't part of it."""
    kind, plan = device.split(":")[0], choices.recipe.fingerprint
    return {
        "model files": plan["model"],
        "recipe": options.recipe.canonical(),
        "calibration": plan["calibration"],
        "alternatives": " ".join(sorted(choices.allowed)),
        "data": text.windows.data_sha256,
        "max_tokens": str(options.max_tokens),
        "seq_len": str(text.seq_len),
        "windows": text.windows.tokens_sha256,
        "seed": str(options.seed),
        "device": device_identity(device),
        "kernels": cpu_level() if kind == "cpu" else kind,
        **software_versions(),
    }
