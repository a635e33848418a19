"""The HTML report of `eval`: one page that needs no network, and a small table for notebooks.

The page begins with a verdict and the table of models. These plots follow:

1. the difference to the base model in each window, with the interval of the mean
2. ΔPPL as the text grows
3. the distribution of KL, with the noise floor
4. KL against size
5. the error of each layer, as heat maps with one colour scale

Everything in the plots is in the JSON too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from quantkit.evaluation import metrics
from quantkit.evaluation.html_page import (
    HeatMap,
    HeatScale,
    heat_map,
    remark_view,
    rendered,
    table_view,
    tooltip,
)
from quantkit.evaluation.plots import evaluation_plots, require_matplotlib
from quantkit.evaluation.report import (
    Table,
    decibels_text,
    evaluation_remarks,
    evaluation_title,
    gate_text,
    layer_table,
    metric_table,
    model_table,
)
from quantkit.evaluation.result import Evaluation, LayerError
from quantkit.evaluation.verdict import candidate_sentence, model_names, verdict

# Rows of the heat map: name → names of Linears.
GROUPS = {
    "qkv": (
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "query_key_value",
        "c_attn",
        "Wqkv",
        "in_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
    ),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "wo"),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "w1", "w3"),
    "down": ("down_proj", "fc2", "dense_4h_to_h", "w2"),
}
_AS_GOOD_AS_EXACT = 60.0  # dB, the best value of the colour scale
_WORDS = (
    ("ΔPPL", "change of perplexity compared with the base model; lower is better"),
    ("[95 %]", "95 % interval over windows of text; if it includes 0, the change may be noise"),
    ("KL", "KL(base‖quant), how far the predicted distribution moves; 0 nats is no change"),
    ("p99", "99 % of tokens have a smaller value"),
    ("same top-1", "share of positions at which the most likely token is the base model's"),
    ("bits/weight", "size in bits, divided by the number of the base model's weights"),
    ("dB", "signal-to-quantization-noise ratio; 10 dB more is a tenth of the squared error"),
    ("clipped, underflowing", "share of values beyond the format's range, or rounded to zero"),
    ("noise floor", "effect of one more rounding to bfloat16 after each block of the base model"),
)


def evaluation_html(evaluation: Evaluation) -> str:
    """The page of an evaluation. Raises EvaluationError without matplotlib."""
    require_matplotlib()
    names = model_names(evaluation)
    remarks = [text for text in evaluation_remarks(evaluation) if not text.startswith("gate ")]
    maps, scale, caption = _heat_maps(evaluation, names)
    return rendered(
        "evaluation.html.j2",
        title="quantkit eval",
        version=evaluation.quantkit_version,
        verdict=verdict(evaluation),
        description=evaluation_title(evaluation),
        sources=", ".join(evaluation.data.sources),
        warnings=[text for text in remarks if text.startswith("Warning: ")],
        models=table_view(model_table(evaluation), names),
        candidates=[
            {
                "name": names[quant.path],
                "title": tooltip(quant.path, names),
                "scheme": quant.scheme,
                "text": candidate_sentence(quant),
            }
            for quant in evaluation.quants
        ],
        gates=[
            {
                "expr": gate.expr,
                "result": gate.result,
                "path": gate.path,
                "name": names.get(gate.path, gate.path),
                "text": gate_text(gate).removeprefix(f"{gate.result} ").strip("()"),
            }
            for gate in evaluation.gates
        ],
        plots=evaluation_plots(evaluation, _labels(evaluation, names)) if evaluation.quants else [],
        maps=maps,
        scale=scale,
        map_caption=caption,
        metrics=table_view(metric_table(evaluation), names) if evaluation.quants else None,
        layers=table_view(layer_table(evaluation), names),
        remarks=[remark_view(text, names) for text in remarks if not text.startswith("Warning: ")],
        words=_WORDS if evaluation.quants else _WORDS[5:6],
    )


def _labels(evaluation: Evaluation, names: Mapping[str, str]) -> dict[str, str]:
    """Path → short name, with the scheme where the name doesn't say it."""
    return {
        quant.path: names[quant.path]
        if quant.scheme in names[quant.path]
        else f"{names[quant.path]} ({quant.scheme})"
        for quant in evaluation.quants
    }


