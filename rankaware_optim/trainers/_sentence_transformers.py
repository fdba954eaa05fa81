"""This module runs trainers of sentence-transformers, in which the loss function can
have trainable parameters.

Importing this module does not import sentence-transformers.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ._trainer import Settings, Touched
from ._transformers import Groups, TransformersTrainer

# The trainer returns its parameter groups among the optimizer's settings. The key depends
# on the optimizer: it is "optimizer_dict" unless transformers itself builds groups.
_PLACES = ("params", "model", "optimizer_dict")


class SentenceTransformersTrainer(TransformersTrainer):
    """A trainer of sentence-transformers.

    In sentence-transformers, the optimizer trains the parameters of the loss function,
    which include the parameters of the model. With the argument
    `learning_rate_mapping`, the user can set a different learning rate for some
    parameters.
    """

    @staticmethod
    def is_one(value: object) -> bool:
        # The classes are compared by the names of their packages, because isinstance would
        # have to import the library.
        packages = {kind.__module__.partition(".")[0] for kind in type(value).__mro__}
        return (
            "sentence_transformers" in packages
            and TransformersTrainer.is_one(value)
            and hasattr(value, "loss")
        )

    def own_optimizer(self) -> tuple[type, Settings]:
        native, settings = super().own_optimizer()
        # `groups` returns the parameter groups, so that they are removed from the settings
        rest = {name: settings[name] for name in settings if name != "optimizer_dict"}
        return native, rest

    def trained(self, model: nn.Module) -> nn.Module:
        # With several data sets the loss can be a dict of losses. The trainer also lists
        # their parameters with a Sequential, so the names of the parameters are the same.
        # Nobody calls this module.
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
            # Without this key the group gets the weight decay that the user passes to
            # attach. Groups of norms and biases have weight_decay=0, which stays.
            if with_decay.issuperset(map(id, group["params"])):
                group.pop("weight_decay", None)
        return copies

    def touched(self) -> Touched:
        modules, *rest = super().touched()
        return Touched([*modules, self.trained(self.model)], *rest)
