"""`quantkit.calibrate`."""

from __future__ import annotations

import os

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
    require_whole,
    size_of,
)
from quantkit.api.messages import step_done, tell_of_new_start, warn
from quantkit.api.one_run import one_run
from quantkit.calibration.calibrate import calibrate as run_calibration
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.result import CalibrationResult
from quantkit.checkpoint.run_control import Progress, ShouldStop, never, silent
from quantkit.schemes.recipe import Recipe


def calibrate(
    model: Model,
    output: str | os.PathLike[str],
    *,
    data: Data | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    num_samples: int = 128,
    seq_len: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    all_experts: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> CalibrationResult:
    """Run text through a model, block by block, and record statistics of the input of each Linear.

    Only one decoder block is in memory at a time. The files are written to `output`.

    model: directory with safetensors files, hub id, or .gguf file.
    output: directory to write; it appears only when it is complete.
    data: file name (.txt, .jsonl, .parquet), "dataset:NAME[:CONFIG[:SPLIT]]", a list of these, a
        list of texts or of conversations, or a datasets.Dataset; None takes a bundled text.
    recipe: its algorithms are run, and the calibration is valid for this recipe only; None records
        statistics for every scheme.
    num_samples: number of windows, at least 1.
    seq_len: tokens per window; None for 2048, or fewer if the model has fewer positions.
    batch_size: windows per batch; None for about 1024 tokens on a CPU and 8192 on a GPU.
    seed: for sampling windows, and for random rotations.
    memory: bytes of hidden states in memory, such as "8GB"; the rest goes to a file. None for half
        of the free memory.
    all_experts: run every token through every expert, so that none sees too few tokens.
    device: "auto", "cpu", "cuda" or "cuda:N".
    trust_remote_code: run Python code from the checkpoint.
    resume: continue an interrupted run, to the same bytes.
    overwrite: replace an existing output, or an interrupted run.
    progress: called with what is being done, blocks done and blocks in all.
    should_stop: asked between two steps; True ends the run, so that `resume` can continue it.

    Returns the calibration's path, counts, times and warnings. `export` takes it as `calibration`.

    Raises:
        CheckpointError: the model can't be read, is damaged or isn't supported.
        CalibrationError: a Linear can't be measured.
        RecipeError: the recipe makes no sense for this model.
        DataError: the text can't be read or is too short.
        OutputError: the output can't be written, or must not be replaced or continued.
        Interrupted: `should_stop` ended the run.
    """
    require_callables(progress=progress, should_stop=should_stop)
    require_flags(
        all_experts=all_experts,
        trust_remote_code=trust_remote_code,
        resume=resume,
        overwrite=overwrite,
    )
    require_whole("num_samples", num_samples)
    require_at_least(1, num_samples=num_samples, batch_size=batch_size)
    require_whole("seed", seed)
    require_at_least(2, seq_len=seq_len)
    options = CalibrationOptions(
        model_path(model),
        path_of("output", output),
        data_sources(data),
        None if recipe is None else recipe_of(recipe),
        num_samples=num_samples,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        device=device,
        memory=None if memory is None else size_of(memory, "memory"),
        all_experts=all_experts,
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    tell_of_new_start(options.output, resume)
    with one_run():
        result = run_calibration(options, progress or silent, should_stop or never)
    if not result.was_finished:
        warn(result.warnings)
        for remark in result.chosen:
            step_done(remark)
    step_done(result)
    return result
