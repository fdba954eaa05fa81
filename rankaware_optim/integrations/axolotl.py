"""The plug-in for Axolotl, which imports this module by name.

    plugins: [rankaware_optim.integrations.axolotl.Plugin]
    rankaware: {tuned_at: "r=16,alpha=32"}      # or {recipe: recipe.toml}

`learning_rate` is the rate tuned at `tuned_at`. `optimizer`, weight decay, betas and the schedule
come from the YAML.
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, model_validator

from ..errors import OptimizerError
from ._attach import attach
from ._settings import settings_from_words

_OWN_GROUPS = ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups")


class Settings(BaseModel):
    """The section `rankaware:`, with the arguments of `RankAwareOptimizer`. A reference is a text:
    "r=16,alpha=32".
    """

    model_config = ConfigDict(extra="forbid")

    tuned_at: str | None = None
    recipe: str | None = None
    law: str | None = None
    method: Literal["lora", "full"] = "lora"
    init: Literal["A", "B"] | None = None
    rates: dict[str, float] = {}
    other_lr: float | None = None
    per_layer_width: bool = False
    batch: float | None = None
    strict: bool = False
    scale_weight_decay: bool = True
    on_rank_change: Literal["raise", "reset"] = "raise"

    @model_validator(mode="after")
    def _check(self) -> Settings:
        """Check the reference before a model is loaded."""
        self.for_optimizer()
        return self

    def for_optimizer(self) -> dict[str, Any]:
        """Return the arguments of `RankAwareOptimizer` that were set."""
        return settings_from_words(self.model_dump(exclude_unset=True, exclude_none=True))


class Arguments(BaseModel):
    """The plug-in's part of Axolotl's configuration."""

    rankaware: Settings = Settings()


class Plugin(BasePlugin):
    """Attaches a `RankAwareOptimizer` for the optimizer in the YAML."""

    def get_input_args(self) -> str:
        return f"{__name__}.Arguments"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        given = [name for name in _OWN_GROUPS if cfg.get(name) not in (None, False)]
        if given:
            raise OptimizerError(
                f"{given[0]} is of groups that Axolotl makes, which this plug-in replaces.",
                "Leave it out, and say it as rankaware: rates: {'*embed_tokens*': 1e-5}, or law:"
                " loraplus.",
            )
        settings = Settings.model_validate(dict(cfg.rankaware or {})).for_optimizer()
        rate: dict[str, Any] = {} if "recipe" in settings else {"lr": float(cfg.learning_rate)}
        attach(trainer, **rate, **settings)
