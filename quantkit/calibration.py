"""`calibrate`: run text through the model and record the statistics of every Linear's input and of keys and values.

CALIB holds `calibration.json` (what was measured, from what) and `statistics.safetensors`. The statistics serve every scheme:
calibrate once, export many. Between batches the state is saved now and then, which is what `--resume` continues from.
"""

from __future__ import annotations

import inspect
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.checkpoint import Checkpoint, read_header, read_json, read_tensor
from quantkit.data import BUNDLED_CALIBRATION, calibration_windows, load_tokenizer, window_length
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.interrupts import stop_between_steps
from quantkit.layouts import QuantizationLayout
from quantkit.output import OutputDirectory, check_output, write_json, write_tensors
from quantkit.scheme import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantkit.observers import HeadObserver, InputObserver

SCHEMA_VERSION = 1
STATISTICS_FILE = "statistics.safetensors"
SECONDS_BETWEEN_SAVES = 30.0
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class CalibrationOptions:
    model: Path
    output: Path
    data: tuple[str, ...] = ()
    recipe: Recipe | None = None
    num_samples: int = 128
    seq_len: int | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class InputStatistics:
    """What was seen at one input: which Linears read it, and its largest magnitudes."""

    linears: tuple[str, ...]
    in_features: int
    tokens: int
    amax: float
    first_position_amax: float


@dataclass(frozen=True)
class Calibration:
    """A CALIB directory, opened."""

    path: Path
    description: dict[str, Any]
    inputs: dict[str, InputStatistics]  # by each Linear's name
    kv_amax: dict[str, tuple[float, float]]  # attention module → largest key, largest value

    @classmethod
    def open(cls, path: str | Path) -> Calibration:
        path = Path(path)
        if not (path / "calibration.json").is_file():
            raise CalibrationError(f"{path} is no calibration (it has no calibration.json); make one with: quantkit calibrate MODEL -o {path}")
        try:
            description = read_json(path / "calibration.json", "")
            if description["schema_version"] != SCHEMA_VERSION:
                raise CalibrationError(f"{path} has calibration format {description['schema_version']}, this quantkit reads {SCHEMA_VERSION}; calibrate again")
            inputs: dict[str, InputStatistics] = {}
            for entry in description["inputs"]:
                statistics = InputStatistics(tuple(entry["linears"]), entry["in_features"], entry["tokens"], entry["amax"], entry["first_position_amax"])
                inputs |= dict.fromkeys(statistics.linears, statistics)
            kv_amax = {entry["module"]: (entry["k_amax"], entry["v_amax"]) for entry in description["kv"]}
            description["model"]["fingerprint"]
        except (KeyError, TypeError, CheckpointError) as error:
            raise CalibrationError(f"{path}/calibration.json is damaged ({error}); calibrate again") from None
        return cls(path, description, inputs, kv_amax)

    def require_same_model(self, checkpoint: Checkpoint, fingerprint: str) -> None:
        if self.description["model"]["fingerprint"] != fingerprint:
            raise CalibrationError(
                f"{self.path} was made from another model ({self.description['model']['path']}) than {checkpoint.path}, or its files have changed since; calibrate this one"
            )

    def require_same_recipe(self, recipe: Recipe) -> None:
        """A calibration made for a recipe serves that one only; one made without serves all."""
        earlier = self.description.get("recipe")
        if earlier is not None and Recipe.from_mapping(earlier, str(self.path)).canonical() != recipe.canonical():
            raise CalibrationError(f"{self.path} was made for another recipe; export with the same recipe, or calibrate without one, which serves every scheme")

    def observers(self) -> dict[str, InputObserver]:
        """The full statistics, by the name of each input's first Linear."""
        from quantkit.observers import InputObserver

        header = read_header(self.path / STATISTICS_FILE)
        tensors = {name: read_tensor(info) for name, info in header.items()}
        names = dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith(".histogram"))
        return {name: InputObserver.from_tensors(name, tensors) for name in names}


@dataclass(frozen=True)
class CalibrationSummary:
    path: Path
    windows: int
    seq_len: int
    requested: int
    inputs: int
    linears: int
    seconds: float
    tokens_per_second: float


