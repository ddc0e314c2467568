"""The bench on a CPU, with tiny shapes and a clock of known answers: what rows say, not how fast anything is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_dit.eval.bench import cases, inputs, kernels, work
from sparse_dit.eval.bench.cases import DENSITIES, HEADLINES, SHAPES, Case, Group, Shape, plan, read_shape
from sparse_dit.eval.bench.clock import Call, CudaClock, HostClock, Timing
from sparse_dit.eval.bench.inputs import Inputs
from sparse_dit.eval.bench.kernels import FAILED, LEFT_OUT, MEASURED, Bench
from sparse_dit.eval.bench.lines import row_line
from sparse_dit.eval.bench.yardsticks import block_mask, others
from sparse_dit.eval.results import append_row, load_rows
from sparse_dit.kernels.lists import lists_to_mask
from sparse_dit.kernels.oracle import oracle_attention
from sparse_dit.kernels.quantize import quantize

CPU = torch.device("cpu")
SHAPE = Shape(heads=2, tokens=300, head_size=64)


class FixedClock:
    """Runs every call once and says what it took: `ms` in turn, then the last of them."""

    def __init__(self, *ms: float) -> None:
        self.ms = list(ms)
        self.works = True

    def measure(self, call: Call) -> Timing:
        call(0)
        return Timing(self.ms.pop(0) if len(self.ms) > 1 else self.ms[0], 1)

    def in_turn(self, calls: Sequence[Call]) -> list[float]:
        outs = [call(0)[0] for call in calls]
        assert not any(torch.equal(outs[0], out) for out in outs[1:]), "they are one call"
        return [2.0, *(2.1 for _ in calls[1:])]

    def copy_rate(self) -> float:
        return 4.0

    def alive(self) -> bool:
        return self.works

    def input_sets(self, size: int) -> int:
        return 1


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cases, inputs):
        monkeypatch.setattr(module, "GRIDS", {SHAPE.tokens: (1, 10, 30)})


def bench(clock: FixedClock, seconds: float = 60.0) -> Bench:
    return Bench(CPU, torch.float32, clock, seconds, "sparse-dit bench kernels")


def test_a_plan_starts_with_what_matters_and_holds_no_case_twice() -> None:
    groups = plan(SHAPES, DENSITIES, ["hopper", "triton"], ["flash", "flash4"], flex=True)
    assert [group.shape for group in groups[: len(HEADLINES)]] == list(HEADLINES)
    first = groups[0].cases
    assert [(case.kernel, case.density) for case in first[:4]] == [("hopper", d) for d in (0.3, 0.2, 0.1, 1.0)]
    assert {case.what for case in first} == {"attention", "quantize", "lists", "mass"}
    told = [(group.shape, case) for group in groups for case in group.cases]
    assert len(told) == len(set(told))
    assert {group.shape for group in groups} == set(SHAPES)
    assert all(case.kernel != "flex" for group in groups[: -len(SHAPES)] for case in group.cases)
    assert not any(case.ordered for shape, case in told if shape.tokens not in cases.GRIDS)


def test_a_plan_keeps_to_the_densities_asked_for() -> None:
    groups = plan([SHAPES[0], SHAPE], [0.2], ["triton"], [], flex=False)
    plain = {case.density for group in groups for case in group.cases if case.what == "attention" and case.codes}
    assert plain == {0.2}
    assert groups[0].shape == SHAPES[0]


@pytest.mark.parametrize("text", ["12x300", "axbxc", "0x300x64", "12x300x64x1", ""])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^shapes: .*; valid: HEADS"):
        read_shape(text)


def test_shapes_read_back() -> None:
    assert [read_shape(str(shape)) for shape in SHAPES] == list(SHAPES)


def test_rows_stand_beside_the_mean_of_both_dense_times() -> None:
    """Dense 2 and 4 ms, so 3 with a spread of 2/3; the case takes 1."""
    case = Case("attention", "host", 0.4)
    dense, row = bench(FixedClock(2.0, 1.0, 4.0)).rows([Group(SHAPE, (case,))])
    assert (row["ratio"], row["dense_ms"]) == (3.0, 3.0)
    assert row["dense_spread"] == pytest.approx(2 / 3)
    assert dense["ratio"] == 1.5
    # ceil(300 / 128) = 3 key blocks, round(0.4 * 3) = 1 a row, so a third of the area but for the ragged end.
    assert row["density"] == pytest.approx(1 / 3, abs=0.12)
    assert row["tflops"] == pytest.approx(SHAPE.flop * row["density"] / 1e9)
    assert row["error"] < 1e-5
    assert (row["status"], row["reason"], row["command"]) == (MEASURED, None, "sparse-dit bench kernels")


@pytest.mark.usefixtures("small_grid")
def test_every_case_of_a_plan_runs_and_its_rows_can_be_saved(tmp_path: Path) -> None:
    groups = plan([SHAPE], [0.3, 1.0], ["host"], [], flex=False)
    file = tmp_path / "rows.jsonl"
    rows = list(bench(FixedClock(1.0)).rows(groups))
    for row in rows:
        append_row(file, row)
    assert len(load_rows(file)) == 1 + len(groups[0].cases)
    assert {row["status"] for row in rows} == {MEASURED}
    limits = {"native": 1e-5, "int8": 0.015, "int8_fp8": 0.04}
    for row in rows:
        if row["what"] in ("attention", "mass"):
            assert row["error"] < limits[row["precision"]], row
    assert {row["what"] for row in rows} == {"attention", "quantize", "lists", "mass"}


def test_a_failing_kernel_is_a_row_and_the_others_run() -> None:
    group = Group(SHAPE, (Case("attention", "triton", 0.5, block_k=48), Case("attention", "host")))
    _, failed, row = bench(FixedClock(1.0)).rows([group])
    assert failed["status"] == FAILED
    assert failed["reason"].startswith("block_k: 48")
    assert (failed["ms"], failed["ratio"], row["status"]) == (None, None, MEASURED)


def test_an_output_that_is_not_finite_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "block_sparse_attention", lambda q, *_, **__: (torch.full_like(q, math.nan), None))
    _, row = bench(FixedClock(1.0)).rows([Group(SHAPE, (Case("attention", "host"),))])
    assert (row["status"], row["reason"], row["ms"]) == (FAILED, "the output is not finite", None)


def test_nothing_runs_on_a_device_that_is_gone() -> None:
    class Dying(FixedClock):
        def measure(self, call: Call) -> Timing:
            if len(self.ms) == 1:
                self.works = False
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")
            return super().measure(call)

    groups = [
        Group(SHAPE, (Case("attention", "host"), Case("attention", "host", 0.3))),
        Group(SHAPE, (Case("mass", "mass"),)),
    ]
    dense, failed, left, other = bench(Dying(3.0, 1.0)).rows(groups)
    assert (dense["status"], dense["ratio"], dense["dense_spread"]) == (MEASURED, 1.0, None)
    assert failed["reason"] == "CUDA error: an illegal memory access was encountered more lines"
    assert (left["status"], other["status"]) == (LEFT_OUT, LEFT_OUT)
    assert "takes no more work" in left["reason"]


def test_summaries_are_timed_in_turn_with_dropping() -> None:
    cases = (Case("attention", "host", 0.5, skipped="summary"), Case("attention", "host", 0.5))
    _, whole, dropped = bench(FixedClock(3.0)).rows([Group(SHAPE, cases)])
    assert (whole["on_top"], dropped["on_top"]) == (pytest.approx(0.05), None)
    assert "+5.0 % on top of drop" in row_line(whole)
    assert "on top" not in row_line({name: value for name, value in dropped.items() if name != "on_top"})


def test_when_time_is_up_the_rest_is_told() -> None:
    groups = [Group(SHAPE, (Case("attention", "host"),)), Group(SHAPE, (Case("mass", "mass"),))]
    rows = list(bench(FixedClock(1.0), seconds=-1.0).rows(groups))
    assert [row["status"] for row in rows] == [LEFT_OUT, LEFT_OUT]
    assert "seconds were over" in rows[0]["reason"]


@pytest.fixture(scope="module")
def made() -> Inputs:
    return Inputs(SHAPE, CPU, torch.float32, sets=1, seed=3)


@pytest.mark.parametrize("block_k", [64, 128])
def test_exact_rows_are_the_oracles(made: Inputs, block_k: int) -> None:
    case = Case("attention", "host", 0.4, block_k=block_k)
    mask = lists_to_mask(made.blocks(case), math.ceil(SHAPE.tokens / block_k))
    out, _ = oracle_attention(*made.sets[0], mask, 128, block_k)
    assert made.error(case, out) < 1e-14
    wrong = out.clone()
    wrong[:, 1] *= 1.5
    assert made.error(case, wrong) > 0.2


def test_exact_rows_with_summaries_are_those_of_a_float64_kernel(made: Inputs) -> None:
    """The torch path in fp32, whose means are not rounded further: another derivation of the same sums."""
    case = Case("attention", "host", 0.4, skipped="summary")
    out = work.work(case, made).call(0)
    assert isinstance(out, torch.Tensor)
    assert made.error(case, out) < 1e-5
    assert made.error(replace(case, skipped="drop"), out) > 0.05


@pytest.mark.usefixtures("small_grid")
def test_exact_rows_follow_the_order() -> None:
    made = Inputs(SHAPE, CPU, torch.float32, sets=1, seed=3)
    case = Case("attention", "host", 0.4, ordered=True)
    assert not torch.equal(made.order[0], torch.arange(SHAPE.tokens))
    attend: Callable[[int], object] = work.work(case, made).call
    out = attend(0)
    assert isinstance(out, torch.Tensor)
    assert made.error(case, out) < 1e-5
    assert made.error(Case("attention", "host", 0.4), out) > 0.1


def test_uneven_lists_end_dense_and_have_the_area_of_equal_ones() -> None:
    made = Inputs(Shape(2, 128 * 40, 16), CPU, torch.float32, sets=1, seed=0)
    uneven, same = (made.blocks(Case("attention", "host", 0.5, lists=lists)) for lists in ("uneven", "same area"))
    assert (uneven.counts[..., -inputs.TEXT_BLOCKS :] == 40).all()
    assert len(uneven.counts.unique()) > 20
    assert len(same.counts.unique()) == 1
    assert same.density(5120, 5120) == pytest.approx(uneven.density(5120, 5120), abs=0.5 / 40 + 1e-9)


def test_flex_attention_gets_the_same_blocks(made: Inputs) -> None:
    blocks = made.blocks(Case("attention", "flex", 0.6))
    mask = block_mask(blocks, SHAPE.tokens)
    assert torch.equal(mask.to_dense().bool(), lists_to_mask(blocks, 3))
    assert mask.seq_lengths == (SHAPE.tokens, SHAPE.tokens)


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
def test_bytes_of_quantization_are_those_of_its_tensors(made: Inputs, precision: str) -> None:
    moved = work.work(Case("quantize", "quantize", precision=precision), made).moved
    codes = quantize(*made.sets[0], precision=precision, scale=0.125)
    q = made.sets[0][0]
    steps = codes.q_scale.nbytes + codes.lse_shift.nbytes + codes.k_scale.nbytes
    if precision == "int8":  # v stays where it is
        assert moved == 2 * q.nbytes + codes.q.nbytes + codes.k.nbytes + steps
    else:
        assert codes.v_scale is not None
        assert codes.v_mean is not None
        whole = codes.q.nbytes + codes.k.nbytes + codes.v.nbytes + steps
        assert moved == 3 * q.nbytes + whole + codes.v_scale.nbytes + codes.v_mean.nbytes


def test_the_processors_clock_goes_through_input_sets() -> None:
    seen: list[int] = []
    timing = HostClock(runs=3).measure(seen.append)
    assert seen == [0, 1, 2, 3]
    assert (timing.runs, timing.ms >= 0) == (3, True)


@pytest.mark.parametrize("kind", ["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_calls_in_turn_each_run_once_a_round_and_the_slow_one_is_told(kind: str) -> None:
    size = 1 << (10 if kind == "host" else 22)
    x = torch.randn(size, device="cpu" if kind == "host" else "cuda")
    seen: list[tuple[str, int]] = []

    def call(name: str, times: int) -> Call:
        def work(run: int) -> None:
            seen.append((name, run))
            for _ in range(times):
                x.mul_(1.0)

        return work

    clock = HostClock(runs=9) if kind == "host" else CudaClock(torch.device("cuda"), repeat_ms=1.0, warmup_ms=1.0)
    slow, fast = clock.in_turn([call("slow", 50), call("fast", 1)])
    assert slow > 2 * fast
    rounds = seen[-18:] if kind == "host" else seen[-40:]
    for first, second in zip(rounds[::2], rounds[1::2], strict=True):
        assert {first[0], second[0]} == {"slow", "fast"}
        assert first[1] == second[1]
    assert len({first[0] for first in rounds[::2]}) == 2, "always in the same order"


ARGUMENTS = ["--shapes", "1x200x64", "--densities", "1.0", "0.3", "--no_flex"]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `main` measure on the CPU, where it would refuse to."""
    monkeypatch.setattr(kernels, "current_gpu", lambda: CPU)
    monkeypatch.setattr(kernels, "CudaClock", lambda device: FixedClock(2.0))


