"""The network module for kohya's sd-scripts, which import it by name.

    --network_module rankaware_optim.integrations.kohya --network_args
    "rankaware_tuned_at=r=16,alpha=16" ...

`--learning_rate`, `--unet_lr` and `--text_encoder_lr` are the rates tuned there. The network is
`rankaware_network`, by default "networks.lora". Its groups are split by rank and factor, each with
its own rate. Other settings are network arguments: `rankaware_` and the name of an argument of
`rank_aware_param_groups`. The optimizer is assumed to be sign-like, as Adam is. A saved file
contains the name of the actual network.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from ..errors import OptimizerError
from ..optimizer import rank_aware_param_groups
from ._settings import settings_from_words

_PREFIX = "rankaware_"
# in the scripts' own order
_METHODS = ("prepare_optimizer_params_with_multiple_te_lrs", "prepare_optimizer_params")


def create_network(*args: Any, **kwargs: Any) -> Any:
    """Return the network `rankaware_network`, with parameter groups split by rank."""
    others, name, settings = _parted(kwargs)
    return _adapted(import_module(name).create_network(*args, **others), name, settings)


def create_network_from_weights(*args: Any, **kwargs: Any) -> Any:
    """Return the network in a file, with parameter groups split by rank, and its weights."""
    others, name, settings = _parted(kwargs)
    network, weights = import_module(name).create_network_from_weights(*args, **others)
    return _adapted(network, name, settings), weights


def _parted(kwargs: dict[str, Any]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return the network's own arguments, its module's name, and our settings."""
    name = kwargs.pop(f"{_PREFIX}network", "networks.lora")
    settings = settings_from_words(kwargs, _PREFIX)
    for unusable in {
        "recipe",
        "scale_weight_decay",
        "on_rank_change",
    } & settings.keys():
        raise OptimizerError(
            f"rankaware_{unusable} is for an optimizer of this package, and the scripts build a"
            " native one.",
            "Leave it out; a recipe's rate and reference are printed by rankaware show.",
        )
    others = {
        name: value for name, value in kwargs.items() if not name.startswith(_PREFIX)
    }
    return others, name, settings


def _adapted(network: Any, name: str, settings: dict[str, Any]) -> Any:
    """Replace the network's method that returns parameter groups, and return the network."""
    method = next(method for method in _METHODS if hasattr(network, method))
    setattr(
        network, method, partial(_split, network, getattr(network, method), settings)
    )
    network.prepare_network = partial(
        _name_network, name, getattr(network, "prepare_network", lambda args: None)
    )
    return network


def _split(
    network: Any, native: Callable[..., Any], settings: dict[str, Any], *rates: Any
) -> Any:
    """Return the network's groups with rates by rank, and for each the description of its original
    group.
    """
    result = native(*rates)
    groups = result[0] if isinstance(result, tuple) else result
    lr = next((group["lr"] for group in groups if group.get("lr")), rates[-1])
    split = rank_aware_param_groups(
        groups, model=network, lr=lr, named=False, **settings
    )
    if not isinstance(result, tuple):
        return split
    return split, [result[1][group["user_group"]] for group in split]


def _name_network(name: str, native: Callable[[Any], None], args: Any) -> None:
    """Put the network's name into the metadata of saved files. It is called before training."""
    native(args)
    args.network_module = name