def calibrate(options: CalibrationOptions, on_progress: Callable[[int, int], None] = lambda done, total: None) -> CalibrationSummary:
    """Measure and write CALIB. on_progress(windows done, windows in all) is called after each batch."""
    check_output(options.output, overwrite=options.overwrite, reads=[options.model])
    checkpoint = Checkpoint.open(options.model)
    if QuantizationLayout.read(checkpoint.config) is not None:
        raise CheckpointError(f"{options.model} is quantized already; calibrate the original model")

    import torch
    import transformers

    from quantkit.model import auto_config, load_model, pick_device

    config = auto_config(options.model, options.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options.trust_remote_code)
    seq_len = window_length(options.seq_len, getattr(config.get_text_config(), "max_position_embeddings", None))
    names = options.data or (str(BUNDLED_CALIBRATION),)
    windows = calibration_windows(names, tokenizer, options.num_samples, seq_len, options.seed)
    batch_size = options.batch_size or max(1, TOKENS_PER_BATCH // seq_len)
    device = pick_device(options.device)
    fingerprint = {
        "model": checkpoint.fingerprint(),
        "data": windows.tokens_sha256,
        "recipe": options.recipe.canonical() if options.recipe else "",
        "batch size": str(batch_size),
        "device": device.split(":")[0],
        "quantkit version": __version__,
        "torch version": torch.__version__,
        "transformers version": transformers.__version__,
    }
    with stop_between_steps() as stop, torch.inference_mode():
        output = OutputDirectory(options.output, fingerprint, resume=options.resume, overwrite=options.overwrite, reads=[options.model])
        model = load_model(options.model, device, trust_remote_code=options.trust_remote_code)
        started = time.monotonic()
        statistics = _Statistics.resumed(output)
        batches = [windows.windows[start : start + batch_size] for start in range(0, len(windows.windows), batch_size)]
        groups = _groups_of_shared_inputs(model, torch.tensor([windows.windows[0].tokens[:8]], device=device))
        saved = time.monotonic()
        for number, batch in enumerate(batches[statistics.batches_done :], statistics.batches_done + 1):
            tokens = torch.tensor([window.tokens for window in batch], device=device)
            with _observing(model, groups, statistics) as cache:
                _forward(model, tokens, cache)
            statistics.batches_done = number
            on_progress(min(number * batch_size, len(windows.windows)), len(windows.windows))
            if stop.signal_name or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                statistics.save(output)
                saved = time.monotonic()
            stop.check(f"after {number} of {len(batches)} batches, which are kept")
    seconds = time.monotonic() - started
    write_tensors(output.partial / STATISTICS_FILE, statistics.tensors())
    description = {
        "schema_version": SCHEMA_VERSION,
        "quantkit_version": __version__,
        "model": {"path": str(options.model), "fingerprint": fingerprint["model"]},
        "recipe": options.recipe.to_mapping() if options.recipe else None,
        "data": {
            "sources": [str(name) if options.data else "bundled" for name in names],
            "sha256": windows.data_sha256,
            "tokens_sha256": windows.tokens_sha256,
        },
        "windows": len(windows.windows),
        "windows_requested": options.num_samples,
        "seq_len": seq_len,
        "tokens": len(windows.windows) * seq_len,
        "seed": options.seed,
        "fingerprint": fingerprint,
        "python_version": platform.python_version(),
        "inputs": statistics.describe_inputs(groups),
        "kv": statistics.describe_kv(_attention_names(model)),
    }
    write_json(output.partial / "calibration.json", description)
    statistics.discard_saved(output)
    output.commit()
    tokens = len(windows.windows) * seq_len
    linears = sum(len(group) for group in groups)
    return CalibrationSummary(options.output, len(windows.windows), seq_len, options.num_samples, len(groups), linears, seconds, tokens / seconds)


class _Statistics:
    """All observers of one run, and how to save and continue them."""

    def __init__(self) -> None:
        self.inputs: dict[str, InputObserver] = {}
        self.heads: dict[tuple[int, str], HeadObserver] = {}
        self.batches_done = 0

    @classmethod
    def resumed(cls, output: OutputDirectory) -> _Statistics:
        from quantkit.observers import HeadObserver, InputObserver

        statistics = cls()
        record = output.done.get("state")
        if record is None:
            return statistics
        tensors = {name: read_tensor(info) for name, info in read_header(output.partial / record["file"]).items()}
        for name in dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith(".histogram")):
            statistics.inputs[name] = InputObserver.from_tensors(name, tensors)
        for name, tensor in tensors.items():
            if name.startswith("kv."):
                _, layer, which = name.split(".")
                statistics.heads[int(layer), which] = HeadObserver(tensor)
        statistics.batches_done = record["batches"]
        return statistics

    def save(self, output: OutputDirectory) -> None:
        """Write the state under a new name, then point to it: a crash in between keeps the former."""
        former = output.done.get("state")
        name = f"state-{self.batches_done}.safetensors"
        write_tensors(output.partial / name, self.tensors())
        output.record("state", {"file": name, "batches": self.batches_done})
        if former is not None and former["file"] != name:
            (output.partial / former["file"]).unlink(missing_ok=True)

    @staticmethod
    def discard_saved(output: OutputDirectory) -> None:
        for path in output.partial.glob("state-*.safetensors*"):
            path.unlink()

    def tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, observer in self.inputs.items():
            tensors |= observer.tensors(name)
        return tensors | {f"kv.{layer}.{which}": observer.amax for (layer, which), observer in self.heads.items()}

    def describe_inputs(self, groups: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        described = []
        for group in groups:
            observer = self.inputs.get(group[0])
            if observer is None:
                continue
            described.append(
                {
                    "name": group[0],
                    "linears": list(group),
                    "in_features": observer.channel_amax.numel(),
                    "tokens": int(observer.counts.sum()),
                    "amax": observer.amax,
                    "first_position_amax": observer.first_amax,
                }
            )
        return described

    def describe_kv(self, attention_names: Mapping[int, str]) -> list[dict[str, Any]]:
        layers = sorted({layer for layer, _ in self.heads})
        return [
            {"module": attention_names[layer], "k_amax": float(self.heads[layer, "k"].amax.max()), "v_amax": float(self.heads[layer, "v"].amax.max())}
            for layer in layers
            if layer in attention_names
        ]

    def observe_heads(self, layer: int, which: str, states: Tensor) -> None:
        import torch

        from quantkit.observers import HeadObserver

        observer = self.heads.setdefault((layer, which), HeadObserver(torch.zeros(states.shape[1])))
        observer.update(states)


def _forward(model: nn.Module, tokens: Tensor, cache: Any) -> None:
    """The model's forward without the cost of logits."""
    arguments: dict[str, Any] = {"input_ids": tokens}
    accepted = inspect.signature(model.forward).parameters
    if cache is not None and "past_key_values" in accepted:
        arguments |= {"past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = 1
    model(**arguments)


def _groups_of_shared_inputs(model: nn.Module, tokens: Tensor) -> list[list[str]]:
    """Linears by shared input: those that are handed the very same tensor (q, k and v; gate and up). Found by one short forward."""
    from quantkit.model import named_linears

    groups: dict[tuple[int, int], list[str]] = {}
    alive: list[Tensor] = []  # as long as they live, no other tensor gets their address
    handles = []

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            alive.append(arguments[0])
            groups.setdefault((arguments[0].data_ptr(), arguments[0].numel()), []).append(name)

        return hook

    output_embedding = model.get_output_embeddings()
    for name, module in named_linears(model):
        if module is not output_embedding:
            handles.append(module.register_forward_pre_hook(record(name)))
    try:
        _forward(model, tokens, None)
    finally:
        for handle in handles:
            handle.remove()
    if not groups:
        raise CalibrationError("no Linear of this model was reached by a forward pass; quantkit calibrates models made of torch.nn.Linear")
    return list(groups.values())


@contextmanager
def _observing(model: nn.Module, groups: Sequence[Sequence[str]], statistics: _Statistics) -> Iterator[Any]:
    """Hook the first Linear of each group; yields the cache that observes keys and values after rotary embedding."""
    import torch
    from transformers import DynamicCache

    from quantkit.observers import InputObserver

    class ObservingCache(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            statistics.observe_heads(layer_idx, "k", key_states)
            statistics.observe_heads(layer_idx, "v", value_states)
            return key_states, value_states

    modules = dict(model.named_modules())
    handles = []

    def observe(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs = arguments[0]
            if not torch.isfinite(inputs.abs().amax()):
                raise CalibrationError(f"the input of {name} holds NaN or infinity; the model overflows on this text or its weights are damaged")
            statistics.inputs.setdefault(name, InputObserver.empty(inputs.shape[-1])).update(inputs)

        return hook

    for group in groups:
        handles.append(modules[group[0]].register_forward_pre_hook(observe(group[0])))
    try:
        yield ObservingCache()
    finally:
        for handle in handles:
            handle.remove()


def _attention_names(model: nn.Module) -> dict[int, str]:
    """Layer index → the attention module's name: the deepest module that knows its layer's index and holds Linears."""
    from torch import nn

    names: dict[int, str] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and any(isinstance(child, nn.Linear) for child in module.children()):
            names[index] = name
    return names
