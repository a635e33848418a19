"""Write the files next to the shards: the index, the config, the model card, the manifest, and
copies of the model's other files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from quantkit import __version__
from quantkit.checkpoint.files import blake3_file, write_bytes, write_json, write_text
from quantkit.checkpoint.finished_output import MANIFEST_FILE, PROGRESS_FILE
from quantkit.checkpoint.formats import QuantizedLayers
from quantkit.checkpoint.model_files import INDEX_FILE
from quantkit.checkpoint.output_dir import OutputDirectory
from quantkit.checkpoint.shard_plan import TensorPlan
from quantkit.checkpoint.units import counted, format_bytes
from quantkit.errors import OutputError
from quantkit.exporter.plan import ExportPlan
from quantkit.models.task import MASKED, task_of


def write_index(
    partial: Path, names: Sequence[str], shards: Sequence[Sequence[TensorPlan]]
) -> None:
    """Write the index of a checkpoint with more than one shard.

    partial: the output directory while it is incomplete.
    names: file names of the shards.
    shards: tensors of each shard.
    """
    if len(names) == 1:
        return
    weight_map = {tensor.name: name for name, tensors in zip(names, shards) for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors)
    write_json(partial / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_config(partial: Path, plan: ExportPlan) -> None:
    """Write config.json with a `quantization_config`, and the format's side file, if any."""
    recipe, file_format = plan.options.recipe, plan.file_format
    schemes = {name: linear.scheme for name, linear in plan.linears.items()}
    # The output head of a masked model may have no tensor, and its name depends on the
    # architecture, so it can't be listed in `ignore`.
    by_name = task_of(plan.checkpoint.config, plan.checkpoint.path) == MASKED
    layers = QuantizedLayers(
        schemes,
        plan.skipped,
        recipe.scheme,
        recipe.kv_cache is not None,
        by_name,
        plan.skipped_elsewhere,
    )
    config = dict(plan.checkpoint.config) | {"quantization_config": file_format.config(layers)}
    if plan.calibration and plan.calibration.untied:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
    write_json(partial / "config.json", config)
    if file_format.side_file is not None:
        write_json(partial / file_format.side_file, file_format.side_file_content(layers))


def copy_others(partial: Path, plan: ExportPlan, others: Sequence[Path]) -> None:
    """Copy the model's other files, and write its model card with a section on quantization."""
    for path in others:
        target = partial / path.relative_to(plan.checkpoint.path)
        if target.parent.is_symlink():
            raise OutputError(
                f"{target.parent} is a symbolic link, and export doesn't write through links;"
                " remove it"
            )
        target.parent.mkdir(exist_ok=True)
        if path.name != "README.md":
            write_bytes(target, path.read_bytes())
    card = plan.checkpoint.path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card in others else ""
    # Remove the section of an earlier export.
    text = re.sub(
        r"(?ms)^## Quantization\n\nQuantized with quantkit .*?(?=^#|\Z)", "", text
    ).rstrip()
    text += "\n\n" if text else ""
    write_text(partial / "README.md", text + model_card_section(plan))


def write_manifest(output: OutputDirectory, plan: ExportPlan) -> None:
    """Write the manifest: hashes of the output's files, and what they were made from. `verify`
    reads it, and a resumed run recognizes a finished output by it.
    """
    files = {name: entry for name, entry in output.done.items() if name.endswith(".safetensors")}
    for path in sorted(output.partial.rglob("*")):
        name = path.relative_to(output.partial).as_posix()
        if (
            path.is_file()
            and name not in files
            and path.name not in (PROGRESS_FILE, MANIFEST_FILE)
            and not name.endswith(".tmp")
        ):
            files[name] = {"bytes": path.stat().st_size, "blake3": blake3_file(path)}
    content = {
        "schema_version": 1,
        "quantkit_version": __version__,
        "fingerprint": plan.fingerprint,
        "files": dict(sorted(files.items())),
    }
    if plan.calibration:
        # For `eval`, which warns if the model is evaluated on its calibration text.
        described = plan.calibration.description
        sources = {key: described["data"][key] for key in ("sources", "source_sha256")}
        if plan.changed:
            content["changed"] = plan.changed
        content["calibrated_on"] = sources | {"token_pieces": described["token_pieces"]}
    write_json(output.partial / MANIFEST_FILE, content)


def model_card_section(plan: ExportPlan) -> str:
    """The section of the model card on quantization, in Markdown."""
    counts = Counter(linear.scheme for linear in plan.linears.values())
    lines = [
        f"- {counted(count, 'Linear')} in {scheme.name} (weights {scheme.weight}, inputs"
        f" {scheme.input or 'as they are'})"
        for scheme, count in counts.items()
    ]
    if plan.block_scales:
        lines.append(
            f"- made from FP8 blocks ({len(plan.block_scales)} weights), not from the original"
            " floating-point weights"
        )
    if plan.calibration:
        described = plan.calibration.description
        what = "static scales measured"
        if described.get("chosen"):
            what = (
                "weights quantized by"
                f" {' and '.join(algorithm.name for algorithm in plan.options.recipe.algorithms)}"
            )
        lines.append(
            f"- {what} on {described['tokens']} tokens ({', '.join(described['data']['sources'])})"
        )
    if plan.options.recipe.kv_cache:
        lines.append("- scales for an FP8 KV cache")
    unchanged = (
        "; embeddings, norms and lm_head are not quantized" if "lm_head" in plan.skipped else ""
    )
    lines.append(
        f"- {format_bytes(plan.bytes_before)} of weights became"
        f" {format_bytes(plan.bytes_after)}{unchanged}"
    )
    return (
        f"## Quantization\n\nQuantized with quantkit {__version__} (format"
        f" {plan.options.file_format}):\n\n" + "\n".join(lines) + "\n"
    )
