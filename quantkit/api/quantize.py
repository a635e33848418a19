"""`quantkit.quantize`: calibrate if needed, export, verify, and check the result."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.api.inputs import (
    Data,
    Model,
    data_sources,
    model_path,
    path_of,
    recipe_of,
    require_at_least,
    require_callables,
    require_choice,
    require_flags,
    require_list,
    require_whole,
    size_of,
)
from quantkit.api.messages import step_done, warn
from quantkit.api.one_run import one_run
from quantkit.calibration.calibrate import calibrate as run_calibration
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.reader import Calibration
from quantkit.calibration.result import CalibrationResult
from quantkit.checkpoint.finished_output import CALIBRATION_FILE, MANIFEST_FILE
from quantkit.checkpoint.formats import FORMATS
from quantkit.checkpoint.notebook import html_table
from quantkit.checkpoint.output_checks import check_output
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.run_control import RESUME_HINT, Progress, ShouldStop, never, silent
from quantkit.data.sources import DataSource
from quantkit.errors import FaultsFound, Interrupted, OutputError, QuantkitError
from quantkit.evaluation.sanity_check import CHECK_TOKENS, SanityCheck, check_sanity
from quantkit.exporter.default_scheme import default_scheme
from quantkit.exporter.plan import ExportOptions, ExportPlan, plan_export
from quantkit.exporter.result import ExportResult
from quantkit.exporter.runtimes import as_computed
from quantkit.exporter.verification import Verification
from quantkit.exporter.verify import verify as check_checkpoint
from quantkit.exporter.write import export as write_checkpoint
from quantkit.models.distributed import require_one_process
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.serving import HARDWARE, RUNTIMES


@dataclass(frozen=True)
class QuantizeResult:
    """A checkpoint that `quantize` wrote and checked, or with `dry_run` the plan of one.

    recipe: the recipe, with the default scheme if none was named.
    checkpoint: the export.
    calibration: the calibration that this run made; None if there was none, or an earlier run had
        finished it.
    verification: the result of `verify`; None if it wasn't asked for.
    check: the sanity check; None if it wasn't asked for, or the checkpoint has faults.
    """

    recipe: Recipe
    checkpoint: ExportResult
    calibration: CalibrationResult | None = None
    verification: Verification | None = None
    check: SanityCheck | None = None

    @property
    def path(self) -> Path:
        """The output directory."""
        return self.checkpoint.path

    def __fspath__(self) -> str:
        return str(self.path)

    def to_json(self) -> dict[str, Any]:
        """What `quantkit quantize` prints as JSON."""
        content = self.checkpoint.to_json()
        if self.checkpoint.is_dry_run:
            return content
        return content | {
            "scheme": self.recipe.scheme.name,
            "verify": None if self.verification is None else self.verification.to_json(),
            "judgement": None if self.check is None else self.check.to_json(),
        }

    def __str__(self) -> str:
        """One line for each step."""
        steps = [self.calibration, self.checkpoint, self.verification]
        lines = [str(step) for step in steps if step is not None]
        if self.check is not None:
            lines.append(f"{self.path}: {self.check}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<QuantizeResult\n{self}>"

    def _repr_html_(self) -> str:
        rows = dict(self.checkpoint.rows())
        if self.calibration is not None:
            rows["calibration"] = str(self.calibration.path)
        if self.verification is not None:
            rows["verified"] = self.verification.found()
        if self.check is not None:
            rows["sanity check"] = str(self.check)
        return html_table("Quantized checkpoint", rows)


def quantize(
    model: Model,
    output: str | os.PathLike[str],
    recipe: Recipe | str | os.PathLike[str] | None = "fp8-dynamic",
    *,
    data: Data | None = None,
    calibration: str | os.PathLike[str] | None = None,
    ignore: Iterable[str] = (),
    kv_cache: str | None = None,
    observer: str | None = None,
    runtime: str | None = None,
    format: str = "compressed-tensors",
    hardware: str | None = None,
    num_samples: int = 128,
    seq_len: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    all_experts: bool = False,
    max_shard_size: int | str = "5GB",
    allow_unreached: bool = False,
    verify: bool = True,
    check: bool = True,
    check_tokens: int = CHECK_TOKENS,
    device: str = "auto",
    trust_remote_code: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> QuantizeResult:
    """Quantize a model in one step: calibrate if needed, export, verify, and run a sanity check.

    A calibration that this run makes is stored in OUTPUT-calibration. The sanity check compares the
    result with the model on a short text. It fails if perplexity rises by more than 10 %, or the
    mean KL exceeds 0.15 nats, beyond the statistical uncertainty.

    model: directory with safetensors files, hub id, or .gguf file.
    output: directory to write; it appears only when it is complete.
    recipe: a Recipe, the name of a scheme, or a recipe's .yaml file; None takes the scheme that
        most runtimes can load.
    data: text for the calibration, else for the sanity check, as `calibrate` takes it; None takes
        bundled texts.
    calibration: an earlier result of `calibrate`, or its directory.
    hardware: target hardware, such as "hopper" or "cpu": decides the scheme if `recipe` is None,
        and the arithmetic of the sanity check.
    verify, check: whether to verify the output, and to run the sanity check.
    check_tokens: number of tokens for the sanity check.
    progress: called with what is being done, done and total.

    The other parameters are those of `calibrate` and `export`.

    Returns the results of the steps.

    Raises:
        FaultsFound: the output has faults, or fails the sanity check. The files are kept, and
            the error's `result` is the QuantizeResult.
        QuantkitError: as `calibrate` and `export` raise it.
    """
    require_callables(progress=progress, should_stop=should_stop)
    require_flags(
        all_experts=all_experts,
        allow_unreached=allow_unreached,
        verify=verify,
        check=check,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
    )
    require_one_process("quantize")
    require_choice("runtime", runtime, RUNTIMES)
    require_choice("format", format, FORMATS)
    require_choice("hardware", hardware, HARDWARE)
    require_whole("num_samples", num_samples)
    require_at_least(1, num_samples=num_samples, batch_size=batch_size)
    require_whole("seed", seed)
    require_at_least(2, seq_len=seq_len, check_tokens=check_tokens)
    path, directory, sources = model_path(model), path_of("output", output), data_sources(data)
    if recipe is None:
        made = _default_recipe(path, runtime, hardware, format)
    else:
        made = recipe_of(recipe)
    made = made.with_options(require_list("ignore", ignore), kv_cache, observer)
    for scheme in made.schemes:
        as_computed(scheme, hardware)
    export_options = ExportOptions(
        path,
        directory,
        made,
        None if calibration is None else path_of("calibration", calibration),
        runtime=runtime,
        file_format=format,
        max_shard_bytes=size_of(max_shard_size, "max_shard_size"),
        resume=resume,
        overwrite=overwrite,
        allow_unreached=allow_unreached,
    )
    calibration_options = None
    if made.needs_calibration and calibration is None:
        calibration_options = CalibrationOptions(
            path,
            directory.with_name(directory.name + "-calibration"),
            sources,
            # Statistics serve every recipe; weights that algorithms quantize serve theirs alone.
            made if made.quantizes_weights else None,
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
    run_check = functools.partial(
        check_sanity,
        path,
        directory,
        () if calibration_options is not None else sources,
        check_tokens,
        hardware,
        device,
        trust_remote_code,
    )
    steps = _Steps(export_options, calibration_options, verify, run_check if check else None)
    plan = steps.plan()
    if dry_run:
        warn(plan.warnings)
        return QuantizeResult(made, ExportResult.of(plan))
    if sources and calibration_options is None and not check:
        given = calibration is not None
        reason = "`calibration` is given" if given else "this recipe needs no calibration"
        warn([f"`data` is not read: {reason}"])
    with one_run():
        result = steps.run(plan, progress or silent, should_stop or never)
    _require_sound(result)
    return result


@dataclass(frozen=True)
class _Steps:
    """What one call does.

    export: the export; without the calibration that this call makes.
    calibration: the calibration that this call makes, or None.
    verify: whether the output is verified.
    check: the sanity check, called with `progress` and `should_stop`; None if it isn't wanted.
    """

    export: ExportOptions
    calibration: CalibrationOptions | None
    verify: bool
    check: Callable[[Progress, ShouldStop], SanityCheck] | None

    def plan(self) -> ExportPlan:
        """The export's plan, made before a calibration that it needs."""
        return plan_export(self.export, calibration_follows=self.calibration is not None)

    def run(self, plan: ExportPlan, progress: Progress, should_stop: ShouldStop) -> QuantizeResult:
        calibrated = None
        warned = plan.warnings if self.calibration is not None else ()
        warn(warned)  # a calibration may take hours
        if self.calibration is not None:
            calibrated = _calibrate(self.export, self.calibration, progress, should_stop)
            plan = plan_export(replace(self.export, calibration=self.calibration.output))
        exported = write_checkpoint(plan, progress, should_stop)
        warn(text for text in plan.warnings if text not in warned)
        step_done(exported)
        result = QuantizeResult(self.export.recipe, exported, calibrated)
        try:
            if self.verify:
                result = replace(result, verification=_verify(plan, progress, should_stop))
            if self.check is not None and (result.verification is None or result.verification.ok):
                result = replace(result, check=_check(plan, self.check, progress, should_stop))
        except Interrupted as stopped:
            raise Interrupted(str(stopped), RESUME_HINT) from None  # the files are complete
        return result


