"""Adapter files: what is read from their headers, and that no file, however damaged, raises an error but ours."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rankaware_optim import InspectionError, RankAwareError
from rankaware_optim.inspection import inspect_file
from rankaware_optim.transfer import survey_rates

RANK, WEIGHTS = 8, "adapter_model.safetensors"
LAYER = "base_model.model.layers.0.q_proj"
CONFIG = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 16,
    "init_lora_weights": True,
    "use_rslora": False,
}


def pair(
    layer: str = LAYER, rank: int = RANK, *, fan_in=32, fan_out=48, kernel=()
) -> dict[str, torch.Tensor]:
    """One adapted layer as PEFT saves it."""
    a = torch.zeros(rank, fan_in, *kernel)
    return {
        f"{layer}.lora_A.weight": a,
        f"{layer}.lora_B.weight": torch.zeros(fan_out, rank, *(1 for _ in kernel)),
    }


def kohya(layer: str, rank: int, alpha: float | None) -> dict[str, torch.Tensor]:
    """One adapted layer as kohya's scripts save it."""
    made = {
        f"{layer}.lora_down.weight": torch.zeros(rank, 32),
        f"{layer}.lora_up.weight": torch.zeros(48, rank),
    }
    return made if alpha is None else {**made, f"{layer}.alpha": torch.tensor(alpha)}


@pytest.fixture
def folder(tmp_path):
    """Makes a PEFT folder of these tensors, with `changes` to its configuration; None drops a key."""

    def make(tensors=None, **changes):
        save_file(
            pair() if tensors is None else tensors,
            tmp_path / "adapter_model.safetensors",
        )
        config = {
            key: value
            for key, value in {**CONFIG, **changes}.items()
            if value is not None
        }
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def write_raw(path, header: bytes, data: bytes = b"", length: int | None = None):
    path.write_bytes(
        (len(header) if length is None else length).to_bytes(8, "little")
        + header
        + data
    )
    return path


def entry(*shape: int, dtype="F32", offsets=None) -> dict:
    return {
        "dtype": dtype,
        "shape": list(shape),
        "data_offsets": offsets or [0, 4 * math.prod(shape)],
    }


def only_our_errors(path) -> None:
    try:
        survey = inspect_file(path)
    except RankAwareError:
        return
    assert survey.factors or survey.other


# --- what is read ---------------------------------------------------------------------------------------------------


def test_an_init_that_the_files_cannot_declare_is_given(folder):
    """init= replaces the declared init of every pair, as after `initialize`, and another value is refused."""
    path = folder()
    assert {factor.init for factor in inspect_file(path).factors} == {"A"}
    assert {factor.init for factor in inspect_file(path, init="B").factors} == {"B"}
    with pytest.raises(InspectionError, match=r"'A' .*or 'B'"):
        inspect_file(path, init="C")


def test_a_peft_folder_is_surveyed(folder):
    """Rank, fans and role come from the shapes; scaling and init from the configuration."""
    survey = inspect_file(
        folder({**pair(), "base_model.model.score.weight": torch.zeros(2, 2)})
    )
    assert [(f.role, f.rank, f.fan_in, f.fan_out) for f in survey.factors] == [
        ("A", 8, 32, 48),
        ("B", 8, 32, 48),
    ]
    assert {(f.scaling, f.init, f.layer, f.convention) for f in survey.factors} == {
        (2.0, "A", LAYER, "peft")
    }
    assert survey.other == ("base_model.model.score.weight",)
    assert survey.looked_at == 3
    assert survey.notes == ()


def test_the_file_of_a_folder_is_read_without_its_configuration(folder):
    """The .safetensors file alone has no alpha: scaling 1, with a note, and an unknown init."""
    survey = inspect_file(folder() / "adapter_model.safetensors")
    assert {(f.scaling, f.init) for f in survey.factors} == {(1.0, "unknown")}
    assert any("scaling 1 is assumed" in note for note in survey.notes)


