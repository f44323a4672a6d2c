"""Images per second and core of the Community Forensics training pipeline, against plain Pillow and torchvision.

    python benchmarks/augmentation.py [--images 200] [--rounds 5] [--seed 0]

Both sides do the same for the same PNG files of 512 x 512 px (photos of the pool) in one process on one thread: decode,
draw a program, resize the short side, augment, crop, normalised float tensor. They take turns, image set by image
set; CPU time is counted, so that other work on the machine disturbs the ratio little. The plain side's pixels
must equal those of `exact=True`.
"""
import argparse
import io
import time

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from aigid_repro.data.photos import photo_dir, pool
from aigid_repro.detect.random_states import OPERATIONS, RandomStates, apply_program, decode, to_tensor

NORMALISE = dict(mean=(.485, .456, .406), std=(.229, .224, .225))
BILINEAR = InterpolationMode.BILINEAR


def files(n:int=8, side:int=512)->list[bytes]:
    "PNG files of centre-cropped photos."
    found = []
    for name in pool().file:
        image = Image.open(photo_dir()/name).convert("RGB")
        if min(image.size) < side: continue
        scale = side/min(image.size)
        image = TF.center_crop(image.resize([max(side, round(s*scale)) for s in image.size], Image.Resampling.LANCZOS), side)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found.append(buffer.getvalue())
        if len(found) == n: break
    return found


def jpeg(image, quality, codec):
    if codec == "pillow":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")
    _, data = cv2.imencode(".jpg", cv2.cvtColor(np.array(image), cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, quality))
    return Image.fromarray(cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))


def cutout(image, top, left, height, width, grey):
    pixels = np.array(image)
    pixels[top:top + height, left:left + width] = grey
    return Image.fromarray(pixels)


PLAIN = {
    "jpeg": jpeg, "cutout": cutout, "hflip": TF.hflip, "vflip": TF.vflip,
    "crop": lambda im, **p: TF.crop(im, **p),
    "resize": lambda im, size, kernel: TF.resize(im, size, InterpolationMode(kernel)),
    "resized_crop": lambda im, size, kernel, **p: TF.resized_crop(im, **p, size=size, interpolation=InterpolationMode(kernel)),
    "rotate": lambda im, angle: TF.rotate(im, angle, BILINEAR),
    "translate": lambda im, dx, dy: TF.affine(im, 0, [dx, dy], 1, [0, 0], BILINEAR),
    "shear": lambda im, x, y: TF.affine(im, 0, [0, 0], 1, [x, y], BILINEAR),
    "pad": lambda im, left, top, right, bottom, grey, size: TF.resize(TF.pad(im, [left, top, right, bottom], grey), size, BILINEAR),
}
assert PLAIN.keys() == OPERATIONS.keys()


class Clock:
    "CPU seconds by stage."
    def __init__(self): self.spent = {"decode": 0., "augment": 0., "tensor": 0.}
    def stage(self, name, f, *args, **kw):
        start = time.process_time()
        result = f(*args, **kw)
        self.spent[name] += time.process_time() - start
        return result


def plain_augment(image, augmentation, rng):
    for name, p in augmentation.program(image.size[::-1], rng): image = PLAIN[name](image, **p)
    return image


def plain(data, augmentation, rng, clock):
    image = clock.stage("decode", lambda: Image.open(io.BytesIO(data)).convert("RGB"))
    image = clock.stage("augment", plain_augment, image, augmentation, rng)
    return clock.stage("tensor", lambda: TF.normalize(TF.to_tensor(image), **NORMALISE))


def ours(data, augmentation, rng, clock):
    pixels = clock.stage("decode", decode, data)
    return clock.stage("tensor", to_tensor, clock.stage("augment", augmentation, pixels, rng), **NORMALISE)


def compare(size:int, data:list[bytes], images:int, rounds:int, seed:int)->None:
    "Print the table of one crop size."
    sides = {"plain": (plain, RandomStates(size)), "ours, exact": (ours, RandomStates(size, exact=True)),
             "ours": (ours, RandomStates(size))}
    for i in range(8): # the same pixels, and the first calls' extra time
        tensors = [f(data[i%len(data)], a, np.random.default_rng([seed, i]), Clock()) for f, a in sides.values()]
        program = sides["ours"][1].program((512, 512), np.random.default_rng([seed, i]))
        exact = apply_program(decode(data[i%len(data)]), program, exact=True)
        assert (tensors[0] - to_tensor(exact, **NORMALISE)).abs().max() < 1e-5
        assert torch.equal(tensors[1], to_tensor(exact, **NORMALISE))
    clocks, rates = {k: Clock() for k in sides}, {k: [] for k in sides}
    for r in range(rounds):
        for k, (f, a) in sides.items():
            start = time.process_time()
            for i in range(images): f(data[i%len(data)], a, np.random.default_rng([seed, r, i]), clocks[k])
            rates[k].append(images/(time.process_time() - start))
    print(f"\n{size} px: CPU milliseconds an image; images a second and core; ratio to plain, median (range) of {rounds} rounds")
    for k in sides:
        ms = "  ".join(f"{n} {1e3*t/images/rounds:5.2f}" for n, t in clocks[k].spent.items())
        ratio = np.divide(rates[k], rates["plain"])
        print(f"  {k:12s} {ms}   {np.median(rates[k]):6.1f}/s   {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(images=200, rounds=5, seed=0).items(): parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = files()
    print(f"{len(data)} PNG files of 512 x 512 px, {np.mean([len(d) for d in data])/1e3:.0f} kB on average; official mode, n_max 2")
    for size in 224, 384: compare(size, data, options.images, options.rounds, options.seed)
