"""Pinned launch settings: whole, within every GPU's memory, replaceable by a file, and refused in one line."""

import json
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_dit.kernels import attention, tiles
from sparse_dit.kernels import attention_int8 as int8
from sparse_dit.kernels.tiles import HEAD_SIZES, PRECISIONS, Launch, TileRow, pinned, read_rows, trial, write_rows

SHIPPED = Path(tiles.__file__).with_name("tiles.json")
ROWS = read_rows(SHIPPED.read_text(encoding="utf-8"), "tiles.json")
# Kilobytes of shared memory that a program may take (CUDA programming guide, table of compute capabilities; for
# gfx942 the local data share of a compute unit).
MEMORY = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
# E4M3 is no type of matrix units before sm_89, and Triton's of gfx942 is another FP8.
WITHOUT_FP8 = {"sm_80", "sm_86", "gfx942"}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's rows lie; rows are read anew before and after."""
    monkeypatch.setenv(tiles.USER_FILE, str(tmp_path / "mine" / "tiles.json"))
    for cached in (tiles._rows, tiles._tell):
        cached.cache_clear()
    yield tmp_path / "mine" / "tiles.json"
    for cached in (tiles._rows, tiles._tell):
        cached.cache_clear()


def row(**changes: object) -> dict[str, object]:
    return {**ROWS[0].to_dict(), **changes}


def test_every_kernel_has_a_row_for_every_architecture_head_size_and_precision() -> None:
    expected = {
        (kernel, architecture, head_size, precision)
        for kernel, precisions in PRECISIONS.items()
        for precision in precisions
        for architecture in MEMORY
        for head_size in HEAD_SIZES
        if precision != "int8_fp8" or architecture not in WITHOUT_FP8
    }
    assert {entry.key for entry in ROWS} == expected


@pytest.mark.parametrize("entry", ROWS, ids=lambda entry: "-".join(map(str, entry.key)))
def test_rows_fit_the_shared_memory(entry: TileRow) -> None:
    """Q, and K and V of the tiles in flight: as many as stages where copies are asynchronous bulk ones, else one less.

    Shared memory that Triton reports when it compiles the kernels is never above this.
    """
    launch, codes = entry.launch, entry.kernel == "attention_int8"
    element = 1 if codes else 2
    values = {"mass": 0, "attention": 2}.get(entry.kernel, 1 if entry.precision == "int8_fp8" else 2)
    in_flight = launch.num_stages - (entry.architecture not in ("sm_90", "sm_100"))
    size = entry.head_size * (launch.tile_q * element + in_flight * launch.tile_k * (element + values))
    assert size <= MEMORY[entry.architecture] * 1024
    assert entry.origin.startswith(("measured on ", "reasoned: "))