CONFIGS = [
    ({"use_rslora": True}, 16 / math.sqrt(8), "A"),
    ({"lora_alpha": 4}, 0.5, "A"),
    ({"alpha_pattern": {"q_proj": 32}}, 4.0, "A"),
    ({"alpha_pattern": {"layers.0.q_proj": 32}}, 4.0, "A"),
    ({"alpha_pattern": {"v_proj": 32}}, 2.0, "A"),
    ({"rank_pattern": {"q_proj": 8}, "r": 64}, 2.0, "A"),
    (
        {
            "rank_pattern": {"q_proj": 8},
            "r": 64,
            "alpha_pattern": {"q_proj": 4},
            "use_rslora": True,
        },
        math.sqrt(2),
        "A",
    ),
    (
        {"alpha_pattern": {"v_proj": 4, "proj": 4, "0.q_proj": 8, "q_proj": 32}},
        1.0,
        "A",
    ),
    ({"alpha_pattern": {"^layers.0.q_proj": 32}}, 4.0, "A"),
    ({"alpha_pattern": {"base_model.model.layers.0.q_proj": 32}}, 2.0, "A"),
    ({"alpha_pattern": {}}, 2.0, "A"),
    ({"init_lora_weights": "gaussian"}, 2.0, "A"),
    ({"init_lora_weights": "pissa"}, 2.0, "other"),
    ({"init_lora_weights": False}, 2.0, "other"),
    ({"init_lora_weights": None}, 2.0, "unknown"),
]


@pytest.mark.parametrize(("changes", "scaling", "init"), CONFIGS)
def test_the_configuration_decides_scaling_and_init(changes, scaling, init, folder):
    """alpha, its patterns, rsLoRA and the declared init are PEFT's."""
    for factor in inspect_file(folder(**changes)).factors:
        assert (factor.scaling, factor.init) == (pytest.approx(scaling), init)


PRUNED = {
    "peft_type": "ADALORA",
    "init_r": 8,
    "rank_pattern": {"x.lora_E": [True, False]},
}
ALONE = None  # without a configuration
READINGS = [
    # the names of A and B with their shapes, changes to PEFT's configuration, and what is read
    ("x.lora_A", (8, 32), (48, 8), {}, (8, 32, 48, 2.0, "A", "linear", "peft")),
    (
        "x.lora_A.d.weight",
        (8, 32),
        (48, 8),
        {},
        (8, 32, 48, 2.0, "A", "linear", "peft"),
    ),
    ("x.lora_A", (8, 4, 3), (48, 8, 1), {}, (8, 12, 48, 2.0, "A", "conv", "peft")),
    (
        *("x.lora_A.weight", (8, 4, 3, 3), (6, 4, 1, 1), {}),
        (8, 36, 6, 2.0, "A", "conv", "peft"),
    ),
    (
        *("x.lora_embedding_A", (8, 100), (32, 8), {}),
        (8, 100, 32, 2.0, "B", "embedding", "peft-embedding"),
    ),
    (
        *("x.lora_A", (6, 32), (48, 6), PRUNED),
        (6, 32, 48, 16 / 6, "other", "adalora", "peft-adalora"),
    ),
    (
        *("q_lora.down.weight", (8, 32), (48, 8), ALONE),
        (8, 32, 48, 1.0, "unknown", "linear", "diffusers-legacy"),
    ),
    (
        *("q.lora.down.weight", (8, 32), (48, 8), ALONE),
        (8, 32, 48, 1.0, "unknown", "linear", "diffusers-legacy"),
    ),
    (
        *("q.lora_linear_layer.down.weight", (8, 32), (48, 8), ALONE),
        (8, 32, 48, 1.0, "unknown", "linear", "diffusers-legacy"),
    ),
    (
        *("x.lora_A.weight", (8, 32), (48, 8), ALONE),
        (8, 32, 48, 1.0, "unknown", "linear", "lora_A/lora_B"),
    ),
    (
        *("x.lora_A.one.weight", (8, 32), (48, 8), ALONE),
        (8, 32, 48, 1.0, "unknown", "linear", "peft"),
    ),
    (
        *("x.lora_embedding_A", (8, 32), (48, 8), ALONE),
        (8, 32, 48, 1.0, "unknown", "embedding", "peft-embedding"),
    ),
    (
        *("x.lora_down.weight", (8, 4, 3, 3), (6, 8, 1, 1), ALONE),
        (8, 36, 6, 1.0, "unknown", "conv", "lora_down/lora_up"),
    ),
]
SECOND = {"lora_A": "lora_B", "embedding_A": "embedding_B", "down": "up"}


@pytest.mark.parametrize(("first", "a", "b", "changes", "expected"), READINGS)
def test_every_layout_is_read(first, a, b, changes, expected, folder):
    """Rank, fans, scaling, init, kind and convention of each dialect's keys and shapes, with a configuration or alone."""
    second = first
    for one, other in SECOND.items():
        second = second.replace(one, other)
    path = folder({first: torch.zeros(a), second: torch.zeros(b)}, **(changes or {}))
    survey = inspect_file(path / WEIGHTS if changes is ALONE else path)
    found = {
        (f.rank, f.fan_in, f.fan_out, f.scaling, f.init, f.kind, f.convention)
        for f in survey.factors
    }
    assert found == {expected}
    assert [(f.name, f.role) for f in survey.factors] == [(first, "A"), (second, "B")]


