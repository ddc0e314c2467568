"""The bench of several GPUs, with one process on a CPU: what its row says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sparse_dit.eval.bench import parallel
from sparse_dit.eval.bench.parallel import SMALL, TINY, Trial, build, check, forward, inputs, measure

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one process, which shares nothing."""
    monkeypatch.setattr(parallel, "share", lambda model: None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_weights_and_inputs_are_the_same_everywhere() -> None:
    one, other = (build(TINY, CPU, torch.float32) for _ in range(2))
    given = inputs(TINY, CPU, torch.float32)
    out = forward(one, given)
    assert out.shape == given["hidden_states"].shape
    assert out.isfinite().all()
    assert torch.equal(out, forward(other, inputs(TINY, CPU, torch.float32)))
    assert not any(parameter.is_meta for parameter in one.parameters())
    assert 0.2 < out.std() < 5.0


@pytest.mark.usefixtures("alone")
def test_one_process_differs_from_itself_by_nothing() -> None:
    rows = check(Trial(CPU, torch.float32, seconds=60.0), TINY)
    assert [row["recipe"] for row in rows] == [recipe["name"] for recipe in SMALL]
    assert all(row["difference"] == 0.0 and row["sparse_calls"] == TINY.layers for row in rows)
    assert all(row["density"] < 0.4 for row in rows)


@pytest.mark.usefixtures("alone")
def test_a_row_tells_times_and_their_ratio() -> None:
    row = measure(Trial(CPU, torch.float32, seconds=60.0), TINY, SMALL[0], runs=2)
    assert row["ratio"] == row["one_s"] / row["shared_s"] > 0.0
    assert (row["one_runs"], row["shared_runs"], row["difference"]) == (2, 2, 0.0)
    assert row["exchange_s"] > 0.0
    assert json.loads(json.dumps(row)) == row


@pytest.mark.usefixtures("alone")
def test_without_time_nothing_is_measured() -> None:
    row: dict[str, Any] = measure(Trial(CPU, torch.float32, seconds=0.0), TINY, SMALL[0], runs=2)
    assert set(row.values()) == {None}
