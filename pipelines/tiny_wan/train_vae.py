"""Trains the VAE of tiny-wan: single frames first, then whole clips at the default length.

    python -m sparse_dit.pipelines.tiny_wan.train_vae --out runs/vae --seconds 600

Resumable: started again with the same folder it goes on from the last checkpoint. Writes `vae/` in diffusers' format
and `vae.json` with the reconstruction PSNR on held-out clips.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from sparse_dit.pipelines.tiny_wan import DEFAULTS
from sparse_dit.pipelines.tiny_wan.architecture import build_vae
from sparse_dit.pipelines.tiny_wan.grammar import draw_scene, held_out_scenes
from sparse_dit.pipelines.tiny_wan.training import AveragedWeights, Run
from sparse_dit.pipelines.tiny_wan.videos import check_photos, render
from sparse_dit.pipelines.tiny_wan.whole_clip import WholeClipVAE

_FRAMES, _SIZE = DEFAULTS["num_frames"], DEFAULTS["height"]
_IMAGE_SHARE = 0.12
_KL_WEIGHT = 1e-4


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--batch", type=int, default=16, help="clips a step")
    parser.add_argument("--image-batch", type=int, default=128, help="frames a step of the first stage")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(arguments)
    check_photos()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    vae = build_vae().to(device)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    whole = WholeClipVAE(vae)
    optimizer = torch.optim.AdamW(
        vae.parameters(), options.rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=device == "cuda"
    )
    averaged = AveragedWeights(vae.parameters(), decay=0.999)
    run = Run(options.out, options.seconds, vae, optimizer, averaged, options.rate)
    run.resume()
    forward = torch.compile(whole) if options.compile else whole

    def loss_of(step: int, progress: float) -> dict[str, Tensor]:
        rng = random.Random(step)
        if progress < _IMAGE_SHARE:
            scenes = [draw_scene(rng) for _ in range(options.image_batch)]
            video = render(scenes, frames=2, size=_SIZE, seed=step, device=device)[:, :, :1]
            return reconstruction_loss(whole, video)
        scenes = [draw_scene(rng) for _ in range(options.batch)]
        return reconstruction_loss(forward, render(scenes, frames=_FRAMES, size=_SIZE, seed=step, device=device))

    run.train(loss_of)
    averaged.copy_to_model()
    whole.release()
    vae.to(torch.bfloat16).save_pretrained(options.out / "vae")
    report = evaluate(AutoencoderKLWan.from_pretrained(options.out / "vae", torch_dtype=torch.float32).to(device))
    report |= {"steps": run.step, "training_seconds": round(run.used)}
    (options.out / "vae.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return report


def reconstruction_loss(model: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], video: Tensor) -> dict[str, Tensor]:
    """L1 plus L2 of the pixels and a light KL term; bf16 autocast on CUDA."""
    video = video.contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast(video.device.type, torch.bfloat16, enabled=video.device.type == "cuda"):
        output, mean, log_variance = model(video)
    error = output.float() - video
    mean, log_variance = mean.float(), log_variance.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    squared = error.square().mean()
    loss = error.abs().mean() + 2 * squared + _KL_WEIGHT * divergence
    return {"loss": loss, "psnr": 10 * torch.log10(4 / squared.detach()), "kl": divergence.detach()}


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, clips: int = 64, batch: int = 8) -> dict[str, Any]:
    """Reconstruction PSNR in dB (of [0, 1] pixels, per clip) of held-out clips, through diffusers' own chunked path."""
    scenes = held_out_scenes(clips, seed=1)
    psnr = []
    started = time.perf_counter()
    for first in range(0, clips, batch):
        part = scenes[first : first + batch]
        video = render(part, frames=_FRAMES, size=_SIZE, seed=first, device=vae.device)
        output = vae.decode(vae.encode(video).latent_dist.mode()).sample
        squared = F.mse_loss(output, video, reduction="none").mean((1, 2, 3, 4))
        psnr += (10 * torch.log10(4 / squared)).tolist()
    ordered = sorted(psnr)
    return {
        "clips": clips,
        "frames": _FRAMES,
        "psnr_mean": sum(psnr) / clips,
        "psnr_median": ordered[clips // 2],
        "psnr_min": ordered[0],
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    main()
