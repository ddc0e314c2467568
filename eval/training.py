"""Trains or judges tiny-wan and appends what came of it as a row.

    python -m sparse_dit.eval.training --rows eval/results/tiny-wan-training.jsonl vae --out runs/vae --seconds 420
    python -m sparse_dit.eval.training --rows eval/results/tiny-wan-training.jsonl judge --out runs/judge.json

What follows the part goes to its script in `sparse_dit.pipelines.tiny_wan`, which runs on its own as well.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_dit.eval.results import Row, append_row, command_line, device_of, load_rows, provenance
from sparse_dit.pipelines.tiny_wan import evaluate, train_transformer, train_vae

PARTS: dict[str, Callable[[Sequence[str]], dict[str, Any]]] = {
    "vae": train_vae.main,
    "transformer": train_transformer.main,
    "judge": evaluate.main,
}


def run_part(part: str, arguments: Sequence[str], rows: Path) -> Row:
    """Runs a part and appends its row.

    Args:
        part: one of `PARTS`.
        arguments: of the part's own script.
        rows: the JSONL file, which is read first: a damaged one is told before the work starts.

    Returns:
        The row: part, command, device, versions, and what the script reports.

    Raises:
        ValueError: an unknown part, or as `sparse_dit.eval.results.load_rows`.
    """
    if part not in PARTS:
        raise ValueError(f"part: {part!r}; valid: {', '.join(PARTS)}")
    load_rows(rows)
    report = PARTS[part](arguments)
    module = PARTS[part].__module__
    row = {
        "part": part,
        "command": command_line(f"python -m {module}", arguments),
        **report,
        "device": device_of("cuda" if torch.cuda.is_available() else "cpu", torch.float32),
        **provenance(),
    }
    append_row(rows, row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="the JSONL file to append to")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the part's own script")
    options = parser.parse_args()
    run_part(options.part, options.arguments, options.rows)


if __name__ == "__main__":
    main()
