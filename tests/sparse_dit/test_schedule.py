"""Schedules."""

import pytest

from sparse_dit.schedule import Schedule


def test_nothing_is_dense_by_default() -> None:
    schedule = Schedule()
    assert not schedule.reads_noise
    assert schedule.dense_reason(step=0, noise=1.0, layer=0) is None


def test_the_first_steps_are_dense() -> None:
    schedule = Schedule(dense_steps=2)
    assert [schedule.dense_reason(step, None, 0) for step in range(4)] == ["dense_steps", "dense_steps", None, None]


def test_dense_while_the_noise_level_is_above() -> None:
    schedule = Schedule(dense_above=0.9)
    assert schedule.reads_noise
    assert [schedule.dense_reason(5, noise, 0) for noise in (1.0, 0.91, 0.9, 0.1)] == ["dense_above"] * 2 + [None] * 2


def test_listed_layers_are_dense_in_every_step() -> None:
    schedule = Schedule(dense_layers=(0, 3))
    assert [schedule.dense_reason(9, 0.1, layer) for layer in range(5)] == [
        "dense_layers",
        None,
        None,
        "dense_layers",
        None,
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [("dense_steps", -1), ("dense_above", 1.1), ("dense_above", -0.1), ("dense_above", float("nan"))],
)
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^schedule\.{field}: .*; valid: "):
        Schedule(**{field: value})  # type: ignore[arg-type]


def test_negative_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^schedule\.dense_layers: \[0, -1\]; valid: "):
        Schedule(dense_layers=(0, -1))
