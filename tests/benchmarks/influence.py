"""What an influence costs: as a multiple of a plain forward and backward pass over the same tokens, beside a library.

    python -m tests.benchmarks.influence [--small] [--domains 2,4,8,16] [--tokens 2] [--kronfluence FOLDER] [a.b=c …]

Same machine, model, tokens, micro-batches, layers and precision (fp32 on CPU), each contestant in a process of its own,
one after another. The clock runs from a loaded model to the domain × reference matrix; peak memory is what a process
grows by from before it loads the model (so the model's own 0.5 GB is in it).

- `plain`: one forward and backward pass with all weights' gradients. Only supervised positions pass through the head,
  which makes it the smaller of two possible yardsticks; `plain, all logits` is the other.
- `kfac`, `ekfac`, `joint`: one actor of the service with all of this process's threads, its files and its
  loading of the model included. `kfac` divides λ between A and S, where kronfluence adds it to their product; `ekfac`
  is the same in both. `joint` (the default: layers combined) is damped by a made-up constant Λ in place of the
  optimiser's; the examples that it sees the curvature on are a fixed number.
- `kronfluence`: fits its factors on the same training examples and scores. It has no notion of domains, and
  per-example gradients of these layers don't fit into memory, so the cheapest way to the matrix is taken: a domain's
  summed gradient as the *query* (the influence is symmetric, and there are more training than reference tokens), and
  its scores with every reference example, summed by set: M passes over the references, one over the training sample.
  The model is used as the library's examples do, with logits at every position. It is handed our micro-batches and
  our sampled labels, so that the two matrices differ by nothing but arithmetic. It isn't one of this project's
  dependencies; it is read from the folder that is named, or where Python finds it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from ideal.config.config import InfluenceConfig
from ideal.config.file import load
from ideal.data.batches import IGNORED, Item, batches, length
from ideal.data.chat import ChatEncoder
from ideal.data.domains import prepare
from ideal.data.examples import ExampleSet
from ideal.influence.accumulate import Block, sample_labels
from ideal.influence.layers import tracked_layers
from ideal.influence.products import combined, table_of
from ideal.influence.sampled import curvature_blocks, tokens_and_weights
from ideal.influence.table import Array, split
from ideal.mixture import draw
from ideal.model.base import load_model, load_tokenizer, materialise, summed_loss, supervised_logits
from ideal.training.trainer import DAMPING
from service.stages.influence_actor import InfluenceActor
from service.store.layout import MODEL, reference_file, train_file
from tests.service.peak import status

CPU = torch.device("cpu")
INSTALL = "pip install --no-deps --target FOLDER kronfluence einops opt_einsum einconv"
MADE_UP = 0.1
"""Λ of `joint`: about √v̂ = 3e-4 over a sum of learning rates of 3e-3."""
SMALL = [f"model.layers.{number}.mlp.*" for number in (9, 19, 29)]


@dataclass(frozen=True)
class Setting:
    """What every process is told.

    Attributes:
        config: what isn't said here.
        folder: the model, and the examples of every set.
        names: the domains.
        train, reference: input tokens in all domains' samples together, and in all reference sets.
        dealt: deal all examples out to so many domains and reference sets, as if they were cards; 0 leaves them be.
    """

    config: str
    folder: str
    names: list[str]
    layers: list[str]
    train: int
    reference: int
    batch_tokens: int
    seed: int
    dealt: int = 0
    blocks: int = 2
    kronfluence: str = ""


OURS: dict[str, dict[str, Any]] = {
    "kfac": {"joint": False},
    "ekfac": {"solver": "ekfac", "joint": False, "damping": 0.1},
    "joint": {},
}
"""Our contestants: what each changes in the section `influence`."""

SAME = {"ekfac": "kronfluence ekfac"}
"""What should say the same as what."""


def chosen(pool: ExampleSet, tokens: int, seed: int, name: str) -> list[Item]:
    """The first examples of a set's seeded order, up to so many tokens.

    Raises:
        SystemExit: it hasn't as many.
    """
    order = [pool[int(i)] for i in draw(len(pool), len(pool), seed, name)]
    total = np.cumsum([length(item) for item in order])
    if total[-1] < tokens:
        sys.exit(f"{name} has {total[-1]} tokens, {tokens} are asked for: set a larger `size` in the config")
    return order[: int(np.searchsorted(total, tokens)) + 1]


def sample(setting: Setting) -> tuple[list[Block], int]:
    """Every domain's blocks, then every reference set's; and how many domains.

    The mixture is the training sample itself: each of its tokens has the same weight.

    Raises:
        SystemExit: there are too few examples for so many parts.
    """
    folder, names, seed = Path(setting.folder), setting.names, setting.seed
    each, of_reference = setting.train // len(names), setting.reference // len(names)
    train = {name: chosen(ExampleSet.load(train_file(folder, name)), each, seed, name) for name in names}
    asked = {name: chosen(ExampleSet.load(reference_file(folder, name)), of_reference, seed, name) for name in names}
    if setting.dealt:
        train, asked = dealt(train, setting.dealt), dealt(asked, setting.dealt)
    tokens = [sum(int(supervised[1:].sum()) for _, supervised in items) for items in train.values()]
    blocks: list[Block] = []
    for (name, items), share in zip(train.items(), tokens, strict=True):
        blocks += split(f"train/{name}", items, range(len(items)), setting.blocks, share / sum(tokens))
    for name, items in asked.items():
        blocks += split(f"reference/{name}", items, range(len(items)), setting.blocks, 0.0)
    if not all(block.items for block in blocks):
        sys.exit(f"some block of {setting.blocks} in a set is empty: ask for fewer domains or more tokens")
    return blocks, len(train)


def dealt(sets: dict[str, list[Item]], count: int) -> dict[str, list[Item]]:
    """All sets' examples in so many new ones."""
    cards = [item for items in sets.values() for item in items]
    return {str(n): cards[n::count] for n in range(count)}


