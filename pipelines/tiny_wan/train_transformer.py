"""Trains the transformer and the text encoder of tiny-wan on cached latents, by rectified flow.

    python -m sparse_dit.pipelines.tiny_wan.train_transformer --vae runs/vae/vae --out runs/transformer --seconds 900

Resumable: started again with the same folder it goes on from the last checkpoint. Writes the whole pipeline to
`model/` and what the judge finds on held-out captions to `judge.json`.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from einops import rearrange
from torch import Tensor, nn

from sparse_dit.pipelines.tiny_wan import DEFAULTS
from sparse_dit.pipelines.tiny_wan.architecture import FLOW_SHIFT, build_pipeline, prompt_embeddings
from sparse_dit.pipelines.tiny_wan.evaluate import evaluate
from sparse_dit.pipelines.tiny_wan.grammar import draw_scene
from sparse_dit.pipelines.tiny_wan.training import AveragedWeights, Run
from sparse_dit.pipelines.tiny_wan.videos import check_photos, render
from sparse_dit.pipelines.tiny_wan.whole_clip import WholeClipVAE

_CAPTION_DROPOUT = 0.1
# Padding dilutes cross-attention, as in Wan: a short one makes the start easy, the long one is the pipeline's default.
_SHORT_TEXT, _LONG_TEXT = 64, 512
_SHORT_TEXT_SHARE = 0.4


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--clips", type=int, default=16384, help="clips whose latents are cached")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--judged", type=int, default=64, help="held-out captions generated and judged at the end")
    parser.add_argument("--guidance", type=float, default=DEFAULTS["guidance_scale"], help="of what is judged")
    parser.add_argument("--init", type=Path, help="a saved pipeline whose transformer and text encoder to start from")
    parser.add_argument("--seed", type=int, default=0, help="of the clips and the noise; another one for a second run")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(arguments)
    check_photos()
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKLWan.from_pretrained(options.vae, torch_dtype=torch.float32).to(device)
    captions, latents = cached_latents(vae, options.out, options.clips, options.seed, device)
    mean, std = latents.float().mean((0, 2, 3, 4)), latents.float().std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    pipe = build_pipeline(vae).to(device)
    if options.init:
        start = WanPipeline.from_pretrained(options.init, torch_dtype=torch.float32, use_safetensors=True)
        pipe.transformer.load_state_dict(start.transformer.state_dict())
        pipe.text_encoder.load_state_dict(start.text_encoder.state_dict())
    model = nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), options.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device == "cuda"
    )
    averaged = AveragedWeights(model.parameters(), decay=0.999)
    run = Run(options.out, options.seconds, model, optimizer, averaged, options.rate)
    run.resume()
    if options.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    shape = (1, -1, 1, 1, 1)
    shift, scale = mean.view(shape).to(device), std.view(shape).to(device)

    def loss_of(step: int, progress: float) -> dict[str, Tensor]:
        rng = random.Random(f"step {step} of {options.seed}")
        chosen = torch.tensor([rng.randrange(len(captions)) for _ in range(options.batch)])
        clean = (latents[chosen.to(latents.device)].to(device).float() - shift) / scale
        text = ["" if rng.random() < _CAPTION_DROPOUT else captions[index] for index in chosen.tolist()]
        length = _SHORT_TEXT if progress < _SHORT_TEXT_SHARE else _LONG_TEXT
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            embeddings = prompt_embeddings(pipe.tokenizer, pipe.text_encoder, text, length)
            return {"loss": flow_loss(pipe.transformer, clean, embeddings)}

    run.train(loss_of)
    averaged.copy_to_model()
    save(pipe, options.out / "model")
    report = evaluate(options.out / "model", options.judged, options.out / "samples", device, guidance=options.guidance)
    report |= {"steps": run.step, "training_seconds": round(run.used), "clips_cached": len(captions)}
    (options.out / "judge.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "wrong"}))
    return report


@torch.no_grad()
def cached_latents(vae: AutoencoderKLWan, folder: Path, count: int, seed: int, device: str) -> tuple[list[str], Tensor]:
    """Captions and latent means of training clips, [count, 16, 9, 16, 16] fp16; read from `folder` when there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"latents-{count}-{seed}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        return saved["captions"], saved["latents"].to(device)
    whole, rng, batch = WholeClipVAE(vae), random.Random(f"clips {seed}"), 32
    scenes = [draw_scene(rng) for _ in range(count)]
    started, parts = time.perf_counter(), []
    for first in range(0, count, batch):
        video = render(
            scenes[first : first + batch],
            frames=DEFAULTS["num_frames"],
            size=DEFAULTS["height"],
            seed=1_000_000 * (seed + 1) + first,
            device=device,
        )
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            parts.append(whole.encode(video)[0].half())
    whole.release()
    latents = torch.cat(parts)
    captions = [scene.caption for scene in scenes]
    torch.save({"captions": captions, "latents": latents.cpu()}, path)
    print(json.dumps({"cached": count, "seconds": round(time.perf_counter() - started, 1)}), flush=True)
    return captions, latents


def flow_loss(transformer: nn.Module, clean: Tensor, embeddings: Tensor) -> Tensor:
    """Rectified flow: predict noise - clean at x = (1 - sigma) clean + sigma noise (Liu et al., 2022).

    The noise level sigma is logit-normal and then shifted like the pipeline's scheduler shifts it.
    """
    level = torch.sigmoid(torch.randn(len(clean), device=clean.device))
    level = FLOW_SHIFT * level / (1 + (FLOW_SHIFT - 1) * level)
    noise = torch.randn_like(clean)
    sigma = rearrange(level, "b -> b 1 1 1 1")
    noisy = (1 - sigma) * clean + sigma * noise
    (prediction,) = transformer(noisy, level * 1000, embeddings, return_dict=False)
    loss: Tensor = (prediction.float() - (noise - clean)).square().mean()
    return loss


def save(pipe: WanPipeline, folder: Path) -> None:
    """Write the pipeline in bf16 safetensors."""
    pipe.vae.register_to_config(_name_or_path="")  # where it was read from is nobody's business
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        part.to(torch.bfloat16)
    pipe.save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    main()
