"""Surveys of adapter files, PEFT folders or .safetensors files, and how they were trained: kohya's
scripts write rates, optimizer and steps into the metadata. Only headers are read, and no tensors.
"""

from __future__ import annotations

import ast
import fnmatch
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import check_init
from .._types import Factor, Init, Survey
from ..errors import InspectionError
from ._conventions import INITS
from ._file_pairs import file_pairs
from ._pairs import reading_of
from ._peft_config import LORA_TYPES, AdapterConfig, read_config
from ._safetensors import Header, read_header, shown
from ._survey import factors_of, is_other_adapter, unsupported

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Entries of kohya's scripts.
_TRAINING = (
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_learning_rate",
    "ss_unet_lr",
    "ss_text_encoder_lr",
    "ss_optimizer",
    "ss_max_train_steps",
)


def inspect_file(path: str | Path, *, init: Init | None = None) -> Survey:
    """Find the LoRA pairs of an adapter on disk. Nothing is unpickled, and no tensors are loaded.

    The names of all conventions are known, registered ones included: PEFT, kohya, LyCORIS (Tucker
    too), diffusers (old and new), torchtune and loralib. Rank, fan-in and fan-out come from the
    shapes. The rank must agree with the one that the file or a configuration declares. The scaling
    comes from the file's entries (kohya's `alpha`), the configuration (PEFT's, or the copy in a
    diffusers file), or kohya's metadata. Otherwise it is 1, with a note. The adapter is usually
    trained, so its init is the declared one, or "unknown". The survey of an adapter without a law,
    such as LoHa, has no factors.

    Args:
        path: a folder with PEFT's adapter_config.json and a .safetensors file, or one .safetensors
            file.
        init: the init of all pairs, as for `inspect_model`, if the declared one is not theirs, as
            after `initialize`.

    Raises:
        InspectionError: something is missing, damaged or contradictory. The message names the file
            and the key.
    """
    check_init(init, known=INITS)
    file, config = _file_at(Path(path))
    header = read_header(file)
    pairs, numbers = file_pairs(header, config)
    factors, notes = list[Factor](), dict[str, None]()
    for pair in pairs:
        names, reading = (pair.a.name, pair.b.name), reading_of(pair)
        declared = pair.owner.init_lora_weights
        factors += factors_of(pair, names, reading, declared, init, notes)
    left = header.tensors.keys() - {f.name for f in factors}
    unlawful = set(filter(is_other_adapter, left))
    kind = config.values.get("peft_type")
    if kind in LORA_TYPES and not factors and not unlawful:
        raise InspectionError(
            f"{file} has no LoRA pair among {len(header.tensors)} tensors.",
            "Give an adapter's file, not a base model's.",
        )
    for name in unlawful:  # such as x.hada_w1_a
        numbers.add(f"{name.removesuffix('.weight').rpartition('.')[0]}.alpha")
    left -= {name for name in numbers if header.is_scalar(name)}
    other = tuple(filter(left.__contains__, header.tensors))
    return Survey(
        tuple(factors),
        other,
        (*notes, *_file_notes(header, config)),
        looked_at=len(header.tensors),
        unsupported=unsupported(other),
    )


def _file_notes(header: Header, config: AdapterConfig) -> Iterator[str]:
    kind = config.values.get("peft_type")
    if kind not in LORA_TYPES:
        yield f"The folder's adapter is {kind}, which no law covers."
    texts = header.metadata
    entries = [f"{key} {shown(texts[key])}" for key in _TRAINING if key in texts]
    if entries:
        yield f"Its metadata has {', '.join(entries)}."
    if not config.where and os.path.isfile(header.path.with_name(_CONFIG)):
        yield f"{_CONFIG} in the file's folder was not read. Give the folder to read it."


# --- the file -------------------------------------------------------------------------------------


def _file_at(path: Path) -> tuple[Path, AdapterConfig]:
    """Return the safetensors file, `path` or the one in that folder, and the folder's configuration
    if there is one.
    """
    config = AdapterConfig()
    if not os.path.isdir(path):
        _refuse_pickles([path])
        return path, config
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise InspectionError(
            f"{path} cannot be read: {error}.", "Give a folder that you may read."
        ) from error
    lacking = f" and no {_CONFIG}"
    if _CONFIG in names:
        config = read_config(path / _CONFIG)
        lacking = f", none of them {_WEIGHTS}"
    files = fnmatch.filter(names, "*.safetensors")
    if not files:
        _refuse_pickles(map(path.joinpath, names))
    if config.where and _WEIGHTS in files:
        files = [_WEIGHTS]
    if len(files) == 1:
        return path / files[0], config
    raise InspectionError(
        f"{path} has {len(files)} .safetensors files{lacking}.",
        "Give one .safetensors file, or a folder saved by PEFT.",
    )


