"""The plug-in for Axolotl, which imports this module by name.

    plugins: [rankaware_optim.integrations.axolotl.Plugin]
    rankaware: {tuned_at: "r=16,alpha=32"}      # or {recipe: recipe.toml}

`learning_rate` is the rate tuned at `tuned_at`. `optimizer`, weight decay, betas and the schedule
come from the YAML.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from ..errors import OptimizerError
from ._attach import attach
from ._settings import settings_from_words

_AXOLOTLS_GROUPS = (
    "loraplus_lr_ratio",
    "embedding_lr",
    "embedding_lr_scale",
    "lr_groups",
)


class Arguments(BaseModel):
    """The plug-in's part of Axolotl's configuration.

    Its section `rankaware:` has the arguments of `RankAwareOptimizer`. A reference is a text,
    "r=16,alpha=32", or a mapping, {r: 16, lora_alpha: 32}.
    """

    rankaware: dict[str, Any] = {}

    @field_validator("rankaware")
    @classmethod
    def _check(cls, words: dict[str, Any]) -> dict[str, Any]:
        """Check the settings before a model is loaded."""
        settings_from_words(words)
        return words


class Plugin(BasePlugin):
    """Attaches a `RankAwareOptimizer` for the optimizer in the YAML."""

    def get_input_args(self) -> str:
        return f"{__name__}.Arguments"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        for name in _AXOLOTLS_GROUPS:
            if cfg.get(name) not in (None, False):
                raise OptimizerError(
                    f"{name} is of groups that Axolotl makes, which this plug-in replaces.",
                    "Leave it out, and say it as rankaware: rates: {'*embed_tokens*': 1e-5}, or"
                    " law: loraplus.",
                )
        attach(
            trainer,
            **settings_from_words(cfg.rankaware or {}, lr=float(cfg.learning_rate)),
        )