BESIDE = [
    ({"x.lora_E": (8, 1)}, "adalora", 32, "peft-adalora"),
    ({"x.lora_mid.weight": (8, 8, 3, 3)}, "conv", 288, "locon-tucker"),
]


@pytest.mark.parametrize(("others", "kind", "fan_in", "convention"), BESIDE)
def test_a_third_tensor_of_a_layer_tells_its_convention(
    others, kind, fan_in, convention, tmp_path
):
    """AdaLoRA's singular values, and Tucker's core, whose kernel counts for the fan-in, are no factors."""
    names, ones = ("x.lora_A", "x.lora_B"), ()
    if kind == "conv":
        names, ones = ("x.lora_down.weight", "x.lora_up.weight"), (1, 1)
    shapes = {names[0]: (8, 32, *ones), names[1]: (48, 8, *ones), **others}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    survey = inspect_file(tmp_path / "x.safetensors")
    found = {(f.rank, f.fan_in, f.kind, f.convention) for f in survey.factors}
    assert found == {(8, fan_in, kind, convention)}
    assert survey.other == tuple(others)


OTHERS = [
    (["x.hada_w1_a", "x.hada_w2_b", "x.alpha"], {"peft_type": "LOHA"}),
    (["x.lokr_w1", "x.alpha"], {"peft_type": "LOKR"}),
    (["x.vera_lambda_b"], {"peft_type": "VERA", "r": None}),
    (["x.gralora_A"], {"peft_type": "GRALORA", "r": 0}),
    (["prompt_embeddings"], {"peft_type": "PROMPT_TUNING", "r": "none"}),
]


@pytest.mark.parametrize(("keys", "changes"), OTHERS)
def test_an_adapter_without_a_law_is_a_survey_without_factors(keys, changes, folder):
    """LoHa, LoKr, VeRA and what only the configuration names are listed, not refused; their alpha is no tensor."""
    survey = inspect_file(
        folder(
            {key: torch.zeros(() if "alpha" in key else (4, 4)) for key in keys},
            **changes,
        )
    )
    assert survey.factors == ()
    assert survey.other == tuple(key for key in keys if key != "x.alpha")
    assert any(changes["peft_type"] in note for note in survey.notes)


def test_an_alpha_of_the_model_is_no_setting(tmp_path):
    """A model's own `alpha`, of a layer without a pair or of several numbers, is one of the other tensors."""
    own = {"snake.alpha": torch.tensor(math.nan), "y.alpha": torch.ones(3)}
    save_file(
        {**kohya("x", 8, 4.0), **kohya("y", 8, None), **own},
        tmp_path / "lora.safetensors",
    )
    survey = inspect_file(tmp_path / "lora.safetensors")
    assert set(survey.other) == set(own)
    assert {f.layer: f.scaling for f in survey.factors} == {"x": 0.5, "y": 1.0}


METADATA = [
    (
        {
            "ss_network_alpha": "4",
            "ss_network_dim": "8",
            "ss_network_module": "networks.lora",
            "ss_learning_rate": "0.0001",
        },
        0.5,
    ),
    ({"ss_network_alpha": "None"}, None),
    ({"ss_network_alpha": "Dynamic"}, None),
    ({}, None),
]


@pytest.mark.parametrize(("metadata", "scaling"), METADATA)
def test_kohyas_metadata_stand_in_for_a_missing_alpha(metadata, scaling, tmp_path):
    """ss_network_alpha counts where a layer has no own alpha; what the metadata say is a note."""
    save_file(
        kohya("x", 8, None) | kohya("y", 8, 16.0),
        tmp_path / "lora.safetensors",
        metadata,
    )
    survey = inspect_file(tmp_path / "lora.safetensors")
    assert {f.layer: f.scaling for f in survey.factors} == {
        "x": scaling or 1.0,
        "y": 2.0,
    }
    assert any("scaling 1 is assumed" in note for note in survey.notes) == (
        scaling is None
    )
    assert all(
        any(value in note for note in survey.notes) for value in metadata.values()
    )


