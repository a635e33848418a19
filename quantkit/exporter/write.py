"""`export`: safetensors in, safetensors out, a few rows at a time; the model is never built.

The output's headers are known from the plan, so as many threads as there are cores take one tensor
after the other, make its codes and put them where they belong, while a thread for each shard
follows, reads back what has been written and hashes it. Source rows are looked at in the page cache
and codes go from a core's own cache to the file: memory holds a few megabytes for each thread,
whatever the model's size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import ops
from quantkit.checkpoint.files import cores
from quantkit.checkpoint.formats import KV_SUFFIXES, kv_scale_module
from quantkit.checkpoint.interrupts import stop_between_steps
from quantkit.checkpoint.output_dir import (
    OutputDirectory,
    check_disk_space,
    check_output,
    finished_already,
)
from quantkit.checkpoint.reader import DTYPES, read_tensor
from quantkit.checkpoint.stream import WeightStream
from quantkit.checkpoint.writer import (
    ShardWriter,
    TensorPlan,
    plan_shards,
    shard_names,
    tensor_bytes,
)
from quantkit.errors import CheckpointError, OutputError
from quantkit.exporter.plan import ExportPlan, file_times
from quantkit.exporter.sidecar_files import copy_others, write_config, write_index, write_manifest
from quantkit.models.assignment import QuantizedLinearInfo
from quantkit.ops.reference import QuantizedTensor, choose_scale, kv_scale
from quantkit.schemes.scheme import TENSOR


@dataclass(frozen=True)
class ExportSummary:
    path: Path
    quantized: int
    left: int
    bytes_before: int
    bytes_after: int
    warnings: tuple[str, ...]
    was_finished: bool = False  # by an earlier run; nothing was written

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "quantized": self.quantized,
            "left": self.left,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "warnings": list(self.warnings),
        }


def export(
    plan: ExportPlan, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> ExportSummary:
    """Write the checkpoint. on_progress(bytes read, bytes in all) is called in this thread, several
    times a second.
    """
    options, checkpoint = plan.options, plan.checkpoint
    quantized = sum(row.status == "quantized" for row in plan.parameters)
    summary = ExportSummary(
        options.output,
        quantized,
        len(plan.left),
        plan.bytes_before,
        plan.bytes_after,
        plan.warnings,
    )
    if options.resume and finished_already(options.output, plan.fingerprint, options.overwrite):
        return replace(summary, was_finished=True)
    check_output(options.output, overwrite=options.overwrite, reads=_inputs(plan))
    others = checkpoint.other_files()
    jobs = _jobs(plan)
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
        _Run(plan, output, _Run.by_shard(jobs, names, shards), finished).run(on_progress)
        if file_times(checkpoint) != plan.fingerprint["model files"]:
            raise CheckpointError(
                f"{', '.join(path.name for path in checkpoint.shard_paths[:3])} or another shard of"
                f" {checkpoint.path} changed while it was read; leave it alone and export again"
            )
        if checkpoint.source is not None:
            checkpoint.source.clean()
        write_index(output.partial, names, shards)
        write_config(output.partial, plan)
        copy_others(output.partial, plan, others)
        write_manifest(output, plan)
    except CheckpointError:
        output.discard()  # this model can't be finished, so there is nothing to resume
        raise
    except OSError as error:
        raise OutputError(
            f"can't write {output.partial} to its end: {error.strerror}; finished shards are kept:"
            " mend that and go on with --resume"
        ) from None
    output.commit()
    return summary


def _inputs(plan: ExportPlan) -> list[Path]:
    return [plan.checkpoint.path, *([plan.calibration.path] if plan.calibration else [])]


@dataclass(frozen=True)
class _Job:
    """Tensors that are made from one parameter, together: a Linear's weight with its scales, a
    tensor as it was, or the scale of a KV cache.
    """

    source: str | None
    linear: QuantizedLinearInfo | None
    tensors: tuple[TensorPlan, ...]
    bytes_read: int


def _jobs(plan: ExportPlan) -> list[_Job]:
    jobs, file_format = [], plan.file_format
    for row in plan.parameters:
        info = plan.checkpoint.tensors[plan.added.get(row.name, row.name)]
        linear = (
            plan.linears.get(row.name.removesuffix(".weight"))
            if row.status == "quantized"
            else None
        )
        dtype = plan.dense_dtype if row.name in plan.block_scales else info.dtype
        tensors = (
            linear.tensors(file_format) if linear else [TensorPlan(row.name, dtype, info.shape)]
        )
        jobs.append(_Job(row.name, linear, tuple(tensors), row.bytes_before))
    if plan.options.recipe.kv_cache:
        names = [
            file_format.kv_scale_name(module, suffix)
            for module in plan.calibration.kv_amax
            for suffix in KV_SUFFIXES
        ]
        jobs += [
            _Job(None, None, (TensorPlan(name, "F32", file_format.scalar_shape),), 0)
            for name in names
        ]
    return jobs


class _Run:
    """The threads of one export, and what they share.

    Makers take jobs in order; the first job of a shard opens its file and starts the thread that
    follows it. A maker waits where too many shards are unfinished, so that the disk sets the pace.
    """

    @staticmethod
    def by_shard(
        jobs: Sequence[_Job], names: Sequence[str], shards: Sequence[Sequence[TensorPlan]]
    ) -> dict[str, list[_Job]]:
        by_first = {job.tensors[0].name: job for job in jobs}
        return {
            name: [by_first[tensor.name] for tensor in tensors if tensor.name in by_first]
            for name, tensors in zip(names, shards)
        }

    def __init__(
        self,
        plan: ExportPlan,
        output: OutputDirectory,
        shards: dict[str, list[_Job]],
        finished: dict[str, Any],
    ) -> None:
        self._plan, self._output = plan, output
        self._stream = WeightStream(plan.checkpoint)
        self._amax = _SharedAmax(plan, self._stream)
        self._todo = {name: jobs for name, jobs in shards.items() if name not in finished}
        self._jobs = iter([(name, job) for name, jobs in self._todo.items() for job in jobs])
        self._read = sum(job.bytes_read for name in finished for job in shards[name])
        self._writers: dict[str, ShardWriter] = {}
        self._followers: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._unfinished = threading.Semaphore(max(2, cores()))
        self._stopping = threading.Event()
        self._recorded = 0
        self._error: BaseException | None = None

    def run(self, on_progress: Callable[[int, int], None]) -> None:
        for jobs in self._todo.values():
            for job in jobs:
                self._stream.expect(self._touched(job))
        threads_before = torch.get_num_threads()
        makers = [
            threading.Thread(target=self._guarded, args=(self._make,), name=f"maker {number}")
            for number in range(cores())
        ]
        try:
            with stop_between_steps() as stop:
                for maker in makers:
                    maker.start()
                while alive := [
                    thread for thread in (*makers, *self._followers) if thread.is_alive()
                ]:
                    if stop.signal_name:
                        self._stopping.set()
                    on_progress(self._read, self._plan.bytes_before)
                    alive[0].join(0.05)
                    if self._stopping.is_set() and not any(maker.is_alive() for maker in makers):
                        self._abandon_incomplete()
                if self._error is not None:
                    raise self._error
                if self._recorded < len(self._todo):
                    stop.check("between two tensors; finished shards are kept")
                on_progress(self._read, self._plan.bytes_before)
        finally:
            # Also where this thread is torn out of its loop, by a second signal: no follower may
            # wait for what nobody will make, and no maker may look at a shard that is closed.
            self._stopping.set()
            with self._lock:
                for writer in self._writers.values():
                    writer.abandon()
            for thread in (*makers, *self._followers):
                if thread.ident is not None:
                    thread.join()
            torch.set_num_threads(threads_before)
            self._stream.close()

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run a thread's work; the first error stops all and is raised where `run` was called."""
        try:
            work(*arguments)
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._stopping.set()
            self._abandon_incomplete()
            for _ in range(cores()):
                self._unfinished.release()  # nobody waits for a shard that won't be finished

    def _abandon_incomplete(self) -> None:
        with self._lock:
            for writer in self._writers.values():
                if not writer.is_complete or self._error is not None:
                    writer.abandon()

    # ---- Makers.

    def _make(self) -> None:
        torch.set_num_threads(1)  # for this thread: the parallelism is over tensors
        while not self._stopping.is_set():
            with self._lock:
                name, job = next(self._jobs, (None, None))
            if job is None:
                return
            writer = self._writer(name)
            if writer is None:
                return
            for tensor, content, offset in self._parts(job):
                if writer.is_abandoned:
                    return
                writer.write_part(tensor, tensor_bytes(content), offset)
            self._stream.done(self._touched(job))
            with self._lock:
                self._read += job.bytes_read

    def _writer(self, name: str) -> ShardWriter | None:
        """The shard's writer, opened with its follower where this is its first job; None when
        everything stops.
        """
        with self._lock:
            if name in self._writers:
                return self._writers[name]
        self._unfinished.acquire()
        with self._lock:
            if name in self._writers:
                self._unfinished.release()
                return self._writers[name]
            if self._stopping.is_set():
                self._unfinished.release()
                return None
            tensors = [tensor for job in self._todo[name] for tensor in job.tensors]
            writer = self._writers[name] = ShardWriter(self._output.partial / name, tensors)
            follower = threading.Thread(
                target=self._guarded, args=(self._follow, name, writer), name=f"follower of {name}"
            )
            self._followers.append(follower)
            follower.start()
        return writer

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

    # ---- One job: parts of tensors, each a name, rows of it, and their place in bytes.

    def _touched(self, job: _Job) -> list[str]:
        """The tensors that making this one reads: its own, and with one scale for a whole fused set
        the other members'.
        """
        if job.source is None or job.source in self._plan.added:
            return []
        if job.linear is not None and job.linear.scheme.weight.granularity == TENSOR:
            return [
                f"{member}.weight"
                for member in self._plan.fused_with.get(job.linear.name, (job.linear.name,))
            ]
        return [job.source]

    def _parts(self, job: _Job) -> Iterator[tuple[str, Tensor, int]]:
        if job.source is None:
            yield job.tensors[0].name, _kv_scale(self._plan, job.tensors[0]), 0
        elif job.linear is None:
            yield from self._copied(job.source, job.tensors[0])
        elif (chosen := self._chosen(job)) is not None:
            yield from self._chosen_codes(job, chosen)
        elif self._stream.source_spec == job.linear.scheme.weight:
            yield from self._codes_as_they_are(job)
        else:
            yield from self._quantized(job)

    def _chosen(self, job: _Job) -> QuantizedTensor | None:
        """What calibration chose for a Linear."""
        calibration = self._plan.calibration
        return (
            calibration.quantized_weight(job.linear.name, job.linear.scheme.weight)
            if calibration
            else None
        )

    def _chosen_codes(
        self, job: _Job, quantized: QuantizedTensor
    ) -> Iterator[tuple[str, Tensor, int]]:
        """Codes and scales that algorithms chose, as they are: rounding anew would undo their
        work.
        """
        linear = job.linear
        if not torch.isfinite(quantized.scale).all():
            raise _not_finite(job.source)
        places = {tensor.name.rpartition(".")[2]: tensor for tensor in job.tensors}
        for suffix, part in self._plan.file_format.encode_rows(quantized, linear.scheme).items():
            yield places[suffix].name, _as_stored(part, suffix, linear), 0
        yield from self._constants(linear, places, quantized.scale)

    def _constants(
        self, linear: QuantizedLinearInfo, places: Mapping[str, TensorPlan], weight_scale: Tensor
    ) -> Iterator[tuple[str, Tensor, int]]:
        shared = weight_scale if linear.scheme.weight.granularity == TENSOR else None
        input_scale = (
            input_scale_of(linear, self._plan) if linear.scheme.needs_calibration else None
        )
        for suffix, constant in self._plan.file_format.encode_constants(
            linear.scheme, linear.shape, shared, input_scale
        ).items():
            yield places[suffix].name, constant, 0

    def _copied(self, name: str, tensor: TensorPlan) -> Iterator[tuple[str, Tensor, int]]:
        changed = self._plan.calibration.weights.get(name) if self._plan.calibration else None
        if changed is not None:
            yield name, read_tensor(changed), 0
            return
        dtype = getattr(torch, DTYPES[tensor.dtype][1])
        row_bytes = tensor.nbytes // max(1, tensor.shape[0] if tensor.shape else 1)
        for first, last in self._stream.steps(name):
            with self._stream.rows(name, first, last) as rows:
                if rows.is_floating_point() and rows.element_size() > 1 and not _is_finite(rows):
                    raise _not_finite(name)
                yield name, rows.to(dtype), first * row_bytes

    def _codes_as_they_are(self, job: _Job) -> Iterator[tuple[str, Tensor, int]]:
        """The source's blocks are the scheme's: rounding them anew would only lose."""
        weight, scale = job.tensors
        with self._stream.stored_rows(
            self._plan.block_scales[job.source], 0, scale.shape[0]
        ) as scales:
            if not _is_finite(scales):
                raise _not_finite(self._plan.block_scales[job.source])
            yield scale.name, scales.float(), 0
        for first, last in self._stream.steps(job.source):
            with self._stream.stored_rows(job.source, first, last) as codes:
                if (codes.view(torch.uint8) & 0x7F == 0x7F).any():
                    raise _not_finite(job.source)
                yield weight.name, codes, first * weight.shape[1]

    def _quantized(self, job: _Job) -> Iterator[tuple[str, Tensor, int]]:
        linear = job.linear
        spec = linear.scheme.weight
        amax = self._amax.of(linear.name) if spec.granularity == TENSOR else None
        places = {tensor.name.rpartition(".")[2]: tensor for tensor in job.tensors}
        block_rows = spec.granularity.rows or 1
        for first, last in self._stream.steps(job.source, block_rows):
            with self._stream.rows(job.source, first, last) as rows:
                quantized = ops.quantize(rows, spec, amax)
            if not torch.isfinite(quantized.scale).all():
                raise _not_finite(job.source)
            for suffix, part in self._plan.file_format.encode_rows(
                quantized, linear.scheme
            ).items():
                tensor = places[suffix]
                row = (
                    first
                    if linear.is_transposed or tensor.shape[0] == linear.shape[0]
                    else first // block_rows
                )
                yield (
                    tensor.name,
                    _as_stored(part, suffix, linear),
                    row * (tensor.nbytes // tensor.shape[0]),
                )
        yield from self._constants(linear, places, quantized.scale)


def _as_stored(part: Tensor, suffix: str, linear: QuantizedLinearInfo) -> Tensor:
    """Codes as the weight lay on disk; a transposed weight comes as a whole."""
    return part.T.contiguous() if linear.is_transposed and suffix == "weight" else part


def _is_finite(rows: Tensor) -> bool:
    if not rows.numel():
        return True
    row = rows.reshape(1, -1)
    return bool(torch.isfinite(torch.ops.quantkit.block_amax(row, 1, row.shape[1])).all())


class _SharedAmax:
    """Largest weight of each Linear that has one scale, over its fused set where it is in one; each
    set is measured when its first member comes.
    """

    def __init__(self, plan: ExportPlan, stream: WeightStream) -> None:
        self._stream = stream
        self._sets = plan.fused_with
        self._amax: dict[tuple[str, ...], Any] = {}
        self._locks: dict[tuple[str, ...], threading.Lock] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> Tensor:
        """[1, 1] float32."""
        members = self._sets.get(name, (name,))
        with self._lock:
            lock = self._locks.setdefault(members, threading.Lock())
        with lock:
            if members not in self._amax:
                self._amax[members] = self._measure([f"{member}.weight" for member in members])
            return self._amax[members]

    def _measure(self, names: Sequence[str]) -> Tensor:
        largest = torch.zeros(1, 1)
        for name in names:
            for first, last in self._stream.steps(name):
                with self._stream.rows(name, first, last) as rows:
                    largest = torch.maximum(
                        largest, torch.ops.quantkit.block_amax(rows, *rows.shape)
                    )
            if not torch.isfinite(largest).all():
                raise _not_finite(name)
        return largest


def _not_finite(tensor: str) -> CheckpointError:
    return CheckpointError(
        f"the weight {tensor} holds NaN or infinity; a model with it is ruined, so fetch it again"
        " or mend it"
    )


def _kv_scale(plan: ExportPlan, tensor: TensorPlan) -> Tensor:
    k_amax, v_amax = plan.calibration.kv_amax[kv_scale_module(tensor.name)]
    return kv_scale(torch.tensor(k_amax if tensor.name.endswith("k_scale") else v_amax)).reshape(
        tensor.shape
    )


def input_scale_of(linear: QuantizedLinearInfo, plan: ExportPlan) -> Tensor:
    """The static scale of a Linear's input, [1, 1]."""
    return choose_scale(torch.tensor([[_static_amax(linear, plan)]]), linear.scheme.input)


def _static_amax(linear: QuantizedLinearInfo, plan: ExportPlan) -> float:
    """The magnitude that a static input scale must reach, over the whole fused set: runtimes keep
    one scale for it.
    """
    members = plan.fused_with.get(linear.name, (linear.name,))
    return max(
        plan.calibration.static_amax(member, linear.scheme.input, plan.options.recipe.observer)
        for member in members
    )
