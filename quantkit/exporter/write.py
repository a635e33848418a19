"""`export`: write a quantized checkpoint from a model's safetensors files, a few rows at a time,
without building the model.

The plan determines the headers of the output, so each tensor's place in its file is known.

- Maker threads, one for each core, take one tensor after the other, compute its codes
  (`tensor_maker`) and write them to their place.
- A follower thread for each shard reads back what has been written, and hashes it.

Each thread needs a few megabytes of memory, whatever the size of the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.files import cores
from quantkit.checkpoint.finished_output import finished_already
from quantkit.checkpoint.output_checks import check_disk_space, check_output
from quantkit.checkpoint.output_dir import OutputDirectory
from quantkit.checkpoint.run_control import RESUME_HINT, Progress, ShouldStop, never, silent
from quantkit.checkpoint.shard_plan import TensorPlan, plan_shards, shard_names
from quantkit.checkpoint.stream import WeightStream
from quantkit.checkpoint.writer import ShardWriter, tensor_bytes
from quantkit.errors import CheckpointError, Interrupted, OutputError
from quantkit.exporter.plan import ExportPlan, file_times
from quantkit.exporter.result import ExportResult
from quantkit.exporter.sidecar_files import copy_others, write_config, write_index, write_manifest
from quantkit.exporter.tensor_maker import Job, TensorMaker, plan_jobs
from quantkit.models.threads import one_thread


def export(
    plan: ExportPlan, progress: Progress = silent, should_stop: ShouldStop = never
) -> ExportResult:
    """Write a planned checkpoint.

    progress: told of the bytes read and the bytes to read, in this thread, several times a second.
    should_stop: asked as often.

    Raises:
        OutputError: the output can't be written.
        CheckpointError: a weight has NaN or infinity, or the model changed during the export.
        Interrupted: the export was stopped; finished shards are kept.
    """
    options, checkpoint = plan.options, plan.checkpoint
    started = time.monotonic()
    result = replace(ExportResult.of(plan), is_dry_run=False)
    if options.resume and finished_already(options.output, plan.fingerprint, options.overwrite):
        return replace(result, was_finished=True)
    check_output(options.output, overwrite=options.overwrite, reads=_inputs(plan))
    others = checkpoint.other_files()
    jobs = plan_jobs(plan)
    shards = plan_shards([job.tensors for job in jobs], options.max_shard_bytes)
    names = shard_names(len(shards))
    check_disk_space(options.output, plan.bytes_after + sum(path.stat().st_size for path in others))
    output = OutputDirectory(
        options.output,
        plan.fingerprint,
        resume=options.resume,
        overwrite=options.overwrite,
        reads=_inputs(plan),
    )
    finished = output.finished(names)
    try:
        run = _Run(plan, output, _Run.by_shard(jobs, names, shards), finished)
        with one_thread():  # tensors are processed in parallel
            run.run(progress, should_stop)
        _require_unchanged(plan)
        if checkpoint.source is not None:
            checkpoint.source.clean()
        write_index(output.partial, names, shards)
        write_config(output.partial, plan)
        copy_others(output.partial, plan, others)
        write_manifest(output, plan)
    except CheckpointError:
        output.discard()  # an export of this model can't be finished, so it can't be resumed
        raise
    except OSError as error:
        raise OutputError(
            f"can't finish writing {output.partial}: {error.strerror}; finished shards are kept",
            hint="fix that and continue with `resume=True`",
        ) from None
    output.commit()
    return replace(result, seconds=time.monotonic() - started)


def _require_unchanged(plan: ExportPlan) -> None:
    """Raise CheckpointError if the model's files were changed after the plan was made."""
    checkpoint = plan.checkpoint
    if file_times(checkpoint) != plan.fingerprint["model files"]:
        raise CheckpointError(
            f"{', '.join(path.name for path in checkpoint.shard_paths[:3])} or another shard of"
            f" {checkpoint.path} changed while it was read; export again without changing it"
        )


def _inputs(plan: ExportPlan) -> list[Path]:
    """The directories that an export reads, which its output must not replace."""
    return [plan.checkpoint.path, *([plan.calibration.path] if plan.calibration else [])]