def test_a_diffusers_file_carries_its_configurations(tmp_path):
    """Each part of the pipeline has its own entries in the metadata; the part's name is no part of a pattern's."""
    entries = {
        "unet.r": 8,
        "unet.lora_alpha": 16,
        "unet.init_lora_weights": True,
        "unet.alpha_pattern": {"^b.q": 4},
    }
    entries |= {
        "te.r": 4,
        "te.lora_alpha": 4,
        "te.use_rslora": True,
        "te.rank_pattern": {"v": 2},
    }
    tensors = (
        pair("unet.a.q")
        | pair("unet.b.q")
        | pair("te.q", 4)
        | pair("te.v", 2)
        | pair("vae.q")
    )
    save_file(
        tensors,
        tmp_path / "x.safetensors",
        {"lora_adapter_metadata": json.dumps(entries)},
    )
    survey = inspect_file(tmp_path / "x.safetensors")
    found = {f.layer: (f.scaling, f.init, f.convention) for f in survey.factors}
    assert found == {
        "unet.a.q": (2.0, "A", "peft"),
        "unet.b.q": (0.5, "A", "peft"),
        "te.q": (2.0, "unknown", "peft"),
        "te.v": (pytest.approx(4 / math.sqrt(2)), "unknown", "peft"),
        "vae.q": (1.0, "unknown", "lora_A/lora_B"),
    }


def test_peft_s_own_file_is_taken_among_several(folder):
    """Beside a configuration, adapter_model.safetensors is the one; without, the only one is, and several are an error."""
    made = folder()
    save_file({"w": torch.zeros(1)}, made / "another.safetensors")
    assert len(inspect_file(made).factors) == 2
    (made / "adapter_config.json").unlink()
    with pytest.raises(InspectionError, match=r"2 \.safetensors files and no adapter_"):
        inspect_file(made)
    (made / "another.safetensors").unlink()
    (made / WEIGHTS).rename(made / "pytorch_lora_weights.safetensors")
    assert len(inspect_file(str(made)).factors) == 2


def test_a_kohya_file_carries_its_own_alpha(tmp_path):
    """alpha entries give each layer its scaling, and are no other tensors."""
    path = tmp_path / "lora.safetensors"
    save_file({**kohya("lora_unet_a", 8, 4.0), **kohya("lora_unet_b", 16, 32.0)}, path)
    survey = inspect_file(path)
    assert {(f.layer, f.rank, f.scaling) for f in survey.factors} == {
        ("lora_unet_a", 8, 0.5),
        ("lora_unet_b", 16, 2.0),
    }
    assert {f.convention for f in survey.factors} == {"lora_down/lora_up"}
    assert survey.other == ()


def test_a_pair_at_the_top_of_a_file_has_its_alpha(tmp_path):
    """The state_dict of a single layer has names without a layer, its alpha too."""
    tensors = kohya("x", 8, 4.0).items()
    path = tmp_path / "lora.safetensors"
    save_file({name.removeprefix("x."): tensor for name, tensor in tensors}, path)
    survey = inspect_file(path)
    assert ({f.scaling for f in survey.factors}, survey.other) == ({0.5}, ())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64]
)
def test_alpha_of_any_dtype_is_read(dtype, tmp_path):
    """alpha may be stored at any precision."""
    save_file(
        {**kohya("x", 8, None), "x.alpha": torch.tensor(4, dtype=dtype)},
        tmp_path / "lora.safetensors",
    )
    assert inspect_file(tmp_path / "lora.safetensors").factors[0].scaling == 0.5


def test_a_hundred_gigabytes_are_surveyed_in_a_second(tmp_path):
    """Only the header and the alphas are read, of a sparse file of 100 GB in 6,000 tensors."""
    layers, rows, columns = 2000, 16, 800_000
    header: dict[str, dict] = {}
    end = 0
    for i in range(layers):
        for name, shape in (
            ("lora_down.weight", (rows, columns)),
            ("lora_up.weight", (64, rows)),
            ("alpha", ()),
        ):
            size = 4 * math.prod(shape)
            header[f"lora_unet_{i}.{name}"] = entry(*shape, offsets=[end, end + size])
            end += size
    encoded = json.dumps(header).encode()
    path = write_raw(tmp_path / "big.safetensors", encoded)
    try:
        with path.open("r+b") as file:
            file.truncate(8 + len(encoded) + end)
            for i in range(layers):
                file.seek(
                    8 + len(encoded) + header[f"lora_unet_{i}.alpha"]["data_offsets"][0]
                )
                file.write(struct.pack("<f", 8.0))
    except OSError as error:
        pytest.skip(f"no sparse file here: {error}")
    began = time.process_time()
    survey = inspect_file(path)
    assert time.process_time() - began < 1
    assert end > 100e9
    assert {(f.rank, f.fan_in, f.scaling) for f in survey.factors} == {
        (rows, columns, 0.5)
    }
    assert len(survey.factors) == 2 * layers


