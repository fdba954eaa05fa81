"""
The tiny model of the other examples
====================================

This module creates a small language model, a tokenizer, some texts and a reward function, so the other examples do
not need to download anything.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<eos>",
    "a",
    "the",
    "small",
    "cat",
    "dog",
    "bird",
    "tree",
    "runs",
    "sees",
    "eats",
    "likes",
    "jumps",
    "and",
    "over",
    "under",
    "big",
    "red",
    "old",
    "user",
    ":",
]
TEXTS = [
    f"{a} {b} {c} {d}"
    for a in ("a", "the")
    for b in ("cat", "dog", "bird")
    for c in ("sees", "eats")
    for d in WORDS[5:9]
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word."""
    made = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chat = "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' ' }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="the",
        chat_template=chat,
    )


def model() -> LlamaForCausalLM:
    """Return a Llama with two layers of width 128."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            **sizes,
        )
    )


def cats(completions: list[str], **_: object) -> list[float]:
    """Reward the number of cats."""
    return [float(text.count("cat")) for text in completions]
