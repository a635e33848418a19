"""What `eval` and `compare` say to people: the tables of a result, what must be known beside them,
Markdown for a model card.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from quantkit.checkpoint.units import counted, format_bytes


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


WORST_SHOWN = 5  # layers of each candidate


def interval_text(interval: dict[str, Any], digits: int = 2, unit: str = " %") -> str:
    """+1.23 % [+1.10, +1.36]"""
    value = f"{interval['value']:+.{digits}f}{unit}"
    if interval["low"] is None:
        return value
    return f"{value} [{interval['low']:+.{digits}f}, {interval['high']:+.{digits}f}]"


EVALUATION_COLUMNS = (
    "model",
    "scheme",
    "perplexity",
    "ΔPPL [95 %]",
    "KL mean",
    "KL p99",
    "same top-1",
    "size",
    "bits/weight",
    "Linears",
    "inputs quantized",
    "tokens/s",
)


def evaluation_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for the base, one per candidate; the columns are EVALUATION_COLUMNS."""
    base = result["base"]
    size = (format_bytes(base["bytes"]), f"{base['bits_per_weight']:.2f}")
    rows = [
        (
            base["path"],
            "base",
            f"{base['perplexity']:.4f}",
            "",
            "",
            "",
            "",
            *size,
            "",
            "",
            f"{base['tokens_per_second']:.0f}",
        )
    ]
    for quant in result["quants"]:
        activations = {True: "yes", False: "no"}.get(quant["activations_quantized"], "in part")
        rows.append(
            (
                quant["path"],
                quant["scheme"],
                f"{quant['perplexity']:.4f}",
                interval_text(quant["ppl_delta_pct"]),
                f"{quant['kld']['mean']:.5f}",
                f"{quant['kld']['p99']:.4f}",
                f"{100 * quant['top1_agreement']:.2f} %",
                format_bytes(quant["bytes"]),
                f"{quant['bits_per_weight']:.2f}",
                f"{quant['linears_quantized']} ({len(quant['linears_left'])} left)",
                activations,
                f"{quant['tokens_per_second']:.0f}",
            )
        )
    return rows