def measured(part: str, setting: Setting) -> dict[str, Any]:
    """A contestant's seconds, peak bytes, and matrix."""
    blocks, domains = sample(setting)
    before = status("VmRSS")
    model = load_model(Path(setting.folder) / MODEL, torch.float32, CPU)
    layers = tracked_layers(model, setting.layers)
    with torch.no_grad():
        supervised_logits(model, batches(blocks[0].items, setting.batch_tokens)[0][1])  # libraries get ready
    started, passed = time.perf_counter(), None
    if part.startswith("plain"):
        matrix = plain(model, blocks, setting, whole="all logits" in part)
    elif part.startswith("kronfluence"):
        matrix = kronfluence(part.split()[1], model, layers, blocks, domains, setting)
    else:
        shapes = {layer: model.get_parameter(f"{layer}.weight").shape for layer in layers}
        del model  # the actor loads its own
        matrix, passed = ours(part, shapes, blocks, domains, setting)
    return {
        "pass_seconds": passed,
        "seconds": time.perf_counter() - started,
        "peak_bytes": status("VmHWM") - before,
        "tokens": sum(length(item) for block in blocks for item in block.items),
        "train_tokens": sum(length(item) for block in blocks if block.weight for item in block.items),
        "layers": len(layers),
        "threads": torch.get_num_threads(),
        "matrix": matrix.tolist(),
    }


def plain(model: nn.Module, blocks: list[Block], setting: Setting, whole: bool) -> Array:
    """All weights' gradients, summed over the sample."""
    for block in blocks:
        for _, batch in batches(block.items, setting.batch_tokens):
            if whole:
                logits = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
                summed_loss(logits[batch.targets != IGNORED], batch).backward()
            else:
                summed_loss(supervised_logits(model, batch), batch).backward()
    return np.zeros(0)


