"""A model from nothing: it loads like any other, it has learnt, and it is the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ideal.config.inputs import MadeModel, Source
from ideal.data.chat import ChatEncoder
from ideal.model.base import load_model, load_tokenizer
from ideal.training.pretraining import pretrain

CORPUS = [Source(reasoning_gym="gcd", size=64, seed=0, options={"min_value": 1, "max_value": 9})]
MADE = MadeModel(corpus=CORPUS, vocabulary=320, hidden=64, layers=1, batch_examples=16, epochs=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder, said = tmp_path_factory.mktemp("made"), []
    pretrain(MADE, folder, 128, lambda message, done, total: said.append(f"{message} {done}/{total}"))
    return folder, said


def test_it_learns_and_says_how_far_it_is(made: tuple[Path, list[str]]) -> None:
    _, said = made
    losses = [float(line.split()[1]) for line in said]
    assert said[-1].endswith("8/8")
    assert losses[-1] < losses[0] - 1


def test_it_is_a_model_like_any_other(made: tuple[Path, list[str]]) -> None:
    folder, _ = made
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    talk = [{"role": "user", "content": "12 and 8"}, {"role": "assistant", "content": "4"}]
    (example,) = ChatEncoder(tokenizer, 64).encode(talk)
    answer = tokenizer.decode([i for i, s in zip(example.ids, example.supervised, strict=True) if s])
    assert answer == "4<|im_end|>"
    assert len(tokenizer("1234")["input_ids"]) == 4, "digits stand by themselves"
    assert model(input_ids=torch.tensor([example.ids])).logits.shape[-1] == len(tokenizer)


def test_it_is_the_same_every_time(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    pretrain(MADE, tmp_path, 128)
    again, first = load_file(tmp_path / "model.safetensors"), load_file(made[0] / "model.safetensors")
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert next(iter(first.values())).dtype == torch.bfloat16


class Killed(Exception):
    """It comes out of the middle of the making."""


def test_killed_in_the_middle_it_goes_on_to_the_same_weights(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Killed twice. The last state that is kept is compared too: it holds the weights before they are rounded."""
    steps: list[int] = []

    def make(name: str, killed_at: int = 0) -> float:
        def progress(message: str, done: int, total: int) -> None:
            steps.append(done)
            if done == killed_at:
                raise Killed

        return pretrain(MADE, tmp_path / name, 128, progress, tmp_path / f"{name} kept", checkpoint_steps=3)

    for step in (4, 7):
        with pytest.raises(Killed):
            make("killed", step)
    loss = make("killed")
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 7, 8]
    assert make("undisturbed") == loss
    kept = "kept/step-00000006/state.safetensors"
    for ours, theirs in (
        (tmp_path / "killed/model.safetensors", made[0] / "model.safetensors"),
        (tmp_path / f"killed {kept}", tmp_path / f"undisturbed {kept}"),
    ):
        again, first = load_file(ours), load_file(theirs)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], first[name]) for name in first)
