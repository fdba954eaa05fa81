"""Surveys of adapter files: PEFT folders or .safetensors files. Only headers are read, and no
tensors but alphas.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .._checks import check_init, shown
from .._types import Factor, Init
from ..errors import InspectionError
from ._conventions import INITS
from ._file_pairs import Header, file_pairs, read_header
from ._pairs import reading_of, scaling_of
from ._peft_config import AdapterConfig, embedded_configs, read_config
from ._record import Survey
from ._survey import factors_of, init_of, is_other_adapter, unsupported

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_NO_ALPHA = "The file and its folder have no alpha: scaling 1 is assumed."
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

    The conventions are those of models, registered ones too. Rank, fan-in and fan-out come from the
    shapes. The rank must agree with the one that a configuration declares. The scaling comes from
    the file's `alpha` or the configuration (PEFT's, or the copy in a diffusers file).
    Otherwise it is 1, with a note. The adapter is usually trained, so its init is the declared one,
    or "unknown". The survey of an adapter without a law, such as LoHa, has no factors.

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
    configs = [config] if config else embedded_configs(file, header.metadata)
    factors, notes = _read(header, configs, init)
    has_adapter = factors or any(map(is_other_adapter, header.shapes))
    if not has_adapter and (config is None or config.entries is not None):
        raise InspectionError(
            f"{file} has no LoRA pair among {len(header.shapes)} tensors.",
            "Give an adapter's file, not a base model's.",
        )
    read = {f.name for f in factors} | header.numbers.keys()
    other = tuple(name for name in header.shapes if name not in read)
    return Survey(
        tuple(factors),
        other,
        (*notes, *_file_notes(header, config)),
        looked_at=len(header.shapes),
        unsupported=unsupported(other),
    )


def _read(
    header: Header, configs: Sequence[AdapterConfig], init: Init | None
) -> tuple[list[Factor], list[str]]:
    """Return the factors of a file, and what is assumed of them."""
    factors, scalings = list[Factor](), list[float | None]()
    for pair in file_pairs(header, configs):
        reading = reading_of(pair)
        scalings.append(scaling_of(pair, reading.rank_a))
        started = init or init_of(pair, pair.owner.init, reading.kind)
        factors += factors_of(pair, reading, scalings[-1], started)
    return factors, [_NO_ALPHA] if None in scalings else []


def _file_notes(header: Header, config: AdapterConfig | None) -> Iterator[str]:
    if config and config.entries is None:
        yield f"The folder's adapter is {config.kind}, which no law covers."
    texts = header.metadata
    entries = [f"{key} {shown(texts[key])}" for key in _TRAINING if key in texts]
    if entries:
        yield f"Its metadata has {', '.join(entries)}."
    if not config and os.path.isfile(header.path.with_name(_CONFIG)):
        yield f"{_CONFIG} in the file's folder was not read. Give the folder to read it."


# --- the file -------------------------------------------------------------------------------------


def _file_at(path: Path) -> tuple[Path, AdapterConfig | None]:
    """Return the safetensors file, `path` or the one in that folder, and the folder's configuration
    if there is one.
    """
    if not os.path.isdir(path):
        return path, None
    config = None
    if os.path.lexists(path / _CONFIG):
        config = read_config(path / _CONFIG)
    files = sorted(path.glob("*.safetensors"))
    if config and path / _WEIGHTS in files:
        files = [path / _WEIGHTS]
    if len(files) != 1:
        raise InspectionError(
            f"{path} has {len(files)} .safetensors files, none of them PEFT's {_WEIGHTS} beside"
            f" {_CONFIG}.",
            "Give one .safetensors file, or a folder saved by PEFT. Pickles (.bin, .pt, .ckpt) are"
            " not read, since they can run any code: save the adapter as .safetensors.",
        )
    return files[0], config