def _refuse_pickles(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.suffix.lower() in _PICKLES:
            raise InspectionError(
                f"{path} is a pickle by its name. Reading a pickle can run any code in it.",
                "Save the adapter as .safetensors.",
            )


# --- how the adapter was trained ------------------------------------------------------------------

# The key of a part's rate, and how its layers begin. "" is the whole model.
_PARTS = {
    "": ("ss_learning_rate", ""),
    "UNet": ("ss_unet_lr", "lora_unet"),
    "text encoder": ("ss_text_encoder_lr", "lora_te"),
}


class PartRate(NamedTuple):
    """The base rate of a part of the model, per step, and the part's survey. part: "" for the whole
    model.
    """

    part: str
    lr: float
    survey: Survey


@dataclass(frozen=True)
class Training:
    """An adapter's training, from its file: rates, the optimizer's class and settings, number of
    steps.
    """

    rates: tuple[PartRate, ...]
    optimizer: str
    settings: Mapping[str, Any]
    steps: int | None

    @property
    def optimizer_class(self) -> type:
        """An empty class with the optimizer's name, from which its family follows."""
        package, _, name = self.optimizer.rpartition(".")
        return type(name, (), {"__module__": package})


def read_training(path: str | Path) -> Training:
    """Return how the adapter at `path` was trained, from kohya's metadata.

    A part's rate is ss_unet_lr or ss_text_encoder_lr, by default ss_learning_rate. Several text
    encoders are separate parts.

    Raises:
        InspectionError: the file has no rate, or an impossible one; or as for `inspect_file`.
    """
    survey, file = inspect_file(path), _file_at(Path(path))[0]
    metadata = read_header(file).metadata
    rates = [
        rate
        for rate in _rates(file, survey, metadata)
        if rate.lr and rate.survey.factors
    ]
    if not rates:
        raise InspectionError(
            f"{file} has no learning rate: there is no ss_learning_rate in its metadata.",
            "Give the rate yourself, before --from in a shell.",
        )
    name, _, arguments = metadata.get("ss_optimizer", "").partition("(")
    steps = metadata.get("ss_max_train_steps", "")
    count = int(steps) if steps.isdecimal() and len(steps) < 16 else 0
    dotted = len(name) < 200 and all(map(str.isidentifier, name.split(".")))
    return Training(
        tuple(rates), name if dotted else "", _settings(arguments), count or None
    )


def _rates(
    file: Path, survey: Survey, metadata: Mapping[str, str]
) -> Iterator[PartRate]:
    """Yield the rates of the parts, or one rate for all if no part has its own."""
    rates_of = {
        part: _numbers(file, key, metadata) for part, (key, _) in _PARTS.items()
    }
    common = rates_of.pop("")[:1]
    if not any(rates_of.values()):
        rates_of = {"": common}
    for part, rates in rates_of.items():
        rates = rates or common
        for number, lr in enumerate(rates, 1):
            # With two encoders kohya's layers are lora_te1_..., lora_te2_...
            name, start = part, _PARTS[part][1]
            if len(rates) > 1:
                name, start = f"{part} {number}", f"{start}{number}_"
            factors = tuple(f for f in survey.factors if f.layer.startswith(start))
            yield PartRate(name, lr, replace(survey, factors=factors))


def _numbers(file: Path, key: str, metadata: Mapping[str, str]) -> list[float]:
    """Return the rates under a key: none, one, or several."""
    text = metadata.get(key, "None").strip()
    if text in ("None", "", "[]"):
        return []
    try:
        values = [float(part) for part in text.strip("[]").split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value < 1e6 for value in values):
        raise InspectionError(
            f"{file}: {key} in its metadata is {shown(text)}.",
            "Give the rate yourself.",
        )
    return values


def _settings(arguments: str) -> dict[str, Any]:
    """Return the literal values of a text such as "scale_parameter=False,betas=(0.9, 0.99)", as
    kohya writes it.
    """
    try:
        call = ast.parse(f"f({arguments.removesuffix(')')[:10_000]})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    settings: dict[str, Any] = {}
    for keyword in call.keywords if isinstance(call, ast.Call) else ():
        with suppress(ValueError, RecursionError, MemoryError):  # not a literal
            settings[keyword.arg or ""] = ast.literal_eval(keyword.value)
    return settings
