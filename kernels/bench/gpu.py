"""The campaign for a GPU: build, check, measure and evaluate the CUDA kernels, in under nine
minutes and without a network. `make gpu` runs it.

    python kernels/bench/gpu.py [-o DIR] [--seconds 520] [--libraries DIR] [--model DIR] [--only
    STAGE,...]

Each stage is a process of its own with a time limit: one that hangs or fails costs its own results
alone, and what it said is kept. DIR/gpu.json and DIR/gpu.md are written anew after every stage. The
package runs from this source tree with whatever torch and transformers Python has; nothing is
installed.

--libraries: a folder with libquantkit_cuda.so (and libquantkit_cpu.so), built elsewhere, instead of
building here.
--model: a checkpoint, such as SmolLM2-135M's, that is evaluated too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
BENCH, TESTS = ROOT / "kernels" / "bench", ROOT / "tests"
STAGES = ("build", "small", "tests", "speed", "sanitizer", "eval")
# Seconds that each may take at most; what is left of the whole counts too.
LIMITS = {"build": 150, "small": 60, "tests": 150, "speed": 200, "sanitizer": 60, "eval": 120}
SMALL_CASES = (
    "quantize_rows",
    "quantize_kv",
    "dequantize",
    "int8",
    "fp8",
    "fp8-block",
    "int8-weight",
    "fp8-weight",
)
TAIL = 3000  # characters of a stage's output that are kept
# What quantkit records of files is hashed by blake3; where that package is missing another hash
# serves here, since nothing outlasts the campaign.
BLAKE3 = """import hashlib


class blake3:
    AUTO = 0

    def __init__(self, data=b"", **_):
        self._hash = hashlib.blake2b(data, digest_size=32)

    def update(self, data):
        self._hash.update(data)
        return self

    def update_mmap(self, path):
        with open(path, "rb") as file:
            while part := file.read(1 << 24):
                self._hash.update(part)
        return self

    def hexdigest(self):
        return self._hash.hexdigest()

    def digest(self):
        return self._hash.digest()
"""

# Where quantkit is installed editable, its finder would come before PYTHONPATH.
SITECUSTOMIZE = """import sys

