"""What visitors may not ask for is refused in one line, before anything runs."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparse_dit.app.demo.actions import Asked, Studio
from sparse_dit.app.demo.limits import Limits, allowed_models, join_recipe, read_request, split_recipe, takes_density
from sparse_dit.app.demo.visits import Visit
from sparse_dit.pipelines.generate import Request
from sparse_dit.recipe import load_recipe, recipe_names

LIMITS = Limits()


def request(**changes: Any) -> Request:
    sent = {"prompt": "a red circle", "seed": 1, "steps": 5, "width": 64, "height": 64, "num_frames": 9, **changes}
    return read_request(LIMITS, **sent)


def test_a_request_is_read_and_empty_numbers_are_left_to_the_model() -> None:
    assert request() == Request("a red circle", seed=1, steps=5, width=64, height=64, num_frames=9)
    assert request(prompt=" 3 < 4,\nnot 5 ", seed=None, steps=None, width=None) == Request(
        "3 < 4, not 5", height=64, num_frames=9
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", None),
        ("prompt", ["a"]),
        ("prompt", "a" * 1001),
        ("prompt", "<img src=x onerror=alert(1)>"),
        ("prompt", "a circle </div><script>alert(1)</script>"),
        ("prompt", "< b>bold"),
        ("prompt", "<!-- -->"),
        ("prompt", "a\x00b"),
        ("prompt", "a \u202e b"),
        ("seed", -1),
        ("seed", 2**53),
        ("seed", 1.5),
        ("seed", "0"),
        ("steps", 0),
        ("steps", 51),
        pytest.param("steps", 10**400, id="steps-huge"),
        ("steps", float("nan")),
        ("steps", True),
        ("width", float("inf")),
        ("height", 10**9),
        ("num_frames", -3),
        ("num_frames", [9]),
    ],
)
def test_bad_requests_are_refused(field: str, value: Any) -> None:
    name = "frames" if field == "num_frames" else field
    with pytest.raises(ValueError, match=rf"^{name}: [^\n]{{1,200}}valid: ") as caught:
        request(**{field: value})
    assert "<" not in str(caught.value).replace("a < in front", "")


def test_the_whole_size_is_limited_with_the_models_defaults_filled_in() -> None:
    limits = Limits(steps=10, pixels=64 * 64 * 9)
    limits.check({"num_inference_steps": 10, "width": 64, "height": 64, "num_frames": 9})
    with pytest.raises(ValueError, match="size: 40,960 pixels"):
        limits.check({"num_inference_steps": 10, "width": 64, "height": 64, "num_frames": 10})
    with pytest.raises(ValueError, match="steps: 11; valid: 1 to 10"):
        limits.check({"num_inference_steps": 11})


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_survive_being_split_and_joined(name: str) -> None:
    recipe = load_recipe(name)
    density, steps, precision, rest = split_recipe(recipe)
    assert join_recipe(Limits(recipe=10_000), density, steps, precision, rest) == recipe


def test_a_density_takes_the_place_of_its_rival_and_is_refused_where_there_is_none() -> None:
    radial, sparge = load_recipe("radial"), load_recipe("sparge-cdf")
    *_, steps, precision, rest = split_recipe(radial)
    assert join_recipe(LIMITS, 0.3, steps, precision, rest).selection.density == 0.3  # type: ignore[union-attr]
    assert takes_density(radial)
    dense = load_recipe("dense")
    assert not takes_density(dense)
    with pytest.raises(ValueError, match=r"^density: .* has none"):
        join_recipe(LIMITS, 0.3, 0, "native", split_recipe(dense)[3])
    with pytest.raises(ValueError, match=r"selection\.density: it stands in its own field and in the YAML"):
        join_recipe(LIMITS, 0.3, None, None, "selection: {name: radial, density: 0.2}")
    assert split_recipe(sparge)[1] == sparge.schedule.dense_steps


@pytest.mark.parametrize(
    "rest",
    [
        None,
        "a" * 4001,
        "- 1",
        "selection: [",
        "[" * 90,
        "[" * 3000,
        "note: &a [x, x]\nsource: *a",
        "selection: !!python/object/apply:os.system ['true']",
        "block_q: !!int '16'",
        "selection: {name: profile, file: ../../etc/passwd}",
        "selection: {name: profile, file: /etc/passwd}",
        "selection: {name: profile, file: profile.safetensors}",
        "selection: {name: ../radial}",
        "block_q: 100000000000",
        "state_limit: .inf",
        "schedule: {dense_layers: [0, 99999999]}",
        "name: [1]",
        "1: 2",
        "selektion: radial",
    ],
)
def test_bad_recipes_are_refused_in_one_line(rest: Any) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{1,400}$") as caught:
        join_recipe(LIMITS, None, None, None, rest)
    assert "passwd" not in str(caught.value) or "no paths" in str(caught.value)


@pytest.mark.parametrize("steps", [-1, 11, 2.5, True, "3", float("inf")])
def test_bad_dense_steps_are_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"^dense steps: .*; valid: a whole number from 0 to 10$"):
        join_recipe(Limits(steps=10), None, steps, None, "selection: radial")
    assert join_recipe(Limits(steps=10), None, 10.0, None, "selection: radial").schedule.dense_steps == 10


@pytest.mark.parametrize("density", ["0.3", float("nan"), 2.0, 0.0, -1, True, [0.3]])
def test_bad_densities_are_refused(density: Any) -> None:
    with pytest.raises(ValueError, match="density: "):
        join_recipe(LIMITS, density, 0, "native", "selection: radial")


def test_models_are_shown_by_name_and_found_by_name_only(mini_wan: Path) -> None:
    allowed = allowed_models(["tiny-wan", str(mini_wan), "owner/name"])
    assert allowed == {"tiny-wan": "tiny-wan", mini_wan.name: str(mini_wan.resolve()), "owner/name": "owner/name"}
    with pytest.raises(ValueError, match="two are called"):
        allowed_models([str(mini_wan), str(mini_wan)])
    with pytest.raises(ValueError, match="there is none"):
        allowed_models([])


def test_models_off_the_list_are_refused(studio: Studio, mini_wan: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(mini_wan)
    others = ["tiny-wan", "owner/name", str(mini_wan), f"../{mini_wan.name}", "/etc", str(link), "", "~", "<b>"]
    for name in others:
        visit = Visit(tmp_path / "visit")
        with pytest.raises(ValueError, match=re.escape("model: it is not on this server's list")):
            studio.run(visit, Asked(name, Request("a circle"), load_recipe("radial")), lambda *_: None)
        assert not visit.runs
    assert not list((tmp_path / "visit").iterdir())


def test_links_out_of_a_models_folder_and_pickled_weights_are_refused(mini_wan: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    shutil.copytree(mini_wan, linked)
    weights = linked / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(mini_wan / "transformer" / weights.name)
    with pytest.raises(ValueError, match="is a link out of its folder"):
        allowed_models([str(linked)])
    pickled = tmp_path / "pickled"
    shutil.copytree(mini_wan, pickled)
    (pickled / "transformer" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is refused"):
        allowed_models([str(pickled)])


def test_limits_are_whole_numbers_from_1() -> None:
    with pytest.raises(ValueError, match="steps: 0"):
        Limits(steps=0)
