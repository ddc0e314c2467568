"""PSNR, SSIM and flicker against planted noise, against scikit-image and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from sparse_dit.eval import metrics, perceptual
from sparse_dit.eval.metrics import flicker, measure, psnr, ssim


def clip(frames: int = 3, height: int = 33, width: int = 47, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((frames, height, width, 3), dtype=np.float32)


@pytest.mark.parametrize("frames", [1, 8, 9, 17])
def test_psnr_of_planted_noise(frames: int) -> None:
    reference = np.full((frames, 13, 17, 3), 0.5, np.float32)
    noisy = reference.copy()
    offsets = np.float32(2.0) ** -np.arange(2, 2 + frames)
    noisy += offsets[:, None, None, None]
    expected = -20 * np.log10(offsets.astype(np.float64))
    measured = psnr(noisy, reference)
    assert measured.mean == pytest.approx(expected.mean())
    assert measured.median == pytest.approx(np.median(expected))
    assert measured.min == pytest.approx(expected.min())


def test_one_planted_pixel() -> None:
    reference = clip(2)
    changed = reference.copy()
    changed[1, 5, 7, 2] = reference[1, 5, 7, 2] + (0.25 if reference[1, 5, 7, 2] < 0.5 else -0.25)
    expected = 10 * math.log10(33 * 47 * 3 / 0.25**2)
    measured = psnr(changed, reference)
    assert measured.min == pytest.approx(expected, abs=1e-5)
    assert measured.mean == measured.median == math.inf


def test_agrees_with_scikit_image() -> None:
    reference, noise = clip(seed=1), clip(seed=2)
    frames = (0.8 * reference + 0.2 * noise).astype(np.float32)
    expected = [
        peak_signal_noise_ratio(a.astype(float), b.astype(float), data_range=1.0)
        for a, b in zip(reference, frames, strict=True)
    ]
    assert psnr(frames, reference).mean == pytest.approx(np.mean(expected), abs=1e-6)

    def structure(a: np.ndarray, b: np.ndarray) -> float:
        # scikit-image leaves the window's border out of the mean, so mirroring it first makes it cover the whole frame.
        mirrored = [np.pad(image.astype(float), ((5, 5), (5, 5), (0, 0)), mode="reflect") for image in (a, b)]
        return float(
            structural_similarity(
                *mirrored, data_range=1.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
        )

    values = [structure(a, b) for a, b in zip(reference, frames, strict=True)]
    measured = ssim(frames, reference)
    assert measured.mean == pytest.approx(np.mean(values), abs=1e-6)
    assert measured.median == pytest.approx(np.median(values), abs=1e-6)
    assert measured.min == pytest.approx(min(values), abs=1e-6)


def test_ssim_agrees_with_torchmetrics() -> None:
    frames, reference = clip(2, 24, 19, seed=1), clip(2, 24, 19, seed=2)
    planes = [torch.from_numpy(images).double().permute(0, 3, 1, 2) for images in (frames, reference)]
    expected = structural_similarity_index_measure(*planes, data_range=1.0, reduction="none")
    measured = ssim(frames, reference)
    assert measured.mean == pytest.approx(expected.mean().item(), abs=1e-9)
    assert measured.min == pytest.approx(expected.min().item(), abs=1e-9)


def test_flicker_of_planted_errors() -> None:
    reference = np.broadcast_to(clip(1) * 0.5, (5, 33, 47, 3))
    constant = reference + np.float32(0.25)
    assert flicker(constant, reference).max == pytest.approx(0, abs=1e-7)
    pulsing = reference + np.float32([0, 0.25, 0, 0.25, 0.125])[:, None, None, None]
    measured = flicker(pulsing, reference)
    assert measured.mean == pytest.approx((0.25 * 3 + 0.125) / 4, abs=1e-7)
    assert measured.max == pytest.approx(0.25, abs=1e-7)
    with pytest.raises(ValueError, match="at least 2"):
        flicker(pulsing[:1], reference[:1])


def test_pieces_measure_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    frames, reference = clip(7, 16, 20, seed=1), clip(7, 16, 20, seed=2)
    whole = measure(frames, reference)
    monkeypatch.setattr(metrics, "_CHUNK_PIXELS", 2 * 16 * 20)
    pieces = measure(frames, reference)
    assert pieces.keys() == whole.keys()
    for name, value in whole.items():
        assert pieces[name] == (None if value is None else pytest.approx(value, rel=1e-12)), name
    assert whole["psnr"] == psnr(frames, reference).mean
    assert whole["ssim_min"] == ssim(frames, reference).min
    assert whole["flicker_max"] == flicker(frames, reference).max
    assert whole["difference_max"] == pytest.approx(np.abs(frames.astype(float) - reference).max())


def test_a_long_clip_is_never_in_memory_as_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes of 121 frames exist a few frames at a time, whatever the metric, and nothing is copied before."""
    seen: list[torch.Size] = []

    def spy(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        seen.append(frames.shape)
        return metrics._psnr(frames, reference)

    monkeypatch.setattr(metrics, "METRICS", {"psnr": spy, "ssim": spy})
    monkeypatch.setattr(metrics, "_CHUNK_PIXELS", 4 * 24 * 32 + 5)
    clips = np.tile(clip(1, 24, 32), (121, 1, 1, 1)), np.tile(clip(1, 24, 32, 1), (121, 1, 1, 1))
    pieces = list(metrics._chunks(*clips))
    assert all(piece.base is not None for pair in pieces for piece in pair), "a piece is a copy"
    row = measure(*clips)
    assert {shape[0] for shape in seen} == {4, 1}
    assert sum(shape[0] for shape in seen) == 2 * 121
    assert row["psnr"] == pytest.approx(psnr(clips[0][:1], clips[1][:1]).mean)


def test_equal_clips_differ_by_exactly_nothing() -> None:
    same = clip()
    row = measure(same, same.copy())
    assert row["psnr"] == row["psnr_min"] == math.inf
    assert row["flicker_max"] == row["difference_max"] == 0
    assert row["ssim_min"] == pytest.approx(1, abs=1e-12)


def test_a_single_frame_has_no_flicker() -> None:
    row = measure(clip(1), clip(1, seed=1))
    assert row["flicker"] is row["flicker_max"] is None
    assert row["psnr"] > 0
    with pytest.raises(ValueError, match="at least one"):
        metrics.measure_chunks([])


def test_lpips_is_null_and_says_why(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    assert "torchvision is not installed" in perceptual.missing()
    monkeypatch.setattr(perceptual, "find_spec", lambda name: object())
    assert f"there is no {tmp_path}" in perceptual.missing()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / perceptual.TRUNK).write_bytes(b"not the trunk")
    assert "checksum" in perceptual.missing()
    row = measure(clip(1), clip(1, seed=1))
    assert row["lpips"] is row["lpips_median"] is row["lpips_max"] is None
    with pytest.raises(ValueError, match="checksum"):
        perceptual.lpips(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))


