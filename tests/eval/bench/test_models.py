"""Whole models in a tiny size: everything runs on a CPU, and nothing that went wrong becomes a number."""

import functools
import gc
import itertools
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from sparse_dit.eval.bench import models, steps, variants
from sparse_dit.eval.bench.architectures import (
    ARCHITECTURES,
    COGVIDEOX_5B,
    WAN_14B,
    build,
    few,
    first_layers,
)
from sparse_dit.eval.bench.models import Request, StepBench, main, run
from sparse_dit.eval.bench.steps import Host, Measured, Subject, Times
from sparse_dit.eval.bench.variants import VARIANTS, Variant
from sparse_dit.eval.results import Row, load_rows
from sparse_dit.forecast import forecast
from sparse_dit.layout import TokenLayout
from sparse_dit.recipe import load_recipe

CPU = torch.device("cpu")
CLASSES = ("wan2.1-14b-720p", "cogvideox-5b-480p", "flux.1-dev-2048px", "hunyuanvideo-720p")
# Tokens that count in the self-attention, those that are padding, layers, 10^9 parameters.
PUBLISHED = {
    "wan2.1-14b-720p": (TokenLayout((21, 45, 80)), 0, 40, 14.29),
    "cogvideox-5b-480p": (TokenLayout((13, 30, 45), text_before=226), 0, 42, 5.57),
    "flux.1-dev-2048px": (TokenLayout((1, 128, 128), text_before=512), 0, 57, 11.90),
    "hunyuanvideo-720p": (TokenLayout((33, 45, 80), text_after=100), 156, 60, 12.82),
    "wan2.1-1.3b-480p": (TokenLayout((21, 30, 52)), 0, 30, 1.42),
    "flux.1-dev-1024px": (TokenLayout((1, 64, 64), text_before=512), 0, 57, 11.90),
}
# In a process of its own: here fresh memory is filled, so that nothing is without memory.
SIZES = """
import sys
sys.modules |= dict.fromkeys(("jsonargparse", "gradio", "imageio_ffmpeg", "av", "rich"))
import diffusers, torch
import sparse_dit.eval.bench.models
from sparse_dit.eval.bench.architectures import ARCHITECTURES, layout_of
models = {}
for name, case in ARCHITECTURES.items():
    key = case.transformer, len(case.config), case.config.get("num_layers")
    if key not in models:
        with torch.device("meta"):
            models[key] = getattr(diffusers, case.transformer)(**case.config)
    model = models[key]
    layout = layout_of(model, case.inputs(torch.device("cpu"), torch.float32, 0))
    layers = sum(len(getattr(model, blocks)) for blocks in case.blocks)
    billions = round(sum(weight.numel() for weight in model.parameters()) / 1e9, 2)
    devices = {x.device.type for x in (*model.parameters(), *model.buffers())}
    print(name, repr((layout, case.padding, layers, billions)), *devices, sep="|")
"""


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "TIMED_MS", 0.0)
    monkeypatch.setattr(steps, "HOST_ROUNDS", 1)
    monkeypatch.setattr(steps, "HOST_RUNS", 1)


def bench(**changes: Any) -> StepBench:
    return StepBench(CPU, torch.float32, **{"seconds": 60.0, "command": "sparse-dit bench models", **changes})


def rows_of(case: str, *names: str, **changes: Any) -> list[Row]:
    return list(bench(**changes).rows(ARCHITECTURES[case].shrunk(), names))


