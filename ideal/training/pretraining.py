"""A small language model from nothing: its tokenizer and its weights, from a corpus of examples.

Studies need a base model that a laptop retrains a hundred times. This makes one in a minute or two: a byte-level BPE
with ChatML's template, and a Llama that is trained on every token of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ideal.config.config import SftConfig
from ideal.config.inputs import MadeModel
from ideal.data.chat import ChatEncoder, Message
from ideal.data.examples import ExampleSet
from ideal.data.sources import messages, rows
from ideal.model.base import made_shapes
from ideal.training.checkpoints import keep, latest
from ideal.training.trainer import Trainer, plan, train

END = "<|im_end|>"
SPECIALS = ["<|endoftext|>", "<|im_start|>", END]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = "corpus"


def pretrain(
    made: MadeModel,
    folder: Path,
    max_tokens: int,
    progress: Callable[[str, int, int], None] = lambda message, done, total: None,
    kept: Path | None = None,
    checkpoint_steps: int = 100,
) -> float:
    """Make the model and its tokenizer in ``folder``, in the transformers format, in bf16.

    A making that was killed goes on from its last checkpoint, to the weights that it would have come to undisturbed.

    Args:
        max_tokens: longest example of the corpus.
        kept: the folder of the checkpoints of this very making. Default: none are kept.
        checkpoint_steps: steps between two of them.

    Returns:
        the last step's loss, nats per token.

    Raises:
        BadInput: a source of the corpus can't be read.
        Unusable: a row of it is no conversation.
    """
    corpus = [
        messages(row, source)
        for number, source in enumerate(made.corpus)
        for _, row in rows(source, f"model.made.corpus.{number}")
    ]
    tokenizer = make_tokenizer([message["content"] for talk in corpus for message in talk], made.vocabulary)
    tokenizer.save_pretrained(folder)
    make_weights(made, tokenizer, folder, max_tokens)
    examples = _examples(corpus, ChatEncoder(tokenizer, max_tokens))
    config = SftConfig(
        epochs=made.epochs,
        learning_rate=made.learning_rate,
        batch_examples=made.batch_examples,
        weight_decay=0.01,
        precision="fp32",
    )
    trainer = Trainer(folder, config, torch.device("cpu"), batch_tokens=4096)
    volumes = {CORPUS: len(examples)}
    total = len(plan(volumes, config, made.seed))
    if kept and (state := latest(kept)):
        trainer.load_state(state)
    loss = 0.0
    for log in train(trainer, {CORPUS: examples}, volumes, made.seed):
        loss = log.loss
        progress(f"loss {loss:.3f}", log.step + 1, total)
        if kept and trainer.next_step % checkpoint_steps == 0 and trainer.next_step < total:
            keep(kept, trainer.next_step, trainer.save_state)
    trainer.model.to(torch.bfloat16)
    trainer.save_model(folder)
    return loss


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocabulary`` tokens, digits one by one, with ChatML's specials and template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, "system\nuser\nassistant\n"], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token=END,
        pad_token=END,
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_weights(made: MadeModel, tokenizer: PreTrainedTokenizerBase, folder: Path, max_tokens: int) -> None:
    """A random Llama of these shapes into ``folder``."""
    config = made_shapes(made, max_tokens)
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(made.seed)
        LlamaForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]


def _examples(corpus: list[list[Message]], encoder: ChatEncoder) -> ExampleSet:
    """The corpus with every token supervised."""
    found = ExampleSet.of([example for talk in corpus for example in encoder.encode(talk)])
    return ExampleSet(found.ids, np.ones_like(found.supervised), found.offsets)
