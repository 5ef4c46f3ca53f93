"""``deploy/``: as far as schemas and linters go, without Docker, Kubernetes or Slurm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import psutil
import pytest
import yaml

from tests.waiting import HANGS, until

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|KEY")
FILES = [path for path in sorted(DEPLOY.rglob("*")) if path.is_file() and "locks" not in path.parts]


def check(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return found


def test_scripts_are_sound() -> None:
    check(BIN / "shellcheck", "deploy/install.sh", "deploy/slurm/ideal.sbatch", ".ci/run")


def test_the_images_recipe_is_sound() -> None:
    check(BIN / "hadolint", "--failure-threshold", "warning", "deploy/Dockerfile")


def test_an_image_holds_what_its_recipe_copies() -> None:
    """Everything that is copied is there, and the ignore file lets it through."""
    let = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            *sources, _ = [word for word in line.split()[1:] if not word.startswith("--")]
            for source in sources:
                assert (ROOT / source).exists(), source
                assert any(source == each or source.startswith(f"{each}/") for each in let), source


@pytest.mark.parametrize("name", ["compose.yaml", "compose.code.yaml"])
def test_compose_is_the_schemas(name: str) -> None:
    check(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", f"deploy/{name}")


def test_walls_for_code_are_the_workers_alone() -> None:
    widened = read("compose.code.yaml")["services"]
    assert set(widened) == {name for name in read("compose.yaml")["services"] if name.endswith("worker")}


def test_compose_opens_nothing_to_the_network() -> None:
    ports = [port for service in read("compose.yaml")["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_secrets_are_asked_for_and_never_given() -> None:
    """Compose refuses to start without them; nowhere else is one either."""
    text = (DEPLOY / "compose.yaml").read_text()
    asked = {name for name in re.findall(r"\$\{(\w+)", text) if SECRET.search(name)}
    assert asked == {"RAY_AUTH_TOKEN", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY", "POSTGRES_PASSWORD"}
    for name in asked:
        assert f"${{{name}:?" in text, name
        assert not re.search(rf"\$\{{{name}:?[-+]", text), f"{name} has a default"
    for path in FILES:
        for line in path.read_text().splitlines():
            given = re.match(r"\s*-?\s*(?:export )?(\w*(?:PASSWORD|password|TOKEN|SECRET)\w*)\s*[:=]\s*(\S+)", line)
            if given and not line.lstrip().startswith(("#", ";")):
                assert given[2].startswith(("$", '"$')), f"{path.name}: {line}"


def test_others_images_are_named_by_digest() -> None:
    text = (DEPLOY / "Dockerfile").read_text() + (DEPLOY / "compose.yaml").read_text()
    named = set(re.findall(r"^FROM (\S+) AS|^ *image: (\S+)$", text, re.MULTILINE))
    images = {one or other for one, other in named}
    others = {image for image in images if image != "base" and not image.startswith("ideal")}
    assert len(others) == 2
    assert all(re.fullmatch(r"\S+:[\d.]+\S*@sha256:[0-9a-f]{64}", image) for image in others), others


def test_compose_and_rays_version_are_the_locked_ones() -> None:
    ray = re.search(r"^ray==(\S*)", (DEPLOY / "locks/cpu.txt").read_text(), re.MULTILINE)
    assert ray
    assert read("kuberay/raycluster.yaml")["spec"]["rayVersion"] == ray[1]


def pods() -> dict[str, dict[str, Any]]:
    cluster, job = read("kuberay/raycluster.yaml")["spec"], read("kuberay/rayjob.yaml")["spec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups, "submitter": job["submitterPodTemplate"]}


@pytest.mark.parametrize("name", ["head", "training", "benchmarks", "submitter"])
def test_pods_are_kubernetes_schemas(name: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **pods()[name]}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    assert pod["spec"]["securityContext"]["runAsNonRoot"]


def test_kuberay_lets_in_who_has_its_token_and_the_job_has_it() -> None:
    cluster, job = read("kuberay/raycluster.yaml"), read("kuberay/rayjob.yaml")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    environment = {e["name"]: e for e in pods()["submitter"]["spec"]["containers"][0]["env"]}
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == cluster["metadata"]["name"]
    gpus = {
        n: pods()[n]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for n in ("training", "benchmarks")
    }
    assert gpus == {"training": "8", "benchmarks": "1"}


STUBS = {
    "bin/scontrol": 'printf "node1\\nnode2\\n"',
    "bin/srun": 'while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && node=${1#*=}; shift; done; NODE=$node exec "$@"',
    "home/.venv/bin/ray": 'if [ "$1" = status ]; then exec sed -n "s/^node\\(.\\) ray start.*/ node_\\1/p" "$LOG"; fi\n'
    'echo "$NODE ray $* mode=$RAY_AUTH_MODE token=$RAY_AUTH_TOKEN" >>"$LOG"; exec sleep 600',
    "home/.venv/bin/ideal": 'echo "$NODE ideal $* at=$RAY_ADDRESS token=$RAY_AUTH_TOKEN" >>"$LOG"; exit 3',
}


@pytest.mark.parametrize("arguments", [["my.yaml", "--set", "seed=1"], []])
def test_slurms_script_starts_ray_runs_and_leaves_nothing(tmp_path: Path, arguments: list[str]) -> None:
    """With stand-ins for Slurm's and Ray's commands: who is called where, with one token, and what is left."""
    for name, body in STUBS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_ON_NODE": "4",
        "IDEAL_HOME": str(tmp_path / "home"),
    }
    script = DEPLOY / "slurm" / "ideal.sbatch"
    done = subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, timeout=HANGS)
    if not arguments:
        assert done.returncode == 2
        assert "which config?" in done.stderr
        return
    assert done.returncode == 3, "the run's own status"
    head, worker, run = sorted((tmp_path / "log").read_text().splitlines(), key=lambda line: ("ideal" in line, line))
    token = head.split("token=")[1]
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert token not in script.read_text()
    assert head == f"node1 ray start --head --port=20007 --num-cpus=4 --block mode=token token={token}"
    assert worker == f"node2 ray start --address=node1:20007 --num-cpus=4 --block mode=token token={token}"
    assert run == f"node1 ideal run my.yaml --set seed=1 at=node1:20007 token={token}"
    until(lambda: not left(str(tmp_path / "log")))


def left(log: str) -> list[psutil.Process]:
    """The script's processes that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("LOG") == log and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
