"""This module reads the width of a language model from its `config.json`.

transformers stores this file together with the weights. Reading the width does not
build the model and does not import torch or transformers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from .._checks import check_range, shown
from .._files import read_bytes
from ..errors import InspectionError

_MOST = 10_000_000  # the largest file to read, in bytes; most have a few thousand
# Multimodal models store the configuration of their language model under one of these
# keys.
_OF_TEXT = ("text_config", "llm_config", "language_config", "decoder")
# Different model families use different names for the same number. The most common name
# comes first.
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_FEED_FORWARD = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
# Model families whose feed-forward block has two layers. Newer families have a third
# layer, the gate.
_WITHOUT_GATE = {
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "opt", "bloom", "falcon"),
    *("mpt", "phi", "starcoder2", "bert", "roberta", "t5"),
}


class Widths(NamedTuple):
    """Three measures of the width of a model.

    Args:
        hidden_size: the size of the residual stream. `suggest_lr` uses it to look up
            models.
        mean: the mean fan-in of all linear layers in a block, weighted by the sizes of
            their weights. The learning rates of LoRA depend on it.
        largest: the largest fan-in. The learning rate of full finetuning depends on it.
    """

    hidden_size: float
    mean: float
    largest: float


def read_widths(path: str | os.PathLike[str]) -> Widths:
    """Read the widths of a model from its configuration.

    Args:
        path: a `config.json` of transformers, or a model folder that contains one.

    Raises:
        InspectionError: the file does not exist, is not a JSON object, or does not
            contain the hidden size.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        config: Any = msgspec.json.decode(read_bytes(file, _MOST))
    except (OSError, msgspec.DecodeError) as error:
        raise InspectionError(
            f"Cannot read the model configuration {file}: {error}.",
            "Pass a config.json of transformers, or a model folder that contains one.",
        ) from error
    if not isinstance(config, dict):
        content = shown(config)
        raise InspectionError(
            f"The model configuration {file} must be a JSON object, but it contains {content}.",
            "Pass a config.json of transformers, or a model folder that contains one.",
        )
    for name in _OF_TEXT:
        if isinstance(config.get(name), dict):
            config = config[name]
    hidden = _size(config, _HIDDEN, file)
    if hidden is None:
        raise InspectionError(
            f"The model configuration {file} does not contain hidden_size.",
            "Pass the config.json of a language model, or pass the model's width as a number.",
        )
    return _widths(config, hidden, file)


def _widths(config: Mapping[str, Any], hidden: float, file: Path) -> Widths:
    """Compute the widths from the linear layers of one transformer block.

    The linear layers of a block are the query, key, value and output projections of the
    attention and the layers of the feed-forward block.
    """
    inner = _size(config, _FEED_FORWARD, file) or 4 * hidden
    heads = _size(config, _HEADS, file) or 1
    pairs_of_keys = _size(config, ("num_key_value_heads",), file) or heads
    head = _size(config, ("head_dim", "d_kv"), file) or hidden / heads
    has_gate = config.get("model_type") not in _WITHOUT_GATE
    layers = [  # (inputs, outputs)
        (hidden, heads * head),
        (hidden, 2 * pairs_of_keys * head),
        (heads * head, hidden),
        (hidden, (1 + has_gate) * inner),
        (inner, hidden),
    ]
    size = sum(inputs * outputs for inputs, outputs in layers)
    mean = sum(inputs * inputs * outputs for inputs, outputs in layers) / size
    return Widths(hidden, float(round(mean)), max(inputs for inputs, _ in layers))


def _size(config: Mapping[str, Any], names: Sequence[str], file: Path) -> float | None:
    """Return the value of the first of several names that the configuration contains.

    If the configuration contains none of the names, None is returned.
    """
    for name in names:
        value = config.get(name)
        if value is not None:
            check_range("fan_in", value, f"In {file} {name}", InspectionError)
            return float(value)
    return None
