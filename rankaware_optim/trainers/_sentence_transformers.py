"""A trainer of sentence-transformers, whose loss may have parameters of its own.

Importing this module does not import the library.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ._trainer import Settings, Touched
from ._transformers import Groups, TransformersTrainer

_PLACES = ("params", "model", "optimizer_dict")  # keys under which it keeps its groups


class SentenceTransformersTrainer(TransformersTrainer):
    """A trainer of sentence-transformers: a `Trainer` whose optimizer trains the loss, which holds
    the model, and for which `learning_rate_mapping` gives groups rates of their own.
    """

    @staticmethod
    def is_one(value: object) -> bool:
        packages = {kind.__module__.partition(".")[0] for kind in type(value).__mro__}
        return (
            "sentence_transformers" in packages
            and TransformersTrainer.is_one(value)
            and hasattr(value, "loss")
        )

    def own_optimizer(self) -> tuple[type, Settings]:
        native, settings = super().own_optimizer()
        # the groups that it builds for any class are those of `groups`
        rest = {name: settings[name] for name in settings if name != "optimizer_dict"}
        return native, rest

    def trained(self, model: nn.Module) -> nn.Module:
        loss = self.trainer.loss
        return nn.Sequential(OrderedDict(loss)) if isinstance(loss, dict) else loss

    def groups(self, module: nn.Module) -> Groups:
        trainer = self.trainer
        _, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        groups = next(settings[name] for name in _PLACES if name in settings)
        decays = {*trainer.get_decay_parameter_names(module)}
        with_decay = {id(p) for name, p in module.named_parameters() if name in decays}
        copies = [dict(group) for group in groups]
        for group in copies:
            # as in a Trainer's groups, the optimizer's weight decay is that of the settings
            if with_decay.issuperset(map(id, group["params"])):
                group.pop("weight_decay", None)
        return copies

    def touched(self) -> Touched:
        modules, *rest = super().touched()
        return Touched([*modules, self.trained(self.model)], *rest)
