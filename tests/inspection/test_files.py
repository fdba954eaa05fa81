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
from rankaware_optim.inspection._survey import is_other_adapter

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
        save_file(pair() if tensors is None else tensors, tmp_path / WEIGHTS)
        config = {**CONFIG, **changes}
        given = {key: value for key, value in config.items() if value is not None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(given))
        return tmp_path

    return make


@pytest.fixture
def file_of(tmp_path):
    """Makes a file of these tensors and metadata."""

    def make(tensors, metadata=None):
        save_file(tensors, tmp_path / "x.safetensors", metadata)
        return tmp_path / "x.safetensors"

    return make


def scalings(survey) -> dict[str, float]:
    """The scaling of every layer."""
    return {factor.layer: factor.scaling for factor in survey.factors}


def write_raw(path, header: bytes, data: bytes = b""):
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(*shape: int, dtype="F32", start=0, end=None) -> dict:
    end = start + 4 * math.prod(shape) if end is None else end
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


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
    """Beside the factors the survey has their layer, what else trains, and how much was looked at."""
    survey = inspect_file(
        folder({**pair(), "base_model.model.score.weight": torch.zeros(2, 2)})
    )
    assert {factor.layer for factor in survey.factors} == {LAYER}
    assert survey.other == ("base_model.model.score.weight",)
    assert survey.looked_at == 3
    assert survey.notes == ()


