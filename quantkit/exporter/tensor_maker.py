"""Compute the contents of an export's tensors: copied, or quantized a few rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit import ops
from quantkit.checkpoint.formats import KV_SUFFIXES
from quantkit.checkpoint.header import DTYPES
from quantkit.checkpoint.shard_plan import TensorPlan
from quantkit.checkpoint.stream import WeightStream
from quantkit.checkpoint.tensor_reader import read_tensor
from quantkit.errors import CheckpointError
from quantkit.exporter.plan import ExportPlan
from quantkit.models.assignment import QuantizedLinearInfo
from quantkit.ops.reference import QuantizedTensor, choose_scale, kv_scale
from quantkit.schemes.quant_spec import TENSOR

Part = tuple[str, Tensor, int]  # a tensor's name, some of its rows, and their offset in bytes


@dataclass(frozen=True)
class CopyJob:
    """Write a tensor that isn't quantized: a copy, or what an algorithm changed it to.

    source: name of the parameter.
    tensors: the one tensor to write.
    bytes_read: bytes of the model that the job reads.
    """

    source: str
    tensors: tuple[TensorPlan, ...]
    bytes_read: int


@dataclass(frozen=True)
class LinearJob:
    """Write the tensors of a quantized Linear, which are computed together from its weight.

    source: name of the weight.
    linear: the Linear.
    tensors: the tensors to write: codes and scales.
    bytes_read: bytes of the model that the job reads.
    """

    source: str
    linear: QuantizedLinearInfo
    tensors: tuple[TensorPlan, ...]
    bytes_read: int


@dataclass(frozen=True)
class KVScaleJob:
    """Write the scale of an attention module's keys or values.

    module: name of the attention module.
    suffix: one of `KV_SUFFIXES`.
    tensors: the one tensor to write.
    bytes_read: 0, because the scale comes from the calibration.
    """

    module: str
    suffix: str
    tensors: tuple[TensorPlan, ...]
    bytes_read: int = 0


Job = CopyJob | LinearJob | KVScaleJob


def plan_jobs(plan: ExportPlan) -> list[Job]:
    """One job for each parameter, then the scales of the KV cache."""
    jobs: list[Job] = []
    for row in plan.parameters:
        linear = plan.linears.get(row.name.removesuffix(".weight"))
        if linear is not None and row.status == "quantized":
            tensors = tuple(linear.tensors(plan.file_format))
            jobs.append(LinearJob(row.name, linear, tensors, row.bytes_before))
        else:
            info = plan.checkpoint.tensors[plan.added.get(row.name, row.name)]
            dtype = plan.dense_dtype if row.name in plan.block_scales else info.dtype
            copied = TensorPlan(row.name, dtype, info.shape)
            jobs.append(CopyJob(row.name, (copied,), row.bytes_before))
    if plan.options.recipe.kv_cache:
        assert plan.calibration is not None, "KV scales come from a calibration"
        for module in plan.calibration.kv_amax:
            for suffix in KV_SUFFIXES:
                name = plan.file_format.kv_scale_name(module, suffix)
                scale = TensorPlan(name, "F32", plan.file_format.scalar_shape)
                jobs.append(KVScaleJob(module, suffix, (scale,)))
    return jobs


class TensorMaker:
    """Computes the tensors of a job, in parts. Several threads may use it at once."""

    def __init__(self, plan: ExportPlan, stream: WeightStream) -> None:
        self._plan, self._stream = plan, stream
        self._amax = _SharedAmax(plan, stream)

    def touched(self, job: Job) -> list[str]:
        """The model's tensors that a job reads: its own, and those of fused layers that share one
        scale with it.
        """
        if isinstance(job, KVScaleJob) or job.source in self._plan.added:
            return []
        if isinstance(job, LinearJob) and job.linear.scheme.weight.granularity == TENSOR:
            return [f"{member}.weight" for member in self._plan.fused_with[job.linear.name]]
        return [job.source]

    def parts(self, job: Job) -> Iterator[Part]:
        """The contents of a job's tensors. Raises CheckpointError for NaN or infinity."""
        if isinstance(job, KVScaleJob):
            yield job.tensors[0].name, self._kv_scale(job), 0
        elif isinstance(job, CopyJob):
            yield from self._copied(job.source, job.tensors[0])
        elif (quantized := self._quantized_by_calibration(job)) is not None:
            yield from self._as_calibrated(job, quantized)
        elif self._stream.source_spec == job.linear.scheme.weight:
            yield from self._copied_codes(job)
        else:
            yield from self._quantized(job)

    def _quantized_by_calibration(self, job: LinearJob) -> QuantizedTensor | None:
        """A Linear's weight as an algorithm quantized it; None if none did."""
        calibration = self._plan.calibration
        return (
            calibration.quantized_weight(job.linear.name, job.linear.scheme.weight)
            if calibration
            else None
        )

    def _as_calibrated(self, job: LinearJob, quantized: QuantizedTensor) -> Iterator[Part]:
        """The codes and scales that an algorithm computed, without rounding them again."""
        linear = job.linear
        if not torch.isfinite(quantized.scale).all():
            raise _not_finite(job.source)
        places = {tensor.name.rpartition(".")[2]: tensor for tensor in job.tensors}
        for suffix, part in self._plan.file_format.encode_rows(quantized, linear.scheme).items():
            yield places[suffix].name, _as_stored(part, suffix, linear), 0
        yield from self._constants(linear, places, quantized.scale)

    def _constants(
        self, linear: QuantizedLinearInfo, places: Mapping[str, TensorPlan], weight_scale: Tensor
    ) -> Iterator[Part]:
        """The tensors that a Linear has once: a per-tensor scale, a static input scale."""
        shared = weight_scale if linear.scheme.weight.granularity == TENSOR else None
        input_scale = (
            input_scale_of(linear, self._plan) if linear.scheme.needs_calibration else None
        )
        for suffix, constant in self._plan.file_format.encode_constants(
            linear.scheme, linear.shape, shared, input_scale
        ).items():
            yield places[suffix].name, constant, 0

    def _copied(self, name: str, tensor: TensorPlan) -> Iterator[Part]:
        """A tensor that isn't quantized."""
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

    def _copied_codes(self, job: LinearJob) -> Iterator[Part]:
        """The codes and scales of a model that is in FP8 blocks already, if the scheme has the same
        blocks.
        """
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

    def _quantized(self, job: LinearJob) -> Iterator[Part]:
        """A weight rounded to the scheme's codes."""
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

    def _kv_scale(self, job: KVScaleJob) -> Tensor:
        assert self._plan.calibration is not None, "KV scales come from a calibration"
        keys, values = self._plan.calibration.kv_amax[job.module]
        amax = torch.tensor(dict(zip(KV_SUFFIXES, (keys, values)))[job.suffix])
        return kv_scale(amax).reshape(job.tensors[0].shape)


