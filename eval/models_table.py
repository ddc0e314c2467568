"""Tables of whole models: every variant for the page on models, what was gained for the README."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from sparse_dit.eval.results import Row

UNMEASURED = "Not measured yet."
# What the README shows of each model, and how it calls it.
GAINS = {
    "radial": "radial",
    "radial-int8_fp8": "radial, int8_fp8",
    "balanced": "balanced",
    "balanced-int8": "balanced, int8",
}

Cases = Mapping[tuple[str, bool], Mapping[str, Row]]


def _by_case(rows: Sequence[Row]) -> Cases:
    """The last measured row of each variant, without tiny models, by case and whether it was compiled."""
    cases: dict[tuple[str, bool], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "measured" and not row["tiny"]:
            cases[row["case"], row["compiled"]][row["variant"]] = row
    return cases


def _where(cases: Cases) -> str:
    measured = [row for variants in cases.values() for row in variants.values()]
    where = {f"{row['device']['name']}, torch {row['versions']['torch']}, Triton {row['versions']['triton']}, "
             f"diffusers {row['versions']['diffusers']}" for row in measured}  # fmt: skip
    return "; ".join(sorted(where))


def gains(rows: Sequence[Row]) -> str:
    """How many times faster than the stock model one denoising step is, a line a model.

    Args:
        rows: as `sparse-dit bench models` writes them; compiled ones are left out.
    """
    cases = {key: variants for key, variants in _by_case(rows).items() if not key[1]}
    if not cases:
        return UNMEASURED
    lines = [
        _where(cases),
        "",
        f"| model | tokens | attention in stock | {' | '.join(GAINS.values())} |",
        f"| --- | ---: | ---: | {' | '.join('---:' for _ in GAINS)} |",
    ]
    for (case, _), variants in sorted(cases.items(), key=lambda entry: entry[1]["stock"]["tokens"]):
        ratios = (_number(variants[name]["ratio"], ".2f") if name in variants else "" for name in GAINS)
        stock = variants["stock"]
        lines.append(f"| {case} | {stock['tokens']:,} | {stock['attention_share']:.2f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def models(rows: Sequence[Row]) -> str:
    """One denoising step of whole models: stock, then our variants beside it, by case.

    Args:
        rows: as `sparse-dit bench models` writes them. Of each variant the last measured row counts, without tiny ones.
    """
    cases = _by_case(rows)
    if not cases:
        return UNMEASURED
    lines = [
        _where(cases),
        "",
        "| model | tokens | layers | variant | step, ms | x stock | attention | memory | host, us | density | error |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (case, compiled), variants in cases.items():
        for name, row in sorted(variants.items(), key=lambda entry: entry[0] != "stock"):
            numbers = (
                _number(row["ratio"], ".2f"),
                _number(row["attention_share"], ".2f"),
                _number(row["peak_ratio"], ".3f"),
                # Rows of before hold the difference of two whole forwards, which was noise.
                _number(row["host_us_per_call"] if "host_own_us" in row else None, ".0f"),
                _number(row["density"], ".3f"),
                _number(row["error"], ".4f") if row["wanted_density"] == 1.0 else "",
            )
            layers = f"{sum(row['layers_timed'])} of {sum(row['layers'])}"
            model = f"{case}, compiled" if compiled else case
            lines.append(
                f"| {model} | {row['tokens']:,} | {layers} | {name} | {row['ms']:,.0f} | {' | '.join(numbers)} |"
            )
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
