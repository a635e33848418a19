"""`quantkit.sensitivity`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from quantkit.api.inputs import (
    Data,
    Model,
    data_sources,
    model_path,
    path_of,
    recipe_of,
    require_at_least,
    require_callables,
    require_flags,
    require_list,
    require_whole,
)
from quantkit.api.one_run import one_run
from quantkit.checkpoint.run_control import Progress, ShouldStop, never, silent
from quantkit.errors import ArgumentError
from quantkit.layer_sensitivity.options import KEEP, SensitivityOptions
from quantkit.layer_sensitivity.result import Sensitivity
from quantkit.layer_sensitivity.score import score_sensitivity
from quantkit.schemes.recipe import Recipe


def sensitivity(
    model: Model,
    recipe: Recipe | str | os.PathLike[str],
    data: Data | None = None,
    *,
    max_size: str | int | None = None,
    max_kld: float | None = None,
    alternatives: Sequence[str] = (KEEP,),
    calibration: str | os.PathLike[str] | None = None,
    max_tokens: int = 2048,
    seq_len: int | None = None,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Sensitivity:
    """Rank the Linears of a model by the loss from quantizing them, and fit a recipe to a budget.

    Linears that runtimes fuse (q/k/v, gate/up, all experts of a layer) are one layer group. Each
    group is quantized alone, and the model compared with the unquantized one. The KLs of several
    groups are added to predict their joint KL; how good this prediction is, is measured too.

    model: directory with safetensors files, hub id, or .gguf file.
    recipe: how all layer groups are quantized: a Recipe, a scheme's name, or a .yaml file.
    data: text, as `calibrate` takes it; None takes a bundled text.
    max_size: find the smallest KL within this size: bytes, "150MB", "65%" (of the model), or "+5%"
        (more than with all layer groups quantized).
    max_kld: find the smallest size within this mean KL, nats.
    alternatives: what a budget may give a layer group instead of the recipe's scheme: "keep" (its
        stored dtype), or names of schemes.
    calibration: what `calibrate` returned, or its directory: for static scales and algorithms.
    max_tokens: number of tokens that each variant of the model is evaluated on.
    seq_len: tokens per window; None for 256 (masked language models: 64), or fewer if the model has
        fewer positions.
    seed: for sampling windows.
    device: "auto", "cpu", "cuda" or "cuda:N".
    trust_remote_code: run Python code from the checkpoint.
    output: JSON file to write; an interrupted run can be continued only with it.
    resume: continue an interrupted run.
    overwrite: discard an interrupted run, and start again.
    progress: called with what is being done, steps done and steps in all.
    should_stop: asked between two blocks; True ends the run.

    Returns the layer groups' KLs in nats, worst first as `ranking`, and the budget's solution as
    `solution`; `recipe()` makes its recipe. `solve()` takes another budget and runs nothing.

    Raises:
        EvaluationError: the model can't be evaluated, or no choice meets the budget.
        RecipeError: the recipe makes no sense for this model.
        CalibrationError: the calibration is missing, or belongs to another model or recipe.
        CheckpointError: the model is damaged.
        DataError: the text can't be read or is too short.
        Interrupted: `should_stop` ended the run.
    """
    require_callables(progress=progress, should_stop=should_stop)
    require_flags(trust_remote_code=trust_remote_code, resume=resume, overwrite=overwrite)
    require_whole("seed", seed)
    require_at_least(2, max_tokens=max_tokens, seq_len=seq_len)
    if max_kld is not None and not isinstance(max_kld, (int, float)):
        raise ArgumentError(f"`max_kld` is {max_kld!r}; it must be a number of nats")
    options = SensitivityOptions(
        model_path(model),
        recipe_of(recipe),
        require_list("alternatives", alternatives) or (KEEP,),
        None if calibration is None else path_of("calibration", calibration),
        data_sources(data),
        max_tokens=max_tokens,
        seq_len=seq_len,
        max_size=None if max_size is None else str(max_size),
        max_kld=max_kld,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
        output=None if output is None else path_of("output", output),
        resume=resume,
        overwrite=overwrite,
    )
    with one_run():
        return score_sensitivity(options, progress or silent, should_stop or never)