# --- what is refused ------------------------------------------------------------------------------------------------

GOOD_HEADER = json.dumps(
    {"x.lora_A.weight": entry(2, 4), "x.lora_B.weight": entry(4, 2, offsets=[32, 64])}
).encode()
RAW = [
    (b"", None, b"", "header"),
    (b"{}", 3, b"", "header"),
    (b"{}", 1, b"", "header"),
    (b"{}", 10**8, b"", "header"),
    (b"{}", 2**64 - 1, b"", "header"),
    (b"{}", None, b"", "no LoRA pair among 0 tensors"),
    (b"not json", None, b"", "invalid JSON"),
    (b"\xff\xff", None, b"", "UTF-8"),
    (b"[]", None, b"", "invalid JSON"),
    (b"[" * 100_000, None, b"", "invalid JSON"),
    (b'{"a": {"shape": [1.5, 8]}}', None, b"", "invalid JSON"),
    (
        json.dumps({"a": entry(1, offsets=[4, 0])}).encode(),
        None,
        bytes(4),
        "offset for tensor `a`",
    ),
    (
        json.dumps({"a": entry(2, dtype="\x1b[2J")}).encode(),
        None,
        bytes(8),
        r"unknown variant `\[2J`",
    ),
    (
        json.dumps({"a": entry(2, dtype="F16")}).encode(),
        None,
        bytes(8),
        "invalid shape, data type, or offset",
    ),
    (
        json.dumps({"a": entry(2), "b": entry(2, offsets=[4, 12])}).encode(),
        None,
        bytes(12),
        "offset for tensor `b`",
    ),
    (b'{"__metadata__": {"a": 1}}', None, b"", "expected a string"),
    ("{}".encode("utf-16"), None, b"", "UTF-8"),
    (GOOD_HEADER, None, bytes(63), "not a complete safetensors file"),
    (GOOD_HEADER, None, bytes(10), "not a complete safetensors file"),
    (GOOD_HEADER[:-1], None, bytes(64), "invalid JSON"),
]


@pytest.mark.parametrize(("header", "length", "data", "message"), RAW)
def test_damaged_files_are_refused(header, length, data, message, tmp_path):
    """A file cut short, of another format, or with a header that lies is an error naming the file."""
    path = write_raw(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(InspectionError, match=message) as caught:
        inspect_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 8, 20])
def test_a_file_cut_short_anywhere_is_refused(size, folder):
    """However little of the file is left, the error is ours."""
    path = folder() / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InspectionError):
        inspect_file(path)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "lora.pt", "lora.ckpt", "lora.PTH"]
)
def test_a_pickle_is_refused_unread(name, tmp_path):
    """A pickle, alone or as all that a folder holds, is refused by its name; nothing in it is run."""
    (tmp_path / name).write_bytes(pickle.dumps({"x": [1, 2, 3] * 100}))
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InspectionError, match=f"{name} is a pickle"):
            inspect_file(path)