@pytest.mark.parametrize(
    ("asked", "given", "told"),
    [
        ("sm_90", "sm_90", False),
        ("sm_103", "sm_100", True),
        ("sm_121", "sm_120", True),
        ("sm_87", "sm_86", True),
        ("sm_75", "sm_80", True),
        ("gfx1100", "gfx942", True),
        ("cpu", "sm_86", False),
    ],
)
@pytest.mark.usefixtures("file")
def test_an_unknown_architecture_gets_the_nearest_lower_one_and_is_told_once(
    asked: str, given: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tiles.USER_FILE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [pinned("attention", "native", 72, asked) for _ in range(2)]
    assert {entry.architecture for entry in found} == {given}
    assert {entry.head_size for entry in found} == {128}
    assert [f"for {asked}: those of {given}" in str(warning.message) for warning in caught] == [True] * told


@pytest.mark.parametrize(
    "asked", [("attention", "int8", 64, "sm_90"), ("attention", "native", 512, "sm_90"), ("gemm", "native", 64, "cpu")]
)
def test_what_has_no_row_is_refused(asked: tuple[str, str, int, str], file: Path) -> None:
    write_rows([], file)
    with pytest.raises(ValueError, match=r"^tiles: no row for .*; valid: "):
        pinned(*asked)


def test_a_file_goes_before_the_package_for_its_own_rows_only(file: Path) -> None:
    mine = replace(ROWS[0], launch=Launch(16, 16, 1, 1), origin="measured on a lap")
    write_rows([mine], file)
    for entry in ROWS:
        found = pinned(entry.kernel, entry.precision, entry.head_size, entry.architecture)
        assert found == (mine if entry.key == mine.key else entry)


def test_rows_for_a_new_architecture_are_taken_where_there_are_some(file: Path) -> None:
    write_rows([replace(ROWS[0], kernel="mass", architecture="sm_103", head_size=64, origin="measured")], file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pinned("mass", "native", 64, "sm_103").origin == "measured"
        assert pinned("mass", "native", 128, "sm_103").architecture == "sm_100"


def test_the_package_holds_what_writing_gives(file: Path) -> None:
    write_rows(ROWS, file)
    assert file.read_text() == SHIPPED.read_text()


def test_writing_keeps_other_rows_and_leaves_nothing_half_done(file: Path) -> None:
    first, second = ROWS[0], ROWS[1]
    write_rows([first, second], file)
    write_rows([replace(second, origin="measured again")], file)
    assert read_rows(file.read_text(), "mine") == [first, replace(second, origin="measured again")]
    file.write_text("[{}]")
    with pytest.raises(ValueError, match="row 1"):
        write_rows([first], file)
    assert file.read_text() == "[{}]"
    assert [path.name for path in file.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "mine: no JSON"),
        ("{}", "mine: dict; valid: a list of rows"),
        ("[3]", "mine row 1: 3; valid: the fields kernel, "),
        (json.dumps([row(), row()]), "mine row 2: .* stands there twice"),
        (json.dumps([{**row(), "more": 1}]), "mine row 1: .*more.*; valid: the fields"),
        (json.dumps([row(kernel="gemm")]), "mine row 1 kernel: 'gemm'; valid"),
        (json.dumps([row(kernel=["mass"])]), r"mine row 1 kernel: \['mass'\]; valid"),
        (json.dumps([row(precision="int8")]), "mine row 1 precision: 'int8'; valid"),
        (json.dumps([row(head_size=72)]), "mine row 1 head_size: 72; valid"),
        (json.dumps([row(tile_q=256)]), "mine row 1 tile_q: 256; valid"),
        (json.dumps([row(tile_k=True)]), "mine row 1 tile_k: True; valid"),
        (json.dumps([row(num_warps=3)]), "mine row 1 num_warps: 3; valid"),
        (json.dumps([row(num_stages=2.0)]), "mine row 1 num_stages: 2.0; valid"),
        (json.dumps([row(architecture="hopper")]), "mine row 1 architecture: 'hopper'; valid"),
        (json.dumps([row(origin="")]), "mine row 1 origin: ''; valid"),
    ],
)
def test_a_damaged_file_is_named_with_row_and_field(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=f"^{error}") as caught:
        read_rows(text, "mine")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_named_must_be_there(file: Path) -> None:
    with pytest.raises(ValueError, match=r"^SPARSE_DIT_TILES: .* is no file; valid: "):
        pinned("mass", "native", 64, "sm_90")
    assert not file.exists()


def test_without_a_name_the_file_lies_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tiles.USER_FILE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiles.user_file() == tmp_path / "sparse_dit" / "tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tiles.user_file() == Path.home() / ".cache" / "sparse_dit" / "tiles.json"


def test_a_trial_holds_within_its_block(file: Path) -> None:
    write_rows([], file)
    entry = next(entry for entry in ROWS if entry.key == ("mass", "sm_90", 64, "native"))
    tried = replace(entry, launch=Launch(32, 32, 2, 2))
    with trial(tried):
        assert pinned("mass", "native", 64, "sm_90") == tried
        assert pinned("mass", "native", 64, "sm_80").launch != tried.launch
    assert pinned("mass", "native", 64, "sm_90") == entry
    with suppress(RuntimeError), trial(tried):
        raise RuntimeError("out of resource")
    assert pinned("mass", "native", 64, "sm_90") == entry


@pytest.mark.parametrize(("block_q", "block_k", "warps"), [(128, 128, 8), (128, 64, 8), (128, 32, 4), (64, 128, 4)])
def test_smaller_blocks_cut_tiles_and_then_warps(block_q: int, block_k: int, warps: int, file: Path) -> None:
    """A launch that is best for blocks of 128 must not be a bad one for those of 64: of half the warps it spills."""
    write_rows([], file)
    for kernel, precision in (("attention", "native"), ("attention_int8", "int8"), ("attention_int8", "int8_fp8")):
        entry = next(entry for entry in ROWS if entry.key == (kernel, "sm_90", 128, precision))
        with trial(replace(entry, launch=Launch(128, 128, 8, 3))):
            sizes = (128, block_q, block_k, "sm_90")
            found = attention.launch_for(*sizes) if kernel == "attention" else int8.launch_for(precision, *sizes)
        assert found == Launch(block_q, block_k, warps, 3)


def test_a_cpu_has_an_architecture_of_its_own() -> None:
    assert tiles.architecture(torch.device("cpu")) == "cpu"
