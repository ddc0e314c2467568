"""The table of what an attention call costs the host."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_dit.eval.results import Row


def host(rows: Sequence[Row]) -> str:
    """Host time of one call beyond stock's by recipe, a column for each GPU and revision.

    Args:
        rows: as `python -m sparse_dit.eval.bench.host` writes them; the last one of each GPU and revision counts.
    """
    last = {f"{row['device']['name']}, {row['revision'][:7]}": row for row in rows if row["device"]["type"] == "cuda"}
    if not last:
        return "Not measured yet."
    recipes = dict.fromkeys(name for row in reversed(last.values()) for name in row["beyond_us"])
    lines = [
        f"| us of host time a call | {' | '.join(last)} |",
        f"| --- | {' | '.join('---:' for _ in last)} |",
        "| stock itself | " + " | ".join(f"{row['own_us']:.0f}" for row in last.values()) + " |",
    ]
    for name in recipes:
        cells = (f"{row['beyond_us'][name]:.0f}" if name in row["beyond_us"] else "" for row in last.values())
        lines.append(f"| {name}, beyond stock | {' | '.join(cells)} |")
    return "\n".join(lines)
