"""Families of diffusers 0.42 that must stay dense, and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DenseFamily:
    """A family that no recipe can make sparse.

    Args:
        transformer: name of the class.
        models: the models that people know it by.
        reason: why.
    """

    transformer: str
    models: str
    reason: str


LINEAR = "its self-attention is linear: there is no softmax to leave blocks out of"
CAUSAL = "its self-attention is causal over part of the sequence"
CACHED = "its keys come from a cache of other frames"
PACKED = "it packs text and media in one sequence whose order the forward's arguments do not tell as a grid"
CROSS = "its queries are the image alone while the keys carry the text too"

DENSE = (
    DenseFamily("SanaTransformer2DModel", "Sana", LINEAR),
    DenseFamily("SanaVideoTransformer3DModel", "Sana-Video", LINEAR),
    DenseFamily("SanaWMTransformer3DModel", "Sana-WM", LINEAR),
    DenseFamily("SanaWMLTX2RefinerTransformer3DModel", "Sana-WM refiner", CACHED),
    DenseFamily("LatteTransformer3DModel", "Latte", "it attends within a frame or along time, too short to win"),
    DenseFamily("OmniGenTransformer2DModel", "OmniGen", CAUSAL),
    DenseFamily("QwenImage21Transformer2DModel", "Qwen-Image 2.1", CAUSAL),
    DenseFamily("AnyFlowFARTransformer3DModel", "AnyFlow-FAR", CAUSAL),
    DenseFamily("WanAnimate2Transformer3DModel", "Wan Animate 2", CACHED),
    DenseFamily("Kandinsky6SRTransformer3DModel", "Kandinsky 6 SR", "it brings sparse attention of its own (NABLA)"),
    DenseFamily("Cosmos3OmniTransformer", "Cosmos 3 Omni", PACKED),
    DenseFamily("MiniMaxH3Transformer3DModel", "MiniMax-H3", PACKED),
    DenseFamily("Ideogram4Transformer2DModel", "Ideogram 4", PACKED),
    DenseFamily("JoyImageEditPlusTransformer3DModel", "JoyImage Edit Plus", PACKED),
    DenseFamily(
        "BriaFibo2Transformer2DModel", "Bria FIBO 2", "the forward itself decides how many text tokens it adds"
    ),
    DenseFamily("NucleusMoEImageTransformer2DModel", "Nucleus-Image", CROSS),
    DenseFamily("PRXTransformer2DModel", "PRX", CROSS),
)