editable = {"ScikitBuildRedirectingFinder", "_EditableFinder"}
sys.meta_path[:] = [
    finder
    for finder in sys.meta_path
    if not editable & {type(finder).__name__, getattr(finder, "__name__", "")}
]
"""


class Campaign:
    def __init__(
        self, output: Path, seconds: float, libraries: Path | None, model: Path | None
    ) -> None:
        self.output, self.end, self.libraries, self.model = (
            output,
            time.monotonic() + seconds,
            libraries,
            model,
        )
        self.folder = Path(tempfile.mkdtemp(prefix="quantkit-gpu-"))
        self.site = self.folder / "site"
        paths = [str(self.site), str(TESTS / "support")]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.results: dict[str, Any] = {"stages": {}, "speed": [], "eval": []}

    def command(self, command: list[str], limit: float) -> dict[str, Any]:
        """Run it in a process group of its own, which ends with the limit."""
        began = time.monotonic()
        limit = max(1.0, min(limit, self.end - began))
        log = tempfile.TemporaryFile()  # a pipe would stay open with a grandchild that hangs
        try:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )
        except OSError as error:
            return {"status": "failed", "seconds": 0.0, "output": str(error)}
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = "timed out"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)  # a kernel that hangs may keep it longer
        log.seek(0)
        return {
            "status": status,
            "seconds": round(time.monotonic() - began, 1),
            "output": log.read().decode(errors="replace")[-TAIL:],
        }

    def side_by_side(
        self, commands: dict[str, list[str]], limit: float, each: float, workers: int
    ) -> dict[str, Any]:
        """Several commands, some at a time; the stage is ok if all are."""
        began = time.monotonic()

        def run(item: tuple[str, list[str]]) -> tuple[str, dict[str, Any]]:
            left = limit - (time.monotonic() - began)
            return item[0], (
                self.command(item[1], min(each, left))
                if left > 2
                else {"status": "no time left", "seconds": 0.0, "output": ""}
            )

        with ThreadPoolExecutor(workers) as pool:
            parts = dict(pool.map(run, commands.items()))
        bad = [name for name, part in parts.items() if part["status"] != "ok"]
        status = "ok" if not bad else f"{len(bad)} of {len(parts)} not ok: {', '.join(bad)}"
        return {"status": status, "seconds": round(time.monotonic() - began, 1), "parts": parts}

    def write(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "gpu.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.output / "gpu.md").write_text(table_of(self.results))

    def run(self, stages: list[str]) -> int:
        self.results["machine"] = machine()
        shutil.copytree(
            ROOT / "quantkit",
            self.site / "quantkit",
            ignore=shutil.ignore_patterns("__pycache__", "*.so*"),
        )
        (self.site / "sitecustomize.py").write_text(SITECUSTOMIZE)
        if importlib.util.find_spec("blake3") is None:
            (self.site / "blake3.py").write_text(BLAKE3)
        for stage in stages:
            try:
                result = (
                    getattr(self, stage)(LIMITS[stage])
                    if time.monotonic() < self.end - 5
                    else {"status": "no time left", "seconds": 0.0}
                )
            except (
                Exception
            ) as error:  # a fault of the campaign itself must not lose what the others found
                result = {"status": f"failed: {type(error).__name__}: {error}", "seconds": 0.0}
            self.results["stages"][stage] = result
            print(f"{stage}: {result['status']} ({result['seconds']} s)", flush=True)
            self.write()
        shutil.rmtree(self.folder, ignore_errors=True)
        return int(any(result["status"] != "ok" for result in self.results["stages"].values()))

    # ---- The stages.

    def build(self, limit: float) -> dict[str, Any]:
        built = self.libraries or self.folder / "build"
        result: dict[str, Any] = {"status": "ok", "seconds": 0.0, "output": f"taken from {built}"}
        if not self.libraries:
            architecture = self.results["machine"].get("architecture")
            only = (
                [
                    f"-DQK_CUDA_ARCHITECTURES={'90a' if architecture == '90' else architecture}",
                    "-DQK_CUDA_PTX=",
                ]
                if architecture
                else []
            )
            generator = ["-G", "Ninja"] if shutil.which("ninja") else []
            result = self.command(
                ["cmake", "-S", str(ROOT / "kernels"), "-B", str(built), *generator, *only], limit
            )
            if result["status"] == "ok":
                result = self.command(
                    ["cmake", "--build", str(built), "--parallel", str(os.cpu_count() or 2)], limit
                )
        found = [
            path
            for name in ("libquantkit_cuda.so", "libquantkit_cuda.so.txt", "libquantkit_cpu.so")
            if (path := built / name).is_file()
        ]
        for path in found:
            shutil.copy(path, self.site / "quantkit" / path.name)
        if "libquantkit_cuda.so" not in [path.name for path in found]:
            result["status"] = "failed: no libquantkit_cuda.so"
        return result

    def small(self, limit: float) -> dict[str, Any]:
        return self.side_by_side(
            {name: [sys.executable, str(BENCH / "gpu_small.py"), name] for name in SMALL_CASES},
            limit,
            45,
            4,
        )

    def tests(self, limit: float) -> dict[str, Any]:
        """Each test function in a process, so that a kernel that hangs loses no other's."""
        path = TESTS / "kernels" / "test_cuda.py"
        names = [
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef)
            and node.name.startswith("test_")
            and (
                "machine" in [argument.arg for argument in node.args.args]
                or "on_device" in [getattr(mark, "id", "") for mark in node.decorator_list]
            )
        ]
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "--maxfail=3",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(ROOT),
        ]
        commands = {name: [*pytest, "-k", "not emulated", f"{path}::{name}"] for name in names}
        result = self.side_by_side(commands, limit, 90, min(6, os.cpu_count() or 2))
        for part in result["parts"].values():
            # Without a device all cases are skipped, which pytest takes for success.
            if (
                part["status"] == "ok"
                and "passed" not in part["output"]
                and "." not in part["output"].split("[")[0]
            ):
                part["status"] = "no test ran"
            if part["status"] == "ok":
                part["output"] = part["output"].strip().splitlines()[-1:]
        bad = [name for name, part in result["parts"].items() if part["status"] != "ok"]
        return result | {
            "status": "ok" if not bad else f"{len(bad)} of {len(names)} not ok: {', '.join(bad)}"
        }

    def speed(self, limit: float) -> dict[str, Any]:
        lines = self.folder / "speed.jsonl"
        seconds = max(10.0, min(limit, self.end - time.monotonic()) - 15)
        result = self.command(
            [sys.executable, str(BENCH / "gpu_speed.py"), str(lines), "--seconds", str(seconds)],
            limit,
        )
        if lines.is_file():
            self.results["speed"] = [
                json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")
            ]
        return result

    def sanitizer(self, limit: float) -> dict[str, Any]:
        places = [
            shutil.which("compute-sanitizer"),
            "/usr/local/cuda/bin/compute-sanitizer",
            "/usr/local/cuda/compute-sanitizer/compute-sanitizer",
        ]
        tool = next((place for place in places if place and Path(place).is_file()), None)
        if tool is None:
            return {"status": "skipped: no compute-sanitizer", "seconds": 0.0}
        script = [sys.executable, str(BENCH / "gpu_small.py")]
        commands = {
            f"{check} {name}": [tool, "--tool", check, "--error-exitcode", "9", *script, name]
            for check in ("memcheck", "racecheck", "synccheck")
            for name in SMALL_CASES
        }
        return self.side_by_side(commands, limit, 50, min(6, os.cpu_count() or 2))

    def eval(self, limit: float) -> dict[str, Any]:
        result = self.folder / "eval.json"
        done = self.command(
            [sys.executable, str(BENCH / "gpu_eval.py"), str(self.folder / "eval"), str(result)],
            limit,
        )
        if result.is_file():
            self.results["eval"].append(json.loads(result.read_text()))
        if self.model:
            given = self.folder / "eval-given.json"
            more = self.command(
                [
                    sys.executable,
                    str(BENCH / "gpu_eval.py"),
                    str(self.folder / "eval-given"),
                    str(given),
                    "--model",
                    str(self.model.resolve()),
                ],
                limit,
            )
            if given.is_file():
                self.results["eval"].append(json.loads(given.read_text()))
            done = {
                "status": done["status"] if more["status"] == "ok" else more["status"],
                "seconds": done["seconds"] + more["seconds"],
                "parts": {"random": done, "given": more},
            }
        return done


