"""Model, method and device, as options of the commands."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sparse_dit.pipelines.generate import load_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Setup:
    """Model, method and device.

    Args:
        model: tiny-wan (ships with the package), a folder in diffusers' save format, or a Hub id owner/name.
        recipe: a name from `sparse-dit methods` or the path of a YAML file; --recipe.FIELD VALUE sets any field of it,
            such as --recipe.selection.density 0.2.
        device: where to run; auto is CUDA where there is one.
    """

    model: str = "tiny-wan"
    recipe: str | dict[str, Any] = "tiny-radial"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def load(self) -> "DiffusionPipeline":
        """The pipeline on its device; the progress bars of loading are left out, those of denoising stay.

        Raises:
            ValueError: as `load_pipeline`.
        """
        import diffusers
        import torch
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return load_pipeline(self.model, device)
