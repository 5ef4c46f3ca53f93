"""What other trainers are given is what SFT trained on, and their own loaders read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset, interleave_datasets, load_dataset, load_from_disk
from rich.console import Console
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config
from trl.scripts.utils import DatasetMixtureConfig, get_dataset

from ideal.config.config import Config
from ideal.config.file import load
from ideal.data.chat import ChatEncoder
from ideal.errors import BadInput
from ideal.mixture import draw
from ideal.model.base import load_tokenizer
from ideal.training.trainer import plan
from service.export import base_of, domains, export, trainers
from service.outcome import Outcome
from service.store.layout import MODEL
from service.store.store import RECORD
from tests.service.conftest import tree
from tests.tiny import make_model

VOLUMES = {"math": 30, "chat": 7}
POOL = 20
OTHERS = {
    "llama-factory": ["llamafactory==0.9.5", "omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3"],
    "axolotl": [
        "axolotl==0.19.0",
        "axolotl-contribs-lgpl==0.0.7",
        "axolotl-contribs-mit==0.0.6",
        *("addict==2.4.0", "art==6.5", "colorama==0.4.6", "distro==1.9.0", "fire==0.7.1"),
        *("posthog==7.91.1", "termcolor==3.3.0"),
    ],
}
"""Other trainers' packages, with what they import that isn't here."""


@pytest.fixture
def run(tmp_path: Path, outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Outcome]:
    """A recorded run on files of its own; math is drawn once and a half."""
    made = tree(tmp_path / "store")
    for number, domain in enumerate(made["domains"]):
        for part, start in (("train", 0), ("reference", 500)):
            path = tmp_path / f"{domain['name']}-{part}.jsonl"
            questions = range(number * 1000 + start, number * 1000 + start + POOL)
            rows = [{"prompt": f"Say {n} twice.", "completion": f"{n} {n}"} for n in questions]
            path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "empty", "completion": ""}])))
            domain[part] = {"files": [str(path)]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**made, "max_rejected": 0.5, "sft": {"batch_examples": 2, "lora": {"rank": 8}}}))
    config = load(path)
    final = outcome.equilibrium
    make_model(final.sft.folder / MODEL)
    (final.sft.folder / RECORD).write_text(json.dumps({"fields": {"base": "abc"}}))
    final.volumes = dict(VOLUMES)
    for found in outcome.data.result.values():
        found["pool"] = POOL
    monkeypatch.setattr("service.export.replay", lambda *_: outcome)
    return config, outcome


@pytest.fixture
def folder(run: tuple[Config, Outcome], tmp_path: Path) -> Path:
    export(run[0], tmp_path / "out", Console(quiet=True))
    return tmp_path / "out"


def test_stopped_in_the_middle_it_leaves_no_half_and_can_be_repeated(
    run: tuple[Config, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("service.export.trainers", stopped)
        with pytest.raises(KeyboardInterrupt):
            export(run[0], tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()
    export(run[0], tmp_path / "out", Console(quiet=True))
    assert (tmp_path / "out" / "trl.yaml").exists()
    assert not list(tmp_path.glob(".*"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_examples_are_those_of_sfts_first_epoch_in_their_order(run: tuple[Config, Outcome], folder: Path) -> None:
    config, outcome = run
    model = outcome.equilibrium.sft.folder / MODEL
    read = {domain.name: domain.train for domain in domains(config, model)}
    encoder = ChatEncoder(load_tokenizer(model), config.model.max_tokens)
    items = [read[name][i] for name, v in VOLUMES.items() for i in draw(POOL, v, config.seed, name)]
    trained = [items[position] for step in plan(VOLUMES, config.sft, config.seed) for position in step.picks]
    exported = [encoder.encode(row["messages"])[0] for row in lines(folder / "train.jsonl")]
    assert len(exported) == sum(VOLUMES.values())
    for (ids, supervised), example in zip(trained, exported, strict=False):
        assert ids.tolist() == example.ids
        assert supervised.tolist() == example.supervised
    counts = [row["domain"] for row in lines(folder / "train.jsonl")]
    assert {name: counts.count(name) for name in VOLUMES} == VOLUMES


def test_all_forms_hold_the_same(folder: Path) -> None:
    rows = lines(folder / "train.jsonl")
    assert load_from_disk(folder / "dataset").to_list() == rows
    assert Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(folder / "cache")).to_list() == rows


def test_pools_and_probabilities_give_the_mixture(folder: Path) -> None:
    mixture = json.loads((folder / "mixture.json").read_text())
    assert mixture["volumes"] == VOLUMES
    pools = [
        load_dataset(
            "json", data_files=str(folder / "domains" / f"{name}.jsonl"), split="train", cache_dir=str(folder / "c")
        )
        for name in mixture["probabilities"]
    ]
    assert [len(pool) for pool in pools] == [POOL, POOL]
    many = interleave_datasets(
        [pool.select(np.arange(1000) % POOL) for pool in pools],
        probabilities=list(mixture["probabilities"].values()),
        seed=0,
    )
    share = np.mean([name == "math" for name in many["domain"]])
    assert share == pytest.approx(30 / 37, abs=0.03)


def test_trl_reads_its_file(folder: Path, run: tuple[Config, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    arguments = ["--config", "trl.yaml", "--use_cpu", "true", "--report_to", "none"]
    _, training, model, mixture = parser.parse_args_and_config(arguments)
    assert get_dataset(mixture)["train"].to_list() == lines(folder / "train.jsonl")
    sft = run[0].sft
    assert training.learning_rate == sft.learning_rate
    assert training.gradient_accumulation_steps * training.per_device_train_batch_size == sft.batch_examples
    steps = len(plan(VOLUMES, sft, 0))
    assert training.get_warmup_steps(steps) == round(steps * sft.warmup) > 0
    assert model.model_name_or_path == base_of(*run)
    adapters = get_peft_config(model)
    assert adapters is not None
    assert (adapters.r, adapters.lora_alpha, adapters.lora_dropout) == (8, 32, 0.0)
    assert adapters.target_modules == "all-linear"


def test_without_adapters_each_trainer_trains_all_weights(run: tuple[Config, Outcome]) -> None:
    whole = run[0].model_copy(update={"sft": run[0].sft.model_copy(update={"lora": None})})
    made = trainers(whole, "/models/own", 10)
    assert made["llama-factory.yaml"]["finetuning_type"] == "full"
    assert not [key for tree in made.values() for key in tree if "lora" in key or key in ("adapter", "use_peft")]


def interpreter(folder: Path, packages: list[str]) -> Path:
    """Python with another trainer's code over ours; its own pins, of older versions of what is here, are left out."""
    venv.create(folder)
    (places,) = folder.glob("lib/python*/site-packages")
    (places / "ours.pth").write_text(sysconfig.get_path("purelib"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(places), *packages]
    subprocess.run(install, check=True)
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tool", OTHERS)
def test_other_trainers_learn_the_same_tokens(
    tool: str, folder: Path, run: tuple[Config, Outcome], tmp_path: Path
) -> None:
    """By their own loaders: the same ids, and loss on the same of them, but for the line break behind the end token."""
    base = Path(base_of(*run))
    make_model(base)
    python = interpreter(tmp_path / "environment", OTHERS[tool])
    quiet = {"DISABLE_VERSION_CHECK": "1", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **quiet, "HF_HOME": str(tmp_path / "cache")}
    command = [python, Path(__file__).with_name("other_trainers.py"), tool]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    read = json.loads(ended.stdout.splitlines()[-1])
    encoder = ChatEncoder(load_tokenizer(base), run[0].model.max_tokens)
    ours = sorted(
        (e.ids, e.supervised) for row in lines(folder / "train.jsonl") for e in encoder.encode(row["messages"])
    )
    theirs = sorted((ids, [label != -100 for label in labels]) for ids, labels in read["rows"])
    assert len(theirs) == len(ours) == sum(VOLUMES.values())
    for (ids, learned), (wanted, supervised) in zip(theirs, ours, strict=True):
        end = 1 + max(place for place, is_one in enumerate(supervised) if is_one)
        assert ids == wanted
        assert learned[:end] == supervised[:end]
        assert len(ids) <= end + 1
    assert (read["learning_rate"], read["batch"]) == (run[0].sft.learning_rate, run[0].sft.batch_examples)
    assert read["adapters"] == [8, 32, 0.0, "all linear"]


def test_nothing_is_overwritten_and_changed_sources_are_refused(run: tuple[Config, Outcome], folder: Path) -> None:
    config, _ = run
    with pytest.raises(BadInput, match="isn't an empty folder"):
        export(config, folder, Console(quiet=True))
    files = config.domains[0].train.files
    assert files
    Path(files[0]).write_text(Path(files[0]).read_text().splitlines()[0] + "\n")
    with pytest.raises(BadInput, match="1 usable rows now, 20 in the run"):
        export(config, folder.parent / "other", Console(quiet=True))
    assert not (folder.parent / "other").exists()


def test_before_the_first_iteration_there_is_nothing(config: Config, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="run it first"):
        export(config, tmp_path / "out", Console(quiet=True))


def test_a_model_that_the_project_made_is_named_by_its_folder(run: tuple[Config, Outcome]) -> None:
    config, outcome = run
    assert config.model.source == "smollm2"
    assert base_of(config, outcome) == str(config.root / "stages/model/abc/model")
    other = config.model_copy(update={"model": config.model.model_copy(update={"source": "/models/own"})})
    assert base_of(other, outcome) == "/models/own"
