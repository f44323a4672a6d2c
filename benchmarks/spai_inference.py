"""Images per second of SPAI at full size, against a loop over images and against three plain ViT-B/16 forwards a patch.

    python benchmarks/spai_inference.py [--rounds 3] [--sides 512 1024 2048] [--mixed 16] [--chunk 0] [--memory 4 64] [--cpu] [--seed 0]

Four ways take turns on the same images, in one process:

    loop       image by image, view by view, all features of an image kept, in single precision: as one would write it down
    fp32       score_images in single precision
    default    score_images as it comes, which is bfloat16 where the processor multiplies it natively
    plain      three times the blocks of timm's vit_base_patch16_224 on up to 16 of the patches, in batches of a chunk, in both precisions

Weights are noise of a scale that keeps activations at theirs; the time does not depend on them. The ratio is the median over rounds of
seconds a patch, ours to plain at the same precision. Peak memory is that of a process of its own for each number of images of 512 px,
which come from a generator.
"""
import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import timm
import torch
import torch.nn.functional as F

from aigid_repro.detect.training import half, precision_of, train_settings
from aigid_repro.spai.frequency import views
from aigid_repro.spai.model import SPAI, score_images


def detector(chunk:int, seed:int)->SPAI:
    torch.manual_seed(seed)
    net = SPAI(chunk=chunk).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim in (2, 4): p.normal_(0, p[0].numel()**-.5)
    return net


def picture(h:int, w:int, seed:int)->np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def mixed(n:int, seed:int)->list[np.ndarray]:
    sides = np.random.default_rng(seed).integers(200, 1201, (n, 2))
    return [picture(h, w, seed + i) for i, (h, w) in enumerate(sides)]


@torch.inference_mode()
def loop(net:SPAI, images:list[np.ndarray])->np.ndarray:
    "One image, one view, one block after the other, then the formulas of the paper."
    logits = []
    for image in images:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()/255
        patches = torch.cat(net.cut(x))
        z = []
        for view in views(patches, net.disc):
            tokens, kept = net.encoder.embed(view), []
            for block, projection in zip(net.encoder.blocks, net.projections):
                tokens = block(tokens)
                kept.append(projection(tokens[:, 1:]))
            z.append(torch.stack(kept, 1)) # (k, blocks, tokens, D)
        cosines = [F.cosine_similarity(z[a], z[b], dim=-1) for a, b in ((0, 1), (0, 2), (1, 2))]
        similarities = [s for c in cosines for s in (c.mean(-1), c.std(-1))]
        context = net.context(torch.cat([z[0].mean(-2), z[0].std(-2)], -1))
        vectors = torch.cat([*similarities, context], -1)
        logits.append(net.head(net.body(net.norm(net.sca(vectors, torch.tensor([len(vectors)]))[0])))[:, 0])
    return torch.cat(logits).numpy()


@torch.inference_mode()
def plain(vit:torch.nn.Module, patches:torch.Tensor, chunk:int, precision:str)->None:
    with half("cpu", precision):
        for x in patches.split(chunk):
            for _ in range(3): vit.forward_features(x)


def compare(net:SPAI, vit:torch.nn.Module, name:str, images:list[np.ndarray], rounds:int, default:str, clock)->None:
    "Print the lines of one set of images."
    n = sum(len(net.cut(torch.from_numpy(v).permute(2, 0, 1)[None])) for v in images)
    some, chunk, seconds, logits = torch.rand(min(n, 16), 3, 224, 224), net.at_a_time, {}, {}
    ways = {"loop": lambda: loop(net, images),
            "fp32": lambda: score_images(net, images, precision="no"), "plain fp32": lambda: plain(vit, some, chunk, "no"),
            "default": lambda: score_images(net, images), "plain default": lambda: plain(vit, some, chunk, default)}
    for _ in range(rounds):
        for way, f in ways.items():
            start = clock()
            logits[way] = f()
            seconds.setdefault(way, []).append((clock() - start)/(len(some) if way.startswith("plain") else n))
    for way, base in (("loop", "plain fp32"), ("fp32", "plain fp32"), ("default", "plain default")):
        ours, theirs = np.array(seconds[way]), np.array(seconds[base])
        ratio, difference = ours/theirs, np.abs(logits[way] - logits["loop"]).max()
        print(f"  {name:14s} {n:5d}    {way:8s} {len(images)/n/np.median(ours):8.3f} {np.median(ours):8.3f} {np.median(theirs):8.3f}   "
              f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})   {difference:.1e}", flush=True)
    assert np.abs(logits["fp32"] - logits["loop"]).max() < 1e-4


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(rounds=3, mixed=16, chunk=0, seed=0).items(): parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--sides", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--memory", type=int, nargs="*", default=[4, 64])
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds of one thread: other work disturbs them less")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS) # of so many images, in this process
    o = parser.parse_args()
    net = detector(o.chunk, o.seed)
    if o.peak is not None:
        score_images(net, (picture(512, 512, i) for i in range(o.peak)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)
        sys.exit()
    if o.cpu: torch.set_num_threads(1)
    clock, default = time.process_time if o.cpu else time.perf_counter, precision_of(train_settings())
    vit = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    print(f"{torch.get_num_threads()} threads, {'CPU' if o.cpu else 'wall'} time, chunk {net.at_a_time}, default precision {default}; "
          f"medians of {o.rounds} rounds")
    print("  images         patches  way      images/s    s/patch: ours, plain   ratio (range)   difference to loop")
    loop(net, [picture(224, 224, 0)]), score_images(net, [picture(224, 224, 0)]) # the first calls' extra time
    sets = {f"{side} x {side}": [picture(side, side, side)] for side in o.sides}
    if o.mixed: sets[f"{o.mixed} mixed"] = mixed(o.mixed, o.seed)
    for name, images in sets.items(): compare(net, vit, name, images, o.rounds, default, clock)
    for n in o.memory:
        command = [sys.executable, __file__, "--peak", str(n), "--chunk", str(o.chunk)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"  peak memory, {n} images of 512 px: {int(run.stdout):,} MiB", flush=True)
