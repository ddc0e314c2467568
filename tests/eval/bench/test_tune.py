"""Tuning with made-up times: which launch is taken, and what keeps one out."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sparse_dit.eval.bench import tune as tuning
from sparse_dit.eval.bench.cases import Case
from sparse_dit.eval.bench.clock import Call, Timing
from sparse_dit.eval.bench.inputs import Inputs
from sparse_dit.eval.bench.tune import Tuned, candidates, tune
from sparse_dit.eval.bench.work import Work
from sparse_dit.kernels import tiles
from sparse_dit.kernels.tiles import Launch, pinned, read_rows, write_rows

CPU = torch.device("cpu")


class Pretending:
    """A clock, and work for it, of kernels that take as long as `cost` says of the launch they look up."""

    def __init__(self, cost: Callable[[Launch], float], error: Callable[[Launch], float] = lambda launch: 0.01) -> None:
        self.cost, self.error = cost, error
        self.seen: list[Launch] = []

    def launch(self) -> Launch:
        return pinned("mass", "native", 64, "cpu").launch

    def work(self, case: Case, inputs: Inputs) -> Work:
        if case.what != "mass":
            raise ValueError("backend: 'triton' with tensors on cpu; valid: CUDA tensors")
        return Work(lambda run: self.seen.append(self.launch()), error=lambda: self.error(self.launch()))

    def measure(self, call: Call) -> Timing:
        call(0)
        return Timing(self.cost(self.seen[-1]), 1)

    def copy_rate(self) -> float:
        raise NotImplementedError

    def alive(self) -> bool:
        return True

    def input_sets(self, size: int) -> int:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(tiles.USER_FILE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "HEADS", 1)
    monkeypatch.setattr(tuning, "TOKENS", 256)
    # A CPU can have no rows of its own in a file; in trials it may.
    tiles._rows.cache_clear()
    yield
    tiles._rows.cache_clear()


def tuned(pretending: Pretending, monkeypatch: pytest.MonkeyPatch, seconds: float = 60.0) -> list[Tuned | str]:
    monkeypatch.setattr(tuning, "work", pretending.work)
    return list(tune(CPU, torch.float32, pretending, [64], seconds))


def test_the_fastest_right_launch_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 x 64 of 4 warps takes 1 ms, but with 2 stages it is wrong and with 3 it does not fit; all others take 3."""
    wrong, large, best = Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(64, 64, 4, 4)

    def cost(launch: Launch) -> float:
        if launch == large:
            raise RuntimeError("out of resource: shared memory,\nRequired: 300000")
        return {wrong: 1.0, best: 2.0}.get(launch, 3.0)

    *others, found = tuned(Pretending(cost, lambda launch: 0.5 if launch == wrong else 0.01), monkeypatch)
    assert isinstance(found, Tuned)
    assert (found.row.launch, found.ms, found.pinned_ms, found.whole) == (best, 2.0, 3.0, True)
    assert found.row.origin.startswith("measured on cpu, 20")
    assert found.refused[large] == "out of resource: shared memory, Required: 300000"
    assert "error is 0.5" in found.refused[wrong]
    assert found.tried == len(candidates(pinned("mass", "native", 64, "cpu").launch)) - 1
    assert all(isinstance(other, str) and "valid: CUDA tensors" in other for other in others)


def test_what_is_hardly_faster_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pinned("mass", "native", 64, "cpu").launch
    found = tuned(Pretending(lambda launch: 1.0 if launch == first else 0.99), monkeypatch)[-1]
    assert isinstance(found, Tuned)
    assert (found.row.launch, found.ms) == (first, 1.0)


def test_when_time_is_up_nothing_more_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    pretending = Pretending(lambda launch: 1.0)
    found = tuned(pretending, monkeypatch, seconds=-1.0)
    assert pretending.seen == []
    assert all(isinstance(line, str) and "seconds were over" in line for line in found)