def ours(
    part: str, shapes: dict[str, torch.Size], blocks: list[Block], domains: int, setting: Setting
) -> tuple[Array, float]:
    """The matrix, and the seconds of the (first) pass alone: what grows with the tokens."""
    settings = InfluenceConfig.model_validate({**OURS[part], "blocks": setting.blocks, "precision": "fp32"})
    config = load(setting.config, [])
    resources = config.resources.model_copy(update={"batch_tokens": setting.batch_tokens})
    config = config.model_copy(update={"influence": settings, "resources": resources, "seed": setting.seed})
    checkpoint, threads = Path(setting.folder) / MODEL, torch.get_num_threads()
    if settings.joint:
        save_file({f"{x}.weight": torch.full(s, MADE_UP) for x, s in shapes.items()}, checkpoint.parent / DAMPING)
    layers = list(shapes)
    make = InfluenceActor.__ray_metadata__.modified_class
    with tempfile.TemporaryDirectory(dir=setting.folder) as work:
        actor = make(checkpoint, Given(blocks, domains), layers, Path(work) / "layers-0", config)
        torch.set_num_threads(threads)
        started = time.perf_counter()
        sizes = list(actor.accumulate(0, list(range(len(blocks))), None).values())
        passed = time.perf_counter() - started
        if settings.solver == "ekfac":
            actor.decompose(layers, 1)
            actor.refine(0, list(range(len(blocks))))
        solved = actor.solve(layers, 1, None)
        products = {layer: solved[layer].products for layer in layers}
        if settings.joint:
            forms = actor.forms(layers, list(range(len(curvature_blocks(blocks, domains, settings)))), 1)
            products = combined(products, forms, [solved[layer].damping for layer in layers], setting.blocks)
    _, weights = tokens_and_weights(blocks, domains, setting.blocks)
    return table_of(list(products.values()), sizes, weights, setting.blocks).matrix(), passed


class Given:
    """A sample as the service's actors know it, of blocks that are there already."""

    def __init__(self, blocks: list[Block], domains: int) -> None:
        self.given, self.volumes = blocks, {str(number): 0 for number in range(domains)}

    def blocks(self) -> list[Block]:
        return self.given


def kronfluence(
    strategy: str, model: nn.Module, layers: list[str], blocks: list[Block], domains: int, setting: Setting
) -> Array:
    """The same matrix by the library; its dataset's items are our micro-batches."""
    sys.path.append(setting.kronfluence)
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class Summed(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
            keep = batch["targets"] != IGNORED
            logits = model(input_ids=batch["ids"], attention_mask=batch["mask"].long(), use_cache=False).logits[keep]
            labels = batch["targets"][keep]
            if sample:
                labels = sample_labels(logits.detach(), batch["ours"][0], batch["keys"], batch["set"], setting.seed)
            return nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            return batch["mask"]

    def micro_batches(some: list[Block]) -> list[dict[str, Any]]:
        return [
            {**vars(batch), "ours": [batch], "keys": [block.keys[i] for i in members], "set": block.set}
            for block in some
            for members, batch in batches(block.items, setting.batch_tokens)
        ]

    split_at = domains * setting.blocks
    train, reference = blocks[:split_at], blocks[split_at:]
    asked = micro_batches(reference)
    sets = list(dict.fromkeys(block.set for block in reference))
    owner = np.repeat([sets.index(batch["set"]) for batch in asked], [len(batch["ids"]) for batch in asked])
    task = Summed()
    loading = {"dataloader_kwargs": DataLoaderKwargs(collate_fn=lambda items: items[0])}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=folder)
        factors = FactorArguments(strategy=strategy)
        analyzer.fit_all_factors("factors", micro_batches(train), 1, factor_args=factors, **loading)
        for j in range(domains):
            analyzer.compute_pairwise_scores(
                f"scores-{j}",
                "factors",
                query_dataset=micro_batches(train[j * setting.blocks : (j + 1) * setting.blocks]),
                train_dataset=asked,
                per_device_query_batch_size=1,
                per_device_train_batch_size=1,
                score_args=ScoreArguments(damping_factor=None, aggregate_query_gradients=True),  # 0.1 · mean, as ours
                **loading,
            )
            scores = analyzer.load_pairwise_scores(f"scores-{j}")["all_modules"]
            rows.append(np.bincount(owner, scores.flatten().double().numpy()))
    tokens = np.array([block.supervised() for block in blocks]).reshape(-1, setting.blocks).sum(1)
    return np.asarray(np.array(rows) / tokens[:domains, None] / tokens[domains:])


