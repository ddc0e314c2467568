"""Judges a saved tiny-wan on held-out captions, and the judge itself on rendered videos, whose answers are known.

python -m sparse_dit.pipelines.tiny_wan.evaluate --out judge.json
python -m sparse_dit.pipelines.tiny_wan.evaluate --truth --out truth.json
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from einops import rearrange
from torch import Tensor

from sparse_dit.pipelines.tiny_wan import DEFAULTS, MODEL_DIR
from sparse_dit.pipelines.tiny_wan.grammar import Scene, draw_scene, held_out_scenes
from sparse_dit.pipelines.tiny_wan.judge import Verdict, judge, shares
from sparse_dit.pipelines.tiny_wan.videos import render

_SAMPLES = 24  # clips whose frames are kept
_TRUTH_SEED = 4242


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=DEFAULTS["guidance_scale"])
    parser.add_argument("--samples", type=Path, help="folder for frames of the first clips")
    parser.add_argument(
        "--truth", action="store_true", help="judge rendered training scenes, sharp and through the VAE"
    )
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.truth:
        report = evaluate_truth(options.model, options.captions, device, options.batch)
    else:
        report = evaluate(
            options.model, options.captions, options.samples, device, options.batch, guidance=options.guidance
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "wrong"}))
    return report


def evaluate(
    model: Path,
    count: int,
    samples: Path | None,
    device: str,
    batch: int = 16,
    guidance: float = DEFAULTS["guidance_scale"],
) -> dict[str, Any]:
    """Generate held-out captions with a saved pipeline and judge them.

    Args:
        model: the pipeline's folder.
        count: captions.
        samples: folder for five frames of each of the first clips; None keeps none.
        device: where to generate.
        batch: captions a call.
        guidance: scale of classifier-free guidance.

    Returns:
        What `judge.shares` finds, and what was found wrong.
    """
    pipe = WanPipeline.from_pretrained(model, torch_dtype=torch.float32, use_safetensors=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    verdicts: list[Verdict] = []
    for part in _batches(held_out_scenes(count, seed=7), batch):
        videos = generate(pipe, [scene.caption for scene in part], seed=len(verdicts), guidance=guidance)
        for scene, video in zip(part, videos, strict=True):
            if samples is not None and len(verdicts) < _SAMPLES:
                samples.mkdir(parents=True, exist_ok=True)
                strip = (video[:: DEFAULTS["num_frames"] // 4] * 255).round().byte().cpu()
                torch.save({"caption": scene.caption, "frames": strip}, samples / f"{len(verdicts):03d}.pt")
            verdicts.append(judge(scene, video))
    return {"guidance_scale": guidance, **_report(verdicts)}


@torch.no_grad()
def evaluate_truth(model: Path, count: int, device: str, batch: int = 16) -> dict[str, Any]:
    """Judge rendered videos of training captions, sharp and through the VAE of a saved pipeline: how good is the judge?

    Returns:
        What `judge.shares` finds, with `decoded_` before the names of what was found behind the VAE.
    """
    vae = AutoencoderKLWan.from_pretrained(model / "vae", torch_dtype=torch.float32).to(device)
    rng = random.Random(_TRUTH_SEED)
    sharp: list[Verdict] = []
    decoded: list[Verdict] = []
    for part in _batches([draw_scene(rng) for _ in range(count)], batch):
        seed = _TRUTH_SEED + len(sharp)
        clean = render(part, frames=DEFAULTS["num_frames"], size=DEFAULTS["height"], seed=seed, device=device)
        again = vae.decode(vae.encode(clean).latent_dist.mode()).sample.clamp(-1, 1)
        for found, videos in ((sharp, clean), (decoded, again)):
            frames = (rearrange(videos, "b c t h w -> b t h w c") + 1) / 2
            found += [judge(scene, video) for scene, video in zip(part, frames, strict=True)]
    return {**_report(sharp), **{f"decoded_{name}": value for name, value in _report(decoded).items()}}


def generate(pipe: WanPipeline, prompts: list[str], seed: int, guidance: float = DEFAULTS["guidance_scale"]) -> Tensor:
    """Frames [B, T, H, W, 3] in [0, 1] at the default size; prompt i has the noise of seed + i."""
    generators = [torch.Generator("cpu").manual_seed(seed + index) for index in range(len(prompts))]
    frames = pipe(prompts, generator=generators, output_type="pt", **{**DEFAULTS, "guidance_scale": guidance}).frames
    videos: Tensor = rearrange(frames, "b t c h w -> b t h w c").float()
    return videos


def _report(verdicts: list[Verdict]) -> dict[str, Any]:
    wrong = [v for v in verdicts if False in (v.color_right, v.shape_right, v.motion_right)]
    return {**shares(verdicts), "wrong": [vars(verdict) for verdict in wrong]}


def _batches(items: list[Scene], size: int) -> Iterator[list[Scene]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


if __name__ == "__main__":
    main()
