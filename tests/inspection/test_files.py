"""Adapter files: what is read from their headers, and that damaged files raise only errors of this
package.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rankaware_optim import (
    Convention,
    InspectionError,
    RankAwareError,
    inspect_file,
    inspect_model,
    register_convention,
)
from rankaware_optim.inspection import is_other_adapter

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
    """Return the tensors of one adapted layer as PEFT saves it."""
    a = torch.zeros(rank, fan_in, *kernel)
    return {
        f"{layer}.lora_A.weight": a,
        f"{layer}.lora_B.weight": torch.zeros(fan_out, rank, *(1 for _ in kernel)),
    }


def kohya(layer: str, rank: int, alpha: float | None) -> dict[str, torch.Tensor]:
    """Return the tensors of one adapted layer as kohya's scripts save it."""
    made = {
        f"{layer}.lora_down.weight": torch.zeros(rank, 32),
        f"{layer}.lora_up.weight": torch.zeros(48, rank),
    }
    return made if alpha is None else {**made, f"{layer}.alpha": torch.tensor(alpha)}


@pytest.fixture
def folder(tmp_path):
    """Return a function that makes a PEFT folder, in which `changes` replace entries of the
    configuration, or remove those that are None.
    """

    def make(tensors=None, **changes):
        save_file(pair() if tensors is None else tensors, tmp_path / WEIGHTS)
        config = {**CONFIG, **changes}
        given = {key: value for key, value in config.items() if value is not None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(given))
        return tmp_path

    return make


@pytest.fixture
def file_of(tmp_path):
    """Return a function that writes a file with these tensors and metadata."""

    def make(tensors, metadata=None):
        save_file(tensors, tmp_path / "x.safetensors", metadata)
        return tmp_path / "x.safetensors"

    return make


def scalings(survey) -> dict[str, float]:
    """Return the scaling of every layer, by the layer's name."""
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


# --- what is read from a file ---------------------------------------------------------------------------------------


def test_an_init_that_the_files_cannot_declare_is_given(folder):
    """The argument init= replaces the declared init of every pair, and an impossible value raises
    an error.
    """
    path = folder()
    assert {factor.init for factor in inspect_file(path).factors} == {"A"}
    assert {factor.init for factor in inspect_file(path, init="B").factors} == {"B"}
    with pytest.raises(InspectionError):
        inspect_file(path, init="C")


def test_a_peft_folder_is_surveyed(folder):
    """The survey of a PEFT folder lists the LoRA matrices with their layers, and the other tensors."""
    survey = inspect_file(
        folder({**pair(), "base_model.model.score.weight": torch.zeros(2, 2)})
    )
    assert {factor.layer for factor in survey.factors} == {LAYER}
    assert survey.other == ("base_model.model.score.weight",)
    assert survey.notes == ()


RSLORA = {"use_rslora": True}
Q_OF_64 = {"rank_pattern": {"q_proj": 8}, "r": 64}
SEVERAL = {"v_proj": 4, "proj": 4, "0.q_proj": 8, "q_proj": 32}
CONFIGS = [
    (RSLORA, 16 / math.sqrt(8), "A"),
    ({"lora_alpha": 4}, 0.5, "A"),
    ({"alpha_pattern": {"layers.0.q_proj": 32}}, 4.0, "A"),
    (Q_OF_64, 2.0, "A"),
    ({**Q_OF_64, **RSLORA, "alpha_pattern": {"q_proj": 4}}, math.sqrt(2), "A"),
    ({"alpha_pattern": SEVERAL}, 1.0, "A"),
    ({"alpha_pattern": {"base_model.model.layers.0.q_proj": 32}}, 2.0, "A"),
    ({"alpha_pattern": {}}, 2.0, "A"),
    ({"init_lora_weights": "gaussian"}, 2.0, "A"),
    ({"init_lora_weights": "pissa"}, 2.0, "other"),
    ({"init_lora_weights": False}, 2.0, "other"),
    ({"init_lora_weights": None}, 2.0, "unknown"),
]


@pytest.mark.parametrize(("changes", "scaling", "init"), CONFIGS)
def test_the_configuration_decides_scaling_and_init(changes, scaling, init, folder):
    """Scaling and init follow the configuration's alpha, patterns, rsLoRA and declared init, as in PEFT."""
    for factor in inspect_file(folder(**changes)).factors:
        assert (factor.scaling, factor.init) == (pytest.approx(scaling), init)


PRUNED = {
    "peft_type": "ADALORA",
    "init_r": 8,
    "rank_pattern": {"x.lora_E": [True, False]},
}


