"""`verify`: check that a checkpoint is complete, finite and consistent, and which runtimes load it.

A fault is something that a runtime would refuse or, worse, not notice: a missing scale, a NaN code,
different scales in fused layers. A runtime that can't load a sound checkpoint is only a warning.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from quantkit.checkpoint.files import blake3_file
from quantkit.checkpoint.finished_output import MANIFEST_FILE, changed_tensors
from quantkit.checkpoint.formats import (
    DEFAULT_FORMAT,
    KV_SUFFIXES,
    QuantizationConfig,
    added_suffixes,
    kv_scale_module,
    read_quantization_config,
    stored_linears,
)
from quantkit.checkpoint.model_files import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.run_control import Progress, ShouldStop, never, silent
from quantkit.checkpoint.stream import block_scales
from quantkit.errors import CheckpointError
from quantkit.exporter.runtimes import runtime_problems
from quantkit.exporter.verification import Fault, Findings, QuantizedLinears, Verification
from quantkit.exporter.verify_values import check_values
from quantkit.models.assignment import FLOATS, QuantizedLinearInfo
from quantkit.models.linear_views import as_linear_views
from quantkit.models.tensor_roles import ModelTensors, fused_layers, linears_of
from quantkit.schemes.number_formats import holds_codes
from quantkit.schemes.quant_spec import TENSOR
from quantkit.schemes.serving import RUNTIMES


def verify(
    path: Path,
    base: Path | None = None,
    runtime: str | None = None,
    progress: Progress = silent,
    should_stop: ShouldStop = never,
    as_stored: bool = False,
) -> Verification:
    """Check a checkpoint, quantized or not.

    path: directory of the checkpoint.
    base: directory of the model that it was made from, to compare with.
    runtime: the runtime that must load it; None warns of each that can't.
    progress: told of the tensors that are done, and all tensors.
    should_stop: asked after each tensor.
    as_stored: check only whether it can be run as it is stored. Files that were changed after the
        export, and fused layers with different scales, are no faults then.

    Raises CheckpointError if there is no checkpoint at `path`, or `base` can't be compared with it,
    and Interrupted if it was stopped.
    """
    started = time.monotonic()
    try:
        checkpoint = Checkpoint.open(path)
    except CheckpointError as error:
        if not (path / "config.json").is_file():
            raise  # this is no checkpoint at all
        return Verification(path, faults=(Fault("", f"can't be opened: {error}"),))
    tensors = linears_of(checkpoint)
    checkpoint, base_checkpoint = tensors.checkpoint, _open_base(base)
    config = read_quantization_config(checkpoint.config)
    found = Findings(path, tensors=len(checkpoint.tensors), changed=changed_tensors(path))
    stored = stored_linears(checkpoint.tensors)
    linears: QuantizedLinears = {}
    if config is None:
        _check_unquantized(found, stored)
    else:
        linears = _check_linears(found, checkpoint, config, stored)
        found.skipped = _check_skipped(found, tensors, config, stored)
        stored_config = checkpoint.config["quantization_config"]
        found.faults += [Fault(*fault) for fault in config.file_format.config_faults(stored_config)]
    found.quantized = len(linears)
    if base_checkpoint is not None:
        _check_config_against_base(found, checkpoint, base_checkpoint)
        _check_names_against_base(found, checkpoint, base_checkpoint, stored)
    check_values(found, checkpoint, base_checkpoint, config, stored, linears, progress, should_stop)
    if not as_stored:
        _check_manifest(found, checkpoint)
    if config and config.kv_cache:
        _check_kv_scales(found, checkpoint)
    if config:
        _check_fused_layers(found, checkpoint, config, linears)
    if not as_stored:
        found.faults += found.unequal
    _check_runtimes(found, checkpoint, config, linears, runtime)
    return found.result(time.monotonic() - started)


def _open_base(base: Path | None) -> Checkpoint | None:
    """The base model. Raises CheckpointError if it is quantized, unless exports dequantize it."""
    if base is None:
        return None
    checkpoint = as_linear_views(Checkpoint.open(base))
    config = read_quantization_config(checkpoint.config)
    if config is not None and not config.file_format.is_source:
        raise CheckpointError(f"the base {base} is quantized itself; give the original model")
    return checkpoint


def _check_unquantized(found: Findings, stored: Mapping[str, list[str]]) -> None:
    for module in stored:
        found.fault(
            module,
            "has quantized tensors but config.json has no quantization_config: a runtime would"
            " read the codes as weights",
        )
    if not stored:
        found.warnings.append("the checkpoint is not quantized")


def _check_linears(
    found: Findings,
    checkpoint: Checkpoint,
    config: QuantizationConfig,
    stored: Mapping[str, list[str]],
) -> QuantizedLinears:
    """Check that each quantized Linear has the tensors of its format and scheme. Returns those that
    do.
    """
    linears: QuantizedLinears = {}
    for module, suffixes in stored.items():
        scheme = config.scheme_of(module)
        if scheme is None:
            found.fault(
                module,
                "has quantized tensors, but quantization_config doesn't target it: a runtime would"
                " read the codes as weights",
            )
            continue
        infos = {suffix: checkpoint.tensors[f"{module}.{suffix}"] for suffix in suffixes}
        headers = {suffix: (info.dtype, info.shape) for suffix, info in infos.items()}
        read = functools.partial(_read_tensor, checkpoint, module)
        shape = config.file_format.weight_shape(scheme, headers, read)
        if shape is None or len(shape) != 2:
            found.fault(f"{module}.weight", "is missing, though its scales are there")
            continue
        for suffix in config.file_format.unexpected(scheme, shape, suffixes):
            found.fault(f"{module}.{suffix}", f"is not a tensor of {scheme.name}")
        faults = config.file_format.tensor_faults(module, scheme, shape, headers)
        found.faults += [Fault(*fault) for fault in faults]
        if not faults:
            linears[module] = (scheme, (shape[0], shape[1]))
    return linears


def _read_tensor(checkpoint: Checkpoint, module: str, suffix: str) -> Tensor:
    return checkpoint.read(f"{module}.{suffix}")


def _check_skipped(
    found: Findings,
    tensors: ModelTensors,
    config: QuantizationConfig,
    stored: Mapping[str, list[str]],
) -> dict[str, str]:
    """Check that the config ignores all other Linears. Returns Linear → why it is skipped."""
    skipped: dict[str, str] = {}
    for info in tensors.modules("linear", "lm_head", "router", "used directly").values():
        if info.name in stored:
            continue
        dtype = tensors.checkpoint.tensors[info.tensor].dtype
        if config.scheme_of(info.name) is None:
            skipped[info.name] = info.reason or "ignored in quantization_config"
        elif holds_codes(dtype):
            found.fault(info.tensor, "holds codes, but their scales are missing")
        elif info.kind == "linear" or dtype not in FLOATS:
            found.fault(
                info.tensor,
                "is neither quantized nor ignored in quantization_config: vLLM would use scales"
                " that were never loaded",
            )
        else:
            found.fault(
                info.tensor,
                "is not quantized but quantization_config targets it; add it to 'ignore'",
            )
    if (
        "lm_head" not in skipped
        and tensors.stored.config.get("tie_word_embeddings")
        and config.scheme_of("lm_head") is None
    ):
        skipped["lm_head"] = "tied to the embedding"  # a module without a tensor of its own
    return skipped


def _check_runtimes(
    found: Findings,
    checkpoint: Checkpoint,
    config: QuantizationConfig | None,
    linears: QuantizedLinears,
    runtime: str | None,
) -> None:
    """Check what runtimes can load: a fault for the named one, else warnings for all of them."""
    infos = [
        QuantizedLinearInfo(name, shape, scheme, _is_transposed(checkpoint, name))
        for name, (scheme, shape) in linears.items()
    ]
    file_format = config.file_format.name if config else DEFAULT_FORMAT
    if runtime is not None:
        for problem in runtime_problems(runtime, infos, found.skipped, file_format, checkpoint):
            found.fault("", problem)
        return
    for name in RUNTIMES:
        found.warnings += runtime_problems(name, infos, found.skipped, file_format)


def _is_transposed(checkpoint: Checkpoint, module: str) -> bool:
    weight = checkpoint.tensors.get(f"{module}.weight")
    return weight is not None and not weight.is_dense


def _check_manifest(found: Findings, checkpoint: Checkpoint) -> None:
    """Check the hashes of the files that quantkit wrote. A changed shard is a fault; a changed
    config, tokenizer or model card is only a warning.
    """
    path = checkpoint.path / MANIFEST_FILE
    if not path.is_file():
        return
    files = read_json(path, "").get("files")
    if not isinstance(files, Mapping) or not all(
        isinstance(entry, Mapping) for entry in files.values()
    ):
        found.warnings.append(
            f"{MANIFEST_FILE} is damaged, so files can't be compared with what was exported"
        )
        return
    present = {
        name: entry
        for name, entry in files.items()
        if name == Path(name).as_posix()
        and ".." not in Path(name).parts
        and (checkpoint.path / name).is_file()
    }
    digests = {name: blake3_file(checkpoint.path / name) for name in present}
    for name, entry in files.items():
        if digests.get(name) == entry.get("blake3"):
            continue
        message = (
            "is not the file that was exported"
            if name in digests
            else "was exported but is missing"
        )
        if name.endswith((".safetensors", ".index.json")):
            found.fault(
                name, f"{message} (its hash in {MANIFEST_FILE} differs); export or copy it again"
            )
        else:
            found.warnings.append(f"{name} {message}")


def _check_kv_scales(found: Findings, checkpoint: Checkpoint) -> None:
    """Check that each attention module has the scales of an FP8 KV cache."""
    by_suffix: dict[str, set[str]] = {suffix: set() for suffix in KV_SUFFIXES}
    for name in checkpoint.tensors:
        module = kv_scale_module(name)
        if module is not None:
            by_suffix[name.rpartition(".")[2]].add(module)
    keys, values = by_suffix.values()
    for module in sorted(keys ^ values):
        found.fault(module, "has only one of k_scale and v_scale")
    attentions = {
        name.rpartition(".")[0].rpartition(".")[0]
        for name in checkpoint.tensors
        if ".k_proj." in name
    }
    for module in sorted(attentions - keys - values) or ([""] if not keys else []):
        found.fault(
            f"{module}.k_scale" if module else "",
            "is missing, though there is a kv_cache_scheme: a server would use the scale 1",
        )


def _check_fused_layers(
    found: Findings, checkpoint: Checkpoint, config: QuantizationConfig, linears: QuantizedLinears
) -> None:
    """Check that Linears that a runtime merges have the same per-tensor scales."""
    for members in fused_layers(linears):
        schemes = [linears[member][0] for member in members]
        suffixes = []
        if all(scheme.weight.granularity == TENSOR for scheme in schemes):
            suffixes.append(config.file_format.scale_suffix)
        if all(scheme.needs_calibration for scheme in schemes):
            suffixes.append("input_scale")
        for suffix in suffixes:
            scales = [
                float(checkpoint.read(f"{member}.{suffix}").float().reshape(-1)[0])
                for member in members
            ]
            if len(set(scales)) > 1:
                names = ", ".join(member.rpartition(".")[2] for member in members)
                found.unequal.append(
                    Fault(
                        f"{members[0]}.{suffix}",
                        f"differs among {names}, which runtimes merge under one scale",
                    )
                )


def _check_config_against_base(found: Findings, checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Compare the config with the base's. Keys that determine shapes must be equal; other
    differences are warnings.
    """
    expected = {
        "quantization_config",
        "transformers_version",
        "_name_or_path",
        "dtype",
        "torch_dtype",
    }
    shaping = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    for key in sorted((checkpoint.config.keys() | base.config.keys()) - expected):
        ours, theirs = checkpoint.config.get(key), base.config.get(key)
        # An output head that an algorithm changed is no longer the embedding.
        if ours == theirs or (
            key == "tie_word_embeddings"
            and ours is False
            and any(name not in base.tensors for name in found.changed)
        ):
            continue
        if key in ("hidden_size", "vocab_size", "model_type"):
            raise CheckpointError(
                f"{base.path} has {key} {theirs} and {checkpoint.path} {ours}: it is not the model"
                " that was quantized; give its own base"
            )
        if key in shaping:
            found.fault("config.json", f"has {key} {ours}; the base has {theirs}")
        else:
            found.warnings.append(f"config.json has {key} {ours!r}; the base has {theirs!r}")


def _check_names_against_base(
    found: Findings, checkpoint: Checkpoint, base: Checkpoint, stored: Mapping[str, list[str]]
) -> None:
    """Check that the checkpoint has all tensors of the base, quantized or not, and no others."""
    base_scales = {scale.rpartition(".")[2] for scale in block_scales(base).values()}
    for name in base.tensors:
        module, _, suffix = name.rpartition(".")
        if (
            name not in checkpoint.tensors
            and not (suffix == "weight" and module in stored)
            and suffix not in base_scales
        ):
            found.fault(name, "is in the base but not in this checkpoint")
    added = added_suffixes()
    for name in checkpoint.tensors:
        if (
            name not in base.tensors
            and name.rpartition(".")[2] not in added
            and name not in found.changed
        ):
            found.fault(name, "is not in the base")
