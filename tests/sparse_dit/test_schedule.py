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


def refreshes(schedule: Schedule, steps: list[int]) -> list[int]:
    """The steps of a layer's sparse calls that are refreshes."""
    done: list[int] = []
    for step in steps:
        if schedule.refreshes(step, done[-1] if done else None):
            done.append(step)
    return done


def test_every_step_is_a_refresh_by_default() -> None:
    assert not Schedule().keeps
    assert not Schedule(refresh_every=1).keeps
    assert refreshes(Schedule(), [2, 3, 4]) == [2, 3, 4]


def test_re_ttentions_schedule_refreshes_every_fifth_step_from_the_first_sparse_one() -> None:
    schedule = Schedule(dense_steps=15, refresh_every=5)
    assert schedule.keeps
    assert refreshes(schedule, list(range(15, 50))) == [15, 20, 25, 30, 35, 40, 45]


def test_adaspas_schedule_searches_at_the_first_sparse_step_and_at_step_30() -> None:
    schedule = Schedule(dense_steps=10, refresh_steps=(10, 30))
    assert schedule.keeps
    assert refreshes(schedule, list(range(10, 50))) == [10, 30]


@pytest.mark.parametrize(
    ("every", "growth", "planned"),
    [(1, 1, [0, 1, 3, 6, 10, 15]), (2, 1, [0, 2, 5, 9, 14]), (2, 2, [0, 2, 6, 12]), (3, 0, [0, 3, 6, 9, 12, 15, 18])],
)
def test_gaps_between_refreshes_grow(every: int, growth: int, planned: list[int]) -> None:
    schedule = Schedule(refresh_every=every, refresh_growth=growth)
    assert schedule.keeps
    assert refreshes(schedule, list(range(20))) == planned


def test_growing_gaps_are_counted_from_step_0_and_put_off_by_skipped_steps() -> None:
    schedule = Schedule(refresh_every=1, refresh_growth=1, dense_steps=4)
    assert refreshes(schedule, list(range(4, 20))) == [4, 6, 10, 15]
    assert refreshes(schedule, [0, 2, 5, 7, 9, 17]) == [0, 2, 5, 7, 17]
    assert schedule.refreshes(3, 3)


@pytest.mark.parametrize("settings", [{"refresh_every": 2, "refresh_growth": -1}, {"refresh_growth": 1}])
def test_a_growth_that_means_nothing_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"^schedule\.refresh_growth: .*; valid: "):
        Schedule(**settings)  # type: ignore[arg-type]


def test_a_cache_that_skips_steps_puts_a_refresh_off() -> None:
    assert refreshes(Schedule(refresh_steps=(4, 8)), [3, 5, 6, 9]) == [3, 5, 9]
    assert refreshes(Schedule(refresh_every=4), [1, 3, 6, 9, 10]) == [1, 6, 10]


def test_a_second_call_in_the_step_of_a_refresh_is_one_too() -> None:
    assert Schedule(refresh_every=4).refreshes(0, 0)
    assert Schedule(refresh_steps=(30,)).refreshes(30, 30)


@pytest.mark.parametrize(("field", "value"), [("refresh_every", 0), ("refresh_steps", (3, -1))])
def test_refreshes_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^schedule\.{field}: .*; valid: "):
        Schedule(**{field: value})  # type: ignore[arg-type]