@pytest.mark.usefixtures("on_cpu")
def test_main_appends_rows_that_tell_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    assert kernels.main([*ARGUMENTS, "--out", str(out)]) == 0
    rows = load_rows(out)
    asked = "python -m sparse_dit.eval.bench.kernels --shapes 1x200x64 --densities 1.0 0.3 --no_flex --out rows.jsonl"
    assert {row["command"] for row in rows} == {asked}
    assert {row["status"] for row in rows} == {MEASURED}
    planned = kernels.Request(["1x200x64"], [1.0, 0.3], flex=False).groups(CPU)
    assert len(rows) == 1 + sum(len(group.cases) for group in planned)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("1x200x64 sdpa density 1: measured, 2.000 ms, 1.00 x sdpa, error 0.0000")
    assert printed[-1] == f"wrote {out}"
    assert len(printed) == len(rows) + 1


@pytest.mark.usefixtures("on_cpu")
def test_main_says_what_it_had_no_time_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([*ARGUMENTS, "--seconds", "1e-9", "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert "left out, the 1e-09 seconds were over: 1x200x64 host density 1;" in capsys.readouterr().out
    assert load_rows(tmp_path / "rows.jsonl") == []


@pytest.mark.usefixtures("on_cpu")
def test_main_refuses_a_damaged_file_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n")
    assert kernels.main([*ARGUMENTS, "--out", str(tmp_path / "rows.jsonl")]) == 2
    told = capsys.readouterr()
    assert (told.out, "line 1 is no JSON" in told.err) == ("", True)


def test_a_request_for_flex_attention_puts_it_last() -> None:
    asked = kernels.Request(["1x200x64", "2x300x64"], [0.5])
    last = [case.kernel for group in asked.groups(CPU)[-2:] for case in group.cases]
    assert last == ["flex", "flex"]
    assert all(case.kernel != "flex" for group in asked.groups(CPU)[:-2] for case in group.cases)


def test_a_cpu_has_no_yardsticks_but_sdpa() -> None:
    assert others(CPU) == []
    assert kernels.our_backends(CPU) == ["host"]
