"""Seconds that one detector's robustness sweep takes: the whole grid, on test images of the embedded corpus.

    python benchmarks/robustness.py [--profile mini] [--crops 20] [--grid commfor-all] [--detector high-pass-cnn]

Weights are untrained: the time does not depend on them. One process, one thread.
"""
import argparse
import time

import torch

from aigid_repro.commfor import model  # noqa: F401 - registers the paper's networks
from aigid_repro.detect import networks  # noqa: F401 - registers the common networks
from aigid_repro.detect.detector import create
from aigid_repro.detect.perturbations import grid_of, robustness
from aigid_repro.detect.studies import embedded
from aigid_repro.detect.training import device_of, precision_of, train_settings

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--profile", default="mini")
parser.add_argument("--crops", type=int, default=20)
parser.add_argument("--grid", default="commfor-all")
parser.add_argument("--detector", default="high-pass-cnn")
options = parser.parse_args()
torch.set_num_threads(1)
world = embedded(options.profile)
world.prepare(1)
about, images = world.images("test", options.crops)
detector, precision = create(options.detector).eval(), precision_of(train_settings())
start, cpu = time.perf_counter(), time.process_time()
table = robustness({options.detector: detector}, images, about.id.tolist(), options.grid, device=device_of(), precision=precision)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
conditions = sum(map(len, grid_of(options.grid).values()))
print(f"{options.detector}: {len(images)} images, {conditions} conditions, {len(table):,} logits in {seconds:.1f} s ({cpu:.1f} s of CPU)")
