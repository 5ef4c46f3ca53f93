"""A real vLLM engine on tiny models: it agrees with transformers, and new weights replace the old whole."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from ideal.benchmarks.evaluation import evaluate
from ideal.config.config import LoraConfig
from ideal.config.inputs import BenchmarkConfig
from ideal.errors import BadInput
from ideal.model import lora
from ideal.model.base import load_model, load_tokenizer
from ideal.model.files import is_adapter
from service.cluster.vllm_model import VllmModel, reload, start_engine
from tests.tiny import MAX_TOKENS, make_model

QUESTION = "Spell this word backward (example: sun -> nus): quick brown fox jumps over the lazy dog. "
LONG = QUESTION * 8  # several blocks of vLLM's prefix cache
ANSWERS = ["kciuq", " xof nworb", "god"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models, and the second once more with its tied head written out."""
    root = tmp_path_factory.mktemp("models")
    made = {"first": make_model(root / "first", seed=1), "second": make_model(root / "second", seed=2)}
    made["spelt out"] = Path(shutil.copytree(made["second"], root / "spelt out"))
    file = made["spelt out"] / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return made


def start(folder: Path) -> VllmModel:
    engine = start_engine(folder, max_tokens=4 * MAX_TOKENS, gpu_share=0.85, cpu_cache=0.25, gpus=0)
    return VllmModel(engine, adapter=folder if is_adapter(folder) else None)


@pytest.fixture(scope="module")
def fresh(folders: dict[str, Path]) -> tuple[list[str], list[float]]:
    """What an engine started on the second model says. Two engines can't live in one process at a time."""
    model = start(folders["second"])
    said = generate(model), score(model)
    model.llm.llm_engine.engine_core.shutdown()
    del model
    gc.collect()
    return said


