"""`calibrate`: run text through the model, block by block, and measure the inputs of Linears, keys
and values.

If the recipe's algorithms quantize weights, each block's weights are quantized first
(`block_quantizer.py`). The statistics are then those of the quantized block.

CALIB holds `calibration.json`, and for each decoder block a `block-NNNNN.safetensors` with its
statistics and a `weights-NNNNN.safetensors` with its quantized weights, if any. A block's files are
written when it is finished; a resumed run continues after them. A calibration without quantized
weights can be exported to any scheme.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Container, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.calibration.describe import describe_block
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.reader import SCHEMA_VERSION, Calibration
from quantkit.calibration.result import CalibrationResult, result_of
from quantkit.checkpoint.files import blake3_file, write_json
from quantkit.checkpoint.finished_output import CALIBRATION_FILE, finished_already
from quantkit.checkpoint.formats import read_quantization_config
from quantkit.checkpoint.output_checks import check_output
from quantkit.checkpoint.output_dir import OutputDirectory
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.run_control import Progress, ShouldStop, never, silent
from quantkit.checkpoint.writer import write_tensors
from quantkit.data.sampling import calibration_windows
from quantkit.data.sources import BUNDLED_CALIBRATION
from quantkit.data.text_overlap import token_pieces
from quantkit.data.windows import Windows
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.models.assignment import assign_layers
from quantkit.models.distributed import Ranks, joined_ranks
from quantkit.models.hidden_states import HiddenStates, available_memory, peak_memory_bytes
from quantkit.models.machine import device_identity, software_versions
from quantkit.models.saved_states import SavedStates

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.calibration.block_quantizer import BlockQuantizer
    from quantkit.calibration.hooks import BlockRecorder
    from quantkit.calibration.observers import BlockStatistics
    from quantkit.calibration.weight_files import QuantizedWeightFiles
    from quantkit.models.blockwise import BlockStep, BlockwiseModel, Walk

# A CPU runs each batch on one thread, so batches are small; a GPU needs large ones.
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 8192}


def calibrate(
    options: CalibrationOptions, progress: Progress = silent, should_stop: ShouldStop = never
) -> CalibrationResult:
    """Calibrate a model and write CALIB.

    progress: told of the blocks that are done, as a fraction, and the blocks in all.
    should_stop: asked after each block.

    Raises CalibrationError, CheckpointError, and Interrupted if it was stopped.
    """
    check_output(
        options.output, overwrite=options.overwrite or options.resume, reads=[options.model]
    )
    checkpoint = Checkpoint.open(options.model)
    source = read_quantization_config(checkpoint.config)
    if source is not None and not source.file_format.is_source:
        raise CheckpointError(
            f"{options.model} is quantized already; calibrate the original model, or one in"
            " block-wise FP8"
        )

    from quantkit.models.skeleton import pick_device

    device = pick_device(options.device)
    with joined_ranks(device) as ranks:
        plan = ranks.broadcast_from_first(lambda: _plan(options, checkpoint, device))
        finished = ranks.broadcast_from_first(
            lambda: (
                options.resume
                and finished_already(options.output, plan.fingerprint, options.overwrite)
            )
        )
        if finished:
            return result_of(
                options,
                checkpoint,
                Calibration.open(options.output).description,
                0.0,
                was_finished=True,
            )
        ranks.on_first(
            lambda: check_output(options.output, overwrite=options.overwrite, reads=[options.model])
        )
        return _prepare(options, checkpoint, plan, ranks, progress, should_stop).run()


@dataclass(frozen=True)
class _Plan:
    """What determines the bytes of CALIB; made on rank 0 and broadcast.

    windows: the sampled text as token ids.
    seq_len: tokens per window.
    batch_size: windows per batch.
    sources: names of the data.
    fingerprint: an interrupted run is resumed only if this is the same.
    """

    windows: Windows
    seq_len: int
    batch_size: int
    sources: tuple[str, ...]
    fingerprint: dict[str, str]

    @property
    def batches(self) -> list[list[tuple[int, ...]]]:
        """The windows of each batch, which all have one length: none is padded."""
        batches: list[list[tuple[int, ...]]] = []
        for window in self.windows.windows:
            if (
                not batches
                or len(batches[-1]) == self.batch_size
                or len(batches[-1][0]) != len(window.tokens)
            ):
                batches.append([])
            batches[-1].append(window.tokens)
        return batches


def _plan(options: CalibrationOptions, checkpoint: Checkpoint, device: str) -> _Plan:
    from quantkit.models.text import tokenizer_and_length

    tokenizer, seq_len = tokenizer_and_length(
        options.model, options.seq_len, options.trust_remote_code
    )
    names = options.data or (str(BUNDLED_CALIBRATION),)
    windows = calibration_windows(names, tokenizer, options.num_samples, seq_len, options.seed)
    kind = device.split(":")[0]
    # At least four batches, if there are four windows: statistics are kept per quarter of the data.
    batch_size = options.batch_size or max(
        1, min(TOKENS_PER_BATCH[kind] // seq_len, len(windows.windows) // 4)
    )
    fingerprint = {
        "model files": checkpoint.fingerprint(),
        "data": windows.data_sha256,
        "num_samples": str(options.num_samples),
        "seq_len": str(seq_len),
        "windows": windows.tokens_sha256,
        "seed": str(options.seed),
        "recipe": options.recipe.canonical() if options.recipe else "",
        "batch size": str(batch_size),
        "choice of experts": "all" if options.all_experts else "router's",
        "device": device_identity(device),
        **software_versions(),
    }
    sources = tuple(str(name) for name in options.data) or ("bundled",)
    return _Plan(windows, seq_len, batch_size, sources, fingerprint)


def block_file(number: int) -> str:
    return f"block-{number:05d}.safetensors"


def _prepare(
    options: CalibrationOptions,
    checkpoint: Checkpoint,
    plan: _Plan,
    ranks: Ranks,
    progress: Progress,
    should_stop: ShouldStop,
) -> _Session:
    """Open the model and CALIB.partial on this rank. Refuses a model that can't be calibrated."""
    import torch

    from quantkit.calibration.hooks import require_linears

    started = time.monotonic()
    threads = max(1, torch.get_num_threads())
    model = _open_model(options, checkpoint, ranks)
    quantizer = ranks.first_then_others(
        lambda: _block_quantizer(options, checkpoint, model, threads, ranks)
    )
    ranks.on_first(lambda: require_linears(model))
    ranks.on_first(model.require_unshared)
    output: OutputDirectory | None = ranks.on_first(
        lambda: OutputDirectory(
            options.output,
            plan.fingerprint,
            resume=options.resume,
            overwrite=options.overwrite,
            reads=[options.model],
        )
    )
    partial = ranks.broadcast_from_first(lambda: None if output is None else output.partial)
    assert partial is not None, "rank 0 has opened CALIB.partial"
    batches = [torch.tensor(batch) for batch in plan.batches]
    return _Session(
        options,
        checkpoint,
        plan,
        ranks,
        progress,
        should_stop,
        started,
        threads,
        model,
        batches,
        # Batches are the same for any number of ranks: other batches would round differently.
        range(ranks.rank, len(batches), ranks.count),
        output,
        partial,
        None if quantizer is None else _quantized_files(quantizer, output),
    )


