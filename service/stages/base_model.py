"""The base model θ₀: its files, brought here or made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import ray

from ideal.config.inputs import ModelConfig
from ideal.model.files import local_folder, read_template
from service.cluster.progress import Reporter
from service.stages.content import Checksum, source_content
from service.stages.workers import Workers
from service.store.layout import MODEL
from service.store.stage import Identified, Stage
from service.store.store import WORK


class BaseModelResult(TypedDict):
    bytes: int


@dataclass(frozen=True, kw_only=True)
class BaseModel(Stage[BaseModelResult]):
    """θ₀ in the folder ``model``.

    One that is made is trained by a worker; a making that was killed goes on from its last checkpoint.
    """

    kind = "model"
    version = 2
    model: Identified[ModelConfig]

    def run(self, folder: Path, on: Workers) -> BaseModelResult:
        from ideal.model.base import materialise

        config = self.model.value
        (folder / MODEL).mkdir(exist_ok=True)
        if config.made:
            cpus = on.cluster.sft_cpus
            task = _pretrain.options(num_cpus=cpus)
            ray.get(task.remote(config, folder, cpus, on.resources.checkpoint_steps, on.progress))
        else:
            materialise(config, folder / MODEL)
        return {"bytes": sum(f.stat().st_size for f in (folder / MODEL).iterdir())}


def identified(config: ModelConfig, checksum: Checksum) -> Identified[ModelConfig]:
    """A base model by its source; by the content of its files where they are local, wherever they lie."""
    settings: dict[str, Any] = {"source": config.source, "revision": config.revision}
    if config.made:
        corpus = [source_content(f"model.made.corpus.{n}", each, checksum) for n, each in enumerate(config.made.corpus)]
        settings["made"] = {**config.made.model_dump(mode="json"), "corpus": corpus, "max_tokens": config.max_tokens}
    origin = local_folder(config)
    if origin:
        settings["source"] = {f.name: checksum(f) for f in sorted(origin.iterdir()) if f.is_file()}
    template = read_template(config)
    if template is not None:
        settings["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    return Identified(config, settings)


@ray.remote
def _pretrain(config: ModelConfig, folder: Path, cpus: int, checkpoint_steps: int, progress: Reporter) -> float:
    import torch

    from ideal.training.pretraining import pretrain

    assert config.made
    torch.set_num_threads(cpus)
    kept = folder / WORK / "kept"
    return pretrain(config.made, folder / MODEL, config.max_tokens, progress, kept, checkpoint_steps)
