"""The HTML report: whole in itself, and every figure in it."""

import base64
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_dit.eval import mask_pictures
from sparse_dit.eval.page import page
from sparse_dit.eval.plots import pictures
from sparse_dit.pipelines.generate import write_video


def row(prompt: str, density: float, psnr: float, model: str = "tiny-wan", **more: object) -> dict:
    return {
        "recipe": {"name": "radial", "selection": {"density": density}, "schedule": {"dense_steps": 0}},
        "model": model,
        "prompt": prompt,
        "seed": 0,
        "grid": [9, 16, 16],
        "device": {"type": "cpu", "name": "x86_64", "dtype": "float32"},
        "steps": 20,
        "density": density,
        "run_density": density,
        "psnr": psnr,
        "ssim": 0.9,
        "attention_seconds_sparse": 1.0,
        "attention_seconds_dense": 4.0,
        "seconds_sparse": 3.0,
        "seconds_dense": 5.0,
        "revision": "0123456789abcdef",
        "created": "2026-01-02T03:04:05+00:00",
        **more,
    }


ROWS = [
    row(prompt, density, 50 * density + offset) for density in (0.2, 0.5) for prompt, offset in (("a", 0), ("b", 2))
]


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_the_page_shows_every_setting_and_the_paired_differences() -> None:
    html = page([*ROWS, row("a", 0.3, 20.0, model="<other>")])
    text = text_of(html)
    assert html.count("<svg") == 6
    assert "tiny-wan, 9 x 16 x 16 tokens" in text
    assert "&lt;other&gt;, 9 x 16 x 16 tokens" in text
    assert "0.50 0 of 20 0.50 26.0 [25.0, 27.0] 25.0 0.900 - 0.25 0.60 2" in text
    assert "radial, density 0.20, 0 of 20 steps dense -15.00 [-15.00, -15.00]" in text
    assert "run density" in text
    assert "PSNR against dense (dB)" in text
    assert "5 rows, revision 0123456789ab, measured 2026-01-02." in text


def test_the_page_asks_for_nothing_outside_and_is_well_formed(tmp_path: Path) -> None:
    html = page(ROWS, [compared(tmp_path)])

    class Checker(HTMLParser):
        open_tags: list[str]

        def __init__(self) -> None:
            super().__init__()
            self.open_tags = []

        def handle_starttag(self, tag: str, attrs: list) -> None:
            if tag not in ("meta", "img"):
                self.open_tags.append(tag)
            for name, value in attrs:
                if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                    assert value.startswith(("data:", "#")), value
            assert tag not in ("script", "link", "iframe")

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    checker = Checker()
    checker.feed(html)
    assert checker.open_tags == []
    assert "url(http" not in html
    assert "default-src 'none'" in html
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(svg)


def compared(folder: Path) -> Path:
    """What `sparse-dit compare` leaves."""
    clip = np.random.default_rng(0).random((4, 32, 48, 3), dtype=np.float32)
    write_video(clip, folder / "dense.webp")
    write_video(clip * 0.9, folder / "sparse.webp")
    record = {"recipe": {"name": "radial"}, "run_density": 0.4, "psnr": "inf", "prompt": "a <b> circle"}
    (folder / "result.json").write_text(json.dumps(record))
    return folder


def test_clips_are_filmstrips(tmp_path: Path) -> None:
    html = page(ROWS, [compared(tmp_path)])
    assert "data:image/jpeg;base64," in html
    assert "radial, run density 0.40, inf dB: a &lt;b&gt; circle. From above: dense, sparse, difference x 8" in html
    # Four frames of 48 pixels and as many gaps; three rows.
    assert f'width="{4 * (48 + 3)}" height="{3 * (32 + 3)}"' in html