def _default_recipe(
    model: Path, runtime: str | None, hardware: str | None, file_format: str
) -> Recipe:
    choice = default_scheme(Checkpoint.open(model), runtime, hardware, file_format)
    step_done(f"Default scheme: {choice.scheme.name}, because {choice.reason}")
    return Recipe(choice.scheme)


def _calibrate(
    export: ExportOptions,
    calibration: CalibrationOptions,
    progress: Progress,
    should_stop: ShouldStop,
) -> CalibrationResult | None:
    """Run the calibration, unless `resume` finds it finished."""
    if not (export.resume and (export.output / MANIFEST_FILE).is_file()):
        check_output(export.output, overwrite=export.overwrite, reads=[export.model])
    if export.resume and (calibration.output / CALIBRATION_FILE).is_file():
        _require_same_calibration(calibration)
        return None
    result = run_calibration(calibration, progress, should_stop)
    warn(result.warnings)
    for remark in result.chosen:
        step_done(remark)
    step_done(result)
    return result


def _require_same_calibration(asked: CalibrationOptions) -> None:
    """Raise OutputError if the finished calibration was made with other options."""
    made = Calibration.open(asked.output).description
    same = {
        "data": made["data"]["sources"] == (_names(asked.data) or ["bundled"]),
        "num_samples": made["windows_requested"] == asked.num_samples,
        "seq_len": asked.seq_len in (None, made["seq_len"]),
        "seed": made["seed"] == asked.seed,
        "all_experts": made["all_experts"] == asked.all_experts,
    }
    differing = [f"`{name}`" for name, equal in same.items() if not equal]
    if differing:
        raise OutputError(
            f"{asked.output} was made with a different {', '.join(differing)}",
            "give the same, or start again with `overwrite=True`",
        )