def test_a_configuration_of_another_method_declares_nothing(folder):
    """If adapter_config.json is of a method without a scaling law, LoRA pairs in the file are read
    as if there were no configuration.
    """
    made = folder(peft_type="VERA")
    with_config = inspect_file(made)
    (made / "adapter_config.json").unlink()
    assert with_config.factors == inspect_file(made).factors


ALONE = None  # without a configuration
SMALL = ((8, 32), (48, 8))
READ, UNREAD = (2.0, "A"), (1.0, "unknown")
OLD = (8, 32, 48, *UNREAD, "linear", "diffusers-legacy")
READINGS = [
    # the name of A, the shapes of A and B, changes to PEFT's configuration, and what is read
    ("x.lora_A", *SMALL, {}, (8, 32, 48, *READ, "linear", "peft")),
    ("x.lora_A.d.weight", *SMALL, {}, (8, 32, 48, *READ, "linear", "peft")),
    (
        *("x.lora_embedding_A", (8, 100), (32, 8), {}),
        (8, 100, 32, 2.0, "B", "embedding", "peft-embedding"),
    ),
    (
        *("x.lora_A", (6, 32), (48, 6), PRUNED),
        (6, 32, 48, 16 / 6, "other", "adalora", "peft-adalora"),
    ),
    ("q_lora.down.weight", *SMALL, ALONE, OLD),
    ("q.lora_linear_layer.down.weight", *SMALL, ALONE, OLD),
    ("x.lora_A.one.weight", *SMALL, ALONE, (8, 32, 48, *UNREAD, "linear", "peft")),
    (
        *("x.lora_embedding_A", *SMALL, ALONE),
        (8, 32, 48, *UNREAD, "embedding", "peft-embedding"),
    ),
]


SECOND = {"lora_A": "lora_B", "embedding_A": "embedding_B", "down": "up"}


@pytest.mark.parametrize(("first", "a", "b", "changes", "expected"), READINGS)
def test_every_layout_is_read(first, a, b, changes, expected, folder):
    """The names and shapes of every library are read, both with a configuration and without."""
    second = first
    for one, other in SECOND.items():
        second = second.replace(one, other)
    path = folder({first: torch.zeros(a), second: torch.zeros(b)}, **(changes or {}))
    survey = inspect_file(path / WEIGHTS if changes is ALONE else path)
    keys = ("rank", "fan_in", "fan_out", "scaling", "init", "kind", "convention")
    found = {tuple(getattr(factor, key) for key in keys) for factor in survey.factors}
    assert found == {expected}
    assert [(f.name, f.role) for f in survey.factors] == [(first, "A"), (second, "B")]
    said = any("1 is assumed" in note for note in survey.notes)
    assert said == (changes is ALONE)


def test_a_square_pair_of_bare_tensors_may_be_stored_either_way(folder):
    """A file with lora_A of shape (64, 4) and lora_B of shape (4, 64) raises an error, unless a
    configuration or names of modules show the rank.
    """
    tensors = {"x.lora_A": torch.zeros(64, 4), "x.lora_B": torch.zeros(4, 64)}
    with pytest.raises(InspectionError, match=r"declares no rank.* could be 64 or 4"):
        inspect_file(folder(tensors) / WEIGHTS)
    weights = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    read = inspect_file(folder(tensors, r=64)), inspect_file(folder(weights) / WEIGHTS)
    assert {f.rank for survey in read for f in survey.factors} == {64}


OTHERS = [
    (["x.lora_A.0", "x.lora_B.0"], {"peft_type": "DYLORA"}),
    (["x.hada_w1_a", "x.hada_w2_b", "x.alpha"], {"peft_type": "LOHA"}),
    (["x.lokr_w1", "x.alpha"], {"peft_type": "LOKR"}),
    (["prompt_embeddings"], {"peft_type": "PROMPT_TUNING", "r": "none"}),
]


@pytest.mark.parametrize(("keys", "changes"), OTHERS)
def test_an_adapter_without_a_law_is_a_survey_without_factors(keys, changes, folder):
    """Adapters without a scaling law, such as LoHa, are listed by kind and give a survey without
    LoRA matrices.
    """
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
    ({"x.alpha": torch.ones(3)}, {"x": 1.0}),  # a parameter of the model
]


