"""The tables of pages: they are those of the rows, and they say what the rows say."""

from pathlib import Path
from typing import Any

from sparse_dit.eval.host_table import host
from sparse_dit.eval.models_table import gains, models
from sparse_dit.eval.systems_table import overhead, systems
from sparse_dit.eval.tables import pages, speed

ROOT = Path(__file__).parents[2]


def kernel_row(**changes: Any) -> dict[str, Any]:
    plain = {
        "shape": {"heads": 2, "tokens": 1234, "head_size": 64},
        "what": "attention",
        "kernel": "hopper",
        "precision": "native",
        "ordered": False,
        "codes": False,
        "skipped": "drop",
        "blocks": [128, 128],
        "lists": "equal",
        "wanted_density": 0.3,
        "ratio": 3.14159,
        "error": 0.002,
        "status": "measured",
    }
    return {**plain, **changes}


def test_the_pages_show_the_rows() -> None:
    for page, text in pages(ROOT).items():
        assert page.read_text(encoding="utf-8") == text, "run: make table"


def test_speed_shows_plain_calls_of_kernels_that_take_lists_and_the_worst_error() -> None:
    rows = [
        kernel_row(),
        kernel_row(wanted_density=1.0, ratio=1.0, error=0.003),
        kernel_row(kernel="cudnn", wanted_density=1.0, ratio=1.0),
        kernel_row(codes=True, ratio=9.0),
        kernel_row(ordered=True, ratio=9.0),
        kernel_row(blocks=[128, 64], ratio=9.0),
        kernel_row(status="failed", ratio=None),
        kernel_row(kernel="flex", ratio=2.0),
    ]
    assert speed(rows).splitlines()[2:] == [
        "| 2 x 1,234 x 64 | hopper | native | 1.00 | 3.14 | 0.0030 |",
        "| 2 x 1,234 x 64 | FlexAttention | native |  | 2.00 | 0.0020 |",
    ]


def test_systems_are_sorted_by_psnr_within_density_and_dense_steps() -> None:
    def row(name: str, density: float, psnr: float, dense_steps: int = 0, precision: str = "native") -> dict[str, Any]:
        recipe = {
            "name": name,
            "precision": precision,
            "selection": {"name": "pooled", "density": density},
            "schedule": {"dense_steps": dense_steps},
        }
        return {"recipe": recipe, "steps": 20, "density": density, "run_density": density, "psnr": psnr, "ssim": 0.5}

    rows = [
        row("a", 0.24, 20.0),
        row("a", 0.24, 30.0),
        row("b", 0.26, 27.0),
        row("b", 0.11, 9.0),
        row("c", 0.25, 9.0, 4),
    ]
    text = systems([*rows, row("d", 0.25, 99.0, precision="int8")])
    headings = [line for line in text.splitlines() if line.startswith("**")]
    assert headings == [
        "**Density about 0.25, 0 of 20 steps dense**",
        "**Density about 0.12, 0 of 20 steps dense**",
        "**Density about 0.25, 4 of 20 steps dense**",
    ]
    assert text.index("| b | 0.26 | 0.26 | 27.0 |") < text.index("| a | 0.24 | 0.24 | 25.0 | 25.0 | 20.0 | 0.500 |")
    assert "| d |" not in text


