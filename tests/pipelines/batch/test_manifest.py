"""Rows of a file as requests: what they mean, what is refused, and what makes two rows the same."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_dit.pipelines.batch.identity import digest, model_identity
from sparse_dit.pipelines.batch.manifest import Item, Refused, read_manifest
from sparse_dit.pipelines.generate import Request
from sparse_dit.recipe import load_recipe

DEFAULTS = Request("", steps=7, height=64)
RECIPE = load_recipe("tiny-radial")
CONTEXT = {"model": "sha256:0"}


def read(path: Path, text: str | bytes, **context: Any) -> tuple[list[Item], list[Refused]]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(path, DEFAULTS, RECIPE, {**CONTEXT, **context})


def rows(folder: Path, *plain: dict[str, Any]) -> list[Item]:
    items, refused = read(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in plain))
    assert refused == []
    return items


def test_a_row_has_what_it_names_and_the_defaults(tmp_path: Path) -> None:
    plain = {"prompt": "a fox", "seed": 3, "guidance_scale": 4, "height": None, "steps": 2, "num_frames": 5}
    [item] = rows(tmp_path, plain)
    assert item.line == 1
    assert item.request == Request("a fox", seed=3, guidance_scale=4.0, height=64, steps=2, num_frames=5)
    assert item.recipe == RECIPE
    assert item.name == f"a-fox-{item.id}"


def test_a_row_chooses_and_changes_its_recipe(tmp_path: Path) -> None:
    changed, again, named, both, null = rows(
        tmp_path,
        {"prompt": "x", "recipe.block_q": 32, "recipe.selection.density": 0.4},
        {"prompt": "x", "recipe.block_q": 64},
        {"prompt": "x", "recipe": "radial"},
        {"prompt": "x", "recipe": {"name": "mine", "selection": "all"}, "recipe.block_k": 128},
        {"prompt": "x", "recipe": None, "recipe.block_q": None},
    )
    assert again.recipe == RECIPE.override({"block_q": 64})
    assert null.recipe == RECIPE
    assert changed.recipe == RECIPE.override({"block_q": 32, "selection.density": 0.4})
    assert named.recipe == load_recipe("radial")
    assert (both.recipe.name, both.recipe.block_k) == ("mine", 128)


def test_csv_rows_are_jsonl_rows(tmp_path: Path) -> None:
    table = (
        "\ufeffprompt,seed,guidance_scale,recipe,recipe.selection.density\r\n"
        '"a fox, ""red""\nand a hare",3,2.5,,0.4\r\n'
        "\r\n"
        "12,,,radial,\r\n"
    )
    items, refused = read(tmp_path / "rows.csv", table)
    assert refused == []
    assert [item.line for item in items] == [2, 5]
    same = rows(
        tmp_path,
        {"prompt": 'a fox, "red"\nand a hare', "seed": 3, "guidance_scale": 2.5, "recipe.selection.density": 0.4},
        {"prompt": "12", "recipe": "radial"},
    )
    assert [item.id for item in items] == [item.id for item in same]


BROKEN = {
    "no JSON": ('{"prompt": ', "no JSON"),
    "no object": ("[1, 2]", "valid: a JSON object"),
    "a field twice": ('{"prompt": "a", "prompt": "b"}', "each name once"),
    "unknown field": ('{"prompt": "x", "stepz": 3}', "unknown field 'stepz'; valid: prompt,"),
    "no prompt": ('{"seed": 1}', "prompt: there is none"),
    "blank prompt": ('{"prompt": "  "}', "prompt: there is none"),
    "seed in words": ('{"prompt": "x", "seed": "3"}', "seed: '3'; valid: a whole number"),
    "half a step": ('{"prompt": "x", "steps": 2.5}', "steps: 2.5; valid: a whole number"),
    "steps of truth": ('{"prompt": "x", "steps": true}', "steps: True; valid: a whole number"),
    "steps of zero": ('{"prompt": "x", "steps": 0}', "valid: a whole number from 1"),
    "seed too large": ('{"prompt": "x", "seed": 9223372036854775808}', "2^63 - 1"),
    "guidance of no number": ('{"prompt": "x", "guidance_scale": NaN}', "NaN is no number of JSON"),
    "guidance without end": ('{"prompt": "x", "guidance_scale": 1e999}', "a finite number"),
    "unknown recipe": ('{"prompt": "x", "recipe": "radail"}', "did you mean 'radial'?"),
    "recipe of a kind": ('{"prompt": "x", "recipe": 3}', "valid: a name, a path"),
    "recipe field": ('{"prompt": "x", "recipe.block_z": 3}', "block_z"),
    "recipe value": ('{"prompt": "x", "recipe.block_q": 48}', "16, 32, 64, 128"),
    "lone surrogate": ('{"prompt": "\\ud800"}', "text in UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    line, problem = BROKEN[name]
    good = '{"prompt": "x"}'
    items, refused = read(tmp_path / "rows.jsonl", f"{good}\n\n{line}\n{good}")
    assert [item.line for item in items] == [1, 4]
    assert [one.line for one in refused] == [3]
    assert problem in refused[0].problem
    assert "\n" not in refused[0].problem


def test_bytes_that_are_no_text_are_one_broken_row(tmp_path: Path) -> None:
    items, refused = read(tmp_path / "rows.jsonl", b'{"prompt": "\xff"}\n{"prompt": "x"}\n')
    assert ([item.line for item in items], [one.line for one in refused]) == ([2], [1])


@pytest.mark.parametrize(
    ("row", "problem"), [("x,3,9", "valid: at most 2"), ("x,three", "seed: 'three'"), ('"x,1', "no CSV")]
)
def test_a_broken_row_of_a_table(row: str, problem: str, tmp_path: Path) -> None:
    items, refused = read(tmp_path / "rows.csv", f"prompt,seed\na,1\n{row}\n")
    assert [item.request.seed for item in items] == [1]
    assert [one.line for one in refused] == [3]
    assert problem in refused[0].problem


def test_an_unknown_column_matters_where_it_is_filled(tmp_path: Path) -> None:
    items, refused = read(tmp_path / "rows.csv", "prompt,notes\na,\nb,nice\n")
    assert ([item.line for item in items], [one.line for one in refused]) == ([2], [3])


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    for name, text, valid in [
        ("rows.txt", "x", ".jsonl or .csv"),
        ("rows.jsonl", "\n", "one request a row"),
        ("rows.csv", "prompt,seed\n", "one request a row"),
        ("rows.csv", "prompt,prompt\nx,y\n", "each name once"),
    ]:
        with pytest.raises(ValueError, match=f"^manifest: .*valid: .*{re.escape(valid)}"):
            read(tmp_path / name, text)
    with pytest.raises(ValueError, match="No such file"):
        read_manifest(tmp_path / "none.jsonl", DEFAULTS, RECIPE, CONTEXT)


def test_whatever_changes_a_video_changes_the_id(tmp_path: Path) -> None:
    plain = {"prompt": "x", "seed": 1}
    changes = [{"prompt": "y"}, {"seed": 2}, {"steps": 3}, {"recipe": "radial"}, {"recipe.block_q": 16}, {"width": 64}]
    items = rows(tmp_path, plain, *({**plain, **change} for change in changes))
    [other_model], _ = read(tmp_path / "rows.jsonl", json.dumps(plain), model="sha256:1")
    ids = [item.id for item in [*items, other_model]]
    assert len(set(ids)) == len(ids)
    assert rows(tmp_path, {"seed": 1, "prompt": "x", "steps": 7})[0].id == items[0].id


def test_two_spellings_of_a_value_are_one_row(tmp_path: Path) -> None:
    whole, fraction = rows(tmp_path, {"prompt": "x", "guidance_scale": 4}, {"prompt": "x", "guidance_scale": 4.0})
    assert whole.id == fraction.id
    assert digest({"model": "a", "fps": 1}) == digest({"fps": 1, "model": "a"}) != digest({"fps": 2, "model": "a"})


def test_a_row_changes_the_recipe_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "recipe.block_q": 32}')
    own = load_recipe("radial")
    [item], _ = read_manifest(tmp_path / "rows.jsonl", DEFAULTS, own, CONTEXT)
    assert item.recipe == own.override({"block_q": 32})


@given(prompt=st.text(min_size=1).filter(str.strip))
def test_file_names_are_plain(prompt: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    item = Item(1, "0123456789abcdef", Request(prompt), RECIPE)
    assert re.fullmatch(r"([a-z0-9]+-)*0123456789abcdef", item.name)
    assert len(item.name) <= 57


def test_a_model_is_known_by_its_content(mini_wan: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(mini_wan, tmp_path / "copy")
    assert model_identity(str(copy)) == model_identity(str(mini_wan))
    weights = next(copy.rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_identity(str(copy)) != model_identity(str(mini_wan))
    with pytest.raises(ValueError, match=r"^model: "):
        model_identity(str(tmp_path / "none"))


def test_every_file_that_a_model_reads_counts_and_no_other(mini_wan: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(mini_wan, tmp_path / "copy")
    seen = [model_identity(str(copy))]
    for name in ("merges.txt", "tokenizer/merges.txt", "spiece.model", "more.json"):
        (copy / name).write_text("{}")
        seen.append(model_identity(str(copy)))
    (copy / "spiece.model").rename(copy / "spiece2.model")
    seen.append(model_identity(str(copy)))
    assert len(set(seen)) == len(seen)
    (copy / "README.md").write_text("{}")
    assert model_identity(str(copy)) == seen[-1]


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(model: str, file: str) -> str:
        asked.append((model, file))
        return f"/cache/snapshots/abc123/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert model_identity("owner/name") == "owner/name@abc123"
    assert asked == [("owner/name", "model_index.json")]

    def offline(model: str, file: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"^model: 'owner/name' was not found on the Hub"):
        model_identity("owner/name")
