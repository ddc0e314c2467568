"""From a model's name to a pipeline, from a request to frames, from frames to a video file."""

import inspect
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparse_dit.pipelines import tiny_wan

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

Frames = npt.NDArray[np.float32]
"""Frames [F, H, W, C], float32 in 0..1, as they leave the VAE and before any video codec."""

TINY_WAN = "tiny-wan"

WEIGHTS_REFUSED = frozenset(
    {".bin", ".ckpt", ".gguf", ".h5", ".joblib", ".msgpack", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth"}
)
VIDEO_SUFFIXES = (".mp4", ".webp")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Request:
    """One generation. What is None is left to the model's own default.

    Args:
        prompt: what the frames should show.
        negative_prompt: what they should not show.
        seed: seed of the noise, which is drawn on the CPU and so is the same on every device.
        steps: denoising steps, at least 1.
        height: height of a frame in pixels.
        width: width of a frame in pixels.
        num_frames: frames of the video; image pipelines take none.
        guidance_scale: classifier-free guidance; 1 turns it off.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; valid: a whole number from 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed}; valid: a whole number from 0 to 2^63 - 1")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale: {self.guidance_scale}; valid: a finite number from 0")


def load_pipeline(
    model: str, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None
) -> "DiffusionPipeline":
    """Loads a diffusers pipeline from safetensors and puts it on a device.

    Args:
        model: `tiny-wan` (ships with this package), a folder in diffusers' save format, or a Hub id `owner/name`.
        device: where it will run.
        dtype: of the weights; None is bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ValueError: the model is unknown, its folder is damaged, or it holds weights other than safetensors.
    """
    import diffusers
    import torch

    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {str(device)!r}; there is no CUDA device; valid: 'cpu'")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    source = find_model(model)
    if isinstance(source, Path):
        check_model_folder(source)
    # Wan's VAE drifts visibly in 16 bits; its authors run it in float32 beside a 16-bit transformer.
    dtypes = {"default": dtype, "vae": torch.float32}
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(source), dtype=dtypes, use_safetensors=True)
    except Exception as error:  # whatever a loader stumbles over, the user can only mend the model
        raise ValueError(f"model: {model!r} cannot be loaded ({_first_line(error)})") from error
    return pipeline.to(device)


def find_model(model: str) -> Path | str:
    """The folder that `model` means, or `model` itself where it is a Hub id.

    Raises:
        ValueError: it is neither.
    """
    if model == TINY_WAN:
        return Path(tiny_wan.MODEL_DIR)
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder
    if HUB_ID.fullmatch(model) and not folder.exists() and not model.startswith("."):
        return model
    raise ValueError(f"model: {model!r}; valid: {TINY_WAN!r}, a folder with model_index.json or a Hub id 'owner/name'")


def check_model_folder(folder: Path) -> None:
    """Holds a folder against diffusers' save format before anything in it is loaded.

    Raises:
        ValueError: in one line, with the file that is missing, damaged or refused.
    """
    import diffusers

    refused = sorted(file for file in folder.rglob("*") if file.suffix in WEIGHTS_REFUSED)
    if refused:
        raise ValueError(f"model: {refused[0]} is refused; valid: weights in .safetensors, which cannot carry code")
    index = _read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str) or not hasattr(diffusers, name):
        known = [entry for entry in dir(diffusers) if entry.endswith("Pipeline")]
        near = get_close_matches(str(name), known, n=1)
        hint = f", nearest is {near[0]!r}" if near else ""
        raise ValueError(f"model: {folder / 'model_index.json'} names {name!r}; valid: a pipeline of diffusers{hint}")
    for component, entry in index.items():
        if component.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        if not (folder / component).is_dir() or not any((folder / component).iterdir()):
            raise ValueError(
                f"model: {folder} lacks the folder {component!r}, which its model_index.json names as {entry[1]}"
            )
    for file in sorted(folder.rglob("*.json")):
        _read_json(file)
    for file in sorted(folder.rglob("*.safetensors")):
        _check_safetensors(file)


def generate(pipe: "DiffusionPipeline", request: Request, **overrides: Any) -> Frames:
    """Runs a pipeline once.

    Args:
        pipe: as `load_pipeline` returns it, sparse or not.
        request: what to generate.
        **overrides: further arguments of the pipeline's own call.

    Returns:
        Frames [F, H, W, C], float32 in 0..1; F is 1 for an image pipeline.

    Raises:
        ValueError: the request asks for what the pipeline does not take, or the frames are not finite.
    """
    return generate_batch(pipe, [request], **overrides)[0]


def generate_batch(pipe: "DiffusionPipeline", requests: Sequence[Request], **overrides: Any) -> list[Frames]:
    """Runs a pipeline once for several prompts, each from the noise that it has when it runs alone.

    Args:
        pipe: as `generate`.
        requests: what to generate; they differ in prompt, negative prompt and seed only.
        **overrides: further arguments of the pipeline's own call.

    Returns:
        Frames as `generate`, one clip a request.

    Raises:
        ValueError: as `generate`, no request, or requests that cannot share a call.
    """
    import torch

    arguments = batch_arguments(pipe, requests)
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
    with torch.inference_mode():
        output = pipe(**arguments, generator=generators, output_type="np", **overrides)
    # An image pipeline gives one image a request: a clip of one frame.
    clips = output.frames if hasattr(output, "frames") else [image[None] for image in output.images]
    frames = [np.asarray(clip, dtype=np.float32) for clip in clips]
    for clip, request in zip(frames, requests, strict=True):
        if not np.isfinite(clip).all():
            raise ValueError(f"{type(pipe).__name__} produced frames that are not finite (seed {request.seed})")
    return frames


def batch_arguments(pipe: "DiffusionPipeline", requests: Sequence[Request]) -> dict[str, Any]:
    """The arguments of one call for several requests: `call_arguments`, with lists of prompts.

    Raises:
        ValueError: as `call_arguments`, no request, or requests that cannot share a call.
    """
    if not requests:
        raise ValueError("requests: there are none; valid: at least one")
    first, *others = (call_arguments(pipe, request) for request in requests)
    prompts = ("prompt", "negative_prompt")
    for other in others:
        for name in first.keys() | other.keys():
            if (name not in first or name not in other) or (name not in prompts and first[name] != other[name]):
                raise ValueError(
                    f"{name}: {first.get(name)!r} and {other.get(name)!r}; valid: the same for all requests of a batch"
                )
    return {**first, **{name: [first[name], *(other[name] for other in others)] for name in prompts if name in first}}


def call_arguments(pipe: "DiffusionPipeline", request: Request) -> dict[str, Any]:
    """The arguments of the pipeline's call that a request means, its model's defaults filled in.

    Raises:
        ValueError: the request sets what this pipeline's call does not have.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    asked = {name: value for name, value in asdict(request).items() if name != "seed" and value is not None}
    if "steps" in asked:
        asked["num_inference_steps"] = asked.pop("steps")
    unknown = sorted(asked.keys() - parameters.keys())
    if unknown:
        raise ValueError(f"{unknown[0]}: {type(pipe).__name__} does not take it; leave it out")
    names = ("num_inference_steps", "height", "width", "num_frames", "guidance_scale")
    defaults = {name: parameters[name].default for name in names if name in parameters}
    if Path(pipe.config._name_or_path) == Path(tiny_wan.MODEL_DIR):
        defaults.update(tiny_wan.DEFAULTS)
    return {**{name: value for name, value in defaults.items() if value is not None}, **asked}


def check_video_file(path: Path) -> None:
    """Holds a video's file name against what can be written here, before anything is generated.

    Raises:
        ValueError: another suffix than .mp4 or .webp, or .mp4 without an ffmpeg to write it.
    """
    if path.suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"video file: {str(path)!r}; valid: a name ending in {' or '.join(VIDEO_SUFFIXES)}")
    if path.suffix == ".mp4":
        try:
            import imageio_ffmpeg

            imageio_ffmpeg.get_ffmpeg_exe()
        except (ImportError, RuntimeError):
            raise ValueError(
                f"video file: {str(path)!r} needs ffmpeg; valid: install imageio-ffmpeg, or a name ending in .webp"
            ) from None


