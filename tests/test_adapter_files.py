"""Adapter files: what is read from their headers, and that no file, however damaged, raises an error but ours."""

from __future__ import annotations

import json
import math
import pickle
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rankaware_optim import InspectionError, InvalidReferenceError, RankAwareError, Reference
from rankaware_optim.adapter_files import inspect_file, parse_reference, survey_report

RANK = 8
LAYER = "base_model.model.layers.0.q_proj"
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "init_lora_weights": True, "use_rslora": False}


def pair(layer: str = LAYER, rank: int = RANK, *, fan_in=32, fan_out=48, kernel=()) -> dict[str, torch.Tensor]:
    """One adapted layer as PEFT saves it."""
    a = torch.zeros(rank, fan_in, *kernel)
    return {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": torch.zeros(fan_out, rank, *(1 for _ in kernel))}


def kohya(layer: str, rank: int, alpha: float | None) -> dict[str, torch.Tensor]:
    """One adapted layer as kohya's scripts save it."""
    made = {f"{layer}.lora_down.weight": torch.zeros(rank, 32), f"{layer}.lora_up.weight": torch.zeros(48, rank)}
    return made if alpha is None else {**made, f"{layer}.alpha": torch.tensor(alpha)}


@pytest.fixture
def folder(tmp_path):
    """Makes a PEFT folder of these tensors, with `changes` to its configuration; None drops a key."""

    def make(tensors=None, **changes):
        save_file(pair() if tensors is None else tensors, tmp_path / "adapter_model.safetensors")
        config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def write_raw(path, header: bytes, data: bytes = b"", length: int | None = None):
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def entry(*shape: int, dtype="F32", offsets=None) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": offsets or [0, 4 * math.prod(shape)]}


def only_our_errors(path) -> None:
    try:
        survey = inspect_file(path)
    except RankAwareError:
        return
    assert survey.factors


# --- what is read ---------------------------------------------------------------------------------------------------


def test_a_peft_folder_is_surveyed(folder):
    """Rank, fans and role come from the shapes; scaling and init from the configuration."""
    survey = inspect_file(folder({**pair(), "base_model.model.score.weight": torch.zeros(2, 2)}))
    assert [(f.role, f.rank, f.fan_in, f.fan_out) for f in survey.factors] == [("A", 8, 32, 48), ("B", 8, 32, 48)]
    assert {(f.scaling, f.init, f.layer, f.convention) for f in survey.factors} == {(2.0, "A", LAYER, "peft")}
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
    ({"alpha_pattern": None, "rank_pattern": {"q_proj": 8}, "r": 64}, 2.0, "A"),
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


def test_kinds_of_layers_are_told_apart(folder):
    """A convolution's fan-in is channels × kernel; an embedding has its own convention and starts at Init[B]."""
    embedding = {"e.lora_embedding_A": torch.zeros(8, 100), "e.lora_embedding_B": torch.zeros(32, 8)}
    survey = inspect_file(folder({**pair("c", fan_in=3, kernel=(3, 3)), **embedding}))
    found = {(f.layer, f.kind, f.init, f.fan_in, f.fan_out) for f in survey.factors}
    assert found == {("c", "conv", "A", 27.0, 48.0), ("e", "embedding", "B", 100.0, 32.0)}


def test_a_kohya_file_carries_its_own_alpha(tmp_path):
    """alpha entries give each layer its scaling, and are no other tensors."""
    path = tmp_path / "lora.safetensors"
    save_file({**kohya("lora_unet_a", 8, 4.0), **kohya("lora_unet_b", 16, 32.0)}, path)
    survey = inspect_file(path)
    assert {(f.layer, f.rank, f.scaling) for f in survey.factors} == {("lora_unet_a", 8, 0.5), ("lora_unet_b", 16, 2.0)}
    assert {f.convention for f in survey.factors} == {"lora_down/lora_up"}
    assert survey.other == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_alpha_of_any_dtype_is_read(dtype, tmp_path):
    """alpha may be stored at any precision."""
    save_file({**kohya("x", 8, None), "x.alpha": torch.tensor(4, dtype=dtype)}, tmp_path / "lora.safetensors")
    assert inspect_file(tmp_path / "lora.safetensors").factors[0].scaling == 0.5


def test_only_headers_are_read(tmp_path):
    """An eight-gigabyte file, sparse, is surveyed in under a second."""
    rows, columns = 16, 2**26
    half = 4 * rows * columns
    header = {
        "x.lora_A.weight": entry(rows, columns, offsets=[0, half]),
        "x.lora_B.weight": entry(columns, rows, offsets=[half, 2 * half]),
    }
    encoded = json.dumps(header).encode()
    path = write_raw(tmp_path / "big.safetensors", encoded)
    with path.open("r+b") as file:
        file.truncate(8 + len(encoded) + 2 * half)
    began = time.perf_counter()
    survey = inspect_file(path)
    assert time.perf_counter() - began < 1
    assert {(f.rank, f.fan_in) for f in survey.factors} == {(rows, columns)}


# --- what is refused ------------------------------------------------------------------------------------------------

GOOD_HEADER = json.dumps({"x.lora_A.weight": entry(2, 4), "x.lora_B.weight": entry(4, 2, offsets=[32, 64])}).encode()
RAW = [
    (b"", None, b"", "no whole safetensors file"),
    (b"{}", 3, b"", "no whole safetensors file"),
    (b"{}", 1, b"", "no whole safetensors file"),
    (b"{}", 10**8, b"", "no whole safetensors file"),
    (b"{}", 2**64 - 1, b"", "no whole safetensors file"),
    (b"{}", None, b"", "no LoRA pair among 0 tensors"),
    (b"not json", None, b"", "cannot be read"),
    (b"\xff\xff", None, b"", "cannot be read"),
    (b"[]", None, b"", "no usable"),
    (b"null", None, b"", "no usable"),
    (b"[" * 100_000, None, b"", "cannot be read"),
    (b'{"a": ' + b"1" * 5000 + b"}", None, b"", "a has no usable|cannot be read"),
    (b'{"a": 1}', None, b"", "a has no usable"),
    (b'{"a": {}}', None, b"", "a has no usable"),
    (b'{"a": {"shape": "8"}}', None, b"", "a has no usable"),
    (b'{"a": {"shape": [-8, 8]}}', None, b"", "a has no usable"),
    (b'{"a": {"shape": [true, 8]}}', None, b"", "a has no usable"),
    (b'{"a": {"shape": [1.5, 8]}}', None, b"", "a has no usable"),
    (b'{"a": {"shape": [8, 8]}}', None, b"", "a has no usable"),
    (b'{"a": {"shape": [2], "data_offsets": [0, "8"]}}', None, b"", "a has no usable"),
    (GOOD_HEADER, None, bytes(63), "no whole safetensors file"),
    (GOOD_HEADER, None, bytes(10), "no whole safetensors file"),
    (GOOD_HEADER[:-1], None, bytes(64), "cannot be read"),
]


@pytest.mark.parametrize(("header", "length", "data", "message"), RAW)
def test_damaged_files_are_refused(header, length, data, message, tmp_path):
    """A file cut short, of another format, or with a header that lies is an error naming the file."""
    path = write_raw(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(InspectionError, match=message) as caught:
        inspect_file(path)
    assert str(path) in str(caught.value)


def test_the_header_of_those_files_is_otherwise_good(tmp_path):
    """The table above is of near misses: with all its data the file is surveyed."""
    assert len(inspect_file(write_raw(tmp_path / "x.safetensors", GOOD_HEADER, bytes(64))).factors) == 2


@pytest.mark.parametrize("size", [0, 7, 8, 20])
def test_a_file_cut_short_anywhere_is_refused(size, folder):
    """However little of the file is left, the error is ours."""
    path = folder() / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InspectionError):
        inspect_file(path)


def test_a_header_may_not_claim_more_than_the_format_allows(tmp_path):
    """A header of over 100 MB is refused unread, though the file is large enough."""
    path = write_raw(tmp_path / "x.safetensors", b"{}", length=10**8 + 1)
    with path.open("r+b") as file:
        file.truncate(10**9)
    with pytest.raises(InspectionError, match="no whole safetensors file"):
        inspect_file(path)


def test_a_pickle_is_refused_unread(tmp_path):
    """A .bin file of pickled tensors is no safetensors file; nothing in it is run."""
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(pickle.dumps({"x": [1, 2, 3] * 100}))
    with pytest.raises(InspectionError):
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
]