def _names(sources: tuple[DataSource, ...]) -> list[str]:
    return [str(source) for source in sources]


def _verify(plan: ExportPlan, progress: Progress, should_stop: ShouldStop) -> Verification:
    options = plan.options
    found = check_checkpoint(options.output, options.model, options.runtime, progress, should_stop)
    warn(text for text in found.warnings if text not in plan.warnings)
    if found.ok:
        step_done(found)
    return found


def _check(
    plan: ExportPlan,
    run: Callable[[Progress, ShouldStop], SanityCheck],
    progress: Progress,
    should_stop: ShouldStop,
) -> SanityCheck:
    """The sanity check. Where the two models can't be run, a warning says why."""
    output = plan.options.output
    try:
        checked = run(progress, should_stop)
    except Interrupted:
        raise
    except QuantkitError as error:
        warn([f"{output} is not checked: {error}"])
        return SanityCheck.not_run(str(error))
    step_done(f"{output}: {checked}")
    return checked


def _require_sound(result: QuantizeResult) -> None:
    """Raise FaultsFound for faults of the files, or a failed sanity check."""
    if result.verification is not None and not result.verification.ok:
        faults = result.verification.first_fault
        raise FaultsFound(f"{result.path} has faults: {faults}", result=result)
    if result.check is not None and result.check.is_sane is False:
        raise FaultsFound(
            f"{result.path} fails the sanity check: {result.check.problem}. The files are kept",
            "`quantkit.evaluate` measures the loss in detail",
            result,
        )