RSLORA = {"use_rslora": True}
Q_OF_64 = {"rank_pattern": {"q_proj": 8}, "r": 64}
SEVERAL = {"v_proj": 4, "proj": 4, "0.q_proj": 8, "q_proj": 32}
CONFIGS = [
    (RSLORA, 16 / math.sqrt(8), "A"),
    ({"lora_alpha": 4}, 0.5, "A"),
    ({"alpha_pattern": {"q_proj": 32}}, 4.0, "A"),
    ({"alpha_pattern": {"layers.0.q_proj": 32}}, 4.0, "A"),
    ({"alpha_pattern": {"v_proj": 32}}, 2.0, "A"),
    (Q_OF_64, 2.0, "A"),
    ({**Q_OF_64, **RSLORA, "alpha_pattern": {"q_proj": 4}}, math.sqrt(2), "A"),
    ({"alpha_pattern": SEVERAL}, 1.0, "A"),
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
SMALL = ((8, 32), (48, 8))
READ, UNREAD = (2.0, "A"), (1.0, "unknown")
OF_CONV = ((8, 4, 3, 3), (6, 8, 1, 1))
OLD = (8, 32, 48, *UNREAD, "linear", "diffusers-legacy")
READINGS = [
    # the first name, the shapes of A and B, changes to PEFT's configuration, and what is read
    ("x.lora_A", *SMALL, {}, (8, 32, 48, *READ, "linear", "peft")),
    ("x.lora_A.d.weight", *SMALL, {}, (8, 32, 48, *READ, "linear", "peft")),
    ("x.lora_A", (8, 4, 3), (48, 8, 1), {}, (8, 12, 48, *READ, "conv", "peft")),
    (
        *("x.lora_A.weight", (8, 4, 3, 3), (6, 4, 1, 1), {}),
        (8, 36, 6, *READ, "conv", "peft"),
    ),
    (
        *("x.lora_embedding_A", (8, 100), (32, 8), {}),
        (8, 100, 32, 2.0, "B", "embedding", "peft-embedding"),
    ),
    (
        *("x.lora_A", (6, 32), (48, 6), PRUNED),
        (6, 32, 48, 16 / 6, "other", "adalora", "peft-adalora"),
    ),
    ("q_lora.down.weight", *SMALL, ALONE, OLD),
    ("q.lora.down.weight", *SMALL, ALONE, OLD),
    ("q.lora_linear_layer.down.weight", *SMALL, ALONE, OLD),
    ("x.lora_A.weight", *SMALL, ALONE, (8, 32, 48, *UNREAD, "linear", "lora_A/lora_B")),
    ("x.lora_A.one.weight", *SMALL, ALONE, (8, 32, 48, *UNREAD, "linear", "peft")),
    (
        *("x.lora_embedding_A", *SMALL, ALONE),
        (8, 32, 48, *UNREAD, "embedding", "peft-embedding"),
    ),
    (
        *("x.lora_down.weight", *OF_CONV, ALONE),
        (8, 36, 6, *UNREAD, "conv", "lora_down/lora_up"),
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
    keys = ("rank", "fan_in", "fan_out", "scaling", "init", "kind", "convention")
    found = {tuple(getattr(factor, key) for key in keys) for factor in survey.factors}
    assert found == {expected}
    assert [(f.name, f.role) for f in survey.factors] == [(first, "A"), (second, "B")]
    said = any("scaling 1 is assumed" in note for note in survey.notes)
    assert said == (changes is ALONE)


def test_a_square_pair_of_bare_tensors_may_be_stored_either_way(folder):
    """A file of lora_A (64, 4) and lora_B (4, 64) is refused; a configuration, or modules' weights, say the rank."""
    tensors = {"x.lora_A": torch.zeros(64, 4), "x.lora_B": torch.zeros(4, 64)}
    with pytest.raises(InspectionError, match=r"declares no rank.* may be 64 or 4"):
        inspect_file(folder(tensors) / WEIGHTS)
    weights = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    read = inspect_file(folder(tensors, r=64)), inspect_file(folder(weights) / WEIGHTS)
    assert {f.rank for survey in read for f in survey.factors} == {64}


A_AND_B, DOWN_AND_UP = (
    ("x.lora_A", "x.lora_B"),
    ("x.lora_down.weight", "x.lora_up.weight"),
)
BESIDE = [
    (A_AND_B, (), {"x.lora_E": (8, 1)}, (32, "adalora", "peft-adalora")),
    (A_AND_B, (), {"x.lora_diag": (8,)}, (32, "kasa", "peft-kasa")),
    (
        DOWN_AND_UP,
        (1, 1),
        {"x.lora_mid.weight": (8, 8, 3, 3)},
        (288, "conv", "locon-tucker"),
    ),
]


@pytest.mark.parametrize(("names", "kernel", "others", "expected"), BESIDE)
def test_a_third_tensor_of_a_layer_tells_its_convention(
    names, kernel, others, expected, file_of
):
    """AdaLoRA's and KaSA's singular values, and Tucker's core, whose kernel counts for the fan-in, are no factors."""
    shapes = {names[0]: (8, 32, *kernel), names[1]: (48, 8, *kernel), **others}
    survey = inspect_file(
        file_of({n: torch.zeros(shape) for n, shape in shapes.items()})
    )
    found = {(f.rank, f.fan_in, f.kind, f.convention) for f in survey.factors}
    assert found == {(8, *expected)}
    assert survey.other == tuple(others)


OTHERS = [
    (["x.lora_A.0", "x.lora_B.0"], {"peft_type": "DYLORA"}),
    (["x.hada_w1_a", "x.hada_w2_b", "x.alpha"], {"peft_type": "LOHA"}),
    (["x.lokr_w1", "x.alpha"], {"peft_type": "LOKR"}),
    (["x.vera_lambda_b"], {"peft_type": "VERA", "r": None}),
    (["x.gralora_A"], {"peft_type": "GRALORA", "r": 0}),
    (["prompt_embeddings"], {"peft_type": "PROMPT_TUNING", "r": "none"}),
]


@pytest.mark.parametrize(("keys", "changes"), OTHERS)
def test_an_adapter_without_a_law_is_a_survey_without_factors(keys, changes, folder):
    """LoHa, LoKr, VeRA and what only the configuration names are listed, not refused; their alpha is no tensor."""
    others = [key for key in keys if key != "x.alpha"]
    tensors = {key: torch.zeros((4, 4) if key in others else ()) for key in keys}
    survey = inspect_file(folder(tensors, **changes))
    assert survey.factors == ()
    assert survey.other == tuple(others)
    assert set(survey.unsupported) == set(filter(is_other_adapter, others))
    assert any(changes["peft_type"] in note for note in survey.notes)


ALPHAS = [
    ({"x.alpha": torch.tensor(4.0)}, {"x": 0.5}),
    *(
        ({"x.alpha": torch.tensor(4, dtype=dtype)}, {"x": 0.5})
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64)
    ),
    # a model's own, of a layer without a pair or of several numbers
    ({"snake.alpha": torch.tensor(math.nan), "x.alpha": torch.ones(3)}, {"x": 1.0}),
]


@pytest.mark.parametrize(("alphas", "expected"), ALPHAS)
def test_a_layers_alpha_is_a_number_of_any_dtype(alphas, expected, file_of):
    """It gives the layer's scaling and is no other tensor; any other `alpha` is one."""
    survey = inspect_file(file_of({**kohya("x", 8, None), **alphas}))
    assert scalings(survey) == expected
    assert set(survey.other) == (set() if expected["x"] == 0.5 else set(alphas))


def test_a_files_own_alpha_is_divided_by_the_rank(folder):
    """The `use_rslora` of the configuration is for its own alpha, not for one that the file has."""
    tensors = {**pair(), f"{LAYER}.alpha": torch.tensor(4.0)}
    survey = inspect_file(folder(tensors, use_rslora=True))
    assert {f.scaling for f in survey.factors} == {4 / RANK}


def test_a_pair_at_the_top_of_a_file_has_its_alpha(file_of):
    """The state_dict of a single layer has names without a layer, its alpha too."""
    tensors = kohya("x", 8, 4.0).items()
    survey = inspect_file(file_of({n.removeprefix("x."): t for n, t in tensors}))
    assert (scalings(survey), survey.other) == ({"": 0.5}, ())


TRAINED = {
    "ss_network_alpha": "4",
    "ss_network_dim": "8",
    "ss_network_module": "networks.lora",
    "ss_learning_rate": "0.0001",
}
METADATA = [
    (TRAINED, 0.5),
    ({"ss_network_alpha": "None"}, 1.0),
    ({"ss_network_alpha": "Dynamic"}, 1.0),
    ({}, 1.0),
]


@pytest.mark.parametrize(("metadata", "scaling"), METADATA)
def test_kohyas_metadata_stand_in_for_a_missing_alpha(metadata, scaling, file_of):
    """ss_network_alpha counts where a layer has no own alpha; what the metadata say is a note."""
    tensors = kohya("x", 8, None) | kohya("y", 8, 16.0)
    survey = inspect_file(file_of(tensors, metadata))
    assert scalings(survey) == {"x": scaling, "y": 2.0}
    said = any("scaling 1 is assumed" in note for note in survey.notes)
    assert said == (scaling == 1.0)
    for value in metadata.values():
        assert any(value in note for note in survey.notes)


def test_a_diffusers_file_carries_its_configurations(file_of):
    """Each part of the pipeline has its own entries in the metadata; the part's name is no part of a pattern's."""
    entries = {
        "unet.r": 8,
        "unet.lora_alpha": 16,
        "unet.init_lora_weights": True,
        "unet.alpha_pattern": {"^b.q": 4},
        "te.r": 4,
        "te.lora_alpha": 4,
        "te.use_rslora": True,
        "te.rank_pattern": {"v": 2},
    }
    layers = {"unet.a.q": 8, "unet.b.q": 8, "te.q": 4, "te.v": 2, "vae.q": 8}
    tensors = {
        k: v for layer, rank in layers.items() for k, v in pair(layer, rank).items()
    }
    metadata = {"lora_adapter_metadata": json.dumps(entries)}
    survey = inspect_file(file_of(tensors, metadata))
    found = {f.layer: (f.scaling, f.init, f.convention) for f in survey.factors}
    assert found == {
        "unet.a.q": (2.0, "A", "peft"),
        "unet.b.q": (0.5, "A", "peft"),
        "te.q": (2.0, "unknown", "peft"),
        "te.v": (pytest.approx(4 / math.sqrt(2)), "unknown", "peft"),
        "vae.q": (1.0, "unknown", "lora_A/lora_B"),
    }


def test_peft_s_own_file_is_taken_among_several(folder):
    """Beside a configuration adapter_model.safetensors is the one, and without it none; else the only one is."""
    made = folder()
    save_file({"w": torch.zeros(1)}, made / "another.safetensors")
    assert len(inspect_file(made).factors) == 2
    (made / WEIGHTS).rename(made / "pytorch_lora_weights.safetensors")
    with pytest.raises(InspectionError, match=rf"2 .*, none of them {WEIGHTS}"):
        inspect_file(made)
    (made / "adapter_config.json").unlink()
    with pytest.raises(InspectionError, match=r"2 \.safetensors files and no adapter_"):
        inspect_file(made)
    (made / "another.safetensors").unlink()
    assert len(inspect_file(str(made)).factors) == 2


def test_a_hundred_gigabytes_are_surveyed_in_a_second(tmp_path):
    """Only the header and the alphas are read, of a sparse file of 100 GB in 6,000 tensors."""
    layers, rows, columns = 2000, 16, 800_000
    shapes = {
        "lora_down.weight": (rows, columns),
        "lora_up.weight": (64, rows),
        "alpha": (),
    }
    header: dict[str, dict] = {}
    end = 0
    for i in range(layers):
        for name, shape in shapes.items():
            header[f"lora_unet_{i}.{name}"] = made = entry(*shape, start=end)
            end = made["data_offsets"][1]
    encoded = json.dumps(header).encode()
    path = write_raw(tmp_path / "big.safetensors", encoded)
    start = path.stat().st_size
    try:
        with path.open("r+b") as file:
            file.truncate(start + end)
            for i in range(layers):
                file.seek(start + header[f"lora_unet_{i}.alpha"]["data_offsets"][0])
                file.write(struct.pack("<f", 8.0))
    except OSError as error:
        pytest.skip(f"no sparse file here: {error}")
    began = time.process_time()
    survey = inspect_file(path)
    assert time.process_time() - began < 1
    assert end > 100e9
    found = {(f.rank, f.fan_in, f.scaling) for f in survey.factors}
    assert found == {(rows, columns, 0.5)}
    assert len(survey.factors) == 2 * layers


# --- what is refused ------------------------------------------------------------------------------------------------

GOOD = {"x.lora_A.weight": entry(2, 4), "x.lora_B.weight": entry(4, 2, start=32)}
GOOD_HEADER = json.dumps(GOOD).encode()
CUT = "not a complete safetensors file"
RAW = [
    # the header, the bytes behind it, and the error
    (b"", b"", "header"),
    (b"{}", b"", "no LoRA pair among 0 tensors"),
    (b"not json", b"", "invalid JSON"),
    (b"\xff\xff", b"", "UTF-8"),
    (b"[]", b"", "invalid JSON"),
    (b"[" * 100_000, b"", "invalid JSON"),
    (b'{"a": {"shape": [1.5, 8]}}', b"", "invalid JSON"),
    ({"a": entry(1, start=4, end=0)}, bytes(4), "offset for tensor `a`"),
    ({"a": entry(2, dtype="\x1b[2J")}, bytes(8), r"unknown variant `\[2J`"),
    ({"a": entry(2, dtype="F16")}, bytes(8), "invalid shape, data type, or offset"),
    ({"a": entry(2), "b": entry(2, start=4)}, bytes(12), "offset for tensor `b`"),
    (b'{"__metadata__": {"a": 1}}', b"", "expected a string"),
    ("{}".encode("utf-16"), b"", "UTF-8"),
    (GOOD, bytes(63), CUT),
    (GOOD, bytes(10), CUT),
    (GOOD_HEADER[:-1], bytes(64), "invalid JSON"),
]


@pytest.mark.parametrize(("header", "data", "message"), RAW)
def test_damaged_files_are_refused(header, data, message, tmp_path):
    """A file cut short, of another format, or with a header that lies is an error naming the file."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = write_raw(tmp_path / "x.safetensors", encoded, data)
    with pytest.raises(InspectionError, match=message) as caught:
        inspect_file(path)
    assert str(path) in str(caught.value)


PICKLE = pickle.dumps({"x": [1, 2, 3] * 100})


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "lora.pt", "lora.ckpt", "lora.PTH"]
)
def test_a_pickle_is_refused_unread(name, tmp_path):
    """A pickle, alone or as all that a folder holds, is refused by its name, and by another; nothing in it is run."""
    (tmp_path / name).write_bytes(PICKLE)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InspectionError, match=f"{name} is a pickle"):
            inspect_file(path)
    (tmp_path / name).rename(tmp_path / "x.safetensors")
    with pytest.raises(InspectionError, match=CUT):
        inspect_file(tmp_path / "x.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "x\0y", "pipe.safetensors"])
def test_what_is_no_file_is_refused_at_once(name, tmp_path):
    """Missing, too long or with a zero in it, or a pipe, which nobody may ever write to: an error of ours."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InspectionError, match="There is no file"):
        inspect_file(f"{tmp_path}/{name}")


MISFITS = [
    # the shapes of A and of B
    ((8,), (4, 8)),
    ((8, 4), (8,)),
    ((8, 4), (4, 3)),
    ((8, 4), (4, 16)),
    ((8, 4), (4, 0)),
    ((0, 4), (4, 8)),
    ((0, 4), (4, 0)),
    ((8, 0), (4, 8)),
    ((8, 4), (0, 8)),
    ((8, 4), (4, 4)),
    ((4, 8, 5), (4, 6, 8)),
    ((8,), ()),
]


@pytest.mark.parametrize(("a", "b"), MISFITS)
def test_shapes_that_fit_no_pair_are_refused(a, b, folder):
    """Two halves whose shapes make no pair are an error that names both."""
    tensors = {"x.lora_A.weight": torch.zeros(a), "x.lora_B.weight": torch.zeros(b)}
    with pytest.raises(
        InspectionError, match=r"lora_A\.weight has shape .*lora_B\.weight"
    ):
        inspect_file(folder(tensors))


CORES = [
    ((8, 8, 3, 3), (8, 4, 3, 3)),
    ((4, 8, 3, 3), (8, 4, 1, 1)),
    ((8,), (8, 4, 1, 1)),
    ((8, 8, 0), (8, 4, 1, 1)),
]


@pytest.mark.parametrize(("core", "down"), CORES)
def test_a_core_that_does_not_fit_its_pair_is_refused(core, down, folder):
    """Tucker's core is (r, r, k…) between two 1 × 1 convolutions."""
    shapes = {"lora_mid": core, "lora_down": down, "lora_up": (5, 8, 1, 1)}
    tensors = {f"x.{n}.weight": torch.zeros(shape) for n, shape in shapes.items()}
    with pytest.raises(InspectionError, match=r"x\.lora_down\.weight has shape"):
        inspect_file(folder(tensors))


@pytest.mark.parametrize("keys", [["x.weight"], ["x.lora_a", "x.lora_b"], []])
def test_a_file_without_a_pair_is_refused(keys, file_of):
    """A base model, MLX's transposed pairs or nothing at all is an error that says how much was looked at."""
    path = file_of({key: torch.zeros(8, 8) for key in keys})
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


FULL_NAME = "base_model.model.x.lora_{}.weight"
COLLISIONS = [
    ("x.lora_A.default.weight", "x.lora_B.default.weight"),
    (FULL_NAME.format("A"), FULL_NAME.format("B")),
    (FULL_NAME.format("A.default"), FULL_NAME.format("B.default")),
    ("x.lora_A", "x.lora_B"),
    ("x.lora_down.weight", "x.lora_up.weight"),
    ("x.lora_A", "other.weight"),
]


@pytest.mark.parametrize(("first", "second"), COLLISIONS)
def test_keys_that_collide_are_refused(first, second, folder):
    """One layer's pair given twice, with and without an adapter's name, a prefix or another marker, names both."""
    again = {first: torch.zeros(8, 32), second: torch.zeros(48, 8)}
    with pytest.raises(InspectionError, match=r"x\.lora_A.* collide"):
        inspect_file(folder(pair("x") | again))


def test_two_adapters_of_one_layer_do_not_collide(file_of):
    """A model's whole state may hold several adapters by name."""
    two = {
        key.replace("weight", f"{name}.weight"): value
        for name in ("a", "b")
        for key, value in pair("x").items()
    }
    assert {f.adapter for f in inspect_file(file_of(two)).factors} == {"a", "b"}


def test_a_declared_rank_at_odds_with_the_shapes_is_refused(folder):
    """The error names both files, the key and both numbers."""
    made = folder(r=16, rank_pattern={"k_proj": 8})
    with pytest.raises(InspectionError) as caught:
        inspect_file(made)
    for part in (
        WEIGHTS,
        f"{LAYER}.lora_A.weight",
        "(8, ",
        "adapter_config.json",
        "declares rank 16",
    ):
        assert part in str(caught.value)


ODD_RANKS = (-8, 0, "8", 8.5, True, [8], 10**300)
ODD_ALPHAS = (-1, 0, "16", True, [16], 1e-320, 10**300)
ODD_PATTERNS = (
    *([16], "q_proj", {"q_proj": "x"}, {"q_proj": -1}),
    {f"x{i}": 1 for i in range(5000)},
)
EXPRESSIONS = (r"(a+)+b", ".*q", "q|v", r"layers\.0", "q_proj(", "[z-a]", "")
NO_NAME = "which is no plain name.*inspect_model"
BAD_CONFIGS = [
    *(({"r": value}, r"at `\$.r`") for value in ODD_RANKS),
    ({"r": None}, "missing required field `r`"),
    *(({"lora_alpha": value}, r"at `\$.lora_alpha`") for value in ODD_ALPHAS),
    ({"lora_alpha": math.nan}, "cannot be read"),
    ({"lora_alpha": math.inf}, "cannot be read"),
    *(({"alpha_pattern": value}, r"at `\$.alpha_pattern") for value in ODD_PATTERNS),
    *(({"alpha_pattern": {pattern: 1}}, NO_NAME) for pattern in EXPRESSIONS),
    ({"rank_pattern": {"q.*": 8}}, NO_NAME),
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


TEXTS = [
    *(b"", b"not json", b"[]", b"null", b"7", b"\0", b"[" * 100_000),
    "\ufeff{}".encode(),
    json.dumps(CONFIG).encode("utf-16"),
    json.dumps({**CONFIG, "x": "y" * 10**7}).encode(),  # longer than any of PEFT's
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:9]))
def test_a_configuration_that_is_no_json_object_is_refused(text, folder):
    """adapter_config.json must be one JSON object in UTF-8, of ten megabytes at most."""
    made = folder()
    (made / "adapter_config.json").write_bytes(text)
    with pytest.raises(InspectionError, match=r"adapter_config\.json") as caught:
        inspect_file(made)
    assert ("longer than" in str(caught.value)) == (len(text) > 10**7)


EMBEDDED = [
    ("{", "cannot be read"),
    ("[]", "cannot be read as a JSON object"),
    ('{"unet.r": -1}', r"at `\$.r`"),
    ('{"unet.r": 8, "unet.lora_alpha": "x"}', r"at `\$.lora_alpha`"),
    ('{"unet.r": 4}', "declares rank 4"),
    ("[" * 100_000, "cannot be read"),
]


@pytest.mark.parametrize(("text", "message"), EMBEDDED)
def test_an_unusable_configuration_in_the_metadata_is_refused(text, message, file_of):
    """diffusers' copy of the configuration is checked as PEFT's own file is."""
    path = file_of(pair("unet.q"), {"lora_adapter_metadata": text})
    with pytest.raises(InspectionError, match=f"lora_adapter_metadata.*{message}"):
        inspect_file(path)


BAD_ALPHAS = [
    *(
        (None, text, "ss_network_alpha")
        for text in ("x", "nan", "-1", "0", "1e400", "")
    ),
    *((alpha, "4", ": x has the scaling") for alpha in (0.0, -1.0, math.nan, math.inf)),
]


@pytest.mark.parametrize(("alpha", "stated", "message"), BAD_ALPHAS)
def test_an_alpha_that_cannot_be_is_refused(alpha, stated, message, file_of):
    """A layer's own, or the metadata's where a layer needs it, must be a positive number."""
    path = file_of(kohya("x", 8, alpha), {"ss_network_alpha": stated})
    with pytest.raises(InspectionError, match=message):
        inspect_file(path)


ODD_ALPHA_KINDS = {
    **{"C64": 8, "BOOL": 1, "U16": 2, "F8_E8M0": 1, "F8_E4M3": 1, "F4": 1},
    **{"nonsense": 4, 7: 4, "F32": 2},
}


@pytest.mark.parametrize(("dtype", "size"), ODD_ALPHA_KINDS.items())
def test_an_alpha_of_an_odd_kind_raises_no_error_but_ours(dtype, size, tmp_path):
    """An alpha of any kind that the format knows, or does not, is read or refused by an error of ours."""
    alpha = entry(1, dtype=dtype, start=64, end=64 + size)
    header = json.dumps({**GOOD, "x.alpha": alpha}).encode()
    only_our_errors(write_raw(tmp_path / "x.safetensors", header, bytes(64 + size)))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(scalars, st.lists, max_leaves=4)
kinds = ["F32", "BF16", "I64", "F8_E4M3", "F4", "nonsense", {"F32": None}]
ends = st.integers(-2, 64)
entries = values | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(kinds) | values,
        "shape": st.lists(st.integers(0, 9) | values, max_size=4) | values,
        "data_offsets": st.tuples(ends, ends) | values,
    }
)
FACTORS = ["x.lora_A.weight", "x.lora_B.weight", "x.lora_down", "x.lora_up"]
keys = st.sampled_from([*FACTORS, "x.alpha", "__metadata__", ""])
OVERLAP = {**dict.fromkeys(FACTORS[:2], entry(2, 2)), "x.alpha": entry(1)}


fuzz = settings(
    max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzz
@given(header=st.dictionaries(keys, entries, max_size=5), data=st.binary(max_size=64))
@example(header=OVERLAP, data=bytes(16))
def test_no_header_raises_an_error_but_ours(header, data, tmp_path):
    """Any JSON where a header belongs, before any bytes, is surveyed or refused by an error of ours."""
    path = tmp_path / "x.safetensors"
    only_our_errors(write_raw(path, json.dumps(header).encode(), data))


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
    save_file(pair(), tmp_path / WEIGHTS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    only_our_errors(tmp_path)