def child(part: str, setting: Setting) -> dict[str, Any]:
    """``measured`` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.influence", "--part", part, json.dumps(asdict(setting))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{part} failed:\n{done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cosine(one: list[list[float]], other: list[list[float]]) -> float:
    a, b = np.ravel(one), np.ravel(other)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def written(folder: Path, arguments: argparse.Namespace) -> Setting:
    """Put the model and the examples into a folder, once for all contestants."""
    config = load(arguments.config, arguments.overrides)
    (folder / MODEL).mkdir()
    materialise(config.model, folder / MODEL)
    encoder = ChatEncoder(load_tokenizer(folder / MODEL), config.model.max_tokens)
    for domain in prepare(config, encoder, []):
        domain.train.save(train_file(folder, domain.name))
        domain.reference.save(reference_file(folder, domain.name))
    part = 5 if arguments.small else 1
    layers = SMALL if arguments.small else ["*.mlp.*"]
    names = [domain.name for domain in config.domains]
    return Setting(
        str(arguments.config),
        str(folder),
        names,
        layers,
        5000 // part,
        2600 // part,
        1024,
        config.seed,
        kronfluence=arguments.kronfluence,
    )


def compare(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every contestant in turn, printed as it comes."""
    parts = ["plain", "plain, all logits", *OURS]
    if arguments.only:
        parts = ["plain", *arguments.only]
    sys.path.append(setting.kronfluence)
    if find_spec("kronfluence"):
        parts += [part for part in ("kronfluence kfac", "kronfluence ekfac") if not arguments.only]
    else:
        print(f"kronfluence isn't there: `{INSTALL}`, then name the folder with --kronfluence")
    found: dict[str, Any] = {}
    for part in parts:
        one = found[part] = child(part, setting)
        if part == "plain":
            print(
                f"{one['train_tokens']} training and {one['tokens'] - one['train_tokens']} reference tokens,", end=" "
            )
            print(f"{one['layers']} layers, {len(setting.names)} domains, fp32, {one['threads']} threads\n")
            print(f"{'':<30}{'seconds':>9}{'× plain':>9}{'the pass':>10}{'peak GB':>9}")
        label = f"{part} (Λ made up)" if part == "joint" else part
        one["multiple"] = one["seconds"] / found["plain"]["seconds"]
        passed = f"{one['pass_seconds']:.1f}" if one["pass_seconds"] else ""
        print(f"{label:<30}{one['seconds']:>9.1f}{one['multiple']:>9.2f}{passed:>10}", end="")
        print(f"{one['peak_bytes'] / 1e9:>9.2f}", flush=True)
    for part, other in SAME.items():
        if part in found and other in found:
            found[part]["cosine"] = cosine(found[part]["matrix"], found[other]["matrix"])
            print(f"cosine of the matrices by {part!r} and {other!r}: {found[part]['cosine']:.6f}")
    return found


def scale(name: str, settings: dict[str, Setting]) -> dict[str, Any]:
    """`plain`, `kfac` and `joint` in several settings, in seconds."""
    parts = ("plain", "kfac", "joint")
    print(f"\n{name:<12}{'tokens':>9}" + "".join(f"{part:>9}" for part in parts))
    found = {}
    for label, setting in settings.items():
        found[label] = {part: child(part, setting) for part in parts}
        seconds = "".join(f"{one['seconds']:>9.1f}" for one in found[label].values())
        print(f"{label:<12}{found[label]['kfac']['tokens']:>9}{seconds}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to the config")
    parser.add_argument("--config", default="jobs/configs/quickstart.yaml", help="model, domains and their examples")
    parser.add_argument("--small", action="store_true", help="three blocks' MLPs and a fifth of the tokens")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contestants beside `plain`")
    parser.add_argument("--domains", default="", help="numbers of domains to deal the sample out to, e.g. 2,4,8,16")
    parser.add_argument("--tokens", type=int, default=0, help="how often to double the tokens")
    parser.add_argument("--kronfluence", default="", metavar="FOLDER", help=f"where it is: {INSTALL}")
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    parser.add_argument("--part", nargs=2, metavar=("NAME", "SETTING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part, told = arguments.part
        print("\n" + json.dumps(measured(part, Setting(**json.loads(told)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        setting = written(Path(folder), arguments)
        results = {"contestants": compare(setting, arguments)}
        few = replace(setting, layers=SMALL)
        if arguments.domains:
            counts = [int(n) for n in arguments.domains.split(",")]
            more = replace(few, train=4 * few.train, reference=4 * few.reference)  # enough for sixteen
            results["domains"] = scale("domains", {str(n): replace(more, dealt=n) for n in counts})
        if arguments.tokens:
            sizes = [2**n for n in range(arguments.tokens + 1)]
            results["tokens"] = scale(
                "tokens",
                {f"× {n}": replace(few, train=n * few.train, reference=n * few.reference) for n in sizes},
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
