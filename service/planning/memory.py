"""What each stage's worker holds at its fullest, from the model's shapes alone.

V is the vocabulary, T a forward pass's supervised tokens, w 2 bytes (bf16) or 4 (fp32):

- SFT: parameters in w; master weights, gradient sums and two moments in fp32, of adapters alone where these are
  trained; without a GPU the mean of the last weights, too; activations; logits, their softmax and its gradient in fp32
  (12 T V). Sharded over n workers: an nth of all that is fp32; besides, in w, two layers' weights and the
  vocabulary's, gathered; the gradient of what is largest of them, in w and in fp32 as it is summed. Without a GPU each
  worker first reads the whole model where it trains.
- Influence's pass: parameters in w; the layers' factors and one block's gradient in fp32; activations above the lowest
  tracked layer; two sets of output gradients; logits and what two backward passes make of them in fp32 (20 T V).
- Influence's solve: all sets' gradients of one layer, three times; with `kfac` and `ekfac` one inverse or
  eigen-decomposition in fp64. `joint` then takes sets' solutions of all layers through forward passes with tangents,
  in w, as many at a time as are twice the model, and keeps the logits' tangents, half the model.

Batches are taken to be full and half of their tokens supervised. Left out are what Python and its libraries hold (0.5
to 1 GiB, in the machine's memory), and what an allocator keeps of freed memory. The test holds the formulas against
three models' measured peaks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ideal.config.config import Config, LoraConfig
from ideal.influence.joint import TANGENTS, at_once
from ideal.influence.layers import input_group, layer_shapes
from ideal.influence.solvers import FACTORED, needs_factors
from ideal.model import lora
from ideal.model.precision import ByPrecision
from service.planning.partition import Layers, cut

GIB = 2**30

SUPERVISED = 0.5
"""Share of a batch's tokens that is supervised: answers, not prompts. Assumed."""

WIDTH = ByPrecision(bf16=2, fp32=4)
"""Bytes of a number."""

TRAINED_LOGIT = 12
"""Bytes of each logit as SFT's backward pass begins: log-softmax and two gradients in fp32."""

SAMPLED_LOGIT = 20
"""Bytes of each logit with labels drawn: logits, two log-softmaxes and a gradient in fp32, and the last batch's."""

PLAIN_LOGIT = 16
"""Bytes of each logit in a pass that draws no labels: as in SFT, and the logits themselves."""

TANGENT_LOGIT = 12
"""Bytes of each logit's tangent along each solution while it is made, in a batch."""

KEPT_OUTPUTS = ("gate_proj", "up_proj")
"""Layers whose output a frozen model's backward pass needs anyway; of other tracked layers it is kept besides."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model's shape that memory and time depend on.

    Attributes:
        head: elements of the product with the vocabulary.
        trained: parameters that SFT trains: all of these, or the adapters', which are none of them.
        vocabularies: matrices of that size: 1 where input and output share theirs, else 2.
        body: elements of all other matrices that tokens are multiplied with.
        heads: of attention.
        attention: width of all heads together.
        inner: width of the MLP.
        tracked: (d_out, d_in) of the tracked layers.
    """

    parameters: int
    trained: int
    head: int
    vocabularies: int
    body: int
    layers: int
    hidden: int
    heads: int
    attention: int
    inner: int
    vocabulary: int
    tracked: Layers

    @property
    def adapters(self) -> int:
        """Parameters of the adapters; 0 without."""
        return self.trained if self.trained < self.parameters else 0

    @property
    def tracked_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.tracked.values())

    @classmethod
    def of(cls, shapes: PretrainedConfig, patterns: list[str], adapters: LoraConfig | None = None) -> Sizes:
        """Sizes of a transformers configuration, with adapters if these are trained.

        Raises:
            BadInput: a pattern of tracked layers matches none, or a target of the adapters.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shapes)  # type: ignore[no-untyped-call]
        parameters = sum(p.numel() for p in model.parameters())
        head = shapes.hidden_size * shapes.vocab_size
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        matrices = 1 if tied else 2
        if adapters:
            lora.add(model, adapters)
        heads = shapes.num_attention_heads
        return cls(
            parameters,
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            head,
            matrices,
            parameters - head * matrices,
            shapes.num_hidden_layers,
            shapes.hidden_size,
            heads,
            heads * (getattr(shapes, "head_dim", None) or shapes.hidden_size // heads),
            getattr(shapes, "intermediate_size", None) or 4 * shapes.hidden_size,
            shapes.vocab_size,
            layer_shapes(shapes, patterns, adapters),
        )


def units(config: Config) -> int:
    """Gradients of the domains, and as many of the reference sets."""
    return len(config.domains) * config.influence.blocks


def batch(config: Config) -> int:
    """Tokens in one forward pass at most: an example that is longer than the budget goes alone."""
    return max(config.resources.batch_tokens, config.model.max_tokens)


def depth(sizes: Sizes, layers: Layers) -> int:
    """Decoder layers that a backward pass goes through: from the top down to the lowest of these."""
    numbers = [int(found[1]) for name in layers if (found := re.search(r"\.(\d+)\.", name))]
    return sizes.layers - min(numbers, default=0)


def sft_memory(config: Config, sizes: Sizes, supervised: float) -> int:
    """Bytes of one SFT worker from its second step on."""
    width = WIDTH[config.sft.precision]
    if config.sft.lora:
        working = _working_memory(config, sizes, supervised, 0)
        return sizes.parameters * width + sizes.trained * (width + 16) + working
    shared = width * sizes.head if sizes.vocabularies == 1 else 0  # the head's gradient waits for the embedding's
    working = _working_memory(config, sizes, supervised, shared)
    return sizes.parameters * (width + 16) + max(working, 2 * shared + width * sizes.head)  # and their sum


def sharded_memory(config: Config, sizes: Sizes, supervised: float, workers: int) -> int:
    """Bytes of one of so many SFT workers that divide the model among themselves."""
    width = WIDTH[config.sft.precision]
    layer, root = sizes.body // sizes.layers, sizes.head * sizes.vocabularies
    working = _working_memory(config, sizes, supervised, 0)
    reducing = (width + 4) * max(layer, root)
    return 16 * sizes.parameters // workers + width * (2 * layer + root) + max(working, reducing)


def _working_memory(config: Config, sizes: Sizes, supervised: float, shared: int) -> int:
    """Bytes of activations and logits, beside so many of a gradient that waits."""
    width, tokens = WIDTH[config.sft.precision], batch(config)
    layer = tokens * (2 * (4 + 2 * width) * sizes.hidden + width * 4 * (sizes.attention + sizes.inner))
    logits = max(TRAINED_LOGIT * int(tokens * supervised) * sizes.vocabulary, shared)
    if config.resources.gradient_checkpointing:  # of each layer its input, and one layer in full at a time
        return tokens * sizes.layers * sizes.hidden * width + max(logits, layer + shared)
    return sizes.layers * layer + logits


def reference_memory(config: Config, sizes: Sizes, supervised: float) -> int:
    """Bytes of the worker that takes the reference sets' losses: no gradient, two copies of the logits in fp32."""
    width = WIDTH[config.influence.precision]
    return sizes.parameters * width + int(batch(config) * supervised) * 8 * sizes.vocabulary


