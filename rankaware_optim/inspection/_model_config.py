"""The survey of a model that is not loaded. It is built from its configuration, as transformers and
diffusers write it, without memory for its weights.

The folder is not trusted: nothing in it is run, and nothing is fetched for it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import read_bytes
from .._types import Method, Survey
from ..errors import InspectionError
from ._peft_config import read_object
from ._safetensors import one_line, shown
from ._survey import inspect_model

if TYPE_CHECKING:
    from torch import nn

_LIMIT = 10_000_000  # bytes of a file
_BY_HAND = "or give the width by hand, as fan_in= in a reference"


def survey_config(
    path: str | os.PathLike[str],
    *,
    target_modules: str | Sequence[str] | None = None,
    method: Method = "lora",
) -> Survey:
    """Return the survey of the model that a configuration describes.

    Args:
        path: a model's folder or its config.json, of transformers or diffusers.
        target_modules: the layers that PEFT adapts, as its `LoraConfig` takes them.
        method: "lora", or "full" for all weights, without adapters.

    Raises:
        InspectionError: the configuration cannot be read or built, or no layer is adapted.
    """
    if method == "lora" and not target_modules:
        raise InspectionError(
            "The width of LoRA is that of the layers that it adapts, which are not given.",
            'Give target_modules too, such as ["q_proj", "v_proj"], as for PEFT.',
        )
    file = Path(path)
    if not file.is_file():
        file /= "config.json"
    values = _read(file)
    try:
        with _apart():
            model = _build(values)
            if method == "lora":
                _adapt(model, target_modules)
    except InspectionError:
        raise
    except ImportError as error:
        raise InspectionError(
            f"The model of {file} needs a package that is not here: {one_line(str(error))}.",
            f"Install transformers or diffusers, and peft, {_BY_HAND}.",
        ) from error
    except Exception as error:
        raise InspectionError(
            f"{file} describes no model that can be built here: {one_line(str(error))}.",
            "Give the configuration of a model of the installed transformers or diffusers,"
            f" {_BY_HAND}.",
        ) from error
    return inspect_model(model, method=method)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InspectionError(
            f"There is no file {file}.",
            "Give a model's folder or its config.json, of transformers or diffusers; of a pipeline"
            " the folder of one model, such as its unet or transformer.",
        )
    cure = "Give a config.json of transformers or diffusers."
    values = read_object(str(file), lambda: read_bytes(file, _LIMIT), cure)
    if _has_code(values):
        raise InspectionError(
            f"{file} names code of its own (auto_map), which is not run.",
            "Remove auto_map from a copy of it if transformers has this model too,"
            f" {_BY_HAND}.",
        )
    return values


def _has_code(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return "auto_map" in value or any(map(_has_code, value.values()))


@contextmanager
def _apart() -> Iterator[None]:
    """Build on the meta device, without warnings and without the Hub."""
    import torch
    from huggingface_hub import constants

    online = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = online


def _build(values: dict[str, Any]) -> Any:
    """Return the model of the architecture that a configuration names, else the one without a head.

    Raises:
        ValueError: the library has no such model.
    """
    name, kind = values.get("_class_name"), str(values.get("model_type"))
    if name is not None:
        import diffusers

        architecture = _class_in(diffusers, name, diffusers.ModelMixin)
        if architecture is None:
            raise ValueError(f"diffusers has no model {shown(name)}")
        return architecture.from_config(values)
    import transformers

    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"transformers has no model of type {shown(kind)}")
    config = transformers.CONFIG_MAPPING[kind].from_dict(_without_kernels(values))
    for name in values.get("architectures") or ():
        architecture = _class_in(transformers, name, transformers.PreTrainedModel)
        if architecture is not None:
            return architecture(config)
    return transformers.AutoModel.from_config(config, trust_remote_code=False)


def _class_in(library: Any, name: object, base: type) -> Any:
    """Return a library's class of that name that derives from `base`, else None."""
    member = getattr(library, str(name), None)
    return member if isinstance(member, type) and issubclass(member, base) else None


def _without_kernels(value: Any) -> Any:
    """Return a configuration without the names of attention kernels, which may be code on the
    Hub.
    """
    if not isinstance(value, Mapping):
        return value
    return {
        key: _without_kernels(each)
        for key, each in value.items()
        if "_implementation" not in key
    }


def _adapt(model: nn.Module, target_modules: Any) -> None:
    """Add adapters to the layers that PEFT finds by these names.

    Raises:
        InspectionError: PEFT finds no layer by these names, or cannot adapt one.
    """
    from peft import LoraConfig, inject_adapter_in_model

    weights = (name for name, param in model.named_parameters() if param.dim() > 1)
    layers = sorted({f".{name}".split(".")[-2] for name in weights})
    try:
        inject_adapter_in_model(LoraConfig(target_modules=target_modules), model)
    except ValueError as error:
        words = one_line(str(error)).partition(". ")[0].rstrip(".")
        raise InspectionError(
            f"PEFT cannot adapt this model: {words}.",
            f"Give names of its layers: {', '.join(layers)}.",
        ) from error
