"""A tiny random Llama with its own tokenizer, made on the spot: every test's stand-in for a real model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ideal.model.base import HEAD_WIDTH
from ideal.training import pretraining

MAX_TOKENS = 512

TEXT = [
    "State the final answer to the following arithmetic problem: 12 + 34 - 5 =",
    "Spell this word backward (example: sun -> nus): quick brown fox jumps over the lazy dog.",
    "Question: John is married to Mary. They have a child called Anna. What is Anna to John?",
    "Keep all numbers larger than 10 in this list: ['1.5', '20', '33']. Return the new list.",
    "system user assistant def add(a, b):\n    return a + b\n",
]


def make_model(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 64) -> Path:
    """Write a random Llama and its tokenizer, in the transformers format, into ``folder``.

    Args:
        folder: made if it isn't there; also the return value.
        seed: of the weights; the tokenizer is always the same.
        layers: transformer layers.
        hidden: width, a multiple of 32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_WIDTH,
        num_key_value_heads=max(1, hidden // HEAD_WIDTH // 2),
        head_dim=HEAD_WIDTH,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 words, trained on `TEXT`, with ChatML's specials and template."""
    tokenizer = pretraining.make_tokenizer(TEXT, 400)
    tokenizer.model_max_length = MAX_TOKENS
    return tokenizer