def on_sm_90(best: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the command measure on a pretended GPU, where one launch is the fastest."""
    pretending = Pretending(lambda launch: 1.0 if launch == best else 2.0)
    monkeypatch.setattr(pretending, "launch", lambda: pinned("mass", "native", 64, "sm_90").launch)
    monkeypatch.setattr(tuning, "work", pretending.work)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "current_gpu", lambda: CPU)
    monkeypatch.setattr(tuning, "CudaClock", lambda device: pretending)


def test_what_main_writes_is_what_kernels_are_launched_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no name for the file: it lies where kernels look."""
    best = Launch(64, 32, 8, 4)
    on_sm_90(best, monkeypatch)
    assert pinned("mass", "native", 64, "sm_90").launch != best
    assert tuning.main(["--head_sizes", "64"]) == 0
    file = tmp_path / "sparse_dit" / "tiles.json"
    printed = capsys.readouterr().out
    assert "mass, native, head size 64: 64 x 32, 8 warps, 4 stages, 1.000 ms (pinned 2.000 ms; 24 measured" in printed
    assert printed.endswith(f"wrote {file}\n")
    [row] = read_rows(file.read_text(), "file")
    assert (row.key, row.launch) == (("mass", "sm_90", 64, "native"), best)
    assert pinned("mass", "native", 64, "sm_90") == row
    assert pinned("mass", "native", 128, "sm_90").launch != best


def as_a_command(options: list[str]) -> int | None:
    from sparse_dit.app.cli import main  # needs packages that bare GPU machines lack, where the other tests run

    return main(["tune-tiles", *options])


@pytest.mark.parametrize("run", [tuning.main, as_a_command])
def test_rows_go_to_the_file_that_is_named_and_to_no_other(
    run: Callable[[list[str]], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = Launch(64, 32, 8, 4)
    on_sm_90(best, monkeypatch)
    file = tmp_path / "mine.json"
    assert run(["--head_sizes", "64", "--out", str(file)]) == 0
    assert [row.launch for row in read_rows(file.read_text(), "file")] == [best]
    assert list(tmp_path.iterdir()) == [file]


def test_main_tells_when_nothing_could_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "current_gpu", lambda: CPU)
    monkeypatch.setattr(tuning, "CudaClock", lambda device: Pretending(lambda launch: 1.0))
    assert tuning.main(["--head_sizes", "64", "--seconds", "1e-9", "--out", str(tmp_path / "mine.json")]) == 0
    assert "nothing was measured; " in capsys.readouterr().out
    assert not (tmp_path / "mine.json").exists()


def test_each_has_an_even_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of them in 40 seconds, each launch a second: the last one is still tried ten times, not left out."""
    now = [0.0]
    pretending = Pretending(lambda launch: 1.0)

    def measure(call: Call) -> Timing:
        now[0] += 1.0
        return Pretending.measure(pretending, call)

    def every(case: Case, inputs: Inputs) -> Work:
        return Work(lambda run: pretending.seen.append(pretending.launch()), error=lambda: 0.01)

    monkeypatch.setattr(pretending, "measure", measure)
    monkeypatch.setattr(tuning, "work", every)
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])
    found = list(tune(CPU, torch.float32, pretending, [64], seconds=40.0))
    tried = [each.tried for each in found if isinstance(each, Tuned)]
    assert len(tried) == 4
    assert all(10 <= count <= 12 for count in tried)


def test_candidates_are_valid_rows_the_pinned_one_first(tmp_path: Path) -> None:
    entry = pinned("attention", "native", 128, "sm_90")
    launches = candidates(entry.launch)
    assert launches[0] == entry.launch
    assert len(launches) == len(set(launches))
    for launch in launches:
        file = tmp_path / "rows.json"
        row = tiles.TileRow(*entry.key, launch=launch, origin="measured")
        write_rows([row], file)
        assert read_rows(file.read_text(), "rows") == [row]