# ---- The heat maps.


def _heat_maps(
    evaluation: Evaluation, names: Mapping[str, str]
) -> tuple[list[HeatMap], HeatScale | None, str]:
    """A heat map of each candidate, their common scale, and what they show.

    The maps show outputs where all candidates have their error, because one scale for two kinds of
    errors would compare what can't be compared.
    """
    layers = [layer for quant in evaluation.quants for layer in quant.layers]
    key = "weight_sqnr_db"
    if layers and all(
        any(layer.output_sqnr_db is not None for layer in quant.layers)
        for quant in evaluation.quants
        if quant.layers
    ):
        key = "output_sqnr_db"
    found = [(quant, _worst_of_kinds(quant.layers, key)) for quant in evaluation.quants]
    found = [(quant, kinds) for quant, kinds in found if kinds]
    if not found:
        return [], None, ""
    values = [
        min(value, _AS_GOOD_AS_EXACT)
        for _, kinds in found
        for by_block in kinds.values()
        for value, _ in by_block.values()
    ]
    scale = HeatScale(max(values), min(values), "dB")
    blocks = 1 + max(block for _, kinds in found for each in kinds.values() for block in each)
    labels = _labels(evaluation, names)
    numbers = {id(quant): number for number, quant in enumerate(evaluation.quants)}
    maps = [
        heat_map(f"layers{numbers[id(quant)]}", labels[quant.path], kinds, scale, blocks)
        for quant, kinds in found
    ]
    what = "output" if key == "output_sqnr_db" else "weight"
    caption = (
        f"Signal-to-noise ratio of each layer's {what}, in dB: the lowest of each kind in each"
        " block. A stronger colour is a larger error; all candidates share one scale."
    )
    return maps, scale, caption


def _worst_of_kinds(
    layers: Sequence[LayerError], key: str
) -> dict[str, dict[int, tuple[float, str]]]:
    """Kind of Linear → block → the lowest signal-to-noise ratio of its Linears of that kind, dB,
    with a title that names the Linear.
    """
    found: dict[str, dict[int, tuple[float, str]]] = {kind: {} for kind in GROUPS}
    for layer in layers:
        number = re.search(r"\.(\d+)\.", layer.name)
        leaf = layer.name.rpartition(".")[2]
        kind = next((kind for kind, leaves in GROUPS.items() if leaf in leaves), None)
        value = getattr(layer, key)
        if number is None or kind is None or value is None or math.isnan(value):
            continue
        if value < found[kind].get(int(number[1]), (math.inf, ""))[0] or not found[kind].get(
            int(number[1])
        ):
            text = decibels_text(value)
            title = f"{layer.name}: {text}{'' if text == 'exact' else ' dB'}"
            found[kind][int(number[1])] = value, title
    return {kind: blocks for kind, blocks in found.items() if blocks}


# ---- For notebooks.

_FRAGMENT_METRICS = (metrics.PERPLEXITY, metrics.PPL_DELTA, metrics.KLD, metrics.TOP1_AGREEMENT)


def evaluation_fragment(evaluation: Evaluation) -> str:
    """The verdict and a small table as a piece of HTML, for notebooks. It needs no matplotlib."""
    found, table = verdict(evaluation), model_table(evaluation)
    wanted = _fragment_columns(table)
    small = Table(
        [table.columns[number] for number in wanted],
        [[row[number] for number in wanted] for row in table.rows],
        [place for place, number in enumerate(wanted) if number in table.right],
    )
    return rendered(
        "fragment.html.j2",
        headline=found.headline,
        sentences=found.sentences,
        table=table_view(small, model_names(evaluation)),
    )


def _fragment_columns(table: Table) -> list[int]:
    """The columns of a few metrics, without those that are empty because there is no candidate."""
    shown = {metric.columns[0].heading for metric in _FRAGMENT_METRICS}
    wanted = {"model", "scheme", "size", *shown}
    return [
        number
        for number, column in enumerate(table.columns)
        if column in wanted and any(row[number] for row in table.rows)
    ]