def test_probes_are_heat_maps() -> None:
    table = [[None, 0.5], [0.25, 1.0]]
    probed = {
        "recipe": {"name": "radial"},
        "model": "tiny-wan",
        "rows": 16,
        "prompt": "a circle",
        "by_step": {"density": table, "recall": table, "recall_min": table, "error": None},
    }
    html = page(ROWS, probes=[probed])
    assert html.count("<svg") == 3 + 3
    text = text_of(html)
    assert "radial in tiny-wan, 16 sampled rows a call: a circle" in text
    assert "self-attention layer" in text
    assert "Density: computed share" in text
    assert "relative L2" not in text


def test_distances_are_curves() -> None:
    looked = {
        "model": "tiny-wan", "grid": [9, 16, 16], "prompts": 2, "queries": 640,
        "relative_mass_by_time": [4.0, 1.0, 0.5], "relative_mass_by_space": [30.0, 2.0, 0.0, 0.25],
    }  # fmt: skip
    html = page(ROWS, distances=[looked])
    assert html.count("<svg") == 3 + 2
    text = text_of(html)
    assert "tiny-wan, 9 x 16 x 16 tokens, 2 prompts" in text
    assert "distance in time (latent frames)" in text
    assert "distance in space (tokens, rounded Euclidean)" in text
    assert "mean mass of a key / uniform" in text
    with pytest.raises(ValueError, match="distances: row 1 has no mass"):
        page(ROWS, distances=ROWS)


def test_masks_lie_over_frames() -> None:
    """Every second column of tokens is computed: those parts of the frames stay, the others are dark."""
    keys = np.zeros((3, 4, 4), bool)
    keys[:, :, ::2] = True
    frames = mask_pictures.frames_of(np.full((9, 64, 64, 3), 0.8, np.float32), (3, 4, 4), 1)
    assert frames["latents"] == [0, 1, 2]
    probed = {"grid": [3, 4, 4], "frames": frames}
    bits = base64.b64encode(np.packbits(keys).tobytes()).decode()
    picture, share = mask_pictures.strip(probed, {"query": [1, 2, 1], "keys": bits})
    assert share == 0.5
    pixels = np.asarray(picture).astype(int)
    size = (pixels.shape[1] - 3 * 3) // 3
    first = pixels[:size, :size].reshape(4, size // 4, 4, size // 4, 3).mean((1, 3, 4))
    np.testing.assert_allclose(first[:, ::2], 204, atol=3)
    assert (first[:, 1::2] < 60).all()
    middle = pixels[:, size + 3 : 2 * size + 3]
    assert ((middle == (255, 214, 0)).all(-1)).any(), "the query is not marked"
    assert not ((pixels[:, :size] == (255, 214, 0)).all(-1)).any()


def test_plots_are_pictures_too(tmp_path: Path) -> None:
    with pictures(tmp_path):
        page(ROWS)
    page(ROWS)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["plot-0-0.png", "plot-0-1.png", "plot-0-2.png"]
    with Image.open(files[0]) as picture:
        assert picture.format == "PNG"
        assert picture.width > 500


def test_equal_clips_leave_nothing_to_plot() -> None:
    html = page([row("a", 1.0, math.inf), row("b", 1.0, math.inf)])
    assert "<svg" not in html
    assert "nothing to plot" in html
    assert " inf " in text_of(html)


def test_refuses_what_it_cannot_show(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        page([])
    with pytest.raises(ValueError, match="number 2 compares nothing"):
        page([ROWS[0], {"schema": 1, "part": "vae"}])
    with pytest.raises(ValueError, match="row 1 looks into no model"):
        page(ROWS, probes=[ROWS[0]])
    with pytest.raises(ValueError, match=r"result\.json' cannot be read"):
        page(ROWS, [tmp_path])
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="a folder that sparse-dit compare wrote"):
        page(ROWS, [tmp_path])
    record = json.loads((compared(tmp_path) / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({name: record[name] for name in record if name != "psnr"}))
    with pytest.raises(ValueError, match="a folder that sparse-dit compare wrote"):
        page(ROWS, [tmp_path])
