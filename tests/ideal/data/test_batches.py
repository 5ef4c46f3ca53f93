"""Micro-batches: their targets, their size, and that neither padding nor the short way to the head changes a loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ideal.data.batches import IGNORED, batches, by_length, collate, length
from ideal.data.chat import Example
from ideal.data.examples import ExampleSet
from ideal.model.base import load_model, summed_loss, supervised_logits
from ideal.training.trainer import example_losses
from tests.ideal.made import example_set, full_loss, llama
from tests.tiny import make_model

SHORT = (np.array([5, 6, 7, 8], np.int32), np.array([False, True, False, False]))
LONG = (np.array([1, 2, 3, 4, 5, 6], np.int32), np.array([True, False, True, True, False, True]))


def test_targets_are_the_next_supervised_tokens() -> None:
    batch = collate([SHORT, LONG])
    assert batch.ids.tolist() == [[5, 0, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.mask.tolist() == [[True] + [False] * 4, [True] * 5]
    assert batch.targets.tolist() == [[6] + [IGNORED] * 4, [IGNORED, 3, 4, IGNORED, 6]]
    assert batch.tokens == length(SHORT) + length(LONG) == 6


@pytest.mark.parametrize("budget", [1, 7, 20, 100, 10_000])
def test_the_budget_of_padded_tokens_is_kept(budget: int) -> None:
    items = list(example_set(40, 0))
    made = batches(items, budget)
    assert sorted(i for rows, _ in made for i in rows) == list(range(40)), "everything once"
    for rows, batch in made:
        assert batch.ids.numel() <= budget or len(rows) == 1
        for row, i in enumerate(rows):
            assert batch.ids[row, : length(items[i])].tolist() == items[i][0][: length(items[i])].tolist()


def test_like_lengths_are_together() -> None:
    assert by_length([1, 9, 2, 8, 3], 18) == [[1, 3], [4, 2, 0]]
    assert by_length([], 18) == []
    made = [batch for _, batch in batches(list(example_set(200, 0)), 200)]
    padded = sum(batch.ids.numel() for batch in made)
    assert sum(batch.tokens for batch in made) > 0.85 * padded


@pytest.mark.parametrize("budget", [1, 50, 10_000])
def test_the_loss_is_the_full_models_whatever_the_padding(budget: int) -> None:
    """Only supervised positions go through the head; all positions, one example at a time, is the definition."""
    model, examples = llama(), example_set(12, 1)
    losses, tokens = example_losses(model, examples, torch.device("cpu"), budget)
    for number, example in enumerate(examples):
        with torch.no_grad():
            total, count = full_loss(model, [example])
        assert (losses[number], tokens[number]) == (pytest.approx(float(total), rel=1e-12), count)


def test_padding_has_no_influence_at_all() -> None:
    model = llama()
    alone, beside = collate([SHORT]), collate([SHORT, LONG])
    logits = supervised_logits(model, beside)
    torch.testing.assert_close(supervised_logits(model, alone), logits[:1], rtol=1e-12, atol=1e-12)
    beside.ids[~beside.mask] = 9
    torch.testing.assert_close(supervised_logits(model, beside), logits, rtol=0, atol=0)
    assert logits.shape == (4, 12)


def test_an_answers_loss_is_fp32_in_a_bf16_model(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = load_model(make_model(tmp_path / "m"), torch.bfloat16)
    batch = collate([LONG])
    assert supervised_logits(model, batch).dtype == torch.float32
    assert summed_loss(supervised_logits(model, batch), batch).dtype == torch.float32


def test_examples_survive_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = ExampleSet.of([Example(ids.tolist(), mask.tolist(), "") for ids, mask in (SHORT, LONG)])
    made.save(tmp_path / "e")
    again = ExampleSet.load(tmp_path / "e")
    assert len(again) == 2
    for (ids, mask), (expected_ids, expected_mask) in zip(again, (SHORT, LONG), strict=True):
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(mask, expected_mask)
    assert again.supervised_tokens().tolist() == [1, 3], "a first token has nothing to be predicted from"
    large = example_set(30, 5)
    assert large.supervised_tokens().tolist() == [int((batch.targets != IGNORED).sum()) for batch in map(one, large)]


def one(item):  # type: ignore[no-untyped-def]
    return collate([item])