def test_a_pickle_under_a_false_name_is_refused(tmp_path):
    """A pickle called .safetensors has no such header."""
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps({"x": [1, 2, 3] * 100}))
    with pytest.raises(InspectionError, match="not a complete safetensors file"):
        inspect_file(tmp_path / "x.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    """A pipe, which nobody may ever write to, is no file."""
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(InspectionError, match="There is no file"):
        inspect_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("path", ["nowhere", "x" * 5000, "x\0y"])
def test_a_path_that_cannot_be_is_refused(path):
    """Missing, too long or with a zero in it: an error of ours."""
    with pytest.raises(InspectionError, match="There is no file"):
        inspect_file(path)


MISFITS = [
    {"x.lora_A.weight": (8,), "x.lora_B.weight": (4, 8)},
    {"x.lora_A.weight": (8, 4), "x.lora_B.weight": (8,)},
    {"x.lora_A.weight": (8, 4), "x.lora_B.weight": (4, 3)},
    {"x.lora_A.weight": (8, 4), "x.lora_B.weight": (4, 16)},
    {"x.lora_A.weight": (8, 4), "x.lora_B.weight": (4, 0)},
    {"x.lora_A.weight": (0, 4), "x.lora_B.weight": (4, 8)},
    {"x.lora_A.weight": (0, 4), "x.lora_B.weight": (4, 0)},
    {"x.lora_A.weight": (8, 0), "x.lora_B.weight": (4, 8)},
    {"x.lora_A.weight": (8, 4), "x.lora_B.weight": (0, 8)},
    {"x.lora_A.weight": (8, 4), "x.lora_B.weight": (4, 4)},
    {"x.lora_A.weight": (4, 8, 5), "x.lora_B.weight": (4, 6, 8)},
    {"x.lora_A.weight": (8,), "x.lora_B.weight": ()},
]


@pytest.mark.parametrize("shapes", MISFITS, ids=str)
def test_shapes_that_fit_no_pair_are_refused(shapes, folder):
    """Two halves whose shapes make no pair are an error that names both."""
    path = folder({key: torch.zeros(shape) for key, shape in shapes.items()})
    with pytest.raises(
        InspectionError, match=r"lora_A\.weight has shape .*lora_B\.weight"
    ):
        inspect_file(path)


CORES = [
    ((8, 8, 3, 3), (8, 4, 3, 3)),
    ((4, 8, 3, 3), (8, 4, 1, 1)),
    ((8,), (8, 4, 1, 1)),
    ((8, 8, 0), (8, 4, 1, 1)),
]


@pytest.mark.parametrize(("core", "down"), CORES)
def test_a_core_that_does_not_fit_its_pair_is_refused(core, down, folder):
    """Tucker's core is (r, r, k…) between two 1 × 1 convolutions."""
    tensors = {
        "x.lora_mid.weight": torch.zeros(core),
        "x.lora_down.weight": torch.zeros(down),
    }
    with pytest.raises(InspectionError, match=r"x\.lora_down\.weight has shape"):
        inspect_file(folder({**tensors, "x.lora_up.weight": torch.zeros(5, 8, 1, 1)}))


@pytest.mark.parametrize(
    "keys", [["x.weight"], ["x.lora_a", "x.lora_b"], ["x.lora_A.0", "x.lora_B.0"], []]
)
def test_a_file_without_a_pair_is_refused(keys, folder):
    """A base model, MLX's transposed pairs or nothing at all is an error that says how much was looked at."""
    path = (
        folder({key: torch.zeros(8, 8) for key in keys}) / "adapter_model.safetensors"
    )
    if "x.lora_A.0" in keys:  # DyLoRA's slices are an adapter, though no pair
        assert inspect_file(path).factors == ()
        return
    with pytest.raises(
        InspectionError, match=f"no LoRA pair among {len(keys)} tensors"
    ):
        inspect_file(path)


@pytest.mark.parametrize(
    "key",
    ["x.lora_A.weight", "x.lora_B.weight", "y.lora_up.weight", "x.lora.down.weight"],
)
def test_half_a_pair_is_refused(key, folder):
    """A factor whose other half is missing is named, though other pairs are whole."""
    with pytest.raises(InspectionError, match=f"{key} lacks the other half"):
        inspect_file(folder({**pair("z"), key: torch.zeros(8, 8)}))


COLLISIONS = [
    ("x.lora_A.default.weight", "x.lora_B.default.weight"),
    ("base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"),
    (
        "base_model.model.x.lora_A.default.weight",
        "base_model.model.x.lora_B.default.weight",
    ),
    ("x.lora_A", "x.lora_B"),
    ("x.lora_down.weight", "x.lora_up.weight"),
    ("x.lora_A", "other.weight"),
]


@pytest.mark.parametrize("keys", COLLISIONS)
def test_keys_that_collide_are_refused(keys, folder):
    """One layer's pair given twice, with and without an adapter's name, a prefix or another marker, names both."""
    with pytest.raises(InspectionError, match=r"x\.lora_A.* collide"):
        inspect_file(
            folder(
                pair("x") | {keys[0]: torch.zeros(8, 32), keys[1]: torch.zeros(48, 8)}
            )
        )


def test_two_adapters_of_one_layer_do_not_collide(folder):
    """A model's whole state may hold several adapters by name."""
    two = {
        k.replace("weight", f"{name}.weight"): v
        for name in ("a", "b")
        for k, v in pair("x").items()
    }
    assert {f.adapter for f in inspect_file(folder(two)).factors} == {"a", "b"}


def test_a_declared_rank_at_odds_with_the_shapes_is_refused(folder):
    """The error names both files, the key and both numbers."""
    made = folder(r=16, rank_pattern={"k_proj": 8})
    with pytest.raises(InspectionError) as caught:
        inspect_file(made)
    for part in (
        "adapter_model.safetensors",
        f"{LAYER}.lora_A.weight",
        "(8, ",
        "adapter_config.json",
        "declares rank 16",
    ):
        assert part in str(caught.value)


BAD_CONFIGS = [
    *(({"r": value}, r"at `\$.r`") for value in (-8, 0, "8", 8.5, True, [8], 10**300)),
    ({"r": None}, "missing required field `r`"),
    *(
        ({"lora_alpha": value}, r"at `\$.lora_alpha`")
        for value in (-1, 0, "16", True, [16], 1e-320, 10**300)
    ),
    ({"lora_alpha": math.nan}, "cannot be read"),
    ({"lora_alpha": math.inf}, "cannot be read"),
    *(
        ({"alpha_pattern": value}, r"at `\$.alpha_pattern")
        for value in ([16], "q_proj", {"q_proj": "x"}, {"q_proj": -1})
    ),
    ({"alpha_pattern": {f"x{i}": 1 for i in range(5000)}}, r"at `\$.alpha_pattern"),
    *(
        ({"alpha_pattern": {pattern: 1}}, "which is no plain name.*inspect_model")
        for pattern in (r"(a+)+b", ".*q", "q|v", r"layers\.0", "q_proj(", "[z-a]", "")
    ),
    ({"rank_pattern": {"q.*": 8}}, "which is no plain name.*inspect_model"),
    ({"rank_pattern": {"q_proj": 8.5}}, r"at `\$.rank_pattern"),
    ({"rank_pattern": {"q_proj": True}}, r"at `\$.rank_pattern"),
    ({"rank_pattern": ["q_proj"]}, r"at `\$.rank_pattern"),
    ({"peft_type": "ADALORA"}, r"at `\$.r`"),
    ({"use_rslora": "yes"}, r"at `\$.use_rslora`"),
    ({"init_lora_weights": [True]}, r"at `\$.init_lora_weights`"),
    ({"target_parameters": "experts.up"}, r"at `\$.target_parameters`"),
    ({"target_parameters": ["e.up"]}, "experts by target_parameters.*inspect_model"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_an_unusable_configuration_is_refused(changes, message, folder):
    """A rank or alpha that cannot be is an error naming where it stands."""
    with pytest.raises(InspectionError, match=message):
        inspect_file(folder(**changes))


@pytest.mark.parametrize(
    "text", ["", "not json", "[]", "null", "7", "\0", "[" * 100_000, "\ufeff{}"]
)
def test_a_configuration_that_is_no_json_object_is_refused(text, folder):
    """adapter_config.json must be one JSON object."""
    made = folder()
    (made / "adapter_config.json").write_text(text)
    with pytest.raises(InspectionError, match=r"adapter_config\.json"):
        inspect_file(made)


def test_a_configuration_of_more_than_ten_megabytes_is_refused(folder):
    """A file that no PEFT writes is not read to its end."""
    made = folder()
    (made / "adapter_config.json").write_text(json.dumps({**CONFIG, "x": "y" * 10**7}))
    with pytest.raises(InspectionError, match="longer than"):
        inspect_file(made)


def test_a_configuration_of_another_encoding_is_refused(folder):
    """UTF-16 is no UTF-8."""
    made = folder()
    (made / "adapter_config.json").write_text(json.dumps(CONFIG), encoding="utf-16")
    with pytest.raises(InspectionError, match=r"adapter_config\.json cannot be read"):
        inspect_file(made)


EMBEDDED = [
    ("{", "cannot be read"),
    ("[]", "cannot be read as a JSON object"),
    ('{"unet.r": -1}', r"at `\$.r`"),
    ('{"unet.r": 8, "unet.lora_alpha": "x"}', r"at `\$.lora_alpha`"),
    ('{"unet.r": 4}', "declares rank 4"),
    ("[" * 100_000, "cannot be read"),
]


@pytest.mark.parametrize(("text", "message"), EMBEDDED)
def test_an_unusable_configuration_in_the_metadata_is_refused(text, message, tmp_path):
    """diffusers' copy of the configuration is checked as PEFT's own file is."""
    save_file(
        pair("unet.q"), tmp_path / "x.safetensors", {"lora_adapter_metadata": text}
    )
    with pytest.raises(InspectionError, match=f"lora_adapter_metadata.*{message}"):
        inspect_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", ["x", "nan", "-1", "0", "1e400", ""])
def test_an_alpha_in_the_metadata_that_cannot_be_is_refused(text, tmp_path):
    """ss_network_alpha must be a positive number where a layer needs it."""
    save_file(
        kohya("x", 8, None), tmp_path / "x.safetensors", {"ss_network_alpha": text}
    )
    with pytest.raises(InspectionError, match="ss_network_alpha"):
        inspect_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_in_the_file_that_cannot_be_is_refused(alpha, tmp_path):
    """alpha of zero, below, or not finite is an error that names the layer."""
    save_file(kohya("lora_unet_a", 8, alpha), tmp_path / "lora.safetensors")
    with pytest.raises(InspectionError, match="lora_unet_a has the scaling"):
        inspect_file(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("C64", 8),
        ("BOOL", 1),
        ("U16", 2),
        ("F8_E8M0", 1),
        ("F8_E4M3", 1),
        ("F4", 1),
        ("nonsense", 4),
        (7, 4),
        ("F32", 2),
    ],
)
def test_an_alpha_of_an_odd_kind_raises_no_error_but_ours(dtype, size, tmp_path):
    """An alpha of any kind that the format knows, or does not, is read or refused by an error of ours."""
    alpha = {"dtype": dtype, "shape": [1], "data_offsets": [64, 64 + size]}
    header = json.dumps({**json.loads(GOOD_HEADER), "x.alpha": alpha}).encode()
    only_our_errors(write_raw(tmp_path / "x.safetensors", header, bytes(64 + size)))


def test_a_folder_without_weights_is_refused(folder):
    """A configuration alone is an error that names what is missing."""
    made = folder()
    (made / "adapter_model.safetensors").unlink()
    with pytest.raises(
        InspectionError,
        match=r"0 \.safetensors files, none of them adapter_model\.safetensors",
    ):
        inspect_file(made)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(scalars, st.lists, max_leaves=4)
entries = values | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F32", "BF16", "I64", "F8_E4M3", "F4", "nonsense", {"F32": None}]
        )
        | values,
        "shape": st.lists(st.integers(0, 9) | values, max_size=4) | values,
        "data_offsets": st.tuples(st.integers(-2, 64), st.integers(-2, 64)) | values,
    }
)
keys = st.sampled_from(
    [
        "x.lora_A.weight",
        "x.lora_B.weight",
        "x.lora_down",
        "x.lora_up",
        "x.alpha",
        "__metadata__",
        "",
    ]
)


