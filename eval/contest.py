"""Settings in the table of systems set beside ours: which of them compute as much over a run, and who wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_dit.eval.contenders import CACHED, DENSITIES, IN_PARTS, OURS
from sparse_dit.eval.settings import Interval, Setting, interval, paired

NEAR = 0.01  # run densities that count as equal
KINDS = (OURS, f"{OURS}-drop", CACHED, IN_PARTS)


@dataclass(frozen=True)
class Standing:
    """A setting beside ours at the same run density.

    Args:
        ours: the setting of ours.
        difference: PSNR in dB, ours minus the other, mean over the clips that both have.
        spread: its 95 % bootstrap interval; None where there are too few clips.
        wins: clips on which ours is nearer to dense.
        clips: that both have.
    """

    ours: Setting
    difference: float
    spread: Interval | None
    wins: int
    clips: int


def run_density(setting: Setting) -> float:
    """Mean run density of a setting's clips."""
    mean = setting.mean("run_density")
    assert mean is not None
    return mean


def whole_steps(setting: Setting) -> int:
    """Steps whose calls computed whole attention, as the schedule said or a search or a cache needed."""
    calls, steps = setting.rows[0]["calls"], setting.rows[0]["steps"]
    whole: float = sum(calls["dense"].values()) / calls["planned"] * steps
    return round(whole)


def near(setting: Setting) -> float:
    """The density of the table that a setting's sparse calls are nearest to."""
    density = setting.density
    return min(DENSITIES, key=lambda wanted: abs(wanted - (1.0 if density is None else density)))


def is_ours(setting: Setting) -> bool:
    """Whether a setting is one of the mixtures that the search found, under the names of `KINDS`."""
    return setting.name in KINDS


def caches(setting: Setting) -> bool:
    """Whether a setting keeps what skipped blocks added at the last whole call."""
    skipped = setting.rows[0]["recipe"].get("skipped", "drop")
    return isinstance(skipped, dict) and skipped["name"] == "reuse"


def is_equal(setting: Setting, other: Setting) -> bool:
    """Whether two settings compute as much over a run, in as many whole steps; ours with a cache places them itself."""
    within = abs(run_density(setting) - run_density(other)) <= NEAR
    return within and (other.name in (CACHED, IN_PARTS) or whole_steps(setting) == whole_steps(other))


def standing(setting: Setting, settings: Sequence[Setting], kind: str = OURS) -> Standing | None:
    """A setting beside the one of ours that computes as much over a run; None where there is none.

    Args:
        setting: not ours.
        settings: all of them.
        kind: one of `KINDS`.
    """
    equal = [other for other in settings if other.name == kind and is_equal(setting, other)]
    if kind == OURS and caches(setting):
        # What keeps residuals is met by ours that keeps them, too.
        equal = [other for other in settings if other.name == CACHED and is_equal(setting, other)] or equal
    if not equal:
        return None
    # Where two are near enough: the one that was found for this density, then the nearest.
    ours = min(
        equal,
        key=lambda other: (
            other.name in (OURS, f"{OURS}-drop") and near(other) != near(setting),
            abs(run_density(other) - run_density(setting)),
        ),
    )
    values = paired(ours, setting, "psnr")
    if not values:
        return None
    mean = sum(values) / len(values)
    return Standing(ours, mean, interval(values), sum(value > 0 for value in values), len(values))
