"""Pictures and tables show what they are given, and nothing that visitors typed as markup."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sparse_dit.app.demo import pictures
from sparse_dit.app.demo.actions import Finished
from sparse_dit.app.demo.page import EXAMPLES


def test_a_difference_is_enlarged_and_multiplied() -> None:
    dense = np.full((16, 24, 3), 100, np.uint8)
    sparse = dense.copy()
    sparse[3, 5] += 2
    sparse[:, 12:] += 1
    picture, gain = pictures.difference_map(dense, sparse)
    pixels = np.asarray(picture)
    assert pixels.shape == (256, 384, 3)
    assert gain == 64
    assert (pixels[3 * 16, 5 * 16] == 128).all()
    assert (pixels[0, -1] == 64).all()
    assert (pixels[0, 0] == 0).all()


def test_tokens_that_are_not_computed_are_dark() -> None:
    frame = np.full((16, 16, 3), 200, np.uint8)
    keys = np.zeros((4, 4), bool)
    keys[1, 2] = True
    pixels = np.asarray(pictures.mask_picture(frame, keys))
    side = pixels.shape[0] // 4
    bright = (pixels == 200).all(axis=2)
    assert bright[side : 2 * side, 2 * side : 3 * side].all()
    assert bright.sum() == side * side
    assert pixels[0, 0].max() < 60


def test_the_query_is_among_the_frames_of_a_strip() -> None:
    clip = np.zeros((81, 16, 16, 3), np.uint8)
    keys = np.zeros((21, 2, 2), bool)
    tile = pictures.mask_strip(clip[:5], keys[:2], (0, 0, 0)).width
    for latent in (7, 1):  # 12 of 21, evenly spread, hold the first one of these
        strip = pictures.mask_strip(clip, keys, (latent, 1, 1))
        assert strip.width > tile
        assert (np.asarray(strip) == (255, 214, 0)).all(axis=2).any()


def test_the_frames_of_a_strip_stand_in_rows_with_gaps() -> None:
    tiles = [Image.new("RGB", (10, 6), (200, 0, 0))] * 4
    pixels = np.asarray(pictures._tiled(tiles))[..., 0] == 200
    assert pixels.shape == (2 * 6 + 4, 3 * 10 + 2 * 4)
    row = np.array(([True] * 10 + [False] * 4) * 3)[:-4]
    expected = [*[row] * 6, *[row & False] * 4, *[row & (np.arange(38) < 10)] * 6]
    assert np.array_equal(pixels, np.stack(expected))


def test_the_line_runs_around_tokens_that_belong_together() -> None:
    tokens = np.zeros((3, 3), bool)
    tokens[0, 1] = tokens[1, 1] = tokens[1, 2] = True  # one above the first of two, 20 pixels each
    lined = np.asarray(pictures.outline(Image.new("RGB", (60, 60)), tokens)).any(axis=2)
    for y, x in ((0, 30), (10, 20), (10, 39), (30, 20), (39, 30), (39, 50), (20, 50), (30, 59)):
        assert lined[y, x], (y, x)
    assert not lined[15:26, 26:34].any(), "between a token and the one below it"
    assert not lined[26:34, 36:45].any(), "between a token and the one beside it"
    assert not lined[42:].any()


def test_what_visitors_typed_is_text(run: Finished) -> None:
    recipe = {**run.record["recipe"], "name": "<u>"}
    record = {
        **run.record, "prompt": "<script>alert(1)</script>", "model": "<b>", "backend": "a<i>", "recipe": recipe
    }  # fmt: skip
    html = pictures.numbers_html(record)
    assert "&lt;script&gt;" in html
    assert not any(tag in html for tag in ("<script", "<b>", "<i>", "<u>"))
    assert "<img" not in pictures.heat_html([[0.5, None]], "<img>", "<img>")


def test_numbers_name_what_the_record_holds(run: Finished) -> None:
    html = pictures.numbers_html(run.record)
    for text in (f"{run.record['psnr']:.1f} dB", f"{run.record['run_density']:.3f}", "8 of 12 attention calls sparse"):
        assert text in html
    assert "Every call was dense" not in html
    figures = {"seconds_dense": 8.0, "seconds_sparse": 2.0, "psnr": 31.26, "psnr_min": 12.34}
    figures |= {"ssim": 0.987, "ssim_min": 0.123}
    html = pictures.numbers_html({**run.record, **figures})
    assert "<td>8.0\N{NO-BREAK SPACE}s</td><td>2.0\N{NO-BREAK SPACE}s</td><td>0.25</td>" in html
    assert "31.3 dB (worst 12.3)" in html
    assert "0.987 (worst 0.123)" in html
    nothing = {**run.record, "density": None, "calls": {"sparse": 0, "made": 4, "dense": {"dense_steps": 4}}}
    assert "Every call was dense: have fewer dense steps" in pictures.numbers_html(nothing)
    for reason, told in (("dense_layers", True), ("recipe", False)):
        nothing["calls"] = {"sparse": 0, "made": 4, "dense": {reason: 4}}
        html = pictures.numbers_html(nothing)
        assert ("Every call was dense. " in html) == told
        assert "have fewer dense steps" not in html


def test_words_that_tiny_wan_does_not_know_are_told(run: Finished) -> None:
    prompt = "a small red circle on a white <b> lawn, a small lawn,"
    html = pictures.numbers_html({**run.record, "model": "tiny-wan", "prompt": prompt})
    assert "tiny-wan was trained on few words, and not on: on, white, &lt;b&gt;, lawn,. " in html
    assert "few words" not in pictures.numbers_html({**run.record, "prompt": prompt}), "other models know more"
    assert "few words" not in pictures.numbers_html({**run.record, "model": "tiny-wan", "prompt": EXAMPLES[0][0]})


def test_heat_maps_tell_dense_cells_apart(run: Finished) -> None:
    assert run.inside is not None
    html = pictures.heat_html(run.inside.density, "Density", "")
    assert html.count(">dense<") == 2
    assert html.count("background:rgba") == 4
    assert pictures.heat_html([], "Density", "") == ""


def test_captions_and_thumbnails(run: Finished) -> None:
    assert pictures.caption(run).startswith("1. tiny-radial, ")
    assert pictures.thumbnail(run).size == (512, 256)
    with pytest.raises(FileNotFoundError):
        pictures.thumbnail(replace(run, folder=run.folder / "gone"))