def _open_model(
    options: CalibrationOptions, checkpoint: Checkpoint, ranks: Ranks
) -> BlockwiseModel:
    from quantkit.calibration.hooks import EXPERTS_IMPLEMENTATION, register_observing_experts
    from quantkit.models.blockwise import BlockwiseModel
    from quantkit.models.skeleton import StoredWeights, build_skeleton

    register_observing_experts()
    return BlockwiseModel(
        build_skeleton(
            checkpoint, options.trust_remote_code, experts_implementation=EXPERTS_IMPLEMENTATION
        ),
        StoredWeights(checkpoint, require_finite=True),
        str(checkpoint.path),
        ranks.device,
    )


def _block_quantizer(
    options: CalibrationOptions,
    checkpoint: Checkpoint,
    model: BlockwiseModel,
    threads: int,
    ranks: Ranks,
) -> BlockQuantizer | None:
    """The block quantizer, if the recipe's algorithms quantize weights. Schemes are those that
    `export` will use, and it refuses the same recipes.
    """
    recipe = options.recipe
    if recipe is None or not recipe.quantizes_weights:
        return None
    from quantkit.calibration.block_quantizer import BlockQuantizer
    from quantkit.calibration.rotate import make_rotation

    assignment = assign_layers(checkpoint, recipe)
    settings = recipe.algorithm("rotation")
    return BlockQuantizer(
        model,
        recipe,
        {name: linear.scheme for name, linear in assignment.linears.items()},
        threads,
        None if settings is None else make_rotation(settings, model, options.seed),
        ranks,
    )