@pytest.mark.parametrize("shapes", MISFITS, ids=str)
def test_shapes_that_fit_no_pair_are_refused(shapes, folder):
    """Two halves whose shapes make no pair are an error that names both."""
    path = folder({key: torch.zeros(shape) for key, shape in shapes.items()})
    with pytest.raises(InspectionError, match=r"lora_A\.weight has .*lora_B\.weight .* no LoRA pair"):
        inspect_file(path)


@pytest.mark.parametrize("keys", [["x.lora_A.weight"], ["x.lora_B.weight"], ["x.weight"], []])
def test_a_file_without_a_pair_is_refused(keys, folder):
    """Half a pair, a base model or nothing at all is an error that says how much was looked at."""
    with pytest.raises(InspectionError, match=f"no LoRA pair among {len(keys)} tensors"):
        inspect_file(folder({key: torch.zeros(8, 8) for key in keys}))


BAD_CONFIGS = [
    ({"r": -8}, "@ r"),
    ({"r": 0}, "@ r"),
    ({"r": "8"}, "@ r"),
    ({"r": 8.5}, "@ r"),
    ({"r": True}, "@ r"),
    ({"r": [8]}, "@ r"),
    ({"lora_alpha": -1}, "alpha of .* is -1"),
    ({"lora_alpha": 0}, "alpha of .* is 0"),
    ({"lora_alpha": "16"}, "alpha of .* is '16'"),
    ({"lora_alpha": math.nan}, "alpha of .* is nan"),
    ({"lora_alpha": math.inf}, "alpha of .* is inf"),
    ({"lora_alpha": True}, "alpha of .* is True"),
    ({"lora_alpha": [16]}, "alpha of .* is "),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha of .* is 'x'"),
    ({"alpha_pattern": {"q_proj(": 32}}, "@ alpha_pattern"),
    ({"alpha_pattern": [16]}, "@ alpha_pattern"),
    ({"alpha_pattern": "q_proj"}, "@ alpha_pattern"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_an_unusable_configuration_is_refused(changes, message, folder):
    """A rank or alpha that cannot be is an error naming where it stands."""
    with pytest.raises(InspectionError, match=message):
        inspect_file(folder(**changes))


@pytest.mark.parametrize("text", ["", "not json", "[]", "null", "7", "\0", "[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_refused(text, folder):
    """adapter_config.json must be one JSON object."""
    made = folder()
    (made / "adapter_config.json").write_text(text)
    with pytest.raises(InspectionError, match=r"adapter_config\.json"):
        inspect_file(made)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_in_the_file_that_cannot_be_is_refused(alpha, tmp_path):
    """alpha of zero, below, or not finite is an error that names the layer."""
    save_file(kohya("lora_unet_a", 8, alpha), tmp_path / "lora.safetensors")
    with pytest.raises(InspectionError, match="alpha of lora_unet_a"):
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


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(name, folder):
    """A missing file of the two is named."""
    made = folder()
    (made / name).unlink()
    with pytest.raises(InspectionError, match=name):
        inspect_file(made)


def test_a_missing_path_is_refused(tmp_path):
    """Neither file nor folder: an error that names it."""
    with pytest.raises(InspectionError, match="nowhere"):
        inspect_file(tmp_path / "nowhere.safetensors")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(scalars, st.lists, max_leaves=4)
entries = values | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "F4", "nonsense"]) | values,
        "shape": st.lists(st.integers(0, 9) | values, max_size=4) | values,
        "data_offsets": st.tuples(st.integers(-2, 64), st.integers(-2, 64)) | values,
    }
)
keys = st.sampled_from(
    ["x.lora_A.weight", "x.lora_B.weight", "x.lora_down", "x.lora_up", "x.alpha", "__metadata__", ""]
)


