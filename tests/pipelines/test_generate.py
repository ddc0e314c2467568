"""Loading, generating and writing: what is refused, what is kept."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image, ImageSequence

from sparse_dit.pipelines import generate as module
from sparse_dit.pipelines import tiny_wan
from sparse_dit.pipelines.generate import (
    Request,
    call_arguments,
    check_model_folder,
    check_video_file,
    find_model,
    generate,
    generate_batch,
    load_pipeline,
    write_video,
)

SMALL = Request("a red circle moves right", seed=3, steps=2, height=32, width=32, num_frames=5)


@pytest.fixture(scope="module")
def pipe(mini_wan: Path) -> WanPipeline:
    loaded = load_pipeline(str(mini_wan))
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def broken(mini_wan: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(mini_wan, tmp_path / "broken"))


def test_frames_are_in_range_and_follow_the_seed(pipe: WanPipeline) -> None:
    frames = generate(pipe, SMALL)
    assert frames.shape == (5, 32, 32, 3)
    assert frames.dtype == np.float32
    assert frames.min() >= 0
    assert frames.max() <= 1
    np.testing.assert_array_equal(generate(pipe, SMALL), frames)
    assert np.abs(generate(pipe, replace(SMALL, seed=4)) - frames).max() > 0.01


def test_frames_are_the_pipelines_own(pipe: WanPipeline) -> None:
    own = pipe(
        SMALL.prompt,
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
    ).frames[0]
    np.testing.assert_array_equal(generate(pipe, SMALL), own)


def test_a_batch_has_the_noise_of_single_runs(pipe: WanPipeline) -> None:
    requests = [SMALL, replace(SMALL, prompt="a large blue ring", seed=4), replace(SMALL, seed=5)]
    clips = generate_batch(pipe, requests)
    assert len(clips) == 3
    for clip, request in zip(clips, requests, strict=True):
        np.testing.assert_allclose(clip, generate(pipe, request), atol=1e-5)
    named = [replace(request, negative_prompt="a cat") for request in requests[:2]]
    np.testing.assert_allclose(generate_batch(pipe, named)[1], generate(pipe, named[1]), atol=1e-5)


def test_requests_of_a_batch_differ_in_prompts_and_seeds_only(pipe: WanPipeline) -> None:
    with pytest.raises(ValueError, match="at least one"):
        generate_batch(pipe, [])
    for other in ({"height": 64}, {"steps": 3}, {"negative_prompt": "a cat"}, {"guidance_scale": 1.5}):
        for batch in ([SMALL, replace(SMALL, **other)], [replace(SMALL, **other), SMALL]):
            with pytest.raises(ValueError, match="valid: the same for all requests of a batch"):
                generate_batch(pipe, batch)


def test_defaults_are_the_models_own(pipe: WanPipeline, monkeypatch: pytest.MonkeyPatch, mini_wan: Path) -> None:
    arguments = call_arguments(pipe, Request("x", steps=7))
    assert arguments == {
        "prompt": "x",
        "num_inference_steps": 7,
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "guidance_scale": 5.0,
    }
    monkeypatch.setattr(tiny_wan, "MODEL_DIR", mini_wan)
    assert call_arguments(pipe, Request("x")) == {"prompt": "x", **tiny_wan.DEFAULTS}
    assert call_arguments(pipe, Request("x", height=64)) == {"prompt": "x", **tiny_wan.DEFAULTS, "height": 64}


def test_a_request_that_the_pipeline_does_not_take() -> None:
    class ImagePipeline:
        def __call__(self, prompt: str, height: int = 64) -> None: ...

    with pytest.raises(ValueError, match="num_frames: ImagePipeline does not take it"):
        call_arguments(ImagePipeline(), Request("x", num_frames=5))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"height": -8}, {"num_frames": 0}, {"seed": -1}, {"seed": 2**63},
        {"guidance_scale": float("nan")}, {"guidance_scale": float("inf")}, {"guidance_scale": -0.5},
    ],
)  # fmt: skip
def test_requests_are_checked(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: "):
        replace(SMALL, **wrong)
    assert replace(SMALL, seed=2**63 - 1, guidance_scale=0, steps=1).guidance_scale == 0


def test_weights_have_the_asked_dtype_and_the_vae_has_float32(mini_wan: Path) -> None:
    for asked, dtype in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        loaded = load_pipeline(str(mini_wan), dtype=asked)
        assert (loaded.transformer.dtype, loaded.vae.dtype) == (dtype, torch.float32)


def test_frames_that_are_not_finite_are_refused(mini_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = load_pipeline(str(mini_wan))
    spoilt.set_progress_bar_config(disable=True)
    with torch.no_grad():
        spoilt.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate(spoilt, SMALL)
    frames = np.ones((5, 32, 32, 3), np.float32)
    frames[4, 0, 0, 0] = np.inf
    monkeypatch.setattr(WanPipeline, "__call__", lambda self, **arguments: SimpleNamespace(frames=[frames]))
    monkeypatch.setattr(module, "batch_arguments", lambda pipe, requests: {})
    with pytest.raises(ValueError, match=r"not finite \(seed 3\)"):
        generate(spoilt, SMALL)


def test_models_are_folders_or_hub_ids(mini_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model("tiny-wan") == tiny_wan.MODEL_DIR
    assert find_model(str(mini_wan)) == mini_wan
    assert find_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("")  # what lies here is not asked from the Hub
    for nothing in ("owner/name", "../nothing", "tiny_wan", "/no/such/folder", "./nothing", ""):
        with pytest.raises(ValueError, match="'tiny-wan', a folder"):
            find_model(nothing)


def test_every_kind_of_weights_that_may_hold_code_is_refused(broken: Path) -> None:
    kinds = (".bin", ".ckpt", ".gguf", ".h5", ".joblib", ".msgpack", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth")
    for suffix in kinds:
        file = broken / f"more{suffix}"
        file.write_bytes(b"")
        with pytest.raises(ValueError, match=f"more{suffix} is refused"):
            check_model_folder(broken)
        file.unlink()
    check_model_folder(broken)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".ckpt", ".pth"])
def test_pickled_weights_are_refused(broken: Path, suffix: str) -> None:
    (broken / "vae" / f"more{suffix}").write_bytes(b"")
    with pytest.raises(ValueError, match=f"more{suffix} is refused; valid: weights in .safetensors"):
        load_pipeline(str(broken))


def _no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def _broken_index(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "WanPip')


def _unknown_pipeline(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanPipelin"}))


def _foreign_code(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Mine"]}))


def _no_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def _empty_component(folder: Path) -> None:
    _no_component(folder)
    (folder / "vae").mkdir()


def _no_weights(folder: Path) -> None:
    next((folder / "transformer").glob("*.safetensors")).unlink()


def _truncated_weights(folder: Path) -> None:
    file = next((folder / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def _empty_weights(folder: Path) -> None:
    next((folder / "vae").glob("*.safetensors")).write_bytes(b"")


def _broken_config(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text("[1, 2]")


def _other_shapes(folder: Path) -> None:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "ffn_dim": 48}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_index, "model_index.json is missing"),
        (_broken_index, "model_index.json is damaged"),
        (_unknown_pipeline, "nearest is 'WanPipeline'"),
        (_foreign_code, "valid: a pipeline of diffusers"),
        (_no_component, "lacks the folder 'vae'"),
        (_empty_component, "lacks the folder 'vae'"),
        (_no_weights, "cannot be loaded"),
        (_truncated_weights, r"transformer/.*safetensors is damaged"),
        (_empty_weights, r"vae/.*safetensors is damaged"),
        (_broken_config, "config.json is damaged"),
        (_other_shapes, "cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_one_line(broken: Path, damage, message: str) -> None:
    damage(broken)
    with pytest.raises(ValueError, match=message) as caught:
        load_pipeline(str(broken))
    assert "\n" not in str(caught.value)


def test_cuda_without_a_device(mini_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        load_pipeline(str(mini_wan), "cuda")


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 34), (33, 47)])
def test_a_video_keeps_its_size_and_length(tmp_path: Path, height: int, width: int) -> None:
    ramp = np.linspace(0, 1, 7, dtype=np.float32)[:, None, None, None]
    frames = np.broadcast_to(ramp, (7, height, width, 3))
    write_video(frames, tmp_path / "ramp.mp4", fps=8)
    assert [file.name for file in tmp_path.iterdir()] == ["ramp.mp4"]
    read = iio.imread(tmp_path / "ramp.mp4")
    assert read.shape == (7, height, width, 3)
    np.testing.assert_allclose(read.mean(axis=(1, 2, 3)) / 255, ramp.ravel(), atol=0.02)


def test_webp_is_lossless_and_needs_no_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 33, 48, 3), dtype=np.uint8)
    write_video((pixels / 255).astype(np.float32), tmp_path / "noise.webp", fps=8)
    with Image.open(tmp_path / "noise.webp") as video:
        read = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(video)]
    np.testing.assert_array_equal(np.stack(read), pixels)
    with pytest.raises(ValueError, match=r"needs ffmpeg; valid: install imageio-ffmpeg, or a name ending in \.webp$"):
        check_video_file(tmp_path / "x.mp4")


@pytest.mark.parametrize(("height", "width"), [(32, 33), (33, 32)])
def test_one_odd_side_is_enough_to_keep_all_colours(tmp_path: Path, height: int, width: int) -> None:
    write_video(np.zeros((2, height, width, 3), np.float32), tmp_path / "x.mp4")
    assert iio.immeta(tmp_path / "x.mp4")["pix_fmt"].startswith("yuv444p")


def test_a_video_has_the_frames_a_second_that_were_asked_for(tmp_path: Path) -> None:
    # No two frames are equal, as those may be joined.
    frames = np.linspace(0, 1, 4, dtype=np.float32)[:, None, None, None] * np.ones((4, 32, 32, 3), np.float32)
    for name in ("x.mp4", "x.webp"):
        write_video(frames, tmp_path / name, fps=5)
    assert iio.immeta(tmp_path / "x.mp4")["fps"] == 5
    with Image.open(tmp_path / "x.webp") as video:
        video.load()
        assert (video.info["duration"], video.info["loop"]) == (200, 0)


def test_values_outside_of_the_range_are_cut_and_the_others_rounded(tmp_path: Path) -> None:
    frames = np.array([-3.0, 2.0, 127.6 / 255], np.float32)[:, None, None, None] * np.ones((3, 4, 4, 3), np.float32)
    write_video(frames, tmp_path / "x.webp")
    with Image.open(tmp_path / "x.webp") as video:
        levels = [int(np.asarray(frame.convert("RGB"))[0, 0, 0]) for frame in ImageSequence.Iterator(video)]
    assert levels == [0, 255, 128]


@pytest.mark.parametrize("suffix", [".mp4", ".webp"])
def test_an_encoder_that_fails_leaves_the_video_of_before(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pixels: object, path: Path, fps: int) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, f"_write_{suffix[1:]}", fail)
    (tmp_path / f"x{suffix}").write_bytes(b"before")
    with pytest.raises(OSError, match="No space"):
        write_video(np.zeros((2, 8, 8, 3), np.float32), tmp_path / f"x{suffix}")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(f"x{suffix}", b"before")]


def test_a_video_that_fails_leaves_nothing(tmp_path: Path) -> None:
    for frames in (np.zeros((0, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 4), np.float32)):
        with pytest.raises(ValueError, match="frames: shape"):
            write_video(frames, tmp_path / "x.mp4")
    with pytest.raises(ValueError, match=r"\.mp4"):
        write_video(np.zeros((2, 8, 8, 3), np.float32), tmp_path / "x.gif")
    assert not list(tmp_path.iterdir())
