"""PSNR and SSIM against planted noise and against scikit-image."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sparse_dit.eval.metrics import psnr, ssim


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