fuzz = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(header=st.dictionaries(keys, entries, max_size=5), data=st.binary(max_size=64))
@example(header={"x.lora_A.weight": entry(2, 2), "x.lora_B.weight": entry(2, 2), "x.alpha": entry(1)}, data=bytes(16))
def test_no_header_raises_an_error_but_ours(header, data, tmp_path):
    """Any JSON where a header belongs, before any bytes, is surveyed or refused by an error of ours."""
    only_our_errors(write_raw(tmp_path / "x.safetensors", json.dumps(header).encode(), data))


@fuzz
@given(noise=st.binary(max_size=200), kept=st.integers(0, 120))
def test_no_bytes_raise_an_error_but_ours(noise, kept, tmp_path):
    """Random bytes after a valid beginning are refused by an error of ours."""
    whole = write_raw(tmp_path / "x.safetensors", GOOD_HEADER, bytes(64)).read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:kept] + noise)
    only_our_errors(tmp_path / "x.safetensors")


@fuzz
@given(changes=st.dictionaries(st.sampled_from([*CONFIG, "alpha_pattern"]), values, max_size=4))
def test_no_configuration_raises_an_error_but_ours(changes, tmp_path):
    """Any JSON in a configuration's values is used or refused by an error of ours."""
    save_file(pair(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    only_our_errors(tmp_path)


# --- words ----------------------------------------------------------------------------------------------------------

WORDS = [
    ("r=16,alpha=32", Reference(16, 32)),
    (" rank=16 , alpha=32.5 ", Reference(16, 32.5)),
    ("r=16,alpha=32,rslora", Reference(16, 32, rslora=True)),
    ("r=16,alpha=32,init=B,fan_in=4096", Reference(16, 32, init="B", fan_in=4096)),
    ("full", Reference(method="full")),
]


@pytest.mark.parametrize(("text", "reference"), WORDS)
def test_a_reference_is_read_from_words(text, reference):
    """Rank, alpha, rsLoRA, init and width, or full."""
    assert parse_reference(text) == reference


BAD_WORDS = ["", "r=16", "alpha=32", "r=x,alpha=1", "r=1.5,alpha=1", "r=0,alpha=1", "r=8,alpha=nan", "r=8,alpha=-1"]
BAD_WORDS += ["r=8,alpha=8,init=C", "r=8,alpha=8,beta=1", "r=8,alpha=8,rslora=maybe", "16", "="]


@pytest.mark.parametrize("text", BAD_WORDS)
def test_words_that_make_no_reference_are_refused(text):
    """What is missing, unknown or impossible is an error of ours."""
    with pytest.raises((InspectionError, InvalidReferenceError)):
        parse_reference(text)


def test_the_report_counts_like_factors_on_one_line(folder):
    """A hundred like layers take two lines, with their rates if a base rate is given."""
    survey = inspect_file(folder({k: v for i in range(100) for k, v in pair(f"layers.{i}.q").items()}))
    plain, rated = survey_report(survey), survey_report(survey, lr=2e-4, tuned_at="r=8,alpha=16")
    assert plain.count("100") == 2
    assert "multiplier" not in plain
    assert rated.count("0.0002") == 2
    assert "0 other tensors" in plain