@pytest.mark.parametrize(("alphas", "expected"), ALPHAS)
def test_a_layers_alpha_is_a_number_of_any_dtype(alphas, expected, file_of):
    """A layer's `alpha` of any dtype is read as a number if it has one element, and is a parameter
    otherwise.
    """
    survey = inspect_file(file_of({**kohya("x", 8, None), **alphas}))
    assert scalings(survey) == expected
    assert set(survey.other) == (set() if expected["x"] == 0.5 else set(alphas))


def test_a_files_own_alpha_is_divided_by_the_rank(folder):
    """An alpha in the file is divided by the rank, even if the configuration has `use_rslora`."""
    tensors = {**pair(), f"{LAYER}.alpha": torch.tensor(4.0)}
    survey = inspect_file(folder(tensors, use_rslora=True))
    assert {f.scaling for f in survey.factors} == {4 / RANK}


def test_a_pair_at_the_top_of_a_file_has_its_alpha(file_of):
    """In the state_dict of a single layer, which has no layer names, the alpha is found too."""
    tensors = kohya("x", 8, 4.0).items()
    survey = inspect_file(file_of({n.removeprefix("x."): t for n, t in tensors}))
    assert (scalings(survey), survey.other) == ({"": 0.5}, ())


def test_a_diffusers_file_carries_its_configurations(file_of):
    """Each part of a diffusers pipeline is read with its own configuration from the file's
    metadata.
    """
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
    """From a PEFT folder with several files, adapter_model.safetensors is read, and without a file
    of that name an error counts the files.
    """
    made = folder()
    save_file({"w": torch.zeros(1)}, made / "another.safetensors")
    assert len(inspect_file(made).factors) == 2
    (made / WEIGHTS).rename(made / "pytorch_lora_weights.safetensors")
    with pytest.raises(InspectionError, match=r"contains 2 \.safetensors files"):
        inspect_file(made)
    (made / "adapter_config.json").unlink()
    with pytest.raises(InspectionError, match=r"contains 2 \.safetensors files"):
        inspect_file(made)
    (made / "another.safetensors").unlink()
    assert len(inspect_file(str(made)).factors) == 2


def test_a_hundred_gigabytes_are_surveyed_in_a_second(tmp_path):
    """A sparse file of 100 GB with 4,000 tensors is surveyed in less than a second, because only
    its header is read.
    """
    header: dict[str, dict] = {}
    end = 0
    for i in range(2000):
        for half, shape in {"A": (16, 800_000), "B": (64, 16)}.items():
            header[f"{i}.lora_{half}"] = made = entry(*shape, start=end)
            end = made["data_offsets"][1]
    path = write_raw(tmp_path / "big.safetensors", json.dumps(header).encode())
    try:
        os.truncate(path, path.stat().st_size + end)
    except OSError as error:
        pytest.skip(f"no sparse file here: {error}")
    began = time.process_time()
    survey = inspect_file(path)
    assert time.process_time() - began < 1
    assert end > 100e9
    assert len(survey.factors) == 4000


# --- files that raise an error --------------------------------------------------------------------------------------

GOOD = {"x.lora_A.weight": entry(2, 4), "x.lora_B.weight": entry(4, 2, start=32)}
GOOD_HEADER = json.dumps(GOOD).encode()
RAW = [
    # the header, and the bytes behind it
    (b"", b""),
    (b"{}", b""),
    (b"\xff\xff", b""),
    (b"[" * 100_000, b""),
    ({"a": entry(1, start=4, end=0)}, bytes(4)),
    ({"a": entry(2, dtype="\x1b[2J")}, bytes(8)),
    ({"a": entry(2, dtype="F16")}, bytes(8)),
    (b'{"__metadata__": {"a": 1}}', b""),
    (GOOD, bytes(63)),
    (GOOD_HEADER[:-1], bytes(64)),
]


@pytest.mark.parametrize(("header", "data"), RAW)
def test_damaged_files_are_refused(header, data, tmp_path):
    """A truncated file, a file of another format and a wrong header raise an error that names the
    file.
    """
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = write_raw(tmp_path / "x.safetensors", encoded, data)
    with pytest.raises(InspectionError, match=re.escape(str(path))):
        inspect_file(path)


class Bomb:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "lora.pt", "x.safetensors"])
def test_a_pickle_is_refused_unread(name, folder):
    """A pickle raises an error under any file name, and no code in it runs."""
    made = folder()
    (made / WEIGHTS).unlink()
    (made / name).write_bytes(pickle.dumps(Bomb()))
    for path in (made, made / name):
        with pytest.raises(InspectionError):
            inspect_file(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "x\0y", "pipe.safetensors"])