def figure_rows(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of the table of all other figures: one column for each candidate, and for
    the noise floor where it was measured.
    """
    quants, noise = result["quants"], result.get("noise_floor")
    heads = ("figure", *(quant["path"] for quant in quants), *(["noise floor"] if noise else []))

    def row(name: str, text: Any, of_noise: Any = None) -> tuple[str, ...]:
        return (name, *map(text, quants), *([of_noise(noise) if of_noise else ""] if noise else []))

    def divergence(figures: dict[str, Any]) -> str:
        kld = figures["kld"]
        bounds = (
            "" if kld["mean_low"] is None else f" [{kld['mean_low']:.5f}, {kld['mean_high']:.5f}]"
        )
        return f"{kld['mean']:.5f}{bounds}"

    def quantiles(figures: dict[str, Any]) -> str:
        return " · ".join(
            f"{figures['kld'][name]:.4f}" for name in ("median", "p90", "p99", "p99_9", "max")
        )

    rows = [
        row("KL(base‖quant) mean [95 %], nats", divergence, divergence),
        row("KL median · p90 · p99 · p99.9 · max", quantiles, quantiles),
        row(
            "same top-1 [95 %]",
            lambda quant: _percent_interval(quant["top1"]),
            lambda floor: f"{100 * floor['top1_agreement']:.2f} %",
        ),
        row(
            "right before, wrong now · the other way",
            lambda quant: f"{quant['flips']['to_wrong']} · {quant['flips']['to_right']}",
        ),
        row("McNemar's p of these", lambda quant: f"{quant['flips']['mcnemar_p']:.3g}"),
        row(
            "Δp of the true token: mean · RMS",
            lambda quant: (
                f"{100 * quant['delta_p']['mean']:+.3f} % · {100 * quant['delta_p']['rms']:.3f} %"
            ),
        ),
        row(
            "Δp p1 · p99",
            lambda quant: (
                f"{100 * quant['delta_p']['p1']:+.2f} % · {100 * quant['delta_p']['p99']:+.2f} %"
            ),
        ),
        row(
            "bits per byte (base)",
            lambda quant: (
                f"{_number(quant['bits_per_byte'])} ({_number(result['base']['bits_per_byte'])})"
            ),
        ),
        row(
            "KL where the base is sure of < 25 % · > 90 %",
            lambda quant: " · ".join(
                _confidence(quant, *edges) for edges in ((0.0, 0.25), (0.9, 1.0))
            ),
        ),
        row(
            "KL in the windows' first · last eighth",
            lambda quant: " · ".join(
                f"{quant['kld_by_position'][at]['kld_mean']:.5f}" for at in (0, -1)
            ),
        ),
        row("non-finite tokens", lambda quant: str(quant["nonfinite"])),
        row("KV cache quantized", lambda quant: "yes" if quant["kv_cache_quantized"] else "no"),
        row("peak memory so far", lambda quant: format_bytes(quant["peak_memory_bytes"])),
    ]
    return heads, rows


def _percent_interval(interval: dict[str, Any]) -> str:
    bounds = (
        ""
        if interval["low"] is None
        else f" [{100 * interval['low']:.2f}, {100 * interval['high']:.2f}]"
    )
    return f"{100 * interval['value']:.2f} %{bounds}"


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _confidence(quant: dict[str, Any], low: float, high: float) -> str:
    """The mean KL over the tokens of several bins of confidence."""
    bins = [
        row
        for row in quant["kld_by_confidence"]
        if row["from"] >= low and row["to"] <= high and row["tokens"]
    ]
    tokens = sum(row["tokens"] for row in bins)
    return f"{sum(row['kld_mean'] * row['tokens'] for row in bins) / tokens:.5f}" if tokens else "–"


LAYER_COLUMNS = (
    "model",
    "worst layers",
    "weight dB",
    "median channel",
    "output dB",
    "median channel",
    "clipped w · in",
    "underflowing w · in",
)


def layer_rows(result: dict[str, Any], shown: int = WORST_SHOWN) -> list[tuple[str, ...]]:
    """The worst layers of each candidate, as `layers` ranks them; the columns are LAYER_COLUMNS."""
    rows = []
    for quant in result["quants"]:
        for layer in quant["layers"][:shown]:
            rows.append(
                (
                    quant["path"],
                    layer["name"],
                    _decibels(layer["weight_sqnr_db"]),
                    _decibels(layer["weight_channel_sqnr_db"]["median"]),
                    _decibels(layer.get("output_sqnr_db")),
                    _decibels(layer.get("output_channel_sqnr_db", {}).get("median")),
                    " · ".join(
                        _share(layer.get(f"{what}_clipped")) for what in ("weight", "input")
                    ),
                    " · ".join(
                        _share(layer.get(f"{what}_underflowed")) for what in ("weight", "input")
                    ),
                )
            )
    return rows


def _decibels(value: float | None) -> str:
    return "" if value is None else "exact" if math.isinf(value) and value > 0 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{100 * value:.2g} %"


def evaluation_title(result: dict[str, Any]) -> str:
    hardware = f", as {result['hardware']} computes" if result.get("hardware") else ""
    return f"{_text_described(result)}, {_arithmetic(result)}{hardware}"


def _text_described(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    windows = f"{counted(result['windows'], 'window')} of {protocol['seq_len']}"
    return (
        f"{result['tokens_scored']} tokens in {windows}, protocol {protocol['name']}"
        f" ({protocol['hash']})"
    )


def _arithmetic(result: dict[str, Any]) -> str:
    ran = {quant["exec"] for quant in result["quants"]}
    if ran <= {"reference"}:
        return "reference arithmetic"
    return (
        f"kernels ({result['kernel_level']})"
        if ran == {"kernel"}
        else f"kernels ({result['kernel_level']}) and reference arithmetic"
    )


def evaluation_remarks(result: dict[str, Any]) -> list[str]:
    """What a reader of the table must know beside it."""
    remarks = list(result.get("remarks", ()))
    if result["base"].get("from_cache"):
        remarks.append(
            f"{result['base']['path']}: its hidden states were made by an earlier run, and so was"
            " its tokens/s; --no-cache makes them again"
        )
    for quant in result["quants"]:
        remarks += _quant_remarks(result, quant)
    if result.get("noise_floor"):
        floor = result["noise_floor"]["kld"]["mean"]
        remarks.append(
            "one more rounding to bfloat16 behind each block of the base alone gives a KL of"
            f" {floor:.2g}: what is about that small is noise"
        )
    remarks += [
        f"gate {gate['expr']} on {gate['path']}: {gate_text(gate)}" for gate in result["gates"]
    ]
    return remarks


def gate_text(gate: dict[str, Any]) -> str:
    """pass (0.812)"""
    more = (
        f"; it needs about {gate['more_tokens_needed']} more tokens"
        if gate.get("more_tokens_needed")
        else ""
    )
    return f"{gate['result']} ({gate['value']:.4g}{more})"


def _quant_remarks(result: dict[str, Any], quant: dict[str, Any]) -> list[str]:
    remarks, path, delta = [], quant["path"], quant["ppl_delta_pct"]
    if quant["exec"] == "mixed":
        remarks.append(
            f"{path}: ran through"
            f" {', '.join(f'{name} ({count} Linears)' for name, count in quant['kernels'].items())}"
        )
    if delta["method"] == "t":
        remarks.append(
            f"{path}: Student's t interval, since {result['windows']} windows are too few for a"
            " bootstrap"
        )
    elif delta["method"] == "none":
        remarks.append(
            f"{path}: one window gives no interval; give more text or a smaller --seq-len"
        )
    if delta["smallest_resolvable"]:
        remarks.append(
            f"{path}: this much text resolves differences of about"
            f" {delta['smallest_resolvable']:.2f} %"
        )
    if quant["kld"]["max"] > 0:
        at = quant["kld"]["max_at"]
        context = " ".join(at["context"].split())[-60:]
        remarks.append(
            f"{path}: the largest KL, {quant['kld']['max']:.3g}, is in window {at['window'] + 1} at"
            f" position {at['position']}, behind “{context}”"
        )
    if quant["windows_calibrated_on"]:
        remarks.append(
            f"Warning: {path} was calibrated on text of {quant['windows_calibrated_on']} of these"
            f" {result['windows']} windows; judge it on text that it hasn't seen"
        )
    elif quant["sources_calibrated_on"]:
        remarks.append(
            f"Warning: {path} was calibrated on {', '.join(quant['sources_calibrated_on'])}; judge"
            " it on text that it hasn't seen"
        )
    if quant["weights_only_linears"]:
        remarks.append(
            f"{path}: {len(quant['weights_only_linears'])} fused experts ran with unquantized"
            " inputs"
        )
    if quant["layers"]:
        worst = min(quant["layers"], key=lambda layer: layer["weight_sqnr_db"])
        remarks.append(
            f"{path}: the weight that changed most is {worst['name']},"
            f" {_decibels(worst['weight_sqnr_db'])} dB".replace("exact dB", "exact")
        )
    return remarks


def evaluation_markdown(result: dict[str, Any]) -> str:
    """The tables and what belongs beside them, for a model card."""
    lines = [f"## Quality\n\n{evaluation_title(result)}; {', '.join(result['data']['sources'])}.\n"]
    lines.append(markdown_table(EVALUATION_COLUMNS, evaluation_rows(result)))
    if result["quants"]:
        lines.append(markdown_table(*figure_rows(result)))
    if layer_rows(result):
        lines.append(markdown_table(LAYER_COLUMNS, layer_rows(result)))
    lines += [f"- {remark}" for remark in evaluation_remarks(result)]
    return "\n".join(lines) + "\n"


# ---- compare

COMPARISON_COLUMNS = (
    "A",
    "B",
    "perplexity A",
    "perplexity B",
    "B against A [95 %]",
    "KL B − A [95 %]",
    "same top-1 B − A [95 %]",
    "size B / A",
)


def comparison_rows(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for pair in comparison["pairs"]:
        top1 = {
            key: None if pair["top1_delta"][key] is None else 100 * pair["top1_delta"][key]
            for key in ("value", "low", "high")
        }
        rows.append(
            (
                f"{pair['a']['path']} ({pair['a']['scheme']})",
                f"{pair['b']['path']} ({pair['b']['scheme']})",
                f"{pair['a']['perplexity']:.4f}",
                f"{pair['b']['perplexity']:.4f}",
                interval_text(pair["ppl_delta_pct"]),
                interval_text(pair["kld_delta"], 5, ""),
                interval_text(top1, unit=" points"),
                f"{pair['size_ratio']:.3f}",
            )
        )
    return rows


def comparison_title(comparison: dict[str, Any]) -> str:
    return f"{_text_described(comparison)}, base {comparison['base']['path']}"


def comparison_remarks(comparison: dict[str, Any]) -> Sequence[str]:
    remarks = list(comparison["remarks"])
    for pair in comparison["pairs"]:
        delta = pair["ppl_delta_pct"]
        names = pair["a"]["path"], pair["b"]["path"]
        if delta["low"] is None:
            remarks.append(
                f"{names[1]} against {names[0]}: one window gives no interval; judge both on more"
                " text"
            )
        elif delta["low"] <= 0 <= delta["high"]:
            remarks.append(
                f"{names[1]} against {names[0]}: no difference that this text can show; it resolves"
                f" about {delta['smallest_resolvable']:.2f} %"
            )
        else:
            better = names[1] if delta["value"] < 0 else names[0]
            remarks.append(
                f"{names[1]} against {names[0]}: {better} is better, by more than chance"
            )
    return remarks