def _quantized_files(
    quantizer: BlockQuantizer, output: OutputDirectory | None
) -> QuantizedWeightFiles:
    from quantkit.calibration.weight_files import QuantizedWeightFiles

    return QuantizedWeightFiles(quantizer, output)


@dataclass(frozen=True)
class _Session:
    """One calibration on one rank, ready to run.

    started: time.monotonic() at the start, seconds.
    threads: how many batches run through a block at once on a CPU.
    batches: token ids of all ranks' batches, [windows, positions] each.
    mine: numbers of this rank's batches.
    output: CALIB.partial on rank 0, None on other ranks.
    partial: path of CALIB.partial, on every rank.
    quantized: the files of quantized weights; None if the recipe's algorithms quantize none.
    """

    options: CalibrationOptions
    checkpoint: Checkpoint
    plan: _Plan
    ranks: Ranks
    progress: Progress
    should_stop: ShouldStop
    started: float
    threads: int
    model: BlockwiseModel
    batches: list[Tensor]
    mine: Sequence[int]
    output: OutputDirectory | None
    partial: Path
    quantized: QuantizedWeightFiles | None

    def run(self) -> CalibrationResult:
        done = self.ranks.broadcast_from_first(self._finished_blocks)
        if self.quantized is not None and not done:
            shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
            self.quantized.try_rotation(
                lambda: _open_model(self.options, self.checkpoint, self.ranks),
                self.batches[0],
                shapes,
                lambda number: self.progress("trying the rotation", 0, self.model.block_count),
            )
        if len(done) < self.model.block_count:
            states = HiddenStates(
                self._memory(), self.partial if self.ranks.is_first else None, self._states_device()
            )
            try:
                self._run_blocks(states, done)
            finally:
                states.close()
        description = self.ranks.broadcast_from_first(self._finish)
        return result_of(
            self.options, self.checkpoint, description, time.monotonic() - self.started
        )

    @property
    def _opened(self) -> OutputDirectory:
        assert self.output is not None, "only rank 0 reads and writes CALIB"
        return self.output

    def _finished_blocks(self) -> set[int]:
        """The blocks that an earlier run finished: all of their files are complete."""
        numbers = range(self.model.block_count)
        whole = self._opened.finished([file(number) for number in numbers for file in self._files])
        return {number for number in numbers if all(file(number) in whole for file in self._files)}

    @property
    def _files(self) -> tuple[Callable[[int], str], ...]:
        """The names of the files of a finished block."""
        if self.quantized is None:
            return (block_file,)
        from quantkit.calibration.weight_files import weights_file

        return block_file, weights_file

    def _memory(self) -> int:
        share = self.options.memory if self.options.memory is not None else available_memory() // 2
        return share // self.ranks.count

    def _states_device(self) -> str:
        """Hidden states stay on the GPU if they fill less than a quarter of its free memory."""
        import torch

        if not self.ranks.device.startswith("cuda"):
            return "cpu"
        hidden_size = self.model.model.config.get_text_config().hidden_size
        needed = (
            sum(self.batches[number].numel() for number in self.mine)
            * hidden_size
            * self.model.states_dtype.itemsize
        )
        free = torch.cuda.mem_get_info(self.ranks.device)[0]
        return self.ranks.device if needed < free // 4 else "cpu"

    # -- The blocks.

    def _run_blocks(self, states: HiddenStates, done: Container[int]) -> None:
        from quantkit.calibration.hooks import ObservingCache

        self.progress("embeddings", 0, self.model.block_count)
        saved = SavedStates(self.ranks, self.should_stop, self.output, self.partial)
        quantized = self.quantized

        def on_block(step: BlockStep) -> None:
            if quantized is not None:
                self._quantize(step, quantized, is_done=step.number in done)
            if step.number in done:
                self._advance(step)
            else:
                self._measure(step)

        self.model.walk(
            {batch: self.batches[batch] for batch in self.mine},
            states,
            on_block,
            cache=ObservingCache(),
            load_outer=None if quantized is None else lambda: quantized.load_outer(self.batches[0]),
            restore=lambda walk: self._restore(saved, walk),
            after_block=lambda number, walk: saved.stop_or_save(
                number, self.model.block_count, states, others=lambda: self._encoded(number, walk)
            ),
        )

    def _quantize(self, step: BlockStep, quantized: QuantizedWeightFiles, is_done: bool) -> None:
        """Quantize a block's weights, or install those of an earlier run."""
        if is_done:
            quantized.install(step.number, step.block)
            return
        self.progress(
            f"quantizing block {step.number + 1} of {self.model.block_count}",
            step.number,
            self.model.block_count,
        )
        quantized.quantize(step.number, step.block, self.mine, step.walk.inputs, step.walk.states)

    def _measure(self, step: BlockStep) -> None:
        from quantkit.calibration.hooks import BlockRecorder
        from quantkit.calibration.observers import BlockStatistics

        number = step.number
        recorder = BlockRecorder(self.model, number, step.block, self.options.all_experts)
        total = BlockStatistics()
        earlier: dict[str, float] = {}
        quarter_of = {batch: 4 * batch // len(self.batches) for batch in self.mine}

        def work(batch: int) -> BlockStatistics:
            with recorder.batch(
                self.batches[batch].shape, quarter_of[batch], earlier
            ) as statistics:
                step.advance(batch)
            return statistics

        try:
            held_out = [batch for batch in self.mine if quarter_of[batch] == 3]
            for batches in ([batch for batch in self.mine if quarter_of[batch] < 3], held_out):
                with closing(self._each(work, batches)) as results:
                    for batch, statistics in zip(batches, results):
                        statistics.require_finite()
                        total.merge(statistics)
                        self._report_progress(number, batch)
                if batches is not held_out:
                    for amaxes in self.ranks.all_gather(
                        {name: observer.amax for name, observer in total.inputs.items()}
                    ):
                        earlier |= {
                            name: max(amax, earlier.get(name, 0.0)) for name, amax in amaxes.items()
                        }
        finally:
            recorder.close()
        whole = recorder.complete(total.reduced(self.ranks))
        if not whole.inputs:
            raise CalibrationError(
                f"no token reached a Linear of {self.model.block_name(number)}; quantkit calibrates"
                " models made of torch.nn.Linear"
            )
        if self.ranks.is_first:
            self._write(number, whole, recorder)

    def _advance(self, step: BlockStep) -> None:
        """Run a block that is finished, to get the hidden states after it."""
        with closing(self._each(step.advance, self.mine)) as results:
            for batch, _ in zip(self.mine, results):
                self._report_progress(step.number, batch, "again, ")

    def _each(
        self, work: Callable[[int], Any], batches: Sequence[int]
    ) -> Generator[Any, None, None]:
        from quantkit.models.threads import each_batch

        return each_batch(work, batches, self.model.device, self.threads)

    def _report_progress(self, block: int, batch: int, how: str = "") -> None:
        from quantkit.checkpoint.units import format_bytes

        done = block + (self.mine.index(batch) + 1) / len(self.mine)
        tokens = sum(self.batches[number].numel() for number in self.mine) * self.ranks.count
        rate = tokens * done / self.model.block_count / max(1e-9, time.monotonic() - self.started)
        what = (
            f"{how}block {block + 1} of {self.model.block_count}, {rate:.0f} tokens/s,"
            f" peak {format_bytes(peak_memory_bytes())}"
        )
        self.progress(what, done, self.model.block_count)

    def _write(self, number: int, statistics: BlockStatistics, recorder: BlockRecorder) -> None:
        output, name = self._opened, block_file(number)
        path = output.partial / name
        write_tensors(path, statistics.tensors())
        described = describe_block(statistics, recorder, name)
        output.record(
            name,
            {"bytes": path.stat().st_size, "blake3": blake3_file(path), "description": described},
        )

    def _restore(self, saved: SavedStates, walk: Walk) -> int:
        """The number of the first block to run: after the hidden states that an earlier run saved,
        or 0.
        """
        # Side outputs aren't saved: blocks that are done run again.
        if any(self.ranks.all_gather(self.model.has_side_outputs)):
            return 0
        names = [_encoded_name(batch) for batch in self.mine]
        return saved.restore(
            walk.states,
            lambda block: self.mine,
            lambda block: names if self.model.reads_encoder(block + 1) else (),
            lambda found: walk.begin_decoder(
                {batch: found[_encoded_name(batch)] for batch in self.mine}
            ),
        )

    def _encoded(self, number: int, walk: Walk) -> dict[str, Tensor]:
        """The encoder's outputs to save after a block, where later blocks read them; by the names
        of `_encoded_name`.
        """
        if not self.model.reads_encoder(number + 1):
            return {}
        return {_encoded_name(batch): walk.encoded[batch] for batch in self.mine}

    # -- The end.

    def _finish(self) -> dict[str, Any]:
        options, plan, output = self.options, self.plan, self._opened
        names = [block_file(number) for number in range(self.model.block_count)]
        entries = [output.done[name] for name in names]
        if any("description" not in entry for entry in entries):
            # An earlier run was stopped just before its last rename: everything is written.
            description = Calibration.open(self.partial).description
            output.commit()
            return description
        blocks = [entry["description"] for entry in entries]
        description = {
            "schema_version": SCHEMA_VERSION,
            "quantkit_version": __version__,
            "model": {"path": str(options.model), "fingerprint": plan.fingerprint["model files"]},
            "recipe": options.recipe.to_mapping() if options.recipe else None,
            "data": {
                "sources": list(plan.sources),
                "source_sha256": list(plan.windows.source_sha256),
                "sha256": plan.windows.data_sha256,
                "tokens_sha256": plan.windows.tokens_sha256,
            },
            "windows": len(plan.windows.windows),
            "windows_requested": options.num_samples,
            "seq_len": plan.seq_len,
            "tokens": sum(len(window.tokens) for window in plan.windows.windows),
            "seed": options.seed,
            "all_experts": options.all_experts,
            "fingerprint": plan.fingerprint,
            "python_version": platform.python_version(),
            "inputs": [entry for block in blocks for entry in block["inputs"]],
            "kv": [entry for block in blocks for entry in block["kv"]],
            "experts": [entry for block in blocks for entry in block["experts"]],
            "token_pieces": token_pieces(plan.windows),
        }
        if self.quantized is not None:
            description["chosen"], weight_files = self.quantized.describe()
            names, entries = [*names, *weight_files], [*entries, *weight_files.values()]
        description["files"] = {
            name: {"bytes": entry["bytes"], "blake3": entry["blake3"]}
            for name, entry in zip(names, entries)
        }
        write_json(output.partial / CALIBRATION_FILE, description)
        for path in output.partial.iterdir():
            if path.name not in names and path.name not in (CALIBRATION_FILE, "progress.json"):
                path.unlink()
        output.commit()
        return description


def _encoded_name(batch: int) -> str:
    """The name of the encoder's output for a batch among saved hidden states."""
    return f"{batch}.encoded"
