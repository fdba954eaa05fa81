"""The widths of a language model by the `config.json` that transformers keeps beside its weights.

The model is not built, and neither torch nor transformers is needed.
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

_MOST = 10_000_000  # largest file, in bytes: configurations have a few thousand
# Where models that read more than text keep the configuration of their language model.
_OF_TEXT = ("text_config", "llm_config", "language_config", "decoder")
# What model families call the same number. The first name is the usual one.
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_FEED_FORWARD = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
# Families whose feed-forward block has two layers. All newer ones have a third, the gate.
_WITHOUT_GATE = {
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "opt", "bloom", "falcon"),
    *("mpt", "phi", "starcoder2", "bert", "roberta", "t5"),
}


class Widths(NamedTuple):
    """The widths of a model, in inputs of a layer.

    hidden_size: the size of the residual stream, by which `suggest_lr` knows models. mean: the mean
    fan-in of all linear layers of the blocks, weighted by the size of their weights. LoRA's
    learning rates depend on it. largest: the largest fan-in, for full finetuning.
    """

    hidden_size: float
    mean: float
    largest: float


def read_widths(path: str | os.PathLike[str]) -> Widths:
    """Return the widths of a model by its configuration.

    Args:
        path: a `config.json` of transformers, or the folder of a model that contains one.

    Raises:
        InspectionError: the file is missing or is no JSON object, or it does not state the hidden
            size.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        config: Any = msgspec.json.decode(read_bytes(file, _MOST))
    except (OSError, msgspec.DecodeError) as error:
        raise InspectionError(
            f"The model configuration {file} cannot be read: {error}.",
            "Pass a config.json of transformers, or the folder of a model that contains one.",
        ) from error
    if not isinstance(config, dict):
        raise InspectionError(
            f"The model configuration {file} is not a JSON object, but {shown(config)}.",
            "Pass a config.json of transformers.",
        )
    for name in _OF_TEXT:
        if isinstance(config.get(name), dict):
            config = config[name]
    hidden = _size(config, _HIDDEN, file)
    if hidden is None:
        raise InspectionError(
            f"The model configuration {file} states no {_HIDDEN[0]}.",
            "Pass the configuration of a language model, or state the width yourself.",
        )
    return _widths(config, hidden, file)


def _widths(config: Mapping[str, Any], hidden: float, file: Path) -> Widths:
    """Return the widths, from the linear layers of one block: queries, keys, values and output of
    the attention, then the feed-forward block.
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
    """Return the number by the first of these names that the configuration has."""
    for name in names:
        value = config.get(name)
        if value is not None:
            check_range("fan_in", value, f"In {file} {name}", InspectionError)
            return float(value)
    return None
