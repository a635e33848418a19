"""Final hidden states of bases, kept between runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.cache import SECONDS_UNTIL_ABANDONED, cache_directory
from quantkit.checkpoint.files import blake3_file, write_json
from quantkit.checkpoint.header import DTYPES, TensorInfo, read_header
from quantkit.checkpoint.shard_plan import TensorPlan
from quantkit.checkpoint.tensor_reader import read_tensor
from quantkit.checkpoint.writer import ShardWriter
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from torch import Tensor

# Of all hidden states together: those of 8 billion parameters' model over 500 000 tokens.
MOST_BYTES = 4_000_000_000
HEADER_BYTES = 128  # of one tensor, about


@dataclass(frozen=True)
class CachedHiddenStates:
    """Hidden states in the cache, by window. description: what was said of them when they were put
    there.
    """

    description: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def get(self, number: int) -> Tensor:
        return read_tensor(self.tensors[str(number)])


class HiddenStateCache:
    """Final hidden states of models by what made them."""

    def __init__(self, directory: Path | None = None, most_bytes: int | None = None) -> None:
        self.directory = cache_directory() / "hidden-states" if directory is None else directory
        self._most_bytes = MOST_BYTES if most_bytes is None else most_bytes

    def _paths(self, made_from: Mapping[str, Any]) -> tuple[Path, Path]:
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
        return self.directory / f"{key}.safetensors", self.directory / f"{key}.json"

    def find(self, made_from: Mapping[str, Any]) -> CachedHiddenStates | None:
        """What is there, whole and undamaged, or None."""
        path, description_path = self._paths(made_from)
        try:
            description = json.loads(description_path.read_text())
            if description["bytes"] != path.stat().st_size or description["blake3"] != blake3_file(
                path
            ):
                return None
            tensors = read_header(path)
            os.utime(path)
        except (OSError, ValueError, KeyError, TypeError, QuantkitError):
            return None
        return CachedHiddenStates(description, tensors)

    def keep(
        self,
        made_from: Mapping[str, Any],
        numbers: Sequence[int],
        get: Callable[[int], Tensor],
        description: Mapping[str, Any],
    ) -> str | None:
        """Put hidden states there, one after the other; returns why they weren't, if so. Nothing
        that goes wrong here spoils a result.
        """
        names = {f"torch.{torch_name}": name for name, (_, torch_name) in DTYPES.items()}
        plans = []
        for number in numbers:
            states = get(number)
            plans.append(TensorPlan(str(number), names[str(states.dtype)], tuple(states.shape)))
        needed = sum(plan.nbytes + HEADER_BYTES for plan in plans)
        path, description_path = self._paths(made_from)
        if needed > self._most_bytes:
            return f"they are larger than the cache's {self._most_bytes / 1e9:.3g} GB"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._make_room(needed)
            if shutil.disk_usage(self.directory).free < 2 * needed:
                return f"the disk of {self.directory} is nearly full"
            description_path.unlink(missing_ok=True)
            writer = ShardWriter(path, plans)
            try:
                for number in numbers:
                    writer.write(str(number), get(number))
                writer.close()
            finally:
                writer.release()
            write_json(
                description_path,
                dict(description) | {"bytes": path.stat().st_size, "blake3": blake3_file(path)},
            )
        except (OSError, QuantkitError) as error:
            return f"{self.directory} can't be written to ({error})"
        return None

    def _make_room(self, needed: int) -> None:
        """Remove what was used longest ago until so much fits, and what a killed process left
        unfinished a day ago.
        """
        files = sorted(
            (file.stat().st_mtime, file.stat().st_size, file)
            for file in self.directory.iterdir()
            if file.is_file()
        )
        held = sum(size for _, size, file in files if file.suffix == ".safetensors")
        newest = max((used for used, _, _ in files), default=0.0)
        for used, size, file in files:
            if file.suffix == ".tmp" and newest - used > SECONDS_UNTIL_ABANDONED:
                file.unlink(missing_ok=True)
            if file.suffix == ".safetensors" and held + needed > self._most_bytes:
                for path in (file.with_suffix(".json"), file):
                    path.unlink(missing_ok=True)
                held -= size
