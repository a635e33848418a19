"""`quantkit.verify`."""

from __future__ import annotations

from quantkit.api.inputs import Model, model_path, require_callables, require_choice
from quantkit.api.messages import step_done, warn
from quantkit.checkpoint.run_control import Progress, ShouldStop, never, silent
from quantkit.exporter.verification import Verification
from quantkit.exporter.verify import verify as check_checkpoint
from quantkit.schemes.serving import RUNTIMES


def verify(
    checkpoint: Model,
    *,
    base: Model | None = None,
    runtime: str | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Verification:
    """Check that a checkpoint is complete, finite and consistent, and that runtimes can load it.

    checkpoint: directory or hub id; quantkit or another tool wrote it.
    base: the original model; every weight is compared with it.
    runtime: "vllm", "sglang", "tensorrt-llm" or "transformers"; what it can't load is a fault then.
        None warns of each runtime that can't load it.
    progress: called with what is being done, tensors done and tensors in all.
    should_stop: asked between two tensors; True ends the run.

    Returns the faults, warnings, and with `base` each weight's signal-to-noise ratio in dB. A
    checkpoint with faults raises nothing; call `require_ok()` for that.

    Raises:
        CheckpointError: there is no checkpoint, or `base` can't be compared with it.
        Interrupted: `should_stop` ended the run.
    """
    require_callables(progress=progress, should_stop=should_stop)
    require_choice("runtime", runtime, RUNTIMES)
    found = check_checkpoint(
        model_path(checkpoint),
        None if base is None else model_path(base),
        runtime,
        progress or silent,
        should_stop or never,
    )
    warn(found.warnings)
    if found.ok:
        step_done(found)
    return found
