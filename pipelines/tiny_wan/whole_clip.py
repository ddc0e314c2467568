"""`AutoencoderKLWan` over a whole clip at once.

diffusers runs its Wan VAE frame group by frame group with a feature cache, which bounds memory but makes training slow.
All its convolutions are causal with zero padding, so one pass over the clip computes the same function; only the
temporal resampling treats the first frame apart. Tests hold the two paths equal.
"""

from types import MethodType

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from einops import rearrange
from torch import Tensor, nn


def _resample_whole_clip(self: WanResample, x: Tensor, feat_cache: object = None, feat_idx: object = None) -> Tensor:
    batch = x.shape[0]
    if self.mode == "upsample3d" and x.shape[2] > 1:
        # The first frame stays single; its features do not reach the others through the temporal convolution.
        later = rearrange(self.time_conv(x[:, :, 1:]), "b (two c) t h w -> b c (t two) h w", two=2)
        x = torch.cat([x[:, :, :1], later], dim=2)
    x = self.resample(rearrange(x, "b c t h w -> (b t) c h w"))
    x = rearrange(x, "(b t) c h w -> b c t h w", b=batch)
    if self.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x


class WholeClipVAE(nn.Module):
    """Encoder and decoder of an `AutoencoderKLWan`, without the loop over frame groups.

    The wrapped VAE's resampling modules are replaced while this object is in use; `release` puts them back.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae
        for module in vae.modules():
            if isinstance(module, WanResample):
                module.forward = MethodType(_resample_whole_clip, module)

    def release(self) -> AutoencoderKLWan:
        """The VAE with diffusers' own forward methods again."""
        for module in self.vae.modules():
            if isinstance(module, WanResample):
                del module.forward
        return self.vae

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, T, H, W] in [-1, 1] → mean and log-variance [B, 16, (T - 1) / 4 + 1, H / 8, W / 8]."""
        moments = self.vae.quant_conv(self.vae.encoder(patchify(video, self.vae.config.patch_size)))
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, not clamped."""
        pixels = self.vae.decoder(self.vae.post_quant_conv(latents), first_chunk=True)
        frames: Tensor = unpatchify(pixels, self.vae.config.patch_size)
        return frames

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction from a sampled latent, with the latent's mean and log-variance."""
        mean, log_variance = self.encode(video)
        latents = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.decode(latents), mean, log_variance