def machine() -> dict[str, Any]:
    """What the figures depend on. In a process of its own: this one never touches the GPU."""
    code = (
        "import json, platform, torch\nfound = {'python': platform.python_version(), 'torch':"
        " torch.__version__, 'cuda': torch.version.cuda}\ntry:\n import transformers;"
        " found['transformers'] = transformers.__version__\nexcept ImportError: pass\nif"
        " torch.cuda.is_available():\n p = torch.cuda.get_device_properties(0)\n found |="
        " {'device': p.name, 'architecture': f'{p.major}{p.minor}', 'multiprocessors':"
        " p.multi_processor_count, 'l2_bytes': p.L2_cache_size, 'memory_bytes':"
        " p.total_memory}\nprint(json.dumps(found))\n"
    )
    found: dict[str, Any] = {}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=90
        )
        found = (
            json.loads(done.stdout.splitlines()[-1])
            if done.returncode == 0
            else {"error": done.stderr[-500:]}
        )
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        found["driver"] = driver.stdout.strip()
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError) as error:
        found["error"] = str(error)
    return found


# ---- The table.


def table_of(results: dict[str, Any]) -> str:
    described = results.get("machine", {})
    text = "# The CUDA kernels on a GPU\n\nWritten by `make gpu` (kernels/bench/gpu.py).\n\n"
    text += (
        "".join(f"- {name}: {value}\n" for name, value in described.items())
        + "\n## Stages\n\n| stage | result | seconds |\n| --- | --- | --- |\n"
    )
    for stage, result in results["stages"].items():
        text += f"| {stage} | {result['status']} | {result['seconds']} |\n"
    for stage, result in results["stages"].items():
        failures = (
            {stage: result}
            if "parts" not in result
            else {f"{stage}, {name}": part for name, part in result["parts"].items()}
        )
        for name, part in failures.items():
            if part["status"] != "ok" and part.get("output"):
                text += (
                    f"\n{name}: {part['status']}\n\n```text\n{str(part['output'])[-1200:]}\n```\n"
                )
    for judged in results["eval"]:
        text += (
            f"\n## eval: {judged['model']}\n\n| scheme | perplexity, kernels | perplexity,"
            " reference | apart | allowed |\n| --- | --- | --- | --- | --- |\n"
        )
        for found in judged["schemes"]:
            text += (
                f"| {found['scheme']} | {found['kernel']['perplexity']:.6f} |"
                f" {found['reference']['perplexity']:.6f} | {found['apart']:.2g} |"
                f" {found['bound']:.2g} |\n"
            )
    return text + speed_tables(results["speed"])