def pass_memory(config: Config, sizes: Sizes, blocks: int, supervised: float) -> int:
    """Bytes of the influence actor that needs most in its pass, the tracked layers cut in so many blocks."""
    width, tokens = WIDTH[config.influence.precision], batch(config)
    sampled = needs_factors(config.influence.solver, config.influence) and config.influence.fisher == "sampled"
    layer = 2 * 4 * sizes.hidden + width * (4 * sizes.attention + 3 * sizes.inner)

    def of_block(layers: Layers) -> int:
        inputs = {input_group(name): columns for name, (_, columns) in layers.items()}
        outputs = sum(rows for rows, _ in layers.values())
        besides = sum(rows for name, (rows, _) in layers.items() if not name.endswith(KEPT_OUTPUTS))
        recorded = width * (sum(inputs.values()) + besides + outputs * (2 if sampled else 1))
        kept = sum(rows * columns for rows, columns in layers.values())
        if needs_factors(config.influence.solver, config.influence):
            kept += sum(rows * rows for rows, _ in layers.values()) + sum(c * c for c in inputs.values())
        return 4 * kept + tokens * (depth(sizes, layers) * layer + recorded)

    logits = int(tokens * supervised) * sizes.vocabulary * (SAMPLED_LOGIT if sampled else PLAIN_LOGIT)
    return sizes.parameters * width + logits + max(of_block(part) for part in cut(sizes.tracked, blocks))


def solve_memory(config: Config, sizes: Sizes, supervised: float) -> int:
    """Bytes of an influence actor at its most expensive layer, or with `joint` at all of them."""
    sets = 2 * len(config.domains)

    def of_layer(rows: int, columns: int) -> int:
        products = 4 * 3 * sets * rows * columns
        if config.influence.solver not in FACTORED:
            return products
        wider, other = max(rows, columns), min(rows, columns)
        last = 4 * (rows * rows + columns * columns + rows * columns)  # the layer's before it, or its own, in fp32
        if config.influence.solver == "ekfac":
            decomposing = 36 * wider * wider + 8 * other * other  # LAPACK's workspace is two matrices in fp64
        else:
            decomposing = 28 * wider * wider + 8 * other * other
        return last + max(decomposing, products + 8 * (rows * rows + columns * columns))

    layer = max(of_layer(rows, columns) for rows, columns in sizes.tracked.values())
    together = forms_memory(config, sizes, supervised) if config.influence.joint else 0
    return max(layer, together)


def forms_memory(config: Config, sizes: Sizes, supervised: float) -> int:
    """Bytes of an influence actor as it takes the curvature along every set's solution (`joint`)."""
    width, directions = WIDTH[config.influence.precision], 2 * len(config.domains)
    held = min(directions, at_once(sizes.parameters, sizes.tracked_weights))
    tokens = max(config.resources.batch_tokens // directions, config.model.max_tokens)
    batch_logits = int(tokens * supervised) * sizes.vocabulary
    examples = -(-config.influence.curvature_examples // len(config.domains)) * len(config.domains)
    all_logits = int(examples * config.model.max_tokens * supervised) * sizes.vocabulary
    kept = max(batch_logits, min(all_logits, int(TANGENTS * sizes.parameters / directions)))
    scores = 4 * (1 + held) * 3 * sizes.heads * min(tokens, config.model.max_tokens) * tokens  # attention keeps all
    logits = 4 * directions * kept + batch_logits * (TANGENT_LOGIT * held + PLAIN_LOGIT)
    logits += width * sizes.head  # CPU libraries reorder it
    layer = (1 + held) * tokens * (4 * sizes.hidden + 3 * width * sizes.inner)
    return width * (sizes.parameters + held * sizes.tracked_weights) + max(logits, scores + layer)
