"""The bench of host time: calls of ours cost more than none, and nothing is replaced for good."""

import json
from pathlib import Path

import pytest
import torch

from sparse_dit.eval.bench import host as bench
from sparse_dit.kernels import host


def test_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CALLS", 10)
    monkeypatch.setattr(bench, "BATCHES", 2)
    rows = tmp_path / "host.jsonl"
    monkeypatch.setattr("sys.argv", ["host", "--rows", str(rows)])
    kernels = host.host_attention, torch.nn.functional.scaled_dot_product_attention
    bench.main()
    row = json.loads(rows.read_text())
    assert row["beyond_us"].keys() == bench.RECIPES.keys()
    assert row["own_us"] > 0.0
    assert min(row["beyond_us"]["static"], row["beyond_us"]["pooled, chosen in every call"]) > 0.0
    assert (host.host_attention, torch.nn.functional.scaled_dot_product_attention) == kernels
