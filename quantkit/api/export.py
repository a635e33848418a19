"""`quantkit.export`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from quantkit.api.inputs import (
    Model,
    model_name,
    model_path,
    path_of,
    recipe_of,
    require_callables,
    require_choice,
    require_flags,
    require_list,
    size_of,
)
from quantkit.api.messages import step_done, tell_of_new_start, warn
from quantkit.api.one_run import one_run
from quantkit.checkpoint.formats import FORMATS
from quantkit.checkpoint.hub import is_hub_id, open_hub_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.run_control import Progress, ShouldStop, never, silent
from quantkit.errors import ArgumentError
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.result import ExportResult
from quantkit.exporter.write import export as write_checkpoint
from quantkit.models.distributed import require_one_process
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.serving import RUNTIMES


def export(
    model: Model,
    output: str | os.PathLike[str],
    recipe: Recipe | str | os.PathLike[str],
    *,
    ignore: Iterable[str] = (),
    kv_cache: str | None = None,
    observer: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    runtime: str | None = None,
    format: str = "compressed-tensors",
    max_shard_size: int | str = "5GB",
    allow_unreached: bool = False,
    stream_download: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> ExportResult:
    """Write a model as a quantized checkpoint, a few rows of a tensor at a time.

    The model isn't built, so memory doesn't grow with it. Each shard of a hub id is downloaded when
    it is needed.

    model: directory with safetensors files, hub id, or .gguf file.
    output: directory to write; it appears only when it is complete.
    recipe: a Recipe, the name of a scheme, or a recipe's .yaml file.
    ignore: patterns of Linears that are skipped, besides the recipe's: names, globs, or `re:` and a
        regular expression.
    kv_cache: "fp8" also writes scales for a quantized KV cache.
    observer: how static scales are computed: "absmax", "percentile:P" or "mse"; None for the
        recipe's way.
    calibration: what `calibrate` returned, or its directory. Static schemes, algorithms and a
        quantized KV cache need one.
    runtime: "vllm", "sglang", "tensorrt-llm" or "transformers", which must be able to load the
        output; None only warns.
    format: "compressed-tensors", "fp8" (DeepSeek's blocks) or "modelopt".
    max_shard_size: bytes of a weight file at most, such as "5GB".
    allow_unreached: skip parameters that should be quantized but can't be, instead of refusing the
        model.
    stream_download: for a hub id: delete each downloaded shard as soon as it is quantized.
    dry_run: plan only, write nothing.
    resume: continue an interrupted run, to the same bytes.
    overwrite: replace an existing output, or an interrupted run.
    progress: called with what is being done, bytes read and bytes to read.
    should_stop: asked between two tensors; True ends the run, so that `resume` can continue it.

    Returns the path, what happens to each parameter, sizes in bytes and warnings.

    Raises:
        RecipeError: the recipe makes no sense for this model.
        RuntimeLimitError: `runtime` can't load the output.
        CalibrationError: the calibration is missing, or belongs to another model or recipe.
        CheckpointError: the model can't be read, or a weight has NaN or infinity.
        OutputError: the output can't be written, or must not be replaced or continued.
        Interrupted: `should_stop` ended the run.
    """
    require_callables(progress=progress, should_stop=should_stop)
    require_flags(
        allow_unreached=allow_unreached,
        stream_download=stream_download,
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
    )
    require_one_process("export")
    require_choice("runtime", runtime, RUNTIMES)
    require_choice("format", format, FORMATS)
    directory = path_of("output", output)
    path, checkpoint = _open(model_name(model), directory, calibration, stream_download)
    options = ExportOptions(
        path,
        directory,
        recipe_of(recipe).with_options(require_list("ignore", ignore), kv_cache, observer),
        None if calibration is None else path_of("calibration", calibration),
        runtime=runtime,
        file_format=format,
        max_shard_bytes=size_of(max_shard_size, "max_shard_size"),
        resume=resume,
        overwrite=overwrite,
        allow_unreached=allow_unreached,
    )
    plan = plan_export(options, checkpoint=checkpoint)
    if dry_run:
        warn(plan.warnings)
        return ExportResult.of(plan)
    tell_of_new_start(directory, resume)
    with one_run():
        result = write_checkpoint(plan, progress or silent, should_stop or never)
    warn(plan.warnings)
    step_done(result)
    return result


def _open(
    model: str, output: Path, calibration: str | os.PathLike[str] | None, stream_download: bool
) -> tuple[Path, Checkpoint | None]:
    """The model's directory, or its hub id with the checkpoint opened from its headers alone.

    A calibration is compared with the model's files, so it needs the whole model on disk.
    """
    if stream_download and (calibration is not None or not is_hub_id(model)):
        reason = (
            ", without `calibration`: a calibration is made from a local copy"
            if calibration is not None
            else ""
        )
        raise ArgumentError(f"`stream_download` is for a hub id{reason}")
    if calibration is not None or not is_hub_id(model):
        return model_path(model), None
    partial = output.resolve().with_name(output.name + ".partial")
    return Path(model), open_hub_model(model, partial / ".download" if stream_download else None)
