"""The house's rule: imports point one way, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "quantkit"
# Lower ranks know nothing of higher ones.
ORDER = (
    ("errors",),
    ("interrupts",),
    ("formats",),
    ("scheme",),
    ("quantize", "packing", "native"),
    ("arguments",),
    ("cuda_ops",),
    ("ops", "layouts", "statistics"),
    ("figures", "gates", "mixing"),
    ("linear", "scores", "algorithms.smoothing_fit", "algorithms.coordinate_descent"),
    (
        "observers",
        "ranks",
        "algorithms",
        "algorithms.smoothquant",
        "algorithms.gptq",
        "algorithms.rotation",
        "algorithms.scale_search",
        "algorithms.bias_correction",
    ),
    ("data", "checkpoint", "task"),
    ("matrices", "masked"),
    ("model",),
    ("output", "streaming"),
    ("stacked", "states", "measurements", "cache", "weight_map", "budget", "threads", "calls"),
    ("gguf_files", "resuming"),
    ("kept",),
    ("hub", "assignment"),
    ("blockwise", "heads"),
    ("recording", "encoder_decoder"),
    ("runtimes", "experts"),
    ("folding", "plan", "defaults"),
    ("rotating", "advice"),
    ("choosing",),
    ("chosen",),
    ("calibration", "served", "variants"),
    ("finals",),
    ("layers", "verification"),
    ("export", "evaluation", "inspection"),
    ("installing",),
    ("benchmark", "sensitivity"),
    ("report", "doctor", "comparison"),
    ("verdict",),
    ("ranking",),
    ("page", "judgement"),
    ("demo",),
    ("console",),
    ("commands", "commands.judging"),
    ("commands.making",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
WITHOUT_TORCH = ("errors", "interrupts", "formats", "scheme", "console", "commands.judging", "commands.making", "cli")


def imported_modules(path: Path) -> list[tuple[str, bool]]:
    """(module of quantkit, whether at the top of the file) for each import."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "quantkit":
            name = node.module.partition(".")[2]
            found += [(name, node in tree.body)] if name else [(alias.name, node in tree.body) for alias in node.names if alias.name in RANK]
    return found


def modules() -> dict[str, Path]:
    """All modules of the package by their names in it."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


def test_every_module_has_a_place():
    assert set(modules()) == set(RANK)


def test_imports_point_one_way():
    for importer, path in modules().items():
        for name, _ in imported_modules(path):
            assert RANK[name] < RANK[importer], f"{importer} imports {name}"


def test_values_and_command_line_need_no_torch():
    code = f"import sys; import {', '.join(f'quantkit.{name}' for name in WITHOUT_TORCH)}; assert not {{'torch', 'transformers', 'numpy', 'rich'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