def test_what_is_no_file_is_refused_at_once(name, tmp_path):
    """A missing file, an impossible path and a named pipe raise an error at once, without waiting."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InspectionError, match="no regular file at this path"):
        inspect_file(f"{tmp_path}/{name}")


MISFITS = [
    # the shapes of A and of B
    ((8,), (4, 8)),
    ((8, 4), (8,)),
    ((8, 4), (4, 0)),
    ((0, 4), (4, 0)),
    ((8, 0), (4, 8)),
    ((8, 4), (0, 8)),
    ((8, 4), (4, 4)),
    ((8,), ()),
]


@pytest.mark.parametrize(("a", "b"), MISFITS)
def test_shapes_that_fit_no_pair_are_refused(a, b, folder):
    """If the shapes of A and B do not fit together, the error names both matrices."""
    tensors = {"x.lora_A.weight": torch.zeros(a), "x.lora_B.weight": torch.zeros(b)}
    with pytest.raises(InspectionError, match=r"lora_A\.weight.* \(.*lora_B\.weight"):
        inspect_file(folder(tensors))


NO_PAIRS = [["x.weight"], ["x.up.weight", "x.down.weight", "x.alpha"], []]


@pytest.mark.parametrize("keys", NO_PAIRS)
def test_a_file_without_a_pair_is_refused(keys, file_of):
    """A base model, whose blocks may have `up`, `down` and `alpha`, and an empty file raise an
    error.
    """
    path = file_of({key: torch.zeros(8, 8) for key in keys})
    with pytest.raises(
        InspectionError, match=f"No LoRA pair was found among the {len(keys)} tensors"
    ):
        inspect_file(path)


def test_mlx_pairs_are_refused(file_of):
    """A file of MLX raises an error, because MLX uses torchtune's names but transposes the
    matrices.
    """
    path = file_of({"x.lora_a": torch.zeros(32, 8), "x.lora_b": torch.zeros(8, 48)})
    with pytest.raises(
        InspectionError, match="declares no rank, and no rank can be read"
    ):
        inspect_file(path)


HALVES = ["x.lora_A.weight", "x.lora_B", "y.lora_up.weight", "x.lora.down.weight"]


@pytest.mark.parametrize("key", HALVES)
def test_half_a_pair_is_refused(key, folder):
    """The error for a LoRA matrix without its counterpart names that matrix, even if other pairs
    are complete.
    """
    with pytest.raises(InspectionError, match=f"the LoRA matrix {key}, "):
        inspect_file(folder({**pair("z"), key: torch.zeros(8, 8)}))


# --- conventions of users -------------------------------------------------------------------------------------------


class Gain(torch.nn.Module):
    """A third-party layer with `reduce` of shape (in, r), `expand` of shape (r, out), and the
    scaling in a buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reduce = torch.nn.Parameter(torch.ones(32, 4))
        self.expand = torch.nn.Parameter(torch.zeros(4, 48))
        self.register_buffer("gain", torch.tensor(2.0))


