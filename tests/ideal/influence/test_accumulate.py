"""One pass: gradients and factors against autograd and explicit loops, in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from ideal.data.batches import collate
from ideal.data.examples import ExampleSet
from ideal.errors import BadInput
from ideal.influence.accumulate import STRIPS, WIDE, Block, FactorSums, sample_labels
from ideal.influence.layers import input_group, layer_shapes, record, tracked_layers
from ideal.influence.table import split
from ideal.model.base import supervised_logits
from tests.ideal.made import MLP, VOCABULARY, example_set, full_loss, llama, run

ATTENTION = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.o_proj"]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama()


def one_block(examples: ExampleSet, weight: float = 1.0, name: str = "train/a") -> list[Block]:
    """Everything in one block; ``weight`` by token."""
    return [Block(name, 0, list(examples), list(range(len(examples))), weight)]


def loops(
    model: LlamaForCausalLM, blocks: list[Block], layers: list[str]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
    """(layer, a [d_in], g [d_out], weight) position by position: one example at a time, with the data's labels."""
    for block in blocks:
        for item in block.items:
            ids, supervised = item
            last = int(np.flatnonzero(supervised)[-1])
            taken: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            handles = [
                model.get_submodule(layer).register_forward_hook(
                    lambda m, args, out, layer=layer, taken=taken: taken.update({layer: (args[0], out)})
                )
                for layer in layers
            ]
            model.requires_grad_(True)
            loss, _ = full_loss(model, ExampleSet(ids, supervised, np.array([0, len(ids)])))
            for handle in handles:
                handle.remove()
            gradients = torch.autograd.grad(loss, [taken[layer][1] for layer in layers])
            for layer, g in zip(layers, gradients, strict=True):
                for position in range(last):
                    yield layer, taken[layer][0][0, position].detach(), g[0, position], block.weight
                behind = g[0, last:]
                assert not behind.any(), "nothing behind the last target has a gradient"


