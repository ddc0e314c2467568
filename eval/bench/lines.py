"""Rows of `bench kernels` in words."""

from collections.abc import Sequence

from sparse_dit.eval.results import Row


def row_line(row: Row) -> str:
    """A row in one line."""
    cells = [f"{number(row['ms'], '.3f')} ms"] if row["ms"] is not None else []
    cells += [f"{row['ratio']:.2f} x {row['dense']}"] if row["ratio"] is not None else []
    cells += [f"error {row['error']:.4f}"] if row["error"] is not None else []
    return ", ".join([f"{shape(row)} {case(row)}: {row['status']}", *cells, *filter(None, [note(row)])])


def left_out_line(rows: Sequence[Row]) -> str:
    """What rows that were left out would have measured, and why they were."""
    return f"left out, {rows[0]['reason']}: {'; '.join(f'{shape(row)} {case(row)}' for row in rows)}"


def shape(row: Row) -> str:
    """HEADSxTOKENSxHEAD_SIZE."""
    return "x".join(str(row["shape"][side]) for side in ("heads", "tokens", "head_size"))


def case(row: Row) -> str:
    """What was measured, without what is usual."""
    words = [row["kernel"]]
    words += [row["precision"]] if row["precision"] != "native" else []
    words += [f"density {row['wanted_density']:g}"] if row["what"] in ("attention", "lists") else []
    words += [f"{row['lists']} lists"] if row["lists"] != "equal" else []
    words += ["blocks of {} x {}".format(*row["blocks"])] if row["blocks"] != [128, 128] else []
    words += [row["skipped"]] if row["skipped"] != "drop" else []
    words += ["ordered"] if row["ordered"] else []
    words += ["kernel alone"] if row["codes"] else []
    return " ".join(words)


def note(row: Row) -> str:
    """Why nothing was measured, or what the other columns do not tell; may be empty."""
    if row["reason"] is not None:
        return str(row["reason"])
    notes = []
    if row["tb_per_s"] is not None:
        notes.append(f"{row['tb_per_s']:.2f} TB/s, {row['share_of_copy']:.2f} of a copy")
    if row.get("on_top") is not None:
        notes.append(f"{100 * row['on_top']:+.1f} % on top of drop")
    if row["what"] in ("lists", "mass") and row["ratio"] is not None:
        notes.append(f"{1 / row['ratio']:.3f} of dense")
    if row["what"] == "attention" and row["kernel"] == row["dense"] and row["dense_spread"] is not None:
        notes.append(f"spread {row['dense_spread']:.3f}")
    return ", ".join(notes)


def number(value: float | None, form: str) -> str:
    """A number in a format; empty where there is none."""
    return "" if value is None else f"{value:{form}}"
