"""Draws a contact sheet: a row a caption, five frames across the clip.

python -m sparse_dit.pipelines.tiny_wan.contact_sheet --out contact-sheet.png --prompts 12
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from sparse_dit.pipelines.tiny_wan import MODEL_DIR
from sparse_dit.pipelines.tiny_wan.evaluate import generate
from sparse_dit.pipelines.tiny_wan.grammar import held_out_prompts

_CAPTION_HEIGHT = 18
_COLUMNS = 2


def contact_sheet(captions: list[str], videos: list[Tensor], frames: int = 5) -> Image.Image:
    """One strip a video, two strips a line.

    Args:
        captions: what stands above each strip.
        videos: [T, H, W, 3] in [0, 1] each.
        frames: how many frames of each video, first and last among them.
    """
    strips = []
    for caption, video in zip(captions, videos, strict=True):
        chosen = torch.linspace(0, len(video) - 1, frames).round().long()
        pixels = (video[chosen].clamp(0, 1) * 255).round().byte().cpu().numpy()
        strip = np.concatenate(list(pixels), axis=1)
        image = Image.new("RGB", (strip.shape[1], strip.shape[0] + _CAPTION_HEIGHT), "white")
        ImageDraw.Draw(image).text((3, 3), caption, fill="black")
        image.paste(Image.fromarray(strip), (0, _CAPTION_HEIGHT))
        strips.append(image)
    width, height = strips[0].size
    sheet = Image.new("RGB", (_COLUMNS * (width + 8), -(-len(strips) // _COLUMNS) * height), "white")
    for index, image in enumerate(strips):
        sheet.paste(image, ((index % _COLUMNS) * (width + 8), index // _COLUMNS * height))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--prompts", type=int, default=12, help="held-out captions to draw")
    parser.add_argument("--seed", type=int, default=21)
    options = parser.parse_args()
    pipe = WanPipeline.from_pretrained(options.model, torch_dtype=torch.float32, use_safetensors=True)
    captions = held_out_prompts(options.prompts, seed=options.seed)
    videos = [generate(pipe, [caption], seed=index)[0] for index, caption in enumerate(captions)]
    contact_sheet(captions, videos).save(options.out)


if __name__ == "__main__":
    main()
