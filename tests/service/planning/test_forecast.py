"""``ideal plan`` says what fits and what doesn't, for a machine that isn't there, and starts nothing."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoConfig

from ideal.config.config import Config
from ideal.config.file import load
from ideal.errors import BadInput
from service.cluster.cluster import Cluster
from service.planning.forecast import forecast, read_bytes, read_work
from service.planning.memory import Sizes
from service.planning.times import ABSENT_GPU, Work, seconds

CONFIGS = Path(__file__).resolve().parents[3] / "jobs" / "configs"
SHAPES = CONFIGS / "shapes"
EIGHT = Cluster(cpus=64, gpus=8, nodes=1, sft_workers=8, sft_cpus=1, influence_workers=8)
WORK = Work([1000, 3000], 400, 256)


@pytest.fixture(scope="module")
def paper() -> Config:
    return load(CONFIGS / "llama-3.2-1b.yaml", ["resources.batch_tokens=2048"]).decided("bf16")


@pytest.fixture(scope="module")
def sizes(paper: Config) -> Sizes:
    return Sizes.of(AutoConfig.from_pretrained(SHAPES / "llama-3.2-1b.json"), paper.influence.layers)


def printed(config: Config, model: Path, **options: object) -> str:
    out = io.StringIO()
    forecast(config, Console(file=out, width=200), model=str(model), **options)  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("llama-3.2-1b", 1_235_814_400), ("llama-3.2-3b", 3_212_749_824), ("llama-3.1-8b", 8_030_261_248)],
)
def test_shapes_are_the_published_ones(model: str, parameters: int) -> None:
    assert Sizes.of(AutoConfig.from_pretrained(SHAPES / f"{model}.json"), ["*.mlp.*"]).parameters == parameters


def test_a_model_that_one_worker_cannot_hold_is_sharded(paper: Config) -> None:
    out = printed(paper, SHAPES / "llama-3.1-8b.json", gpus=8, gpu_memory="80GB")
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    for stage in ("SFT, sharded over 8", "reference loss", "influence: pass", "influence: solve"):
        assert "doesn't" not in rows[stage]
        assert "fits" in rows[stage]
    assert "not predicted" in rows["benchmarks"]
    assert "assumed, not measured" in out
    assert "measured here" not in out
    assert "D0 to D2" in out
    assert "sharded" not in printed(paper, SHAPES / "llama-3.2-1b.json", gpus=8, gpu_memory="80GB")


def test_what_does_not_fit_is_a_row_and_the_others_are_still_there(paper: Config) -> None:
    out = printed(paper, SHAPES / "llama-3.1-8b.json", gpus=1, gpu_memory="80GB")
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert "doesn't fit" in rows["SFT"], "one worker has none to share with"
    assert "fits" in rows["reference loss"]
    assert "D0 to D2" not in out  # no sum over stages that can't run


def test_a_forward_pass_that_is_too_large_comes_with_one_that_fits(paper: Config) -> None:
    large = paper.model_copy(update={"resources": paper.resources.model_copy(update={"batch_tokens": 8192})})
    out = printed(large, SHAPES / "llama-3.1-8b.json", gpus=8, gpu_memory="80GB")
    assert "influence fits with --set resources.batch_tokens=4096" in out


def test_this_machine_is_measured(config: Config, tiny_model: Path) -> None:
    out = printed(config, tiny_model)
    assert "measured here" in out
    assert "computed in fp32; measured here: products in bf16 " in out
    assert "of each GPU" not in out
    assert "D0 to D3 without benchmarks" in out


def test_time_follows_the_work_and_the_machine(paper: Config, sizes: Sizes) -> None:
    def taken(joint: bool = False, solver: str = "kfac", **changes: object) -> dict[str, float]:
        settings = {"joint": joint, "solver": solver}
        config = paper.model_copy(update={"influence": paper.influence.model_copy(update=settings)})
        work = replace(WORK, tokens=changes.pop("tokens", 256))  # type: ignore[arg-type]
        blocks = changes.pop("blocks", 1)
        sharded = bool(changes.pop("sharded", False))
        rates = replace(ABSENT_GPU, **changes)  # type: ignore[arg-type]
        return vars(seconds(config, sizes, EIGHT, blocks, work, rates, rates, sharded))  # type: ignore[arg-type]

    once, longer, slower, cut = taken(), taken(tokens=512), taken(inverse=1e12), taken(blocks=4)
    assert longer["reference"] == pytest.approx(2 * once["reference"])
    assert longer["influence_pass"] == pytest.approx(2 * once["influence_pass"])
    assert longer["influence_solve"] == once["influence_solve"]
    assert slower["influence_solve"] > 1.8 * once["influence_solve"]
    assert taken(solver="ekfac")["influence_solve"] > 5 * once["influence_solve"], "eigenvectors cost more"
    assert once["influence_pass"] < cut["influence_pass"] < 4 * once["influence_pass"]  # fewer shards, fewer layers
    assert once["reference"] == pytest.approx(400 * 256 * 2 * 1_235_748_864 / 400e12, rel=1e-3)

    assert taken(sharded=True, link=1e30)["sft"] == pytest.approx(taken(link=1e30)["sft"])
    assert taken(sharded=True, link=1e9)["sft"] >= taken(link=1e9)["sft"]

    together, longer = taken(joint=True), taken(joint=True, tokens=512)
    assert together["influence_pass"] == once["influence_pass"]
    assert once["influence_solve"] < together["influence_solve"] < longer["influence_solve"]


def test_examples_come_from_the_config_and_what_it_does_not_say_is_named(paper: Config, config: Config) -> None:
    work, notes = read_work(paper, 300)
    assert work == Work([7000, 18_000, 10_000, 50_000], 3 * 500 + 500, 300)
    assert "domains.reasoning.train 10000" in notes[1]
    assert read_work(config, 9) == (Work([12, 6], 24, 9), ["assumed: 9 tokens in an example (--tokens-per-example)"])


def test_sizes_and_models_that_are_none_are_bad_input(paper: Config, tmp_path: Path) -> None:
    assert read_bytes("80GB") == 80 * 10**9
    assert read_bytes("7.5 GiB") == 7.5 * 2**30
    with pytest.raises(BadInput, match="gpu-memory"):
        read_bytes("lots")
    with pytest.raises(BadInput, match="--model"):
        printed(paper, tmp_path / "nothing.json", gpus=8)