def _as_stored(part: Tensor, suffix: str, linear: QuantizedLinearInfo) -> Tensor:
    """Codes, transposed like the stored weight. A transposed weight is quantized as a whole."""
    return part.T.contiguous() if linear.is_transposed and suffix == "weight" else part


def _is_finite(rows: Tensor) -> bool:
    if not rows.numel():
        return True
    row = rows.reshape(1, -1)
    return bool(torch.isfinite(torch.ops.quantkit.block_amax(row, 1, row.shape[1])).all())


class _SharedAmax:
    """The largest magnitude of per-tensor weights, over all layers that are fused, because they
    share one scale. It is computed when the first of them is quantized.
    """

    def __init__(self, plan: ExportPlan, stream: WeightStream) -> None:
        self._stream = stream
        self._fused_with = plan.fused_with
        self._amax: dict[tuple[str, ...], Tensor] = {}
        self._locks: dict[tuple[str, ...], threading.Lock] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> Tensor:
        """The largest magnitude for a Linear, [1, 1] float32."""
        members = self._fused_with[name]
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
        f"the weight {tensor} holds NaN or infinity, which ruins the model; download the model"
        " again or repair it"
    )


def input_scale_of(linear: QuantizedLinearInfo, plan: ExportPlan) -> Tensor:
    """The static scale of a Linear's input, [1, 1]. Fused layers share the scale of the largest
    magnitude, because runtimes use one scale for them.
    """
    calibration, spec = plan.calibration, linear.scheme.input
    assert calibration is not None and spec is not None, "static scales come from a calibration"
    members = plan.fused_with[linear.name]
    amax = max(
        calibration.static_amax(member, spec, plan.options.recipe.observer) for member in members
    )
    return choose_scale(torch.tensor([[amax]]), spec)
