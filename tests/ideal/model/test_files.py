"""What a model's folder may bring: weights and a template, and no code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ideal.config.inputs import ModelConfig
from ideal.errors import BadInput
from ideal.model.base import check_tensors, load_model, load_tokenizer, materialise, shapes
from ideal.model.files import local_folder


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A model with Python beside it that its settings name, and that leaves a mark."""
    made = tmp_path / "model"
    shutil.copytree(tiny_model, made)
    (made / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Own: pass\n")
    return made


def name_code(folder: Path, file: str, **settings: object) -> None:
    written = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**written, **settings}))


def test_an_architecture_of_its_own_is_refused_and_nobody_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name_code(folder, "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    for load in (local_folder, shapes):
        with pytest.raises(BadInput, match="Python of its own"):
            load(ModelConfig(source=str(folder)))
    assert not (tmp_path / "mark").exists()
    assert "y/N" not in capsys.readouterr().out


def test_a_known_architecture_is_transformers_own(folder: Path, tmp_path: Path) -> None:
    """Folders of models that transformers took in later still name their first code."""
    name_code(folder, "config.json", auto_map={"AutoConfig": "own.Own"})
    assert shapes(ModelConfig(source=str(folder))).model_type == "llama"
    assert not (tmp_path / "mark").exists()


def test_a_tokenizers_code_is_not_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name_code(folder, "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with suppress(BadInput):  # or transformers' own class is taken
        load_tokenizer(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", ["[]", "{", '"llama"'])
def test_settings_that_are_none(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(BadInput, match=r"config\.json is no model's"):
        local_folder(ModelConfig(source=str(folder)))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (b"", "model.safetensors can't be read"),
        (b"\xff" * 500, "model.safetensors can't be read"),
        (None, "model.safetensors can't be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "pointer of Git LFS"),
    ],
    ids=["empty", "no header", "cut", "pointer"],
)
def test_damaged_weights_are_found_before_anything_starts(folder: Path, weights: bytes | None, words: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if weights is None else weights)
    with pytest.raises(BadInput, match=words):
        local_folder(ModelConfig(source=str(folder)))


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "model-2.safetensors"}}', "{", "[]", '{"weight_map": [1]}'])
def test_a_shard_that_is_missing_is_named(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadInput, match=r"model-2.safetensors can't be read|is no index of weights"):
        local_folder(ModelConfig(source=str(folder)))


Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: {f"_orig_mod.{name}": each for name, each in found.items()}, r"tensors are missing \(lm_head"),
        (
            lambda found: {f"module.{name}": each for name, each in found.items()},
            r"belong to no layer \(module\.",
        ),
        (
            lambda found: {name: each for name, each in found.items() if "layers.1.mlp.up" not in name},
            r"1 tensors are missing \(model\.layers\.1\.mlp\.up_proj\.weight\)",
        ),
        (
            lambda found: found | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2)},
            r"belong to no layer \(model\.layers\.9",
        ),
        (
            lambda found: found | {"model.norm.weight": found["model.norm.weight"][:-1].clone()},
            r"have another shape than config.json says \(model\.norm\.weight\)",
        ),
    ],
    ids=["compiled", "parallel", "one missing", "one too many", "another shape"],
)
def test_weights_that_are_not_the_architectures_are_refused_by_name(
    folder: Path, change: Callable[[Tensors], Tensors], words: str
) -> None:
    """They load, and what is missing is random."""
    check_tensors(folder)
    rewrite(folder, change)
    with pytest.raises(BadInput, match=words):
        check_tensors(folder)


def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, lambda found: found | {"model.norm.weight": found["model.norm.weight"] * float("nan")})
    with pytest.raises(BadInput, match=r"model\.norm\.weight has values that aren't finite"):
        materialise(ModelConfig(source=str(folder)), tmp_path)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"eos_token_id": 0, "temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6}),
        ({"eos_token_id": [0, 1], "pad_token_id": -1}, {}),
        ({"eos_token_id": 0, "early_stopping": True}, {}),
        (None, {}),
    ],
    ids=["a temperature without sampling", "no padding", "beams", "none"],
)
def test_generation_stops_at_the_trained_end_and_can_be_saved(
    folder: Path, tmp_path: Path, settings: dict[str, object] | None, kept: dict[str, object]
) -> None:
    """A base model's own end token is another; of settings that transformers doesn't save SFT would find out last."""
    own = folder / "generation_config.json"
    own.unlink(missing_ok=True)
    if settings is not None:
        own.write_text(json.dumps(settings))
    before = own.read_text() if own.exists() else None
    made = tmp_path / "made"
    made.mkdir()
    materialise(ModelConfig(source=str(folder)), made)
    end = load_tokenizer(made).convert_tokens_to_ids("<|im_end|>")
    load_model(made, torch.float32).save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    stops = written["eos_token_id"]
    assert end in (stops if isinstance(stops, list) else [stops])
    assert kept.items() <= written.items()
    assert (own.read_text() if own.exists() else None) == before, "the user's own file stays as it is"


def test_a_generation_config_that_is_none(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    (tmp_path / "made").mkdir()
    with pytest.raises(BadInput, match=r"generation_config\.json can't be read"):
        materialise(ModelConfig(source=str(folder)), tmp_path / "made")
