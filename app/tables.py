"""What the commands print for people."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sparse_dit.recipe import Recipe


def print_comparison(record: dict[str, Any], out: str, files: Sequence[str]) -> None:
    """One table of a dense and a sparse run, and the files in `out`."""
    recipe, calls = record["recipe"], record["calls"]
    table = Table(title=f"{record['model']}, {recipe['name']} against dense, seed {record['seed']}: {record['prompt']}")
    for column in ("", "dense", "sparse", "sparse / dense"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for label, field in (("seconds", "seconds"), ("attention seconds", "attention_seconds")):
        dense, sparse = record[f"{field}_dense"], record[f"{field}_sparse"]
        table.add_row(label, f"{dense:.2f}", f"{sparse:.2f}", f"{sparse / dense:.2f}")
    density = record["density"]
    table.add_row("density of sparse calls", "1", "none" if density is None else f"{density:.3f}", "")
    table.add_row("run density", "1", f"{record['run_density']:.3f}", "")
    table.add_row("PSNR (dB), mean / worst frame", "", f"{record['psnr']:.2f} / {record['psnr_min']:.2f}", "")
    table.add_row("SSIM, mean / worst frame", "", f"{record['ssim']:.4f} / {record['ssim_min']:.4f}", "")
    if record["flicker"] is not None:
        table.add_row("flicker, mean / worst frame", "", f"{record['flicker']:.4f} / {record['flicker_max']:.4f}", "")
    if record["lpips"] is not None:
        table.add_row("LPIPS, mean / worst frame", "", f"{record['lpips']:.4f} / {record['lpips_max']:.4f}", "")
    table.add_row("sparse calls", "0", f"{calls['sparse']} of {calls['made']}", "")
    for reason, count in calls["dense"].items():
        table.add_row(f"dense calls ({reason})", "", f"{count} of {calls['made']}", "")
    table.add_row("backend", "model's own", record["backend"], "")
    console = Console()
    console.print(table)
    _print_missing(console, record)
    console.print(f"{out}/: {', '.join(files)}", highlight=False)


def print_file_comparison(row: dict[str, Any]) -> None:
    """One table of a video file against another."""
    title = f"{row['video']} against {row['reference']}: {row['frames']} frames of {row['width']}x{row['height']}"
    table = Table(title=title)
    for column in ("", "mean", "median frame", "worst frame"):
        table.add_column(column, justify="right" if column else "left")
    for label, name, worst, form in (
        ("PSNR (dB)", "psnr", "min", ".2f"),
        ("SSIM", "ssim", "min", ".4f"),
        ("flicker", "flicker", "max", ".4f"),
        ("LPIPS", "lpips", "max", ".4f"),
    ):
        if row[name] is not None:
            table.add_row(label, *(f"{row[field]:{form}}" for field in (name, f"{name}_median", f"{name}_{worst}")))
    table.add_row("largest difference", "", "", f"{row['difference_max']:.4f}")
    console = Console()
    console.print(table)
    _print_missing(console, row)


def print_probe(row: dict[str, Any]) -> None:
    """One table of what a recipe kept, a line a layer."""
    table = Table(title=f"{row['model']}, {row['recipe']['name']}: sparse calls, {row['rows']} sampled rows each")
    for column in ("layer", "density", "kept mass", "worst row", "error of the output"):
        table.add_column(column, justify="right")
    for layer, heads in enumerate(row["by_head"]["density"]):
        if heads is None:
            table.add_row(str(layer), "dense", "", "", "")
            continue
        means = {name: sum(found[layer]) / len(heads) for name, found in row["by_head"].items() if found is not None}
        error = f"{means['error']:.4f}" if "error" in means else "-"
        worst = min(row["by_head"]["recall_min"][layer])
        table.add_row(str(layer), f"{means['density']:.3f}", f"{means['recall']:.4f}", f"{worst:.4f}", error)
    Console().print(table)


def _print_missing(console: Console, row: dict[str, Any]) -> None:
    """Why LPIPS was not measured, where it was not."""
    from sparse_dit.eval.perceptual import missing

    if row["lpips"] is None:
        console.print(missing(), highlight=False)


def print_recipes(recipes: Sequence["Recipe"]) -> None:
    """One table of recipes: of each choice the settings that are not its defaults, and where the recipe comes from."""
    table = Table()
    for column in ("recipe", "choices", "source"):
        table.add_column(column, no_wrap=column == "recipe")
    for recipe in recipes:
        plain = recipe.to_dict()
        schedule = _settings(recipe.schedule, {"name": "schedule", **plain["schedule"]})
        choices = [
            f"order {_settings(recipe.order, plain['order'])}",
            f"selection {_settings(recipe.selection, plain['selection'])}",
            *([schedule] if schedule != "schedule" else []),
            f"precision {recipe.precision}, skipped {_settings(recipe.skipped, plain['skipped'])}",
            f"blocks {recipe.block_q} x {recipe.block_k}",
        ]
        licence = f"licence {recipe.licence}" if recipe.licence else ""
        origin = [recipe.source, plain.get("note", ""), licence]
        table.add_row(recipe.name, "\n".join(choices), "\n".join(filter(None, origin)), end_section=True)
    Console().print(table)


def print_families(rows: Sequence[dict[str, Any]]) -> None:
    """The model families, where text stands in their self-attention, and what stays dense in them."""
    table = Table()
    for column in ("models", "transformer", "kind", "text", "stays dense"):
        table.add_column(column, overflow="fold")
    for row in rows:
        text = " and ".join(side for side in ("before", "after") if row[side])
        table.add_row(row["models"], row["transformer"], row["kind"], text, row["dense"])
    Console().print(table)


def row_line(row: dict[str, Any]) -> str:
    """A result row in one line."""
    density = "none" if row["density"] is None else f"{row['density']:.2f}"
    dense_steps = row["recipe"]["schedule"]["dense_steps"]
    batch = f", batch of {row['batch']}" if row["batch"] > 1 else ""
    return (
        f"{row['recipe']['name']} density {density}, {dense_steps} of {row['steps']} steps dense: "
        f"{row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}, "
        f"attention {row['attention_seconds_sparse']:.2f} of {row['attention_seconds_dense']:.2f} s{batch} "
        f"({row['prompt']})"
    )


def _settings(choice: Any, plain: str | dict[str, Any]) -> str:
    """A choice in one line: its name in recipes and the settings that are not its defaults."""
    if isinstance(plain, str):
        return plain
    defaults = {field.name: field.default for field in fields(choice)}
    changed = [
        f"{name} {value}" for name, value in plain.items() if name != "name" and getattr(choice, name) != defaults[name]
    ]
    return " ".join([plain["name"], *changed])
