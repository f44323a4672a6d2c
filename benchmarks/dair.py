"""Seconds of GenSign's dynamic convolutions with kernels mixed first, against K convolutions whose outputs are mixed.

    python benchmarks/dair.py [--rounds 5] [--batch 8] [--side 128] [--structures 6] [--seed 0]

Both ways take turns on the same input in one process, on one thread:

    mix         the convolution alone, for the sizes of the three stages; the shares of the kernels are given
    layer       with the router that computes the shares, which is the same in both ways
    backward    the layer and its gradients
    image       whole reconstructions at full size, by random structures of one to three stages

Seconds are medians over rounds, of CPU time: other work disturbs it less. The ratio is the median of a round's ratios, plain to fused.
"""
import argparse
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aigid_repro.gensign import dair as library


class Plain(library.CCDC):
    "K convolutions, then mixed."
    def mix(self, h:Tensor, shares:Tensor)->Tensor:
        outputs = torch.stack([F.conv2d(h, w, b, padding=1) for w, b in zip(self.weight, self.bias)], 1)
        return (outputs*shares[..., None, None]).sum(1)


def twins(make): # network with kernels mixed first, and the same with outputs mixed
    fused, plain = make().eval(), make().eval()
    for m in plain.modules():
        if isinstance(m, library.CCDC): m.__class__ = Plain
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def seconds(f)->tuple[float, Tensor]:
    start = time.process_time()
    out = f()
    return time.process_time() - start, out


def compare(name:str, fused, plain, rounds:int)->None: # functions without arguments that give a tensor
    "Print a line."
    taken = []
    for _ in range(rounds + 1): # the first warms up
        (a, ours), (b, theirs) = seconds(fused), seconds(plain)
        taken.append((a, b))
    a, b = np.array(taken[1:]).T
    off = ((ours - theirs).abs().max()/theirs.abs().max()).item()
    print(f"  {name:24s} {1e3*np.median(a):9.1f} {1e3*np.median(b):9.1f}   {np.median(b/a):.2f} ({(b/a).min():.2f} to {(b/a).max():.2f})   {off:.1e}",
          flush=True)
    assert off < 1e-5


def gradients(net, h:Tensor)->Tensor: return torch.cat([g.flatten() for g in torch.autograd.grad(net(h).square().mean(), [net.weight, net.bias])])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(rounds=5, batch=8, side=128, structures=6, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(o.seed)
    print(f"one thread, batch {o.batch}, images of {o.side} px; milliseconds, medians of {o.rounds} rounds")
    print("  what                         fused     plain   ratio (range)   largest relative difference")
    for c, side in ((128, o.side//4), (64, o.side//2), (32, o.side)):
        fused, plain = twins(lambda c=c: library.CCDC(c))
        h = torch.randn(o.batch, c, side, side)
        with torch.inference_mode():
            shares = fused.shares(h)
            compare(f"mix, {c} channels", lambda: fused.mix(h, shares), lambda: plain.mix(h, shares), o.rounds)
            compare(f"layer, {c} channels", lambda: fused(h), lambda: plain(h), o.rounds)
        compare(f"backward, {c} channels", lambda: gradients(fused, h), lambda: gradients(plain, h), o.rounds)
    fused, plain = twins(library.DAIR)
    x = torch.rand(o.batch, 3, o.side, o.side)*2 - 1
    for depth in (1, 2, 3):
        rng = random.Random(o.seed)
        plans = [p for p in (library.draw(rng) for _ in range(1000)) if len(p) == depth][:o.structures//3]
        compare(f"image, {depth} stages", *(lambda net=net: torch.cat([net.reconstruct(x, p) for p in plans]) for net in (fused, plain)), o.rounds)