def dense_factors(
    model: LlamaForCausalLM, blocks: list[Block], layers: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    a: dict[str, torch.Tensor] = {}
    s: dict[str, torch.Tensor] = {}
    positions = 0.0
    for layer, x, g, weight in loops(model, blocks, layers):
        a[layer] = a.get(layer, 0) + weight * torch.outer(x, x)
        s[layer] = s.get(layer, 0) + weight * torch.outer(g, g)
        positions += weight * (layer == layers[0])
    return a, s, positions


@pytest.mark.parametrize("layers", [MLP, ATTENTION])
def test_gradient_sums_are_autograds(model: LlamaForCausalLM, layers: list[str]) -> None:
    examples = example_set(7, 1)
    _, (found,) = run(model, one_block(examples), layers=layers, factors=False)
    model.requires_grad_(True)
    loss, tokens = full_loss(model, examples)
    loss.backward()
    assert found.tokens == tokens
    assert found.loss == pytest.approx(float(loss.detach()))
    for layer in layers:
        torch.testing.assert_close(found.gradients[layer], model.get_submodule(layer).weight.grad)


def test_no_weight_needs_a_gradient(model: LlamaForCausalLM) -> None:
    """The backward pass ends at the lowest tracked layer: no memory for the weights' gradients."""
    run(model, one_block(example_set(2, 1)))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("layers", [MLP, ATTENTION])
def test_factors_are_the_loop_over_positions(model: LlamaForCausalLM, layers: list[str]) -> None:
    """Two domains with weights of their own, and a reference set that must not enter."""
    blocks = one_block(example_set(5, 1), 0.3) + one_block(example_set(6, 2), 0.02, "train/b")
    reference = one_block(example_set(4, 3), 0.0, "reference/a")
    sums, _ = run(model, blocks + reference, layers=layers, fisher="empirical")
    a, s, positions = dense_factors(model, blocks, layers)
    assert sums.positions == pytest.approx(positions)
    for layer in layers:
        torch.testing.assert_close(sums.a[input_group(layer)], a[layer])
        torch.testing.assert_close(sums.s[layer], s[layer])


def test_positions_that_count(model: LlamaForCausalLM) -> None:
    """Prompt positions do; padding and what stands behind the last target don't."""
    ids = np.array([3, 4, 5, 6, 7, 8, 9], np.int32)
    short = (ids, np.array([0, 0, 0, 1, 1, 0, 0], bool))
    long = (ids, np.array([0, 0, 0, 0, 0, 0, 1], bool))
    sums, _ = run(model, [Block("train/a", 0, [short, long], [0, 1], 0.5)], fisher="empirical")
    assert sums.positions == 0.5 * (4 + 6)
    cut = (ids[:5], short[1][:5])
    tail_cut, _ = run(model, [Block("train/a", 0, [cut, long], [0, 1], 0.5)], fisher="empirical")
    torch.testing.assert_close(sums.a, tail_cut.a, rtol=0, atol=0)
    torch.testing.assert_close(sums.s, tail_cut.s, rtol=0, atol=0)
    answers_only = sum(
        torch.outer(a, a) * w
        for number, (layer, a, _, w) in enumerate(loops(model, [Block("train/a", 0, [short], [0], 0.5)], MLP[:1]))
        if layer == MLP[0] and number % 4 >= 2
    )
    assert torch.dist(sums.a[input_group(MLP[0])], answers_only) > 0.01 * torch.linalg.norm(answers_only)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_neither_batching_nor_order_changes_anything(model: LlamaForCausalLM, fisher: str) -> None:
    examples = example_set(9, 1)
    (block,) = one_block(examples)
    order = [4, 8, 0, 3, 7, 1, 2, 6, 5]
    shuffled = Block(block.set, 0, [block.items[i] for i in order], order, block.weight)
    sums, (gradient,) = run(model, [block], fisher=fisher, batch_tokens=1)
    for other, budget in ((block, 40), (block, 10_000), (shuffled, 33)):
        again, (same,) = run(model, [other], fisher=fisher, batch_tokens=budget)
        torch.testing.assert_close((again.a, again.s, again.positions), (sums.a, sums.s, sums.positions))
        torch.testing.assert_close(same.gradients, gradient.gradients)


def test_a_wide_factor_is_whole_though_little_more_than_half_is_computed() -> None:
    width = WIDE + STRIPS - 1  # strips of unequal size
    rows = torch.randn(30, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = FactorSums()
    for part in rows.split(11):
        sums.add_inputs("x", part, 0.5)
    assert not sums.a["x"][-1, 0], "below the strips nothing is computed"
    sums.mirror()
    torch.testing.assert_close(sums.a["x"], 0.5 * rows.T @ rows)


def test_shards_add_up(model: LlamaForCausalLM) -> None:
    """Blocks passed over in different places give the factors of all of them in one."""
    blocks = split("train/a", example_set(8, 1), list(range(8)), 4, 0.7)
    whole, gradients = run(model, blocks)
    first, second = run(model, blocks[1:3]), run(model, [blocks[0], blocks[3]])
    for layer in MLP:
        torch.testing.assert_close(first[0].s[layer] + second[0].s[layer], whole.s[layer])
    assert first[0].positions + second[0].positions == pytest.approx(whole.positions)
    torch.testing.assert_close(second[1][1].gradients, gradients[3].gradients)


def test_factors_are_in_the_mixtures_proportions(model: LlamaForCausalLM) -> None:
    """Σ weight · tokens is 1, so ``positions`` is positions per token, however large each domain's sample is."""
    small, large = example_set(3, 1), example_set(12, 2)
    blocks = split("train/a", small, list(range(3)), 2, 0.8) + split("train/b", large, list(range(12)), 2, 0.2)
    tokens = [int(sum(m[1:].sum() for _, m in b.items)) for b in blocks]
    assert sum(b.weight * t for b, t in zip(blocks, tokens, strict=True)) == pytest.approx(1)
    assert sum(b.weight * t for b, t in zip(blocks[:2], tokens[:2], strict=True)) == pytest.approx(0.8)
    twice = ExampleSet(
        np.tile(large.ids, 2),
        np.tile(large.supervised, 2),
        np.append(large.offsets, large.offsets[1:] + len(large.ids)),
    )
    doubled = blocks[:2] + split("train/b", twice, list(range(24)), 2, 0.2)
    one, two = run(model, blocks, fisher="empirical")[0], run(model, doubled, fisher="empirical")[0]
    torch.testing.assert_close((one.a, one.s, one.positions), (two.a, two.s, two.positions))


def test_the_loss_is_a_sum_over_tokens(model: LlamaForCausalLM) -> None:
    """A mean loss would make S smaller by the square of the count: two equal examples give twice the sums, not half."""
    single = list(example_set(1, 1))
    one, _ = run(model, [Block("train/a", 0, single, [0], 1.0)], fisher="empirical")
    two, _ = run(model, [Block("train/a", 0, single * 2, [0, 1], 1.0)], fisher="empirical")
    torch.testing.assert_close(two.s[MLP[0]], 2 * one.s[MLP[0]])


def test_sampled_fisher_converges_to_the_exact_one(model: LlamaForCausalLM) -> None:
    """S over many seeds against its expectation, every label of every target taken with its probability."""
    examples, layer = example_set(2, 4, longest=3), MLP[0]
    blocks = one_block(examples)
    with record(model, [layer]) as recorder:
        exact = torch.zeros(16, 16, dtype=torch.float64)
        for item in blocks[0].items:
            logits = supervised_logits(model, collate([item]))
            for row in range(len(logits)):  # targets are independent given the inputs: their squares add up
                log_p = logits[row].log_softmax(0)
                for label in range(VOCABULARY):
                    (g,) = torch.autograd.grad(-log_p[label], recorder.outputs[layer], retain_graph=True)
                    exact += log_p[label].detach().exp() * g[0].T @ g[0]
    seeds = 700
    mean = sum(run(model, blocks, layers=[layer], seed=s)[0].s[layer] for s in range(seeds)) / seeds
    empirical = run(model, blocks, layers=[layer], fisher="empirical")[0].s[layer]
    scale = torch.linalg.norm(exact)
    assert torch.dist(mean, exact) < 0.1 * scale
    assert torch.dist(empirical, exact) > 0.3 * scale, "the data's labels would show"


def test_labels_follow_the_models_distribution() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -torch.inf]]).log_softmax(-1)
    batch = collate([(np.array([0, 1], np.int32), np.array([False, True]))])
    drawn = torch.cat([sample_labels(logits, batch, [0], "train/a", seed) for seed in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, logits.exp()[0], rtol=0, atol=0.03)
    assert not (drawn == 3).any()


def test_labels_belong_to_the_example() -> None:
    """The same in any batch and beside any neighbour; another seed, set or key gives others."""
    items = [(np.arange(21, dtype=np.int32), np.arange(21) > 0)] * 2
    flat = torch.zeros(40, 1000)
    both = sample_labels(flat, collate(items), [7, 8], "train/a", 1)
    alone = sample_labels(flat[:20], collate(items[:1]), [8], "train/a", 1)
    assert torch.equal(both[20:], alone)
    assert not torch.equal(both[:20], alone)
    for name, seed in (("train/b", 1), ("train/a", 2)):
        assert not torch.equal(sample_labels(flat[:20], collate(items[:1]), [8], name, seed), alone)


def test_sums_of_a_bf16_model_are_fp32() -> None:
    """bf16 sums stop growing: of 5,000 equal terms 43 % and less arrive."""
    items = list(example_set(2, 1))
    model = llama().bfloat16()
    many, (gradient,) = run(model, [Block("train/a", 0, items * 300, list(range(600)), 1.0)], fisher="empirical")
    few, (once,) = run(model, [Block("train/a", 0, items, [0, 1], 1.0)], fisher="empirical")
    assert many.s[MLP[0]].dtype == gradient.gradients[MLP[0]].dtype == torch.float32
    for large, small in ((many.s, few.s), (gradient.gradients, once.gradients)):
        error = torch.dist(large[MLP[0]], 300 * small[MLP[0]]) / torch.linalg.norm(large[MLP[0]])
        assert error < 0.02
    summed = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(600):
        summed += 1
    assert summed < 0.5 * 600, "in bf16 it would show"


def test_tracked_layers_never_hold_the_head(model: LlamaForCausalLM) -> None:
    names = tracked_layers(model, ["*"])
    assert "lm_head" not in names
    assert len(names) == 14
    assert tracked_layers(model, ["*.down_proj", "*.mlp.*"]) == [n for n in names if ".mlp." in n], "model's order"
    with pytest.raises(BadInput, match=r"influence.layers.*'\*.mpl.\*' matches no linear layer"):
        tracked_layers(model, ["*.mlp.*", "*.mpl.*"])


def test_shapes_come_from_the_configuration_alone(model: LlamaForCausalLM) -> None:
    shapes = layer_shapes(model.config, ["*.mlp.*"])
    assert shapes == {n: tuple(model.get_submodule(n).weight.shape) for n in tracked_layers(model, ["*.mlp.*"])}


def test_layers_that_share_an_input_share_its_factor() -> None:
    assert input_group("m.0.mlp.gate_proj") == input_group("m.0.mlp.up_proj")
    assert len({input_group(f"m.0.self_attn.{n}_proj") for n in "qkv"}) == 1
    assert input_group("m.0.mlp.gate_proj") != input_group("m.1.mlp.gate_proj")
    assert input_group("m.0.mlp.down_proj") != input_group("m.0.mlp.up_proj")
