"What the parity packs were made with: weights that follow from their names and shapes."

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def fill(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    "Scaled noise, seeded by the name; factors lie around one, biases and everything else around zero."
    state = {}
    for name, shape in shapes.items():
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape))
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
            continue
        if name.endswith("running_var"): noise = 1 + .02*np.abs(noise)
        elif name.endswith(("weight", "proj", "kernel")) and len(shape) > 1: noise = noise/math.sqrt(math.prod(shape[1:]))
        elif name.endswith("weight"): noise = 1 + .02*noise
        else: noise = .02*noise
        state[name] = torch.from_numpy(np.asarray(noise, dtype=np.float32))
    return state
