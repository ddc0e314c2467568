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
