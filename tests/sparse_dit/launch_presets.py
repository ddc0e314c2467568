"""Makes attention calls of presets on a GPU that is not there, and prints the kernels of each as a line of JSON.

    python launch_presets.py PRESET...    with tests/kernels on PYTHONPATH

Tensors lie on the CPU and say that they do not; fresh memory is zeros, as nothing writes it.
"""

import json
import sys

import torch
from absent_gpu import launched

from sparse_dit.calls import attend
from sparse_dit.layout import TokenLayout
from sparse_dit.recipe import load_recipe
from sparse_dit.state import Slot

LAYOUT, HEADS, HEAD_SIZE = TokenLayout((6, 16, 16), text_after=20), 4, 128
STEPS = (0, 1, 13)

torch.Tensor.is_cuda = property(lambda x: True)
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.empty = torch.zeros
torch.empty_like = torch.zeros_like
torch.Tensor.new_empty = torch.Tensor.new_zeros

for name in sys.argv[1:]:
    q, k, v = (torch.randn(1, LAYOUT.length, HEADS, HEAD_SIZE).bfloat16().transpose(1, 2) for _ in "qkv")
    recipe, slot = load_recipe(name), Slot()
    for step in STEPS:
        launched.clear()
        done = attend(recipe, LAYOUT, q, k, v, scale=None, layer=3, step=step, slot=slot)
        kernels = [launch["kernel"].removesuffix("_kernel") for launch in launched]
        print(json.dumps({"preset": name, "step": step, "backend": done.backend, "kernels": kernels}))
