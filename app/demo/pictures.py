"""What the page draws: difference maps, block masks over frames, and tables as HTML that follows the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from sparse_dit.app.demo.actions import Finished, Pixels, frame_of
from sparse_dit.app.demo.inside import Table, Tokens
from sparse_dit.app.output import only_dense
from sparse_dit.eval.mask_pictures import RING, enlarged, mask_picture, ring
from sparse_dit.eval.results import Row
from sparse_dit.eval.side_by_side import difference_gain
from sparse_dit.pipelines.generate import TINY_WAN
from sparse_dit.pipelines.tiny_wan.grammar import vocabulary

_STRIP = 224
_BAR = 30  # pixels above a frame of the strip, for its label
_COLUMNS = 3


def difference_map(dense: npt.NDArray[np.uint8], sparse: npt.NDArray[np.uint8]) -> tuple[Image.Image, int]:
    """The absolute difference of two frames [H, W, 3], enlarged, times a gain.

    Returns:
        The picture, and the gain.
    """
    difference = np.abs(dense.astype(np.float32) - sparse) / 255
    gain = difference_gain(difference)
    return enlarged(np.round(np.clip(difference * gain, 0, 1) * 255).astype(np.uint8)), gain


def outline(picture: Image.Image, tokens: npt.NDArray[np.bool_]) -> Image.Image:
    """A picture with a thin line around tokens [h, w]; changed in place."""
    height, width = picture.height / tokens.shape[0], picture.width / tokens.shape[1]
    draw = ImageDraw.Draw(picture)
    padded = np.pad(tokens, 1)
    for row, column in np.argwhere(tokens):
        left, top, right, bottom = column * width, row * height, (column + 1) * width, (row + 1) * height
        for beside, line in (
            (padded[row, column + 1], (left, top, right, top)),
            (padded[row + 2, column + 1], (left, bottom - 1, right, bottom - 1)),
            (padded[row + 1, column], (left, top, left, bottom)),
            (padded[row + 1, column + 2], (right - 1, top, right - 1, bottom)),
        ):
            if not beside:
                draw.line(line, fill=RING[1], width=2)
    return picture


def mask_strip(clip: Pixels, keys: Tokens, query: tuple[int, int, int]) -> Image.Image:
    """Every latent frame with the tokens that are computed for a query, at most 12 of them, the query's among them.

    Args:
        clip: the sparse clip [F, H, W, 3].
        keys: [T, h, w].
        query: (t, h, w).
    """
    latents = len(keys)
    chosen = sorted({*np.linspace(0, latents - 1, min(latents, 12)).round().astype(int).tolist(), query[0]})
    font = ImageFont.load_default(20)
    tiles = []
    for latent in chosen:
        picture = mask_picture(clip[frame_of(latent, len(clip), latents)], keys[latent], _STRIP)
        if latent == query[0]:
            ring(picture, query[1:], (keys.shape[1], keys.shape[2]))
        tile = Image.new("RGB", (picture.width, picture.height + _BAR), (24, 24, 27))
        tile.paste(picture, (0, _BAR))
        text = f"{latent}: {keys[latent].mean():.0%}" + (" (query)" if latent == query[0] else "")
        ImageDraw.Draw(tile).text((6, 4), text, fill=RING[1] if latent == query[0] else (228, 228, 231), font=font)
        tiles.append(tile)
    return _tiled(tiles)


def _tiled(tiles: Sequence[Image.Image]) -> Image.Image:
    width, height, gap = tiles[0].width, tiles[0].height, 4
    rows = -(-len(tiles) // _COLUMNS)
    columns = min(_COLUMNS, len(tiles))
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (24, 24, 27))
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % _COLUMNS * (width + gap), number // _COLUMNS * (height + gap)))
    return sheet


def thumbnail(run: Finished) -> Image.Image:
    """The middle frame of a run, dense beside sparse."""
    frame = run.frames // 2
    both = np.concatenate([run.clip(name)[frame] for name in ("dense", "sparse")], axis=1)
    picture = enlarged(both, 512)
    picture.thumbnail((512, 512))
    return picture


def caption(run: Finished) -> str:
    """A run in one line of plain text."""
    record = run.record
    return f"{run.number}. {record['recipe']['name']}, {record['psnr']:.1f} dB: {record['prompt']}"


def numbers_html(record: Row) -> str:
    """Time, attention time, density and quality of a run as a table."""
    rows = []
    for label, name in (("Time", "seconds"), ("Attention time", "attention_seconds")):
        dense, sparse = record[f"{name}_dense"], record[f"{name}_sparse"]
        ratio = f"{sparse / dense:.2f}" if dense else ""
        rows.append((label, _seconds(dense), _seconds(sparse), ratio))
    density = record["density"]
    rows.append(("Density", "1", "no sparse call" if density is None else f"{density:.3f}", ""))
    rows.append(("Run density", "1", f"{record['run_density']:.3f}", ""))
    rows.append(("PSNR, mean frame", "", f"{record['psnr']:.1f} dB (worst {record['psnr_min']:.1f})", ""))
    rows.append(("SSIM, mean frame", "", f"{record['ssim']:.3f} (worst {record['ssim_min']:.3f})", ""))
    calls = record["calls"]
    dense_calls = ", ".join(f"{count} dense ({reason})" for reason, count in calls["dense"].items())
    note = f"{calls['sparse']} of {calls['made']} attention calls sparse{', ' + dense_calls if dense_calls else ''}; "
    note += f"{record['backend']} kernel on {record['device']['name']}, {record['device']['dtype']}; "
    note += " x ".join(map(str, record["grid"])) + f" tokens, seed {record['seed']}, {record['steps']} steps"
    if only_dense(calls["sparse"], calls["dense"]):
        hint = ": have fewer dense steps than steps" if "dense_steps" in calls["dense"] else ""
        note = f"Every call was dense{hint}. {note}"
    if unknown := _unknown_words(record):
        note = f"{TINY_WAN} was trained on few words, and not on: {', '.join(unknown)}. {note}"
    body = "".join(
        f"<tr><th scope=row>{label}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for label, *cells in rows
    )
    head = "".join(f"<th scope=col>{name}</th>" for name in ("", "Dense", "Sparse", "Sparse / dense"))
    return (
        f"<div class=numbers><p class=told>{escape(record['model'])}, {escape(record['recipe']['name'])}: "
        f"{escape(record['prompt'])}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p class=small>{escape(note)}</p></div>"
    )


def _unknown_words(record: Row) -> list[str]:
    """Words of the prompt that tiny-wan reads as one and the same unknown word; other models know their own."""
    known = set(vocabulary())
    return [
        word for word in dict.fromkeys(record["prompt"].split()) if record["model"] == TINY_WAN and word not in known
    ]


def _seconds(value: float) -> str:
    return f"{value:.3f}\N{NO-BREAK SPACE}s" if value < 1 else f"{value:.1f}\N{NO-BREAK SPACE}s"


def heat_html(table: Table, title: str, note: str) -> str:
    """A figure in 0..1 by step (down) and layer (across); dense cells are hatched."""
    if not table:
        return ""
    head = "".join(f"<th scope=col>{layer}</th>" for layer in range(len(table[0])))
    body = []
    for step, row in enumerate(table):
        cells = "".join(
            "<td class=dense title='dense'>dense</td>" if value is None else _heat_cell(value) for value in row
        )
        body.append(f"<tr><th scope=row>{step}</th>{cells}</tr>")
    return (
        f"<figure class=heat><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption><div class=scroll>"
        f"<table><thead><tr><th scope=col>step \\ layer</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        "</div></figure>"
    )


def _heat_cell(value: float) -> str:
    share = min(max(value, 0.0), 1.0)
    color = "#fff" if share > 0.8 else "inherit"
    return f"<td style='background:rgba(194,65,12,{0.08 + 0.87 * share:.2f});color:{color}'>{value:.2f}</td>"
