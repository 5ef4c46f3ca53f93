"""The files that a model is given by: its folder, its chat template. Nothing of it is loaded here."""

from __future__ import annotations

import json
from pathlib import Path

from ideal.config.inputs import ModelConfig
from ideal.errors import BadInput

ADAPTER_SETTINGS = "adapter_config.json"
"""In a folder of adapters alone."""
LFS = b"version https://git-lfs"
"""How a file begins that Git LFS has not fetched."""


def is_adapter(folder: Path) -> bool:
    """Whether a model folder holds adapters alone."""
    return (folder / ADAPTER_SETTINGS).is_file()


def local_folder(config: ModelConfig) -> Path | None:
    """The model's folder if its source is one; None for `smollm2` and hub ids.

    Raises:
        BadInput: the folder isn't there, isn't a whole model in safetensors, or is one that needs code of its own.
    """
    path = Path(config.source)
    if config.source == "smollm2" or not (path.is_absolute() or path.is_dir()):
        return None
    if not (path / "config.json").is_file():
        raise BadInput("model.source", f"{path} is no model folder: it has no config.json", "check the path")
    if is_adapter(path):
        raise BadInput("model.source", f"{path} holds adapters, whose base lies elsewhere", "merge them into it first")
    _check_weights(path)
    _check_code(path)
    return path


def _check_weights(folder: Path) -> None:
    """Check that all shards are there and whole, by their headers alone."""
    from safetensors import SafetensorError, safe_open

    shards = set(folder.glob("*.safetensors"))
    if not shards:
        raise BadInput("model.source", f"{folder} has no .safetensors weights", "convert it; pickles are not loaded")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            shards |= {folder / Path(name).name for name in named}  # wherever else it points
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput("model.source", f"{index} is no index of weights ({error})", "fetch it again") from None
    for shard in sorted(shards):
        try:
            with safe_open(shard, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            pointer = _is_pointer(shard)
            what = "is a pointer of Git LFS, not the weights" if pointer else f"can't be read ({error})"
            raise BadInput(
                "model.source", f"{shard} {what}", "`git lfs pull`" if pointer else "fetch it again"
            ) from None


def _is_pointer(file: Path) -> bool:
    """Whether Git LFS has yet to fetch it."""
    if not file.is_file():
        return False
    with file.open("rb") as start:
        return start.read(len(LFS)) == LFS


def _check_code(folder: Path) -> None:
    """Check that transformers itself knows the architecture: a folder's own Python is never run."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, code = settings.get("model_type"), settings.get("auto_map")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadInput("model.source", f"{folder / 'config.json'} is no model's ({error})", "fetch it again") from None
    if not code:
        return
    from transformers import CONFIG_MAPPING  # seconds to load

    if kind not in CONFIG_MAPPING:
        raise BadInput(
            "model.source",
            f"{folder} needs Python of its own (auto_map in config.json), which is never run",
            "use a model whose architecture transformers has, or convert it to one",
        )


def read_template(config: ModelConfig) -> str | None:
    """The chat template that replaces the tokenizer's own.

    Raises:
        BadInput: the file can't be read.
    """
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("model.chat_template", f"can't be read ({error})", "name a Jinja file") from None
