"""Images per second of `aigid score`, from JPEG files to rows, and of the same networks as timm and transformers have them.

    python benchmarks/scoring.py [--detectors demo commfor-224 ...] [--sides 512 2048] [--images 32] [--precision auto] [--threads 2]
    python benchmarks/scoring.py --memory 10000

For each detector, size and precision: images a second from beginning to end (`engine.score` on files), the seconds of threads that decode
and prepare and of the network as shares of the whole (they may add up to more than 100 %: they overlap), images a second of the kit's
network alone and of a plain forward of timm's or transformers' network of the same shape, at the same batch, precision and threads. Ways
take turns, and the median over rounds counts. Weights are noise; the time does not depend on them. `--memory N` scores N files and prints
the resident memory as it goes. The photographs are the kit's own, enlarged and saved as JPEG of quality 90.
"""
import argparse
import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from aigid_repro.data.photos import open_photo, pool
from aigid_repro.detect.training import half
from aigid_repro.score import engine
from aigid_repro.score.calibration import Calibration
from aigid_repro.score.shelf import Scorer, know, open_scorer

CLIP = dict(width=1024, layers=24, heads=16, mlp=4096, image=224, patch=14)
NETWORKS = {"commfor-224": ("commfor-vit", dict(size="small", image=224)), "commfor-384": ("commfor-vit", dict(size="small", image=384)),
            "spai": ("spai", {}), "gapl": ("gapl", dict(encoder="clip", weights="", options=[*CLIP.items()])),
            "gensign": ("gensign", dict(rgb="clip", weights="", cnn="b0", crop=256, options=[*CLIP.items()]))}


def scorer_of(name:str)->Scorer:
    if name == "demo": return open_scorer()
    from aigid_repro.detect.detector import create
    network, settings = NETWORKS[name]
    know(network)
    torch.manual_seed(0)
    return Scorer(name, create(network, **settings).eval(), "noise", "", Calibration())


def plain_of(name:str): # -> function of the kit's batch, or None where there is no such network elsewhere
    "A forward pass of the network as its library has it."
    import timm
    if name.startswith("commfor"):
        net = timm.create_model(f"vit_small_patch16_{name[-3:]}", num_classes=1).eval()
        return lambda x: net(x)
    if name == "spai":
        net = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
        return lambda x: [net.forward_features(x) for _ in range(3)] # three views of each patch
    if name in ("gapl", "gensign"):
        from transformers import CLIPVisionConfig, CLIPVisionModel
        tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                                                 image_size=224, patch_size=14)).eval()
        if name == "gapl": return lambda x: tower(x)
        b0 = timm.create_model("efficientnet_b0", num_classes=0).eval()
        return lambda x: (tower(x[..., 16:240, 16:240]), b0(x))
    return None


def files(folder:Path, side:int, n:int)->list[Path]:
    photos, made = islice(cycle(pool().photo), n), []
    for i, name in enumerate(photos):
        image = open_photo(name)
        factor = side/max(image.size)
        path = folder/f"{side}-{i:05}.jpg"
        image.resize([round(s*factor) for s in image.size], Image.Resampling.BICUBIC).save(path, quality=90)
        made.append(path)
    return made


def clock(function)->float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(name:str, side:int, paths:list[Path], precision:str, rounds:int)->None:
    scorer, plain = scorer_of(name), plain_of(name)
    precision = engine.precision_for(scorer, precision)
    batch = engine.BATCH
    prepared = [engine.prepare(scorer, p).pixels[0] for p in paths[:batch]]
    if name == "spai":
        views = [v[0] for p in prepared for v in scorer.detector.cut(torch.from_numpy(p.copy()).permute(2, 0, 1)[None])]
        x = torch.stack(views[:scorer.detector.at_a_time]).float()/255
        plain_images = len(x)/(len(views)/len(prepared)) # images that these patches stand for
    else:
        shape = prepared[0].shape
        x = scorer.detector.preprocess.tensor(torch.from_numpy(np.stack([p for p in prepared if p.shape == shape])))
        plain_images = len(x)

    @torch.inference_mode()
    def library():
        with half("cpu", precision): plain(x)

    fast = engine.laid_out(scorer.detector) # as in `engine.score`
    def network():
        with fast: engine.logits_of(scorer, prepared, precision=precision)

    seconds, spent = {"all": [], "network": [], "plain": []}, engine.Times()
    network() # the first call makes kernels and layouts
    if plain is not None: library()
    for _ in range(rounds):
        seconds["all"].append(clock(lambda: [*engine.score(scorer, paths, precision=precision, times=spent)])/len(paths))
        seconds["network"].append(clock(network)/len(prepared))
        if plain is not None: seconds["plain"].append(clock(library)/plain_images)
    rate = {k: 1/statistics.median(v) for k, v in seconds.items() if v}
    share = {k: getattr(spent, k)/spent.total for k in ("decode", "prepare", "network")}
    against = (f"plain {rate['plain']:8.2f}  network/plain {statistics.median(np.divide(seconds['plain'], seconds['network'])):5.2f}  "
               f"all/plain {statistics.median(np.divide(seconds['plain'], seconds['all'])):5.2f}") if "plain" in rate else ""
    shares = ", ".join(f"{k} {v:4.0%}" for k, v in share.items())
    print(f"{name:12} {side:5} px {precision:5} {rate['all']:8.2f} images/s  ({shares})  alone {rate['network']:8.2f}  {against}",
          flush=True)


def memory(n:int, folder:Path)->None:
    paths, process = files(folder, 512, 100), psutil.Process()
    start, scorer = time.perf_counter(), open_scorer()
    for i, row in enumerate(engine.score(scorer, islice(cycle(paths), n)), 1):
        assert not row.error
        if i % max(1, n//10) == 0:
            print(f"{i:6} files  {process.memory_info().rss/2**20:7.0f} MB  {i/(time.perf_counter() - start):6.1f} images/s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="*", default=["demo", *NETWORKS])
    parser.add_argument("--sides", nargs="*", type=int, default=[512, 2048])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--precision", nargs="*", default=["no", "auto"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--memory", type=int, default=0)
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as d:
        if args.memory: memory(args.memory, Path(d))
        else:
            made = {side: files(Path(d), side, args.images) for side in args.sides}
            print(f"{torch.get_num_threads()} threads of the network, batch {engine.BATCH}, {args.images} images, {args.rounds} rounds")
            for name in args.detectors:
                for precision in dict.fromkeys(args.precision):
                    for side in args.sides:
                        most = args.images if name != "spai" else max(1, min(args.images, 8*512**2//side**2))
                        compare(name, side, made[side][:most], precision, args.rounds)