fuzz = settings(
    max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzz
@given(header=st.dictionaries(keys, entries, max_size=5), data=st.binary(max_size=64))
@example(
    header={
        "x.lora_A.weight": entry(2, 2),
        "x.lora_B.weight": entry(2, 2),
        "x.alpha": entry(1),
    },
    data=bytes(16),
)
def test_no_header_raises_an_error_but_ours(header, data, tmp_path):
    """Any JSON where a header belongs, before any bytes, is surveyed or refused by an error of ours."""
    only_our_errors(
        write_raw(tmp_path / "x.safetensors", json.dumps(header).encode(), data)
    )


@fuzz
@given(noise=st.binary(max_size=200), kept=st.integers(0, 120))
def test_no_bytes_raise_an_error_but_ours(noise, kept, tmp_path):
    """Random bytes after a valid beginning are refused by an error of ours."""
    whole = write_raw(tmp_path / "x.safetensors", GOOD_HEADER, bytes(64)).read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:kept] + noise)
    only_our_errors(tmp_path / "x.safetensors")


@fuzz
@given(
    changes=st.dictionaries(
        st.sampled_from([*CONFIG, "alpha_pattern"]), values, max_size=4
    )
)
def test_no_configuration_raises_an_error_but_ours(changes, tmp_path):
    """Any JSON in a configuration's values is used or refused by an error of ours."""
    save_file(pair(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    only_our_errors(tmp_path)


# --- printing -------------------------------------------------------------------------------------------------------


def test_the_report_counts_like_factors_on_one_line(folder):
    """A hundred like layers take two lines, with their rates if a base rate is given, or one a tensor if asked."""
    survey = inspect_file(
        folder({k: v for i in range(100) for k, v in pair(f"layers.{i}.q").items()})
    )
    with_law, rates = survey_rates(survey, lr=2e-4, tuned_at="r=8,alpha=16")
    plain, rated = survey.explain(), with_law.explain(rates=rates)
    assert plain.count("100") == 2
    assert "0.0002" not in plain
    assert rated.count("0.0002") == 2
    every = with_law.explain(per_module=True, rates=rates)
    assert all(f.name in every for f in survey.factors)
    assert every.count("0.0002") == 200
