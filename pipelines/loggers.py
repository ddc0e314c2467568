"""Keeps libraries that nobody asked for from talking on stderr."""

import logging

# diffusers imports torchao where it is installed, which then tells of each of its parts that this machine cannot load;
# torch tells of torchao's enums, and diffusers of its tensors.
_TALKING = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def hush_imports() -> None:
    """Lets only errors through of what diffusers imports on its own; call it before anything imports diffusers."""
    for name in _TALKING:
        logging.getLogger(name).setLevel(logging.ERROR)