class Gated(Gain):
    """A block of a base model that uses the same names but has a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.ones(32))


ROW = Convention(
    "gain",
    "reduce",
    "expand",
    without=("gate",),
    layouts=("columns",),
    scaling=("gain",),
)


def test_one_row_reads_models_and_files(file_of):
    """A registered convention reads the pair of a model and of its file, and skips a block that has
    an excluded attribute.
    """
    model = torch.nn.ModuleDict({"x": Gain(), "mlp": Gated()})
    path = file_of(model.state_dict())
    register_convention(ROW)
    try:
        in_model, in_file = inspect_model(model), inspect_file(path, init="A")
    finally:
        register_convention(ROW, remove=True)
    assert in_model.factors == in_file.factors
    found = {(f.layer, f.rank, f.fan_in, f.scaling) for f in in_file.factors}
    assert found == {("x", 4, 32.0, 2.0)}
    with pytest.raises(InspectionError, match="No LoRA pair"):
        inspect_file(path)


FULL_NAME = "base_model.model.x.lora_{}.weight"
COLLISIONS = [
    ("x.lora_A.default.weight", "x.lora_B.default.weight"),
    (FULL_NAME.format("A"), FULL_NAME.format("B")),
    (FULL_NAME.format("A.default"), FULL_NAME.format("B.default")),
    ("x.lora_A", "x.lora_B"),
    ("x.lora_A", "other.weight"),
]


@pytest.mark.parametrize(("first", "second"), COLLISIONS)
def test_keys_that_collide_are_refused(first, second, folder):
    """A layer whose pair is stored twice, for example with and without an adapter's name, raises an
    error.
    """
    again = {first: torch.zeros(8, 32), second: torch.zeros(48, 8)}
    with pytest.raises(InspectionError, match="one of the two is stored twice"):
        inspect_file(folder(pair("x") | again))


def test_two_adapters_of_one_layer_do_not_collide(file_of):
    """A file with the whole state of a model may contain several named adapters for one layer."""
    two = {
        key.replace("weight", f"{name}.weight"): value
        for name in ("a", "b")
        for key, value in pair("x").items()
    }
    assert {f.adapter for f in inspect_file(file_of(two)).factors} == {"a", "b"}


def test_a_declared_rank_at_odds_with_the_shapes_is_refused(folder):
    """If the declared rank and the shapes differ, the error names both files, the key and both numbers."""
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


ODD = (-8, 0, "8", True, [8], 10**300, math.nan)
PATTERNS = (r"(a+)+b", ".*q", "q|v", r"layers\.0", "q_proj(", "[z-a]", "")
BAD_PATTERNS = ([16], "q_proj", {"q_proj": "x"})
BAD_CONFIGS = [
    *(("r", value) for value in (None, 8.5, *ODD)),
    *(("lora_alpha", value) for value in (1e-320, *ODD)),
    *(("alpha_pattern", value) for value in (*BAD_PATTERNS, {"q_proj": -1})),
    *(("alpha_pattern", {pattern: 1}) for pattern in PATTERNS),
    *(("rank_pattern", {"q_proj": value}) for value in (8.5, True)),
    ("rank_pattern", {"q.*": 8}),
    ("use_rslora", "yes"),
    ("init_lora_weights", [True]),
    ("target_parameters", ["e.up"]),
]


@pytest.mark.parametrize(("name", "value"), BAD_CONFIGS, ids=range(len(BAD_CONFIGS)))
def test_an_unusable_configuration_is_refused(name, value, folder, file_of):
    """An impossible rank, alpha or pattern raises an error that names the configuration, in a
    folder and in a diffusers file.
    """
    with pytest.raises(InspectionError, match=r"Cannot read .*adapter_config\.json: "):
        inspect_file(folder(**{name: value}))
    if value is not None:
        entries = {f"unet.{key}": v for key, v in {**CONFIG, name: value}.items()}
        metadata = {"lora_adapter_metadata": json.dumps(entries)}
        with pytest.raises(
            InspectionError, match="Cannot read the entry lora_adapter_metadata of "
        ):
            inspect_file(file_of(pair("unet.q"), metadata))


TEXTS = [
    *(b"", b"not json", b"[]", b"null", b"7", b"\0", b"[" * 100_000),
    "\ufeff{}".encode(),
    json.dumps(CONFIG).encode("utf-16"),
    # longer than any configuration of PEFT
    json.dumps({**CONFIG, "x": "y" * 10**7}).encode(),
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:9]))
def test_a_configuration_that_is_no_json_object_is_refused(text, folder):
    """An adapter_config.json raises an error unless it is one JSON object in UTF-8 of at most ten
    megabytes.
    """
    made = folder()
    (made / "adapter_config.json").write_bytes(text)
    with pytest.raises(InspectionError, match=r"adapter_config\.json"):
        inspect_file(made)


@pytest.mark.parametrize("text", ["[]", "7", "null"])
def test_a_copy_of_the_configuration_that_is_no_object_is_refused(text, file_of):
    """If the configuration in a diffusers file is no JSON object, the error says so."""
    with pytest.raises(
        InspectionError, match=r"lora_adapter_metadata.*Expected `object`"
    ):
        inspect_file(file_of(pair("q"), {"lora_adapter_metadata": text}))


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_that_cannot_be_is_refused(alpha, file_of):
    """A layer's own alpha that is not a positive finite number raises an error."""
    with pytest.raises(InspectionError, match=": x has the scaling"):
        inspect_file(file_of(kohya("x", 8, alpha)))


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
    """A file with any JSON as its header, followed by any bytes, is read or raises one of our
    errors.
    """
    path = tmp_path / "x.safetensors"
    only_our_errors(write_raw(path, json.dumps(header).encode(), data))


@fuzz
@given(
    changes=st.dictionaries(
        st.sampled_from([*CONFIG, "alpha_pattern"]), values, max_size=4
    )
)
def test_no_configuration_raises_an_error_but_ours(changes, tmp_path):
    """A configuration with any JSON as its values is read or raises one of our errors."""
    save_file(pair(), tmp_path / WEIGHTS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    only_our_errors(tmp_path)
