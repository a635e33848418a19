"""The house's rule: imports point one way, from room to room and from file to file, and the command
line starts without torch.
"""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "quantkit"
# A room knows those before it.
ROOMS = (
    "errors",
    "schemes",
    "ops",
    "checkpoint",
    "data",
    "models",
    "algorithms",
    "calibration",
    "exporter",
    "evaluation",
    "layer_sensitivity",
    "api",
    "cli",
)
WITHOUT_TORCH = (
    "errors",
    "schemes.number_formats",
    "schemes.pattern",
    "schemes.recipe",
    "schemes.scheme",
    "schemes.serving",
    "checkpoint.formats",
    "checkpoint.run_control",
    "cli.console",
    "cli.options",
    "cli.main",
)


def modules() -> dict[str, Path]:
    """All modules of the package by their names in it; the package itself is the empty name."""
    paths = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in paths.items()}


def imported_modules(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of quantkit that a file imports, at its top, in functions and for type checkers.
    Of a room's names those that its `__init__` has.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.partition(".")[2]
                for alias in node.names
                if alias.name.split(".")[0] == "quantkit"
            }
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module.split(".")[0] == "quantkit":
                base = node.module.partition(".")[2]
                inner = [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]
                found |= {name if name in known else base for name in inner}
    return found - {""}


# A result's methods that make a page or another result of it use files that know its type.
METHODS_OF_RESULTS = {
    "evaluation.result": {"evaluation.html", "evaluation.report"},
    "layer_sensitivity.result": {"layer_sensitivity.advice", "layer_sensitivity.html"},
}


def imports() -> dict[str, set[str]]:
    known = modules()
    return {
        name: imported_modules(path, known) - METHODS_OF_RESULTS.get(name, set())
        for name, path in known.items()
    }


def test_every_file_is_in_a_room():
    assert {name.split(".")[0] for name in modules()} - {"", "__main__"} == set(ROOMS)


def test_rooms_use_only_rooms_before_them():
    for importer, imported in imports().items():
        if importer in ("", "__main__"):
            continue
        room = importer.split(".")[0]
        for name in imported:
            assert ROOMS.index(name.split(".")[0]) <= ROOMS.index(room), (
                f"{importer} imports {name}"
            )


def test_files_import_each_other_in_no_circle():
    graph, finished = imports(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in finished:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


def test_no_file_imports_its_own_room():
    for importer, imported in imports().items():
        assert importer.split(".")[0] not in imported, f"{importer} imports its room: name the file"


def test_values_and_command_line_need_no_torch():
    code = (
        f"import sys; import {', '.join(f'quantkit.{name}' for name in WITHOUT_TORCH)}; assert not"
        " {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
