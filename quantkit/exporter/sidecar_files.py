"""The files next to the shards: the index, the configuration, the model card, the manifest, and the
model's other files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from quantkit import __version__
from quantkit.checkpoint.files import blake3_file, write_bytes, write_json, write_text
from quantkit.checkpoint.formats import QuantizedLayers
from quantkit.checkpoint.output_dir import MANIFEST_FILE, PROGRESS_FILE, OutputDirectory
from quantkit.checkpoint.reader import INDEX_FILE
from quantkit.checkpoint.units import counted, format_bytes
from quantkit.checkpoint.writer import TensorPlan
from quantkit.errors import OutputError
from quantkit.exporter.plan import ExportPlan
from quantkit.models.task import MASKED, task_of


def write_index(
    partial: Path, names: Sequence[str], shards: Sequence[Sequence[TensorPlan]]
) -> None:
    if len(names) == 1:
        return
    weight_map = {tensor.name: name for name, tensors in zip(names, shards) for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors)
    write_json(partial / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_config(partial: Path, plan: ExportPlan) -> None:
    recipe, file_format = plan.options.recipe, plan.file_format
    schemes = {name: linear.scheme for name, linear in plan.linears.items()}
    # The output head of a masked model has no tensor where it is tied, and a name of its own in
    # every architecture.
    by_name = task_of(plan.checkpoint.config, plan.checkpoint.path) == MASKED
    layers = QuantizedLayers(
        schemes, plan.left, recipe.scheme, recipe.kv_cache is not None, by_name, plan.left_elsewhere
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
    for path in others:
        target = partial / path.relative_to(plan.checkpoint.path)
        if target.parent.is_symlink():
            raise OutputError(
                f"{target.parent} is a link; nothing is written through it, so remove it"
            )
        target.parent.mkdir(exist_ok=True)
        if path.name != "README.md":
            write_bytes(target, path.read_bytes())
    card = plan.checkpoint.path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card in others else ""
    # What an earlier export says of its own files is not true of these.
    text = re.sub(
        r"(?ms)^## Quantization\n\nQuantized with quantkit .*?(?=^#|\Z)", "", text
    ).rstrip()
    text += "\n\n" if text else ""
    write_text(partial / "README.md", text + model_card_section(plan))


def write_manifest(output: OutputDirectory, plan: ExportPlan) -> None:
    """What lies here and from what it was made, for `verify` and for `--resume` of a run that was
    finished already.
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
        # So that `eval` can say when it judges on the text that the scales were made with.
        described = plan.calibration.description
        kept = {key: described["data"][key] for key in ("sources", "source_sha256")}
        if plan.changed:
            content["changed"] = plan.changed
        content["calibrated_on"] = kept | {"token_pieces": described["token_pieces"]}
    write_json(output.partial / MANIFEST_FILE, content)


def model_card_section(plan: ExportPlan) -> str:
    """What was done to the model, for its card."""
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
                "weights chosen by"
                f" {' and '.join(algorithm.name for algorithm in plan.options.recipe.algorithms)}"
            )
        lines.append(
            f"- {what} on {described['tokens']} tokens ({', '.join(described['data']['sources'])})"
        )
    if plan.options.recipe.kv_cache:
        lines.append("- scales for an FP8 KV cache")
    unchanged = (
        "; embeddings, norms and lm_head are not quantized" if "lm_head" in plan.left else ""
    )
    lines.append(
        f"- {format_bytes(plan.bytes_before)} of weights became"
        f" {format_bytes(plan.bytes_after)}{unchanged}"
    )
    return (
        f"## Quantization\n\nQuantized with quantkit {__version__} (format"
        f" {plan.options.file_format}):\n\n" + "\n".join(lines) + "\n"
    )
