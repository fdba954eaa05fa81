"""Damaged adapter files of every kind, read by `inspect_file`.

A valid file is damaged up to four times: in its tensors (names, shapes, dtypes, values, with a header that fits them),
in its configuration or metadata, in the header's JSON, or in the bytes.
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attacks.outcomes import Attack, Outcomes

from rankaware_optim import InspectionError, inspect_file

SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "F8_E4M3": 1}


@dataclass
class Made:
    """A file that is being built: tensors by name as (dtype, shape, value), a configuration, metadata, then bytes."""

    tensors: dict[str, tuple[str, tuple[int, ...], float]]
    config: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    file: bytes = b""
    config_file: bytes | None = None

    def lay_out(self) -> None:
        """Build the header and the bytes from the tensors."""
        data = b""
        for name, (dtype, shape, value) in self.tensors.items():
            size = SIZES.get(dtype, 4) * math.prod(shape)
            one = (
                struct.pack("<f", value)
                if dtype == "F32" and size == 4
                else bytes(min(size, 10**6))
            )
            place = [len(data), len(data) + len(one)]
            self.header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": place,
            }
            data += one
        self.header |= {"__metadata__": self.metadata} if self.metadata else {}
        text = json.dumps(self.header).encode()
        self.file = len(text).to_bytes(8, "little") + text + data
        self.config_file = (
            None if self.config is None else json.dumps(self.config).encode()
        )


# --- valid files ----------------------------------------------------------------------------------------------------


def pair(
    layer: str, a: str, b: str, rank: int = 4, fan_in: int = 6, fan_out: int = 5
) -> dict[str, Any]:
    return {
        f"{layer}.{a}": ("F32", (rank, fan_in), 0.0),
        f"{layer}.{b}": ("F16", (fan_out, rank), 0.0),
    }


def peft() -> Made:
    at = "base_model.model."
    tensors = pair(f"{at}q", "lora_A.weight", "lora_B.weight") | pair(
        f"{at}l.0.v", "lora_A.weight", "lora_B.weight", 2
    )
    tensors |= pair(f"{at}e", "lora_embedding_A", "lora_embedding_B")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    return Made(
        tensors, {**config, "rank_pattern": {"v": 2}, "alpha_pattern": {"l.0.v": 8}}
    )


def experts() -> Made:
    at = "base_model.model.mlp.experts"
    tensors = pair(at, "lora_A.weight", "lora_B.weight", 12)
    tensors |= pair(f"{at}.base_layer", "lora_A.weight", "lora_B.weight", 12)
    return Made(
        tensors,
        {"r": 4, "lora_alpha": 8, "target_parameters": ["experts.up", "experts.down"]},
    )


def adalora() -> Made:
    tensors = pair("base_model.model.q", "lora_A", "lora_B", 3) | {
        "base_model.model.q.lora_E": ("F32", (3, 1), 0.0)
    }
    return Made(
        tensors,
        {
            "peft_type": "ADALORA",
            "init_r": 4,
            "r": 8,
            "lora_alpha": 8,
            "rank_pattern": {"q": [True]},
        },
    )


def loha() -> Made:
    names = [f"base_model.model.q.hada_w{i}_{half}" for i in (1, 2) for half in "ab"]
    return Made(
        dict.fromkeys(names, ("F32", (4, 4), 0.0)),
        {"peft_type": "LOHA", "r": 4, "alpha": 8},
    )


def kohya() -> Made:
    tensors = pair("lora_unet_q", "lora_down.weight", "lora_up.weight") | {
        "lora_unet_q.alpha": ("F32", (), 2.0)
    }
    tensors |= {
        "lora_unet_c.lora_down.weight": ("F32", (2, 3, 1, 1), 0.0),
        "lora_unet_c.alpha": ("F32", (1,), 1.0),
    }
    tensors |= {"lora_unet_c.lora_mid.weight": ("F32", (2, 2, 3, 3), 0.0)}
    tensors |= {"lora_unet_c.lora_up.weight": ("F32", (4, 2, 1, 1), 0.0)}
    tensors |= pair("lora_te_v", "lora_down.weight", "lora_up.weight")
    return Made(tensors, metadata={"ss_network_dim": "4", "ss_network_alpha": "2.0"})


def diffusers() -> Made:
    tensors = pair("unet.q", "lora_A.weight", "lora_B.weight") | pair(
        "te.v", "lora_A.weight", "lora_B.weight", 2
    )
    entries = {
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {"q": 2},
        "te.r": 2,
        "te.lora_alpha": 2,
    }
    return Made(tensors, metadata={"format": "pt", "lora_adapter_metadata": entries})


def legacy() -> Made:
    tensors = pair("unet.a.to_q_lora", "down.weight", "up.weight") | pair(
        "unet.k.lora", "down.weight", "up.weight"
    )
    return Made(tensors | pair("te.v.lora_linear_layer", "down.weight", "up.weight"))


def torchtune() -> Made:
    return Made(
        pair("layers.0.q", "lora_a.weight", "lora_b.weight"), {"r": 4, "lora_alpha": 8}
    )


def merged() -> Made:
    tensors = {"h.c.lora_A": ("F32", (8, 6), 0.0), "h.c.lora_B": ("F32", (5, 4), 0.0)}
    return Made(tensors, {"r": 4, "lora_alpha": 8, "enable_lora": [True, False, True]})


KINDS: tuple[Callable[[], Made], ...] = (
    peft,
    experts,
    adalora,
    loha,
    kohya,
    diffusers,
    legacy,
    torchtune,
    merged,
)

# --- damage ---------------------------------------------------------------------------------------------------------

VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    4,
    8,
    2**63,
    10**300,
    0.5,
    -0.0,
    math.nan,
    math.inf,
    1e-320,
    "",
    "4",
    "x",
    [],
)
VALUES += (
    [4],
    [-1],
    [[]],
    {},
    {"q": 4},
    {"q": -1},
    {"(": 4},
    {"q": "x"},
    {"(a|a)*b": 4, ".*": 2},
    "\x1b[2J",
    "\ud800",
)
NAMES = (
    "",
    "q",
    "lora_A.weight",
    "x.lora_A",
    "x.lora_B",
    "base_model.model.q.lora_A.default.weight",
    "q.lora_A.weight",
)
NAMES += (
    "__metadata__",
    "q.lora_mid.weight",
    "\x00",
    "é\n",
    "x" * 2000,
    "unet.q.lora_B.weight",
    "lora_unet_q.alpha",
)
DIMS = (0, 1, 2, 3, 4, 5, 8, 12, 64, 2**31)
SHAPES = (
    (),
    (1,),
    (4,),
    (4, 6),
    (5, 4),
    (4, 6, 1),
    (4, 6, 3, 3),
    (5, 2, 1, 1),
    (1, 1, 1, 1, 1),
    (0, 0),
    (3, 4, 6),
)
PIECES = (
    b"",
    b"\xff",
    b"{",
    b"}",
    b"[" * 3000,
    b'"',
    b",",
    b"null",
    b"1e999",
    b"NaN",
    b"-",
    b"\x00" * 8,
    b'"r": 4,',
)


def nth(items: Any, at: int) -> Any:
    items = list(items)
    return items[at % len(items)] if items else None


def harm_tensor(made: Made, at: int, value: Any) -> None:
    """Change one tensor's name, shape, dimension or dtype, give its layer another alpha, or remove the tensor."""
    name = nth(made.tensors, at)
    if name is None:
        return
    dtype, shape, number = made.tensors[name]
    match at // 97 % 6:
        case 0:
            made.tensors[nth(NAMES, at // 7)] = made.tensors.pop(name)
        case 1:
            made.tensors[name] = (dtype, nth(SHAPES, at // 7), number)
        case 2 if shape:
            i = at // 7 % len(shape)
            made.tensors[name] = (
                dtype,
                (*shape[:i], nth(DIMS, at // 11), *shape[i + 1 :]),
                number,
            )
        case 3:
            made.tensors[name] = (
                nth([*SIZES, "F4", "BOOL", "odd"], at // 7),
                shape,
                number,
            )
        case 4:
            alpha = value if isinstance(value, float) else float(at % 5)
            made.tensors[f"{name.split('.lora')[0]}.alpha"] = ("F32", (), alpha)
        case _:
            del made.tensors[name]


def harm_entry(made: Made, at: int, value: Any) -> None:
    """Change or remove one entry of the configuration, of the metadata or of diffusers' nested metadata."""
    inner = made.metadata.get("lora_adapter_metadata")
    tables = [
        t
        for t in (made.config, made.metadata, inner, inner)
        if isinstance(t, dict) and t
    ]
    table = nth(tables, at)
    if table is None:
        return
    keys = [
        *table,
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "target_parameters",
        "peft_type",
        "ss_network_alpha",
    ]
    key = nth(keys, at // 5)
    if at // 97 % 4:
        table[key] = value
    else:
        table.pop(key, None)


def harm_header(made: Made, at: int, value: Any) -> None:
    """Change one value in the header's JSON, and the header's length with it."""
    name = nth(made.header, at)
    if name is None or len(made.file) < 8:
        return
    entry = made.header[name]
    if isinstance(entry, dict) and entry and at // 5 % 4:
        entry[nth(entry, at // 7)] = (
            value if at // 11 % 2 else [value, nth(DIMS, at // 13)]
        )
    elif isinstance(entry, dict) and at // 11 % 2:
        # some readers take the fields in this order
        made.header[name] = [*entry.values()]
    else:
        made.header[name] = value
    start = 8 + int.from_bytes(made.file[:8], "little")
    text = json.dumps(made.header).encode()
    made.file = len(text).to_bytes(8, "little") + text + made.file[start:]


def harm_bytes(made: Made, at: int, value: Any) -> None:
    """Cut off, overwrite or insert bytes in the file or in the configuration, or write a wrong header length."""
    on_config = made.config_file is not None and at % 3 == 0
    data = (made.config_file if on_config else made.file) or b""
    i = at % (len(data) + 1) if at // 3 % 2 else at % (min(len(data), 200) + 1)
    piece = nth(PIECES, at // 7)
    match at // 97 % 5:
        case 0:
            data = data[:i]
        case 1:
            data = data[:i] + bytes([at % 256]) + data[i + 1 :]
        case 2:
            data = data[:i] + piece + data[i:]
        case 3:
            data = (
                nth([0, 1, len(data), 10**8, 2**63, 2**64 - 1], at).to_bytes(
                    8, "little"
                )
                + data[8:]
            )
        case _:
            data = data[: at % 9] + piece
    made.file, made.config_file = (
        (made.file, data) if on_config else (data, made.config_file)
    )


EARLY = {"tensor": harm_tensor, "entry": harm_entry}
LATE = {"header": harm_header, "bytes": harm_bytes}
WEIGHTED = ("tensor", "tensor", "entry", "entry", "header", "bytes")


def run(seed: int, count: int, folder: Path) -> Outcomes:
    chance, outcomes = random.Random(seed), Outcomes()
    for number in range(count):
        kind = chance.choice(KINDS)
        harms = [
            (chance.choice(WEIGHTED), chance.randrange(2**20), chance.choice(VALUES))
            for _ in range(chance.randint(1, 4))
        ]
        path = write(damaged(kind, harms), folder)
        outcomes.attempt(
            (seed, number, kind.__name__), lambda path=path: use(path), InspectionError
        )
    return outcomes


def damaged(kind: Callable[[], Made], steps: list[tuple[str, int, Any]]) -> Made:
    """A file of this kind, damaged by `steps`: each a name, a position and a value."""
    made = kind()
    for name, at, value in steps:
        if name in EARLY:
            EARLY[name](made, at, copy.deepcopy(value))
    if isinstance(made.metadata.get("lora_adapter_metadata"), dict):
        made.metadata["lora_adapter_metadata"] = json.dumps(
            made.metadata["lora_adapter_metadata"]
        )
    made.lay_out()
    for name, at, value in steps:
        if name in LATE:
            LATE[name](made, at, copy.deepcopy(value))
    return made


# --- the run --------------------------------------------------------------------------------------------------------


def write(made: Made, folder: Path) -> Path:
    """Write the files of `made` to `folder`, and return the path to inspect."""
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    path.write_bytes(made.file)
    if made.config_file is None:
        config.unlink(missing_ok=True)
        return path
    config.write_bytes(made.config_file)
    return folder


def use(path: Path) -> None:
    """Check that the survey is complete: it can be written as JSON, and every factor has usable numbers."""
    survey = inspect_file(path)
    json.dumps(
        [survey.other, survey.notes, [f.name for f in survey.factors]], allow_nan=False
    ).encode()
    if not all(
        f.rank and f.fan_in >= 1 and f.fan_out >= 1 and 0 < f.scaling < math.inf
        for f in survey.factors
    ):
        raise AssertionError(f"incomplete survey: {survey}")


ATTACKS = (Attack("damaged adapter files", 15_000, 1000, run),)