def test_lpips_is_measured_where_its_network_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def network(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        assert frames.shape == reference.shape == (1, 3, 33, 47)
        return (frames - reference).abs().mean()

    monkeypatch.setattr(perceptual, "missing", lambda: None)
    monkeypatch.setattr(perceptual, "_network", lambda device: network)
    frames, reference = clip(), clip(seed=1)
    row = measure(frames, reference)
    expected = np.abs(frames - reference).mean(axis=(1, 2, 3))
    assert row["lpips"] == pytest.approx(expected.mean(), rel=1e-5)
    assert row["lpips_max"] == pytest.approx(expected.max(), rel=1e-5)
    with pytest.raises(ValueError, match="32x32 for lpips"):
        measure(frames[:, :20], reference[:, :20])


def test_equal_clips() -> None:
    same = clip()
    assert psnr(same, same.copy()).min == math.inf
    assert ssim(same, same.copy()).min == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_refuses_what_cannot_be_compared(metric) -> None:
    good = clip()
    spoilt = good.copy()
    spoilt[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="shape"):
        metric(good, good[:, :-1])
    with pytest.raises(ValueError, match="no side of 0"):
        metric(good[:0], good[:0])
    with pytest.raises(ValueError, match="nan"):
        metric(spoilt, good)
    with pytest.raises(ValueError, match="reference: values from"):
        metric(good, good * 255)


def test_ssim_needs_its_window() -> None:
    small = clip(1, 10, 40)
    with pytest.raises(ValueError, match="11x11"):
        ssim(small, small)
