"""The scripts that train and judge tiny-wan: what they minimise, what they measure, and that each runs to its end."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from torch import Tensor

from sparse_dit.pipelines.tiny_wan import DEFAULTS, MODEL_DIR, evaluate, train_transformer, train_vae, training
from sparse_dit.pipelines.tiny_wan.judge import Verdict


def test_the_flow_goes_from_clean_to_noise_at_the_shifted_level() -> None:
    """A transformer that knows the clean latents finds the noise by the level that it is told."""
    torch.manual_seed(0)
    clean, levels = torch.randn(4000, 2, 1, 1, 1), []

    def transformer(noisy: Tensor, time: Tensor, text: Tensor, return_dict: bool) -> tuple[Tensor]:
        level = (time / 1000).view(-1, 1, 1, 1, 1)
        levels.append(level)
        return ((noisy - clean) / level,)

    loss = train_transformer.flow_loss(transformer, clean, torch.zeros(0))  # type: ignore[arg-type]
    assert loss < 1e-6
    # Half of the levels are above that of 0 shifted by 3: 3 / 2 / (1 + 2 / 2).
    assert levels[0].median().item() == pytest.approx(0.75, abs=0.02)


def test_the_loss_of_the_vae_by_hand() -> None:
    video = torch.rand(1, 3, 2, 4, 4)

    def model(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return video + 0.2, torch.ones(1, 2), torch.full((1, 2), math.log(2))

    found = train_vae.reconstruction_loss(model, video)
    divergence = 0.5 * (1 + 2 - 1 - math.log(2))
    assert found["kl"].item() == pytest.approx(divergence)
    assert found["psnr"].item() == pytest.approx(20.0, abs=1e-3)  # pixels from -1 to 1: 0.2 is a tenth of the range
    wanted = 0.2 + 2 * 0.04
    assert found["loss"].item() - wanted == pytest.approx(1e-4 * divergence, rel=0.01)


def test_the_vae_is_measured_in_decibels_of_the_whole_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_vae, "_FRAMES", 2)
    monkeypatch.setattr(train_vae, "_SIZE", 16)
    vae = SimpleNamespace(
        device="cpu",
        encode=lambda video: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: video)),
        decode=lambda video: SimpleNamespace(sample=video + 0.02),
    )
    found = train_vae.evaluate(vae, clips=4, batch=3)  # type: ignore[arg-type]
    assert [found[f"psnr_{name}"] for name in ("mean", "median", "min")] == pytest.approx([40.0] * 3, abs=1e-3)


def test_prompts_have_noise_and_guidance_of_their_own() -> None:
    given: dict[str, Any] = {}

    def pipe(prompts: list[str], **settings: Any) -> SimpleNamespace:
        given.update(settings)
        return SimpleNamespace(frames=torch.zeros(len(prompts), 2, 3, 4, 5))

    assert evaluate.generate(pipe, ["a", "b"], seed=7, guidance=2.5).shape == (2, 2, 4, 5, 3)  # type: ignore[arg-type]
    assert [generator.initial_seed() for generator in given["generator"]] == [7, 8]
    assert given["guidance_scale"] == 2.5
    assert given["num_inference_steps"] == DEFAULTS["num_inference_steps"]


def test_a_report_names_what_is_wrong_in_any_way() -> None:
    right = {"caption": "a", "color": "red", "shape": "star", "motion": "left"}
    fine = {"color_right": True, "shape_right": None, "motion_right": True}
    verdicts = [Verdict(**right, **fine)]
    verdicts += [Verdict(**right, **{**fine, name: False}) for name in fine]
    assert evaluate._report(verdicts)["wrong"] == [vars(verdict) for verdict in verdicts[1:]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny clips, and a second of training a step."""
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    for name, value in (("num_frames", 5), ("height", 32), ("width", 32), ("num_inference_steps", 1)):
        monkeypatch.setitem(DEFAULTS, name, value)
    monkeypatch.setattr(train_vae, "_FRAMES", 5)
    monkeypatch.setattr(train_vae, "_SIZE", 32)