def adapters(base: Path, folder: Path, seed: int, rank: int = 4) -> Path:
    """Adapters, as if trained, that change what the base says."""
    model = load_model(base, torch.bfloat16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora.add(model, LoraConfig(rank=rank))
        for name, parameter in model.named_parameters():
            if lora.B in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)  # type: ignore[operator]
    load_tokenizer(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exchanged(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """An engine on one base's adapters, then with others', then with the first again: what it says of a text and what
    transformers does. In between it refuses adapters of another rank."""
    root = tmp_path_factory.mktemp("adapters")
    made = {name: adapters(folders["first"], root / name, seed) for seed, name in enumerate(("one", "two"))}
    model = start(made["one"])
    found = {}
    for turn, name in enumerate(("one", "two", "one")):
        if turn:
            reload(model.llm, made[name])
            model.adapter = made[name]
        ids = model._encode_pair(LONG, ANSWERS[1])
        found[f"{name}, turn {turn}"] = (score(model)[1], reference(model, made[name], *ids)[0])
    with pytest.raises(BadInput, match=r"isn't of the running engine's model: .*lora_A"):
        reload(model.llm, adapters(folders["first"], root / "wider", 0, rank=6))
    model.llm.llm_engine.engine_core.shutdown()
    del model
    gc.collect()
    return found


def test_adapters_are_taken_up_and_exchanged(exchanged: dict[str, tuple[float, float]]) -> None:
    """Within 0.05 nats a token, as whole models; what the first left in the cache isn't taken for the second's."""
    assert len(exchanged) == 3
    for said, wanted in exchanged.values():
        assert said == pytest.approx(wanted, abs=0.05 * 6)
    one, two, again = (said for said, _ in exchanged.values())
    assert one == again
    assert abs(one - two) > 0.5


@pytest.fixture(scope="module")
def stopped(
    fresh: object, exchanged: object, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """What a model answers whose generation config has every token for an end."""
    folder = Path(shutil.copytree(folders["second"], tmp_path_factory.mktemp("stopped") / "model"))
    settings = GenerationConfig.from_pretrained(folder)
    settings.eos_token_id = list(range(len(load_tokenizer(folder))))
    settings.save_pretrained(folder)
    model = start(folder)
    said = generate(model)
    model.llm.llm_engine.engine_core.shutdown()
    del model
    gc.collect()
    return "".join(said)


def test_an_answer_ends_at_any_end_token_of_the_generation_config(
    fresh: tuple[list[str], object], stopped: str
) -> None:
    """The one that SFT trains is among them, whatever the tokenizer's own is."""
    assert stopped == ""
    assert "".join(fresh[0])


@pytest.fixture(scope="module")
def model(fresh: object, exchanged: object, stopped: object, folders: dict[str, Path]) -> Iterator[VllmModel]:
    model = start(folders["first"])
    yield model
    model.llm.llm_engine.engine_core.shutdown()


def generate(model: VllmModel, question: str = LONG, **settings: object) -> list[str]:
    prompt = model.apply_chat_template([{"role": "user", "content": question}])
    arguments = (prompt, {"until": [], "max_gen_toks": 16, **settings})
    return model.generate_until([Instance("generate_until", {}, arguments, 0)] * 2)


def score(model: VllmModel) -> list[float]:
    requests = [Instance("loglikelihood", {}, (LONG, answer), 0) for answer in ANSWERS]
    return [value for value, _ in model.loglikelihood(requests)]


def reference(model: VllmModel, folder: Path, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """The same log-likelihood by transformers, in float32."""
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = llama(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    greedy = logits.argmax(-1).tolist() == answer
    return float(logits.gather(1, torch.tensor(answer)[:, None]).sum()), greedy


def test_log_likelihoods_are_those_of_transformers(model: VllmModel, folders: dict[str, Path]) -> None:
    """Within 0.05 nats a token: bfloat16 against float32."""
    reload(model.llm, folders["first"])
    likeliest = generate(model, max_gen_toks=3)[0]
    prompt = model.apply_chat_template([{"role": "user", "content": LONG}])
    pairs = [(LONG, answer) for answer in ANSWERS] + [(prompt.rstrip("\n"), "\n" + likeliest)]
    got = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (context, answer), (value, _) in zip(pairs, got, strict=True):
        ids = model._encode_pair(context, answer)
        wanted, _ = reference(model, folders["first"], *ids)
        assert value == pytest.approx(wanted, abs=0.05 * len(ids[1]))


def test_an_answer_is_greedy_only_where_each_token_is_the_likeliest(model: VllmModel) -> None:
    context = model.tok_encode(QUESTION)
    answer: list[int] = []
    for _ in range(3):
        scored = model._loglikelihood_tokens([(None, context, [*answer, token]) for token in range(400)])
        answer.append(max(range(400), key=lambda token: scored[token][0]))
        assert [token for token, (_, greedy) in enumerate(scored) if greedy] == [answer[-1]]


def test_a_whole_text_is_scored_in_windows(model: VllmModel, folders: dict[str, Path]) -> None:
    reload(model.llm, folders["first"])
    short, long = QUESTION, LONG * 5
    assert len(model.tok_encode(long)) > model.max_length
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (short, long)]
    values = model.loglikelihood_rolling(requests)
    ids = model.tok_encode(short)
    wanted, _ = reference(model, folders["first"], [model.prefix_token_id], ids)
    assert values[0] == pytest.approx(wanted, abs=0.05 * len(ids))
    assert values[1] < 10 * values[0]


def test_a_long_text_starts_with_one_bos(model: VllmModel) -> None:
    assert model.tok_encode("<|im_start|>user")[:2] != [model.prefix_token_id] * 2
    assert model.max_length == MAX_TOKENS


@pytest.mark.parametrize("name", ["second", "spelt out"])
def test_after_a_reload_the_engine_is_as_if_started_on_the_new_weights(
    model: VllmModel, folders: dict[str, Path], fresh: tuple[list[str], list[float]], name: str
) -> None:
    """The same prompts before and after: neither tied embeddings nor cached prefixes may stay behind."""
    reload(model.llm, folders["first"])
    before = generate(model), score(model)
    assert generate(model) == before[0]
    reload(model.llm, folders[name])
    assert generate(model) == fresh[0] != before[0]
    assert score(model) == fresh[1] != before[1]
    reload(model.llm, folders["first"])
    assert (generate(model), score(model)) == before


def test_a_checkpoint_that_is_broken_or_of_another_model_is_refused(
    model: VllmModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    reload(model.llm, folders["first"])
    before = generate(model)
    cut = Path(shutil.copytree(folders["second"], tmp_path / "cut"))
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-100])
    part = Path(shutil.copytree(folders["second"], tmp_path / "part"))
    tensors = load_file(part / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    for folder, message in (
        (tmp_path / "nothing", "can't be read"),
        (cut, "can't be read"),
        (part, "model.layers.1.mlp.up_proj.weight is missing"),
        (make_model(tmp_path / "deep", layers=3), "isn't of the running engine's model"),
        (make_model(tmp_path / "wide", hidden=128), "isn't of the running engine's model"),
    ):
        with pytest.raises(BadInput, match=message) as caught:
            reload(model.llm, folder)
        assert caught.value.where == str(folder)
        assert generate(model) == before


def test_a_folder_without_a_model_starts_no_engine(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="vLLM can't serve this model"):
        start_engine(tmp_path, max_tokens=64, gpu_share=0.85, cpu_cache=0.25, gpus=0)


@pytest.mark.parametrize(
    ("gpus", "expected"), [(0, {"kv_cache_memory_bytes": 2**28}), (1, {"gpu_memory_utilization": 0.5})]
)
def test_memory_is_a_share_of_gpus_or_a_cache_on_the_cpu(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, gpus: int, expected: dict[str, float]
) -> None:
    monkeypatch.setattr("vllm.LLM", dict)
    asked: Any = start_engine(folders["first"], max_tokens=64, gpu_share=0.5, cpu_cache=0.25, gpus=gpus)
    assert {name: value for name, value in asked.items() if "memory" in name} == expected


def test_answers_stop_where_they_are_told_to(model: VllmModel, folders: dict[str, Path]) -> None:
    reload(model.llm, folders["first"])
    whole = generate(model)[0]
    stop = whole[len(whole) // 2 :][:2]
    assert generate(model, until=[stop])[0] == whole[: whole.index(stop)]
    short = generate(model, max_gen_toks=2)[0]
    assert whole.startswith(short)
    assert len(short) < len(whole)
    assert len(generate(model, LONG * 9)) == 2


def test_a_sampled_answer_hangs_on_its_seed_and_not_on_what_was_asked_before(model: VllmModel) -> None:
    def sampled(seed: int) -> list[str]:
        return generate(VllmModel(model.llm, seed), temperature=1.0, do_sample=True)

    first = sampled(0)
    assert first[0] != first[1], "two samples of one prompt differ"
    assert first != sampled(1)
    generate(model)
    assert sampled(0) == first


def test_lm_eval_scores_it_and_hears_how_far_it_is(model: VllmModel) -> None:
    benchmark = BenchmarkConfig(
        name="spell", reasoning_gym="spell_backward", size=8, seed=3, max_new_tokens=4, num_fewshot=1
    )
    seen: list[tuple[str, int, int]] = []
    got = evaluate(model, [benchmark], allow_code_execution=False, progress=lambda *state: seen.append(state))
    assert got["spell"].items == 8
    assert 0 <= got["spell"].value < 1
    assert seen[0] == ("spell", 0, 0)
    assert seen[-1] == ("spell", 8, 8)
