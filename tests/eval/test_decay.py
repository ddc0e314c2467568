"""Attention mass by distance, on planted attention whose answer is known."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparse_dit.eval.decay import Decay, draw, measured

GRID = (5, 3, 4)
TOKENS = 60


def _one_hot_frames() -> torch.Tensor:
    """Queries and keys that agree within a frame and nowhere else: [1, 2, S, 8]."""
    frame = torch.arange(TOKENS) // 12
    return (40 * F.one_hot(frame, 8).float()).expand(1, 2, -1, -1)


def test_uniform_attention_has_relative_mass_one_everywhere() -> None:
    zeros = torch.zeros(1, 2, TOKENS, 8)
    with measured(GRID, rows_per_call=TOKENS) as decay:
        F.scaled_dot_product_attention(zeros, zeros, zeros)
    assert decay.queries == TOKENS
    assert decay.relative("time") == pytest.approx([1] * 5, abs=1e-4)
    assert decay.relative("space")[:4] == pytest.approx([1] * 4, abs=1e-4)


def test_attention_within_the_frame_is_seen_as_such() -> None:
    q = _one_hot_frames()
    with measured(GRID, rows_per_call=TOKENS) as decay:
        F.scaled_dot_product_attention(query=q, key=q, value=q)
    assert decay.relative("time") == pytest.approx([5, 0, 0, 0, 0], abs=1e-4)


def test_attention_to_the_own_token_is_at_distance_zero() -> None:
    q = 80 * torch.eye(TOKENS)[None, None]
    with measured(GRID, rows_per_call=7, seed=3) as decay:
        F.scaled_dot_product_attention(q, q, q)
    assert decay.queries == 7
    assert float(decay.mass[0, 0]) == pytest.approx(7)
    assert float(decay.mass.sum()) == pytest.approx(7)


def test_calls_over_other_lengths_are_left_alone_and_outputs_unchanged() -> None:
    q, short = torch.randn(1, 2, TOKENS, 8), torch.randn(1, 2, 9, 8)
    expected = F.scaled_dot_product_attention(q, short, short)
    with measured(GRID) as decay:
        assert torch.equal(F.scaled_dot_product_attention(q, short, short), expected)
    assert decay.queries == 0


def test_unknown_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="axis must be 'time' or 'space', got 'depth'"):
        Decay(GRID).relative("depth")


def test_draw_writes_a_picture(tmp_path: Path) -> None:
    q = _one_hot_frames()
    with measured(GRID, rows_per_call=12) as decay:
        F.scaled_dot_product_attention(q, q, q)
    draw(decay, tmp_path / "decay.png")
    assert (tmp_path / "decay.png").read_bytes()[:4] == b"\x89PNG"