def write_video(frames: Frames, path: Path, fps: int = 16) -> None:
    """Writes frames [F, H, W, C] in 0..1 at their own size; the file appears under its name once it is whole.

    Args:
        frames: at least one frame, three channels.
        path: ends in .mp4 (H.264) or .webp (animated, lossless, needs no ffmpeg).
        fps: frames a second.

    Raises:
        ValueError: no frame, not three channels, or as `check_video_file`.
    """
    if frames.ndim != 4 or frames.shape[0] == 0 or frames.shape[-1] != 3:
        raise ValueError(f"frames: shape {frames.shape}; valid: [F, H, W, 3] with F from 1")
    check_video_file(path)
    pixels = np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        (_write_mp4 if path.suffix == ".mp4" else _write_webp)(pixels, partial, fps)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_mp4(pixels: npt.NDArray[np.uint8], path: Path, fps: int) -> None:
    import imageio.v2 as imageio

    odd_sides = pixels.shape[1] % 2 or pixels.shape[2] % 2
    imageio.mimwrite(
        path,
        list(pixels),
        format="FFMPEG",
        fps=fps,
        codec="libx264",
        quality=None,
        # 4:2:0 halves the colour planes and needs even sides; a macro block of 1 keeps imageio from rescaling.
        pixelformat="yuv444p" if odd_sides else "yuv420p",
        macro_block_size=1,
        output_params=["-crf", "16", "-movflags", "+faststart"],
    )


def _write_webp(pixels: npt.NDArray[np.uint8], path: Path, fps: int) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in pixels)
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, lossless=True)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model: {file} is missing; valid: a folder in diffusers' save format") from None
    except ValueError as error:
        raise ValueError(f"model: {file} is damaged ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"model: {file} is damaged (it holds no JSON object)")
    return content


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"model: {file} is damaged ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