def test_models_show_stock_first_and_the_last_row_of_each_variant() -> None:
    def row(variant: str, ratio: float, **changes: Any) -> dict[str, Any]:
        numbers = {"ms": 1234.5, "attention_share": 0.25, "peak_ratio": 1.01, "host_us_per_call": 99.6, "density": 0.2}
        plain = {
            "case": "a-model", "variant": variant, "compiled": False, "tiny": False, "status": "measured",
            "ratio": ratio, "tokens": 4608, "layers": [19, 38], "layers_timed": [2, 4], "wanted_density": 0.2,
            "error": 0.5, "host_own_us": 250.0,
            "device": {"name": "a GPU"}, "versions": {"torch": "2", "triton": "3", "diffusers": "0"},
        }  # fmt: skip
        return {**plain, **numbers, **changes}

    unmeasured = {"peak_ratio": None, "host_us_per_call": None, "density": None, "error": None, "wanted_density": None}
    rows = [
        row("radial", 1.5),
        row("radial", 2.5),
        row("radial", 9.0, tiny=True),
        row("radial", 9.0, status="failed"),
        row("dense", 1.0, wanted_density=1.0, density=1.0, error=0.0123),
        row("stock", 1.0, **unmeasured),
        row("radial", 3.5, compiled=True, attention_share=None),
        {name: value for name, value in row("radial-int8", 3.0).items() if name != "host_own_us"},  # as measured before
    ]
    first, _, _, _, *lines = models(rows).splitlines()
    assert first == "a GPU, torch 2, Triton 3, diffusers 0"
    assert lines == [
        "| a-model | 4,608 | 6 of 57 | stock | 1,234 | 1.00 | 0.25 |  |  |  |  |",
        "| a-model | 4,608 | 6 of 57 | radial | 1,234 | 2.50 | 0.25 | 1.010 | 100 | 0.200 |  |",
        "| a-model | 4,608 | 6 of 57 | dense | 1,234 | 1.00 | 0.25 | 1.010 | 100 | 1.000 | 0.0123 |",
        "| a-model | 4,608 | 6 of 57 | radial-int8 | 1,234 | 3.00 | 0.25 | 1.010 |  | 0.200 |  |",
        "| a-model, compiled | 4,608 | 6 of 57 | radial | 1,234 | 3.50 |  | 1.010 | 100 | 0.200 |  |",
    ]
    assert models([]) == models(rows[2:4]) == "Not measured yet."
    assert gains(rows).splitlines()[-1] == "| a-model | 4,608 | 0.25 | 2.50 |  |  |  |"
    assert gains([]) == "Not measured yet."


def test_overhead_shows_the_last_row_of_each_and_what_is_above_its_limit() -> None:
    def row(system: str, tokens: int, share: float, limit: float, searches: int = 0) -> dict[str, Any]:
        shape = {"heads": 2, "tokens": tokens}
        costs = {"share": share, "limit": limit, "order_ms": 0.5, "dense_ms": 50.0}
        return {"system": system, "shape": shape, **costs, "search_share": 0.123, "searches": searches}

    text = overhead(
        [
            row("a", 1000, 0.9, 0.03),
            row("a", 1000, 0.02, 0.03),
            row("a", 2000, 0.02, 0.01, searches=2),
            row("b", 2000, 0.005, 0.01),
        ]
    )
    assert text.splitlines()[0].startswith("| system | 2 x 1,000: share | of them order | searches | 2 x 2,000: share")
    assert text.splitlines()[2:] == [
        "| a | 2.0 % | 1.0 % |  | **2.0 %** | 1.0 % | 12.3 % |",
        "| b |  |  |  | 0.5 % | 1.0 % |  |",
    ]
    assert overhead([]) == "No rows yet."


def test_host_times_show_the_last_row_of_each_gpu_and_revision() -> None:
    def row(name: str, own: float, kind: str = "cuda", **beyond: float) -> dict[str, Any]:
        device, _, revision = name.partition(" ")
        return {"device": {"type": kind, "name": device}, "revision": revision, "own_us": own, "beyond_us": beyond}

    rows = [
        row("A 1234567f", 1.0, static=2.0),
        row("A 1234567e", 29.4, static=99.6, kept=7.0),
        row("A 7", 30, static=100.4),
    ]
    text = host(rows)
    assert text.splitlines() == [
        "| us of host time a call | A, 1234567 | A, 7 |",
        "| --- | ---: | ---: |",
        "| stock itself | 29 | 30 |",
        "| static, beyond stock | 100 | 100 |",
        "| kept, beyond stock | 7 |  |",
    ]
    assert host([]) == host([row("CPU 1", 1.0, kind="cpu")]) == "Not measured yet."
