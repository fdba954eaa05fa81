"""Settings in words, as YAML, flags and environment variables carry them."""

from __future__ import annotations

import pytest

from rankaware_optim import OptimizerError, RankAwareOptimizer, Reference
from rankaware_optim.integrations._settings import settings_from_words

from ..helpers.models import mlp

WORDS = {
    "tuned_at": "r=16,alpha=32",
    "law": "mua",
    "method": "lora",
    "init": "A",
    "rates": '{"*head*": 1e-3}',
    "other_lr": "1e-4",
    "per_layer_width": "false",
    "batch": "64",
    "strict": "0",
    "scale_weight_decay": "True",
    "on_rank_change": "reset",
}


def test_all_settings_are_read_and_taken():
    """Every setting in words becomes the argument that RankAwareOptimizer takes."""
    found = settings_from_words(WORDS)
    assert found["tuned_at"] == Reference(rank=16, alpha=32)
    assert settings_from_words({"tuned_at": {"r": 16, "lora_alpha": 32}}) == {
        "tuned_at": found["tuned_at"]
    }
    assert found["rates"] == {"*head*": 1e-3}
    assert [
        found[name] for name in ("per_layer_width", "strict", "scale_weight_decay")
    ] == [
        0,
        0,
        1,
    ]
    opt = RankAwareOptimizer(mlp((4,)), "adamw", lr=1e-3, **found)
    assert {group["rank_multiplier"] for group in opt.param_groups} != {1.0}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            {"tunedat": "r=16,alpha=32"},
            "'tunedat' is not a setting. Known are tuned_at, recipe",
        ),
        (
            {"tuned_at": "rank 16"},
            "tuned_at is 'rank 16': 'rank 16' is not a part of a reference",
        ),
        ({"tuned_at": 16}, "tuned_at is 16"),
        ({"tuned_at": {"r": 16}}, "tuned_at is {'r': 16}: Reference lacks alpha"),
        ({"batch": "many"}, "batch is 'many'"),
        ({"strict": "perhaps"}, "neither true nor false"),
        ({"rates": "{"}, "rates is '{'"),
        ({"rates": "[1]"}, "rates is"),
        (
            {"recipe": "r.toml", "tuned_at": "r=16,alpha=32"},
            "Both recipe and tuned_at were given",
        ),
    ],
)
def test_settings_that_cannot_be_read_are_refused(words, sentence):
    """An unknown name, an unreadable value, or both a recipe and a reference: a sentence each."""
    with pytest.raises(OptimizerError, match=sentence):
        settings_from_words(words)
