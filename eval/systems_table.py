"""The table of systems on tiny-wan: how near each stays to dense, and ours at the same run density beside it."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from sparse_dit.eval import contest
from sparse_dit.eval.contenders import BLOCK, DENSITIES, PART, cached_mixtures, mixtures
from sparse_dit.eval.results import Row
from sparse_dit.eval.settings import Setting, settings
from sparse_dit.selection.dynamic import blocks_of_share

_COLUMNS = (
    "system",
    "density",
    "run density",
    "PSNR, dB",
    "median",
    "worst clip",
    "SSIM",
    "median",
    "worst clip",
    "recall",
    "overhead",
    "ours, dB more",
    "clips won",
    "ours without summaries",
    "ours with a cache",
    f"in parts of {PART}",
)
_NONE = ""
OVERHEAD_TOKENS = 32_760  # of the shape whose overhead is shown
# Of ours, the presets whose overhead stands for them.
_PRESETS = dict(zip(DENSITIES, ("quality", "balanced", "fast"), strict=True))


def systems(rows: Sequence[Row], recalls: Sequence[Row] = (), overheads: Sequence[Row] = ()) -> str:
    """Systems by PSNR, in groups of about one density and one number of dense first steps.

    PSNR and SSIM are means over the frames of a clip; of those the mean, the median and the smallest over clips. Ours
    stands in every line of another system: at the same run density, with as many whole steps, how much nearer to dense
    it is, mean over the paired clips with its 95 % bootstrap interval.

    Args:
        rows: as `sparse_dit.eval.systems` writes them; those in native precision are shown.
        recalls: as `sparse_dit.eval.recall` writes them.
        overheads: as `sparse_dit.eval.bench.systems` writes them.
    """
    found = _newest(settings([row for row in rows if row["recipe"]["precision"] == "native"]))
    kept = {json.dumps(row["recipe"], sort_keys=True): row["recall"] for row in recalls}
    shares = {row["system"]: row["share"] for row in overheads if row["shape"]["tokens"] == OVERHEAD_TOKENS}
    groups: dict[tuple[int, float], list[Setting]] = defaultdict(list)
    for setting in found:
        dense_steps = setting.rows[0]["recipe"]["schedule"]["dense_steps"]
        if not contest.is_ours(setting):
            groups[dense_steps, contest.near(setting)].append(setting)
    for place in groups:
        groups[place] += _ours_at(found, *place)
    lines = []
    for (dense_steps, density), members in sorted(groups.items(), key=lambda group: (group[0][0], -group[0][1])):
        ranked = sorted(members, key=lambda setting: -statistics.fmean(setting.values("psnr")))
        lines += [
            f"**Density about {density:g}, {dense_steps} of {rows[0]['steps']} steps dense**",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            f"| --- | {' | '.join('---:' for _ in _COLUMNS[1:])} |",
            *(f"| {' | '.join(_cells(setting, found, kept, shares))} |" for setting in ranked),
            "",
        ]
    return "\n".join(lines).rstrip()


def _newest(found: Sequence[Setting]) -> list[Setting]:
    """Ours, and of every other system the last made setting at each density and number of dense first steps.

    Knobs are turned anew when presets or searches change; mixtures of an earlier search stand in its own rows.
    """
    latest: dict[tuple[str, int, float], Setting] = {}
    for setting in sorted(found, key=lambda one: max(row.get("created", "") for row in one.rows)):
        if not contest.is_ours(setting) and setting.name not in {*mixtures(), *cached_mixtures()}:
            dense_steps = setting.rows[0]["recipe"]["schedule"]["dense_steps"]
            latest[setting.name, dense_steps, contest.near(setting)] = setting
    return [setting for setting in found if contest.is_ours(setting)] + list(latest.values())


def overhead(rows: Sequence[Row]) -> str:
    """What choosing costs beside dense attention, a line a system: shares and milliseconds by shape.

    Args:
        rows: as `sparse_dit.eval.bench.systems` writes them; of several of a system and shape the last one counts.
    """
    if not rows:
        return "No rows yet."
    latest = {(row["system"], row["shape"]["tokens"]): row for row in rows if row["share"] is not None}
    tokens = sorted({size for _, size in latest})
    heads = {row["shape"]["tokens"]: row["shape"]["heads"] for row in latest.values()}
    lines = [
        f"| system | {' | '.join(f'{heads[size]} x {size:,}: share | of them order | searches' for size in tokens)} |",
        f"| --- | {' | '.join('---:' for _ in range(3 * len(tokens)))} |",
    ]
    for system in dict.fromkeys(name for name, _ in latest):
        cells = []
        for size in tokens:
            row = latest.get((system, size))
            if row is None:
                cells += ["", "", ""]
                continue
            within = row["limit"] is None or row["share"] <= row["limit"]
            share = f"{100 * row['share']:.1f} %"
            cells += [share if within else f"**{share}**", f"{100 * row['order_ms'] / row['dense_ms']:.1f} %"]
            cells.append(f"{100 * row['search_share']:.1f} %" if row["searches"] else "")
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ours_at(found: Sequence[Setting], dense_steps: int, density: float) -> list[Setting]:
    """Of ours, those with a line of their own in a group: of each kind the one that was made for its run density."""

    def away(setting: Setting) -> float:
        row = setting.rows[0]
        blocks = -(-math.prod(row["grid"]) // BLOCK)
        kept = blocks_of_share(density, blocks) / blocks
        wanted = (dense_steps + (int(row["steps"]) - dense_steps) * kept) / int(row["steps"])
        return abs(contest.run_density(setting) - wanted)

    def made_for(setting: Setting) -> bool:
        if contest.caches(setting):  # a step more of whole attention moves the budget by more than a block
            return away(setting) < contest.NEAR
        return away(setting) < contest.NEAR / 2 and 0 <= contest.whole_steps(setting) - dense_steps <= 1

    kinds = ([one for one in found if one.name == kind and made_for(one)] for kind in contest.KINDS)
    return [min(those, key=away) for those in kinds if those]


def _cells(
    setting: Setting, found: Sequence[Setting], kept: dict[str, float | None], shares: dict[str, float]
) -> list[str]:
    psnr, ssim = setting.values("psnr"), setting.values("ssim")
    recipe = setting.rows[0]["recipe"]
    recall = kept.get(json.dumps(recipe, sort_keys=True))
    name, mixture = setting.name, ""
    if contest.is_ours(setting):
        name = "cached" if contest.caches(setting) else _PRESETS[contest.near(setting)]
        mixture = f" ({recipe['source']})"
    share = shares.get(name)
    cells = [
        f"{setting.name}{mixture}",
        f"{setting.density:.2f}",
        f"{contest.run_density(setting):.2f}",
        f"{statistics.fmean(psnr):.1f}",
        f"{statistics.median(psnr):.1f}",
        f"{min(psnr):.1f}",
        f"{statistics.fmean(ssim):.3f}",
        f"{statistics.median(ssim):.3f}",
        f"{min(ssim):.3f}",
        _NONE if recall is None else f"{recall:.2f}",
        _NONE if share is None else f"{100 * share:.1f} %",
    ]
    beside = None if contest.is_ours(setting) else contest.standing(setting, found)
    if beside is None:
        return [*cells, *(_NONE for _ in range(5))]
    others = (contest.standing(setting, found, kind) for kind in contest.KINDS[1:])
    return [*cells, _difference(beside), f"{beside.wins} of {beside.clips}", *map(_difference, others)]


def _difference(standing: contest.Standing | None) -> str:
    if standing is None:
        return _NONE
    spread = "" if standing.spread is None else " [{:+.1f}, {:+.1f}]".format(*standing.spread)
    return f"{standing.difference:+.1f}{spread}"
