"""Time of GenSign's reconstructor as it is here, against K convolutions whose outputs are mixed and channels where torch has them.

    python benchmarks/dair.py [--rounds 5] [--batch 8] [--side 128] [--structures 3] [--seed 0]

Both ways take turns on the same input in one process, on one thread:

    mix         the convolution alone, for the sizes of the three stages; the shares of the kernels are given
    layer       with the router that computes the shares
    backward    the layer and its gradients
    image       whole reconstructions at full size, by so many random structures of one, two and three stages

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
    def shares(self, h:Tensor)->Tensor: return self.router(h).unflatten(1, self.bias.shape)
    def mix(self, h:Tensor, shares:Tensor)->Tensor:
        outputs = torch.stack([F.conv2d(h, w, b, padding=1) for w, b in zip(self.weight, self.bias)], 1)
        return (outputs*shares[..., None, None]).sum(1)


class PlainDAIR(library.DAIR):
    def forward(self, x:Tensor, plan:library.Structure)->Tensor: return self.decoder(self.encoder(x, len(plan)), plan)


def twins(make): # network as it is here, and the plain one
    fused, plain = make().eval(), make().eval()
    for m in plain.modules():
        m.__class__ = {library.CCDC: Plain, library.DAIR: PlainDAIR}.get(type(m), type(m))
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def compare(name:str, f, nets, rounds:int, limit:float=1e-5)->None: # function of a network; the twins
    "Print a line."
    taken = []
    for _ in range(rounds + 1): # the first warms up
        out = []
        for net in nets:
            start = time.process_time()
            out.append((f(net), time.process_time() - start))
        taken.append([t for _, t in out])
    (ours, _), (theirs, _) = out
    a, b = np.array(taken[1:]).T
    off, ratio = ((ours - theirs).abs().max()/theirs.abs().max()).item(), b/a
    times = f"{1e3*np.median(a):9.1f} {1e3*np.median(b):9.1f}   {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
    print(f"  {name:24s} {times}   {off:.1e}", flush=True)
    assert off < limit


def gradients(net, h:Tensor)->Tensor: return torch.autograd.grad(net(h).square().mean(), net.weight)[0]


def layers(c:int, h:Tensor, rounds:int)->None: # channels, input
    "The three lines of one size."
    nets = twins(lambda: library.CCDC(c))
    with torch.inference_mode():
        shares = nets[0].shares(h)
        compare(f"mix, {c} channels", lambda net: net.mix(h, shares), nets, rounds)
        compare(f"layer, {c} channels", lambda net: net(h), nets, rounds)
    compare(f"backward, {c} channels", lambda net: gradients(net, h), nets, rounds, 1e-3) # sums over all positions, in another order


def images(depth:int, nets, x:Tensor, structures:int, rounds:int)->None:
    "The line of one depth."
    rng = random.Random(depth)
    plans = [p for p in (library.draw(rng) for _ in range(100)) if len(p) == depth][:structures]
    def all_of(net): return torch.cat([net.reconstruct(x, p) for p in plans])
    compare(f"image, {depth} stages", all_of, nets, rounds, 1e-4) # instance norms of nearly constant features amplify rounding


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(rounds=5, batch=8, side=128, structures=3, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(o.seed)
    print(f"one thread, batch {o.batch}, images of {o.side} px; milliseconds, medians of {o.rounds} rounds")
    print("  what                         fused     plain   ratio (range)         largest relative difference")
    for c, side in ((128, o.side//4), (64, o.side//2), (32, o.side)): layers(c, torch.randn(o.batch, c, side, side), o.rounds)
    nets, x = twins(library.DAIR), torch.rand(o.batch, 3, o.side, o.side)*2 - 1
    for depth in (1, 2, 3): images(depth, nets, x, o.structures, o.rounds)