def test_sizes_are_the_published_ones_and_everything_is_made_where_it_runs() -> None:
    """And the packages of the command line are not needed."""
    done = subprocess.run([sys.executable, "-c", SIZES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [f"{name}|{size!r}|meta" for name, size in PUBLISHED.items()]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("variant", ["radial", "balanced", "dense"])
def test_density_is_that_of_the_whole_call_where_text_leaves_room(name: str, variant: str) -> None:
    """In FLUX.1 at 1,024 px text takes 4 of 36 blocks: 1 - (32 / 36)^2 = 0.21 alone."""
    layout = PUBLISHED[name][0]
    recipe = VARIANTS[variant].recipe(layout)
    told = forecast(recipe, layout, layers=1, branches=1, shape=(1, 24, layout.length, 128), dtype=torch.bfloat16)
    wanted = 1.0 if variant == "dense" else 0.225 if name == "flux.1-dev-1024px" else 0.2
    assert told.density == pytest.approx(wanted, abs=0.011)
    assert recipe.schedule.dense_reason(0, 1.0, 0) is None


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_in_no_checkpoint_is_the_constructors_own(name: str) -> None:
    """Rotary tables are right and on the device also where the model is made in 16 bits."""
    case = ARCHITECTURES[name].shrunk()
    usual = getattr(diffusers, case.transformer)(**case.config)
    made = build(case, CPU, torch.bfloat16, seed=0)
    assert torch.get_default_dtype() is torch.float32
    found = dict(made.named_buffers())
    assert found.keys() == dict(usual.named_buffers()).keys()
    for path, buffer in usual.named_buffers():
        assert found[path].dtype is buffer.dtype
        assert torch.equal(found[path], buffer)


def test_weights_keep_activations_in_scale_and_the_class_its_float32() -> None:
    model = build(WAN_14B.shrunk(), CPU, torch.bfloat16, seed=0)
    weights = dict(model.named_parameters())
    projection = weights["blocks.0.attn1.to_q.weight"]
    assert projection.float().std() == pytest.approx(projection.shape[1] ** -0.5, rel=0.02)
    assert weights["blocks.0.attn1.norm_q.weight"].float().unique().item() == pytest.approx(math.sqrt(3.0), rel=1e-2)
    assert (weights["blocks.0.norm2.weight"] == 1).all()
    assert (weights["blocks.0.attn1.to_q.bias"] == 0).all()
    told = {name for name, weight in weights.items() if weight.dtype is torch.float32}
    assert "condition_embedder.time_embedder.linear_1.weight" in told
    assert "scale_shift_table" in told
    assert "blocks.0.attn1.to_q.weight" not in told


def test_layers_that_do_not_run_come_back() -> None:
    model = build(WAN_14B.shrunk(), CPU, torch.float32, seed=0)
    whole = model.blocks
    with first_layers(model, ("blocks",), (1,)):
        assert list(model.blocks) == [whole[0]]  # type: ignore[arg-type, index]
    assert model.blocks is whole


@pytest.mark.parametrize(
    ("counts", "expected"), [((40,), (6,)), ((19, 38), (2, 4)), ((2, 4), (2, 4)), ((3,), (3,)), ((1, 99), (1, 5))]
)
def test_few_layers_keep_the_proportion(counts: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert few(counts, 6) == expected


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_runs_and_dense_is_stock(name: str, tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    asked = ("dense", "radial", "balanced-int8_fp8")
    run(Request((name,), asked, tiny=True), file, "command", CPU)
    rows = {row["variant"]: row for row in load_rows(file)}
    assert list(rows) == [*asked, "stock"]
    assert {row["status"] for row in rows.values()} == {"measured"}, [row["reason"] for row in rows.values()]
    layers = len(ARCHITECTURES[name].blocks)
    for variant in asked:
        row = rows[variant]
        # A first step and two timed ones, each of one layer of two in every list.
        assert row["calls"] == {"made": 3 * layers, "sparse": 3 * layers, "dense": {}}
        assert (row["backend"], row["runs"], row["tiny"], row["peak_bytes"]) == ("host", 2, True, None)
        assert row["ratio"] == row["stock_ms"] / row["ms"]
        assert row["stock_ms"] == rows["stock"]["ms"]
        assert row["attention_share"] > 0
        assert (row["host_calls"], row["host_own_us"] > 0) == (layers, True)
    assert rows["dense"]["error"] < 1e-5
    assert 1e-3 < rows["radial"]["error"] < 1
    assert rows["radial"]["density"] == rows["radial"]["expected_density"] < 0.35
    assert rows["balanced-int8_fp8"]["recipe"]["precision"] == rows["balanced-int8_fp8"]["precision"] == "int8_fp8"
    assert (rows["stock"]["ratio"], rows["stock"]["host_us_per_call"], rows["stock"]["dense"]) == (1.0, None, "sdpa")


def test_host_time_is_that_of_the_attention_modules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians of the calls that count, of a clock that goes on by one second a look; nothing is left behind."""
    monkeypatch.setattr(steps, "HOST_ROUNDS", 3)
    monkeypatch.setattr(steps, "HOST_RUNS", 2)
    subject = Subject(WAN_14B.shrunk(), CPU, torch.float32, compiled=False, seed=0)
    looks = itertools.count()
    monkeypatch.setattr(steps.time, "perf_counter", lambda: float(next(looks)))
    found = subject._host(load_recipe("radial").override({"schedule.dense_steps": 0, "schedule.dense_layers": []}))
    # One layer, two forwards that count in each of three rounds; the clock goes on by one from begin to end of a call.
    assert found == Host(1e6, 1e6, 6)
    assert found.beyond == 0.0
    assert gc.isenabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    first = run(Request(("cogvideox-5b-480p",), ("dense",), tiny=True), file, "first", CPU)
    again = run(Request(("cogvideox-5b-480p",), ("dense", "radial"), tiny=True), file, "second", CPU)
    assert [row["variant"] for row in first] == ["dense", "stock"]
    assert [row["variant"] for row in again] == ["radial"]
    assert again[0]["stock_ms"] != first[1]["ms"]  # stock is timed in every run
    assert run(Request(("cogvideox-5b-480p",), ("radial",), tiny=True), file, "third", CPU) == []
    assert [row["command"] for row in load_rows(file)] == ["first", "first", "second"]


def test_a_call_that_falls_back_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Variant.recipe

    def with_a_dense_layer(self: Variant, layout: TokenLayout) -> Any:
        return recipe(self, layout).override({"schedule.dense_layers": [0]})

    monkeypatch.setattr(variants.Variant, "recipe", with_a_dense_layer)
    failed, stock = rows_of("cogvideox-5b-480p", "radial")
    assert (failed["status"], failed["ms"], failed["ratio"]) == ("failed", None, None)
    assert failed["reason"] == "0 of 3 calls were sparse; dense: {'dense_layers': 3}"
    assert stock["status"] == "measured"


@pytest.mark.parametrize("name", CLASSES)
def test_stock_is_cudnn_or_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no cuDNN: asked for it, no class falls back, and later forwards are not changed."""
    with monkeypatch.context() as patch:
        patch.setattr(steps, "dense_kernel", lambda device: "cudnn")
        (failed,) = rows_of(name)
    assert (failed["variant"], failed["status"]) == ("stock", "failed")
    assert "No viable backend for scaled_dot_product_attention" in failed["reason"]
    assert [row["status"] for row in rows_of(name)] == ["measured"]


def test_another_density_than_meant_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "expected_density", lambda self, recipe: 0.9)
    failed, _ = rows_of("cogvideox-5b-480p", "radial")
    assert failed["status"] == "failed"
    assert failed["reason"].endswith("; 0.9 was expected")


def test_dense_attention_that_is_off_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LARGEST_ERROR", -1.0)
    failed, _ = rows_of("cogvideox-5b-480p", "dense")
    assert failed["status"] == "failed"
    assert failed["reason"].startswith("dense attention through our kernel is 0.000 off")


def test_a_model_that_gives_no_numbers_leaves_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_dit.eval.bench.architectures.SHARPNESS", math.nan)
    (failed,) = rows_of("cogvideox-5b-480p", "dense", "radial")
    assert (failed["variant"], failed["status"], failed["reason"]) == ("stock", "failed", "the output is not finite")


def test_when_time_is_up_the_rest_is_left_out() -> None:
    left, stock = rows_of("cogvideox-5b-480p", "radial", seconds=-1.0)
    assert (left["status"], left["reason"]) == ("left out", "the -1 seconds were over")
    assert stock["status"] == "measured"


def test_numbers_stand_beside_the_stock_models() -> None:
    """Stock 8 ms and ours 2, of which 1 in attention; on the host 250 us against 350."""
    out = torch.zeros(1)
    stock = Measured(Times([9.0, 7.0]), 6.0, None, 1000, out, None)
    ours = Measured(Times([1.0, 2.0, 9.0]), 1.0, Host(250.0, 350.0, 90), 1020, out, None)
    made = SimpleNamespace(
        short=(2, 4), timed=(2, 4), layers=(20, 40), case=COGVIDEOX_5B, layout=TokenLayout((1, 2, 3)),
        model=torch.nn.Linear(3, 2),
    )  # fmt: skip
    row = bench()._numbers(made, ours, stock)  # type: ignore[arg-type]
    assert (row["ratio"], row["attention_share"], row["peak_ratio"], row["parameters"]) == (4.0, 0.5, 1.02, 8)
    assert (row["host_us_per_call"], row["host_own_us"], row["host_calls"]) == (100.0, 250.0, 90)


def test_compiled_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", in_place)
    sparse, stock = rows_of("cogvideox-5b-480p", "radial", compiled=True)
    torch._dynamo.reset()
    assert (sparse["status"], sparse["compiled"], sparse["calls"]["sparse"]) == ("measured", True, 3), sparse["reason"]
    assert sparse["attention_share"] is sparse["host_us_per_call"] is stock["ms_after"] is None


def test_as_a_module_it_prints_every_row_and_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(["--tiny", "--cases", "cogvideox-5b-480p", "--variants", "dense", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("cogvideox-5b-480p dense: ") == 2
    assert printed.endswith(f"wrote {out}\n")
    assert load_rows(out)[0]["command"].startswith("python -m sparse_dit.eval.bench.models --tiny")
