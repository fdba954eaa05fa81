"""A tiny Llama, whose configuration the tests of trainers share."""

from __future__ import annotations

from typing import Any


def llama_config(**changes: Any) -> Any:
    """Return the configuration of a Llama with one layer of width 16, with these changes."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 32,
        "max_position_embeddings": 16,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaConfig(**sizes | changes)