class _Run:
    """The threads of one export, and their shared state.

    Makers take jobs in order. Who takes the first job of a shard opens its file and starts its
    follower. Makers wait if too many shards are unfinished, so that they don't outrun the disk.
    """

    @staticmethod
    def by_shard(
        jobs: Sequence[Job], names: Sequence[str], shards: Sequence[Sequence[TensorPlan]]
    ) -> dict[str, list[Job]]:
        """Name of a shard → its jobs. A job's tensors are all in the shard of its first tensor."""
        by_first = {job.tensors[0].name: job for job in jobs}
        return {
            name: [by_first[tensor.name] for tensor in tensors if tensor.name in by_first]
            for name, tensors in zip(names, shards)
        }

    def __init__(
        self,
        plan: ExportPlan,
        output: OutputDirectory,
        shards: dict[str, list[Job]],
        finished: dict[str, Any],
    ) -> None:
        self._plan, self._output = plan, output
        self._stream = WeightStream(plan.checkpoint)
        self._maker = TensorMaker(plan, self._stream)
        self._todo = {name: jobs for name, jobs in shards.items() if name not in finished}
        self._jobs = ((name, job) for name, jobs in self._todo.items() for job in jobs)
        self._read = sum(job.bytes_read for name in finished for job in shards[name])
        self._writers: dict[str, ShardWriter] = {}
        self._followers: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._unfinished = threading.Semaphore(max(2, cores()))
        self._stopping = threading.Event()
        self._recorded = 0
        self._error: BaseException | None = None

    def run(self, progress: Progress, should_stop: ShouldStop) -> None:
        """Run all jobs. Raises the first error of a thread, or Interrupted if it was stopped."""
        for jobs in self._todo.values():
            for job in jobs:
                self._stream.expect(self._maker.touched(job))
        makers = [
            threading.Thread(target=self._guarded, args=(self._make,), name=f"maker {number}")
            for number in range(cores())
        ]
        try:
            for maker in makers:
                maker.start()
            while alive := [thread for thread in (*makers, *self._followers) if thread.is_alive()]:
                if should_stop():
                    self._stopping.set()
                progress("tensors", self._read, self._plan.bytes_before)
                alive[0].join(0.05)
                if self._stopping.is_set() and not any(maker.is_alive() for maker in makers):
                    self._abandon_incomplete()
            if self._error is not None:
                raise self._error
            if self._recorded < len(self._todo):
                raise Interrupted(
                    f"stopped with {self._recorded} of {len(self._todo)} shards written",
                    hint=RESUME_HINT,
                )
            progress("tensors", self._read, self._plan.bytes_before)
        finally:
            # KeyboardInterrupt may have ended the loop above while threads still run: no follower
            # may wait for tensors that no maker will write, and no maker may use a closed shard.
            self._stopping.set()
            with self._lock:
                for writer in self._writers.values():
                    writer.abandon()
            for thread in (*makers, *self._followers):
                if thread.ident is not None:
                    thread.join()
            self._stream.close()

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run a thread's work. The first error stops all threads, and `run` raises it."""
        try:
            work(*arguments)
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._stopping.set()
            self._abandon_incomplete()
            for _ in range(cores()):
                self._unfinished.release()  # for makers that wait for a shard to be finished

    def _abandon_incomplete(self) -> None:
        with self._lock:
            for writer in self._writers.values():
                if not writer.is_complete or self._error is not None:
                    writer.abandon()

    # ---- Makers.

    def _make(self) -> None:
        torch.set_num_threads(1)  # in this thread too
        while (taken := self._next_job()) is not None:
            writer, job = taken
            for tensor, content, offset in self._maker.parts(job):
                if writer.is_abandoned:
                    return
                writer.write_part(tensor, tensor_bytes(content), offset)
            self._stream.done(self._maker.touched(job))
            with self._lock:
                self._read += job.bytes_read

    def _next_job(self) -> tuple[ShardWriter, Job] | None:
        """The next job, and the writer of its shard. None if there is none, or the export stops.

        One maker at a time takes a job, and keeps the others waiting while it waits to open a
        shard. A maker that waited with a job of an earlier shard would wait for itself: that shard
        can't be finished without the job.
        """
        with self._turn:
            if self._stopping.is_set():
                return None
            name, job = next(self._jobs, (None, None))
            if name is None or job is None:
                return None
            if name not in self._writers:
                self._unfinished.acquire()
                if self._stopping.is_set():
                    self._unfinished.release()
                    return None
                self._open_shard(name)
            return self._writers[name], job

    def _open_shard(self, name: str) -> None:
        """Open a shard's file, and start its follower."""
        tensors = [tensor for job in self._todo[name] for tensor in job.tensors]
        with self._lock:
            writer = self._writers[name] = ShardWriter(self._output.partial / name, tensors)
            follower = threading.Thread(
                target=self._guarded, args=(self._follow, name, writer), name=f"follower of {name}"
            )
            self._followers.append(follower)
            follower.start()

    def _follow(self, name: str, writer: ShardWriter) -> None:
        try:
            digest = writer.finish()
        finally:
            writer.release()
            self._unfinished.release()
        if digest is not None:
            with self._lock:
                self._output.record(
                    name, {"bytes": (self._output.partial / name).stat().st_size, "blake3": digest}
                )
                self._recorded += 1
