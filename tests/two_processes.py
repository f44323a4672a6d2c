"""Train a tiny transformer on invented images and store its weights: run alone and under torchrun, the weights must agree."""
import sys

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from safetensors.torch import save_file

from aigid_repro.commfor import model  # noqa: F401 - registers the detector
from aigid_repro.data.corpus import png
from aigid_repro.detect.training import train, train_settings

torch.set_num_threads(1)
rng = np.random.default_rng(0)
records = pd.DataFrame([{"image": png(rng.integers(50*y, 150 + 100*y, (40, 40, 3), dtype=np.uint8)), "label": y} for y in [0, 1]*8])
settings = train_settings(detector="commfor-vit", options=(("size", "mini"), ("image", 32), ("patch", 8)), steps=4, batch=8,
                          crop=32, precision="no", resample=.5, noise=.5, jpeg=.5)
log = []
detector = train(settings, records, log=log)
here = PartialState()
if here.is_main_process:
    assert len(log) == settings.steps
    save_file(detector.state_dict(), sys.argv[1])
# a process that ends while the other one still uses their connection may make it end with an error
here.wait_for_everyone()
here.destroy_process_group()