def speed_tables(figures: list[dict[str, Any]]) -> str:
    if not figures:
        return "\nNo figures were measured.\n"
    ceilings = next((figure for figure in figures if figure["what"] == "ceilings"), {})
    text = "\n## Ceilings measured in this run\n\n" + "".join(
        f"- {name}: {_number(value)}\n" for name, value in ceilings.items() if name != "what"
    )
    text += (
        "\nMicroseconds are medians of replays of a CUDA graph, with the least and the most. Times:"
        " how many times as fast as that the kernel is. Shares are of the ceilings above.\n"
    )
    copy = ceilings.get("copy_gb_per_s")
    for what in dict.fromkeys(figure["what"] for figure in figures if figure["what"] != "ceilings"):
        text += (
            f"\n## {what}\n\n| tokens | out × in | µs (least, most) | TFLOP/s | GB/s | share |"
            " against |\n| --- | --- | --- | --- | --- | --- | --- |\n"
        )
        for figure in figures:
            if figure["what"] != what:
                continue
            peak = ceilings.get(
                "int8_tflops"
                if what == "int8"
                else "bfloat16_tflops"
                if what.endswith("-weight")
                else "fp8_fast_tflops"
            )
            bound_by_memory = "tflops" not in figure or figure["tokens"] <= 16
            share = (
                figure["gb_per_s"] / copy
                if bound_by_memory and copy
                else (
                    figure["tflops"] / peak
                    if not bound_by_memory and isinstance(peak, float)
                    else None
                )
            )
            rivals = "; ".join(
                (
                    f"{name}: {rival['microseconds'] / figure['microseconds']:.2f}×"
                    if "error" not in rival
                    else f"{name}: {rival['error'][:60]}"
                )
                for name, rival in figure["rivals"].items()
            )
            shape = (
                f"{figure['out_features']} × {figure['in_features']}"
                if "out_features" in figure
                else str(figure["in_features"])
            )
            text += (
                f"| {figure['tokens']} | {shape} | {figure['microseconds']:.1f}"
                f" ({figure['least']:.1f}, {figure['most']:.1f}) | {_number(figure.get('tflops'))}"
                f" | {figure['gb_per_s']:.0f} | {'' if share is None else f'{share:.0%}'} |"
                f" {rivals} |\n"
            )
    return text


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.0f}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=BENCH / "results")
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--libraries", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument(
        "--only",
        default=",".join(STAGES),
        help="stages, with commas between them; build is needed by all others",
    )
    arguments = parser.parse_args()
    stages = arguments.only.split(",")
    unknown = set(stages) - set(STAGES)
    if unknown:
        parser.error(
            f"unknown stage {', '.join(sorted(unknown))}; choose among {', '.join(STAGES)}"
        )
    libraries = arguments.libraries.resolve() if arguments.libraries else None
    return Campaign(arguments.output.resolve(), arguments.seconds, libraries, arguments.model).run(
        stages
    )


if __name__ == "__main__":
    sys.exit(main())