@pytest.mark.usefixtures("small")
def test_the_vae_is_trained_on_frames_then_clips_and_written_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    loss, measure = train_vae.reconstruction_loss, train_vae.evaluate

    def watched(model: Any, video: Tensor) -> dict[str, Tensor]:
        seen.append(video.shape[2])
        return loss(model, video)

    monkeypatch.setattr(train_vae, "reconstruction_loss", watched)
    monkeypatch.setattr(train_vae, "evaluate", lambda vae: measure(vae, clips=1))
    options = ["--out", str(tmp_path), "--seconds", "3", "--batch", "1", "--image-batch", "2"]
    report = train_vae.main(options)
    assert seen == [1, 5, 5]
    assert (report["steps"], report["frames"]) == (3, 5)
    assert json.loads((tmp_path / "vae.json").read_text()) == report
    check_averaged(tmp_path, load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors"))
    assert train_vae.main(options)["steps"] == 3, "its time is used up"


def check_averaged(folder: Path, written: dict[str, Tensor], part: str = "") -> None:
    """Weights on the disk are those of the checkpoint's average, in bf16; the part is the first of what was trained."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    names = [name.removeprefix(part) for name in saved["model"] if name.startswith(part)]
    assert set(names) == set(written)
    for name, average in zip(names, saved["average"], strict=not part):
        assert written[name].dtype is torch.bfloat16
        assert torch.equal(written[name], average.bfloat16())


@pytest.mark.usefixtures("small")
def test_the_transformer_is_trained_on_cached_latents_and_written_with_its_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleans: list[Tensor] = []
    texts: list[list[str]] = []
    embed = train_transformer.prompt_embeddings

    def embeddings(tokenizer: Any, encoder: Any, captions: list[str], length: int) -> Tensor:
        texts.append(captions)
        return embed(tokenizer, encoder, captions, length)

    def loss(transformer: Any, clean: Tensor, text: Tensor) -> Tensor:
        cleans.append(clean.cpu())
        return text.square().mean() + sum(weight.square().mean() for weight in transformer.parameters())

    monkeypatch.setattr(train_transformer, "prompt_embeddings", embeddings)
    monkeypatch.setattr(train_transformer, "flow_loss", loss)
    options = ["--vae", str(MODEL_DIR / "vae"), "--out", str(tmp_path), "--seconds", "2", "--clips", "6"]
    report = train_transformer.main([*options, "--batch", "24", "--judged", "1"])
    assert (report["steps"], report["clips_cached"], report["captions"]) == (2, 6, 1)
    cached = torch.load(tmp_path / "latents-6-0.pt", weights_only=True)
    said = {text for step in texts for text in step}
    assert "" in said
    assert said - {""} == set(cached["captions"])
    # Latents come to the transformer as the pipeline has them: by channel of mean 0 and deviation 1 over all clips.
    pipe = WanPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    mean, std = (torch.tensor(getattr(pipe.vae.config, f"latents_{name}")) for name in ("mean", "std"))
    torch.testing.assert_close(mean, cached["latents"].float().mean((0, 2, 3, 4)))
    whole = torch.cat(cleans) * std.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1)
    nearest = (whole[:, None] - cached["latents"].float()).abs().amax((2, 3, 4, 5)).amin(1)
    assert nearest.max() < 1e-3
    written = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    check_averaged(tmp_path, load_file(written), "transformer.")
    assert str(MODEL_DIR) not in (tmp_path / "model" / "vae" / "config.json").read_text()
    monkeypatch.setattr(train_transformer, "render", lambda *_, **__: pytest.fail("clips were drawn again"))
    captions, latents = train_transformer.cached_latents(pipe.vae, tmp_path, 6, seed=0, device="cpu")
    assert captions == cached["captions"]
    assert torch.equal(latents, cached["latents"])
