"""The files of quantized weights in CALIB: `weights-NNNNN.safetensors` for each block, and
`weights-outer.safetensors` for layers outside the blocks that a rotation changes.

A file is written once its block is finished, and recorded with its hash. A resumed run installs the
weights of files that are complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantkit.calibration.block_quantizer import BlockQuantizer
from quantkit.calibration.rotate import try_rotation
from quantkit.calibration.rotate_outer import put_outer, rotated_outer
from quantkit.checkpoint.files import blake3_file
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.output_dir import OutputDirectory
from quantkit.checkpoint.tensor_reader import read_tensor
from quantkit.checkpoint.writer import write_tensors
from quantkit.errors import QuantkitError
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.distributed import Ranks
from quantkit.models.hidden_states import HiddenStates

OUTER_FILE = "weights-outer.safetensors"


def weights_file(number: int) -> str:
    return f"weights-{number:05d}.safetensors"


@dataclass(frozen=True)
class QuantizedWeightFiles:
    """The files of one run.

    quantizer: makes their contents.
    output: CALIB.partial on rank 0, which reads and writes for all ranks; None on other ranks.
    """

    quantizer: BlockQuantizer
    output: OutputDirectory | None

    @property
    def ranks(self) -> Ranks:
        return self.quantizer.ranks

    @property
    def _opened(self) -> OutputDirectory:
        assert self.output is not None, "only rank 0 reads and writes CALIB"
        return self.output

    @property
    def rotates_outer(self) -> bool:
        return self.quantizer.rotation is not None and self.quantizer.rotation.stream is not None

    def try_rotation(
        self,
        build: Callable[[], BlockwiseModel],
        tokens: Tensor,
        shapes: Mapping[str, tuple[int, ...]],
        on_block: Callable[[int], None],
    ) -> None:
        """Refuse a model that can't be rotated before the first block is worked on.

        build: makes a second model, for the trial.
        tokens: [windows, positions].
        shapes: of the checkpoint's tensors, by name.
        on_block: called with each block's number before it is tried.
        """
        rotation = self.quantizer.rotation
        if rotation is None:
            return

        def attempt() -> None:
            try:
                try_rotation(build(), tokens, rotation, shapes, on_block)
            except QuantkitError:
                self._opened.discard()
                raise

        self.ranks.on_first(attempt)

    def load_outer(self, tokens: Tensor) -> None:
        """Load the layers outside the blocks, rotated if the recipe rotates the residual stream.

        tokens: [windows, positions], on which the rotation is checked.
        """
        model, rotation = self.quantizer.model, self.quantizer.rotation
        if rotation is None or rotation.stream is None:
            model.load_outer(with_head=False)
            return

        def find() -> Mapping[str, Tensor]:
            if OUTER_FILE not in self._opened.finished([OUTER_FILE]):
                model.load_outer(with_head=True)
                self._write(OUTER_FILE, rotated_outer(model, tokens, rotation), {})
                model.free_outer()
            return self._read(OUTER_FILE)

        found = self.ranks.on_first(find)
        model.load_outer(with_head=False)
        put_outer(model, self.ranks.broadcast_tensors(found))

    def install(self, number: int, block: nn.Module) -> None:
        """Install the weights that an earlier run quantized for a block."""
        self.quantizer.install(
            number,
            block,
            self.ranks.broadcast_tensors(
                self._read(weights_file(number)) if self.ranks.is_first else None
            ),
        )

    def quantize(
        self,
        number: int,
        block: nn.Module,
        batches: Sequence[int],
        calls: Mapping[int, Any],
        states: HiddenStates,
    ) -> None:
        """Quantize a block in place and write its weights; see `BlockQuantizer.quantize`."""
        quantized = self.quantizer.quantize(number, block, batches, calls, states)
        if self.ranks.is_first:
            self._write(weights_file(number), quantized.to_tensors(), quantized.described)

    def _read(self, name: str) -> dict[str, Tensor]:
        return {
            tensor: read_tensor(info)
            for tensor, info in read_header(self._opened.partial / name).items()
        }

    def _write(self, name: str, tensors: Mapping[str, Tensor], description: Any) -> None:
        path = self._opened.partial / name
        write_tensors(path, {tensor: content.cpu() for tensor, content in tensors.items()})
        self._opened.record(
            name,
            {"bytes": path.stat().st_size, "blake3": blake3_file(path), "description": description},
        )

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`chosen` of calibration.json, and the size and hash of each file."""
        names = [weights_file(number) for number in range(self.quantizer.model.block_count)]
        described = [self._opened.done[name]["description"] for name in names]
        found: dict[str, Any] = {
            section: [entry for block in described for entry in block[section]]
            for section in described[0]
        }
        done = {entry["name"] for entry in found["linears"]}
        reason = "transformers has no Linear of that name in a decoder block"
        found["linears"] += [
            {"name": name, "algorithm": "rtn", "reason": reason}
            for name in self.quantizer.schemes
            if name not in done
        ]
        if self.rotates_outer:
            names.append(OUTER_FILE)
        found["untied"] = dict(self.quantizer.rotation.untied) if self.quantizer.rotation else {}
        found["files"] = names
        return found, {name: self._opened.done[name] for name in names}
