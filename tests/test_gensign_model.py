"""GenSign computes what the official code computes, stage by stage, from files in the official form.

Reference outputs in parity/gensign came from the official code with weights that follow from their names and shapes (`dual_full`: the
detector at its released size, `dual_tiny`: the same classes, reduced). With such weights EfficientNet hardly reacts to its input, so the
arrays `cal.` came after its running averages had been replaced by the statistics of the inputs; these are in the file, too. It then
amplifies a hundred times what one processor rounds differently from another, and a pixel at the edge of the wrapped residual may even
turn around; so `cal.` is compared in double precision, from which the official float32 differs by 2e-6 (logits) to 9e-5 (feature maps),
and in single precision where the instructions are those of the official run.
"""

import json
import os
import random
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_weights import fill
from PIL import Image
from torch import nn

from aigid_repro.data.storage import InputError
from aigid_repro.detect.detector import create, load_detector, save_detector
from aigid_repro.detect.training import predict
from aigid_repro.gensign import checkpoints as cp
from aigid_repro.gensign import dair as da
from aigid_repro.gensign.model import GenSign
from aigid_repro.gensign.signature import Extractor, wrap

FOLDER = Path(__file__).parent/"parity"/"gensign"
LIMIT = 1e-5 # of differences, as a share of the largest entry where that is above 1
HEADS = 4 # of the reduced encoder, which are in no file
LIKE_OFFICIAL = torch.ops.mkldnn._is_mkldnn_bf16_supported() # oneDNN with AVX-512: float32 is rounded as in the official run


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER/"golden.npz") as f: return {k: torch.from_numpy(v) for k, v in f.items()}


def shapes(name): return json.loads((FOLDER/f"spec_{name}.json").read_text())


def filled(name): return fill(shapes(name))


def off(ours, theirs): # largest difference, as a share of the largest entry where that is above 1
    assert ours.shape == theirs.shape
    return ((ours.detach() - theirs).abs().max()/theirs.abs().max().clamp(min=1)).item()


# the reconstructor


@pytest.fixture(scope="module")
def dair(tmp_path_factory):
    path = tmp_path_factory.mktemp("dair")/"dair.pth"
    torch.save({p: filled(f"dair_{p}") for p in ("encoder", "decoder")} | {"optimizer_state_dict": {}, "step": 4_000_000}, path)
    net, step = cp.load_dair(path)
    assert step == 4_000_000 and net.sizes == dict(width=64, levels=3, kernels=4) and not net.training
    return net


WORDS = dict(LeakyReLU="leaky", GELU="gelu", SiLU="silu", BatchNorm2d="batch", InstanceNorm2d="instance", GroupNorm="group",
             pixelshuffle="shuffle")


def structures():
    "The five structures of the reference outputs, from their official words."
    def cell(c): return da.CellPlan("".join(step[0] for step in c["order"]), WORDS[c["act"]], WORDS[c["norm"]])
    def stage(s): return da.StagePlan(WORDS.get(s["up"], s["up"]), tuple(map(cell, s["cells"])))
    return [(a["start"], da.Structure(map(stage, a["stages"]))) for a in json.loads((FOLDER/"dair_architectures.json").read_text())]


def test_structures_cover_all_choices_and_have_names():
    used = [s for start, s in structures() if len(s) == {0: 1, 1: 2, 3: 3}[start]]
    cells = [c for s in used for stage in s for c in stage.cells]
    assert len(used) == 5 and {stage.up for s in used for stage in s} == set(da.UPSAMPLERS)
    assert ({c.act for c in cells}, {c.norm for c in cells}, len({c.order for c in cells})) == (set(da.ACTS), set(da.NORMS), 6)
    for s in used: assert da.structure(json.loads(json.dumps(str(s)))) == s


@torch.inference_mode()
def test_features_of_the_encoder(dair, golden):
    seen, encoder = [], dair.encoder
    hooks = [level.register_forward_hook(lambda _, a, y: seen.append(y)) for level in encoder.levels]
    deepest = encoder(golden["dair.x"], 3)
    for h in hooks: h.remove()
    assert off(deepest, golden["dair.F3"]) < LIMIT
    for i, y in enumerate(seen): assert off(y[:, :16], golden[f"dair.F{i}"]) < LIMIT
    for depth in (1, 2): assert torch.equal(encoder(golden["dair.x"], depth), seen[depth - 1])


@pytest.mark.parametrize("number", range(5))
def test_every_structure(number, dair, golden):
    how = structures()[number][1]
    assert off(dair.reconstruct(golden["dair.x"], how), golden[f"dair.arch{number}.out"]) < LIMIT
    others = [s for _, s in structures() if s != how]
    assert min(off(dair.reconstruct(golden["dair.x"], s), golden[f"dair.arch{number}.out"]) for s in others) > 1000*LIMIT


@pytest.mark.parametrize("seed", range(4))
def test_seeds_draw_what_they_draw_in_the_official_code(seed, dair, golden):
    assert off(dair.reconstruct(golden["dair.x"], random.Random(seed)), golden[f"dair.pyseed{seed}.out"]) < LIMIT
    assert str(da.draw(random.Random(0))).startswith("shuffle ") and [len(da.draw(random.Random(s))) for s in range(4)] == [2, 1, 1, 1]


def test_norms_with_the_statistics_of_the_batch(dair, golden):
    before = {k: v.clone() for k, v in dair.state_dict().items()}
    dair.decoder.train()
    with torch.no_grad(): out = dair(golden["dair.x"], structures()[0][1])
    assert off(out, golden["dair.arch0.out_trainmode"]) < 2*LIMIT and off(out, golden["dair.arch0.out"]) > 1000*LIMIT
    moved = {k for k, v in dair.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith("decoder") and ".batch." in k for k in moved)
    dair.load_state_dict(before)
    dair.eval()


class Plain(da.CCDC):
    "K convolutions whose outputs are mixed, as the official code has it."
    def mix(self, h, shares):
        outputs = torch.stack([F.conv2d(h, w, b, padding=1) for w, b in zip(self.weight, self.bias)], 1)
        return (outputs*shares[..., None, None]).sum(1)


@torch.inference_mode()
def test_dynamic_convolution(dair, golden):
    conv, h = dair.decoder.stages[2].cells[0].conv, golden["ccdc.h"]
    assert off(conv.shares(h), golden["ccdc.A"]) < LIMIT and off(conv(h), golden["ccdc.out"]) < LIMIT
    assert (conv(h) - Plain.mix(conv, h, golden["ccdc.A"])).abs().max() < 1e-5
    for wrong in (conv.mix(h, golden["ccdc.A"].flip(1)), conv.mix(h, golden["ccdc.A"].softmax(1))):
        assert off(wrong, golden["ccdc.out"]) > 1000*LIMIT


def test_kernels_mixed_first_in_whole_networks(dair, golden):
    results = {}
    for kind in (da.CCDC, Plain):
        for m in dair.modules():
            if isinstance(m, da.CCDC): m.__class__ = kind
        results[kind] = [dair.reconstruct(golden["dair.x"], s) for _, s in structures()]
    for m in dair.modules():
        if isinstance(m, Plain): m.__class__ = da.CCDC
    for a, b in zip(*results.values()): assert off(a, b) < LIMIT and not torch.equal(a, b)


def test_files_of_the_reconstructor(dair, tmp_path):
    cp.save_dair(dair, tmp_path/"x.pth", step=3, optimizer_state_dict={})
    content = torch.load(tmp_path/"x.pth", weights_only=True)
    assert content.keys() == {"encoder", "decoder", "step", "optimizer_state_dict"}
    for part in ("encoder", "decoder"):
        official = filled(f"dair_{part}")
        assert content[part].keys() == official.keys() and all(torch.equal(v, official[k]) for k, v in content[part].items())
    assert cp.load_dair(tmp_path/"x.pth")[1] == 3


# the extractor


@torch.inference_mode()
def test_extractor(golden, tmp_path):
    torch.save({"noiser": filled("esig"), "optimizer_state_dict": {}, "step": 400_000}, tmp_path/"x.pth")
    net, step = cp.load_extractor(tmp_path/"x.pth")
    assert step == 400_000 and net.sizes == dict(features=64, blocks=8, grey=False)
    x, seen = golden["esig.x"], {}
    parts = {"block0": net.blocks[0], "block7": net.blocks[7], "norm": net.norm}
    hooks = [m.register_forward_hook(lambda _, a, y, name=name: seen.__setitem__(name, y)) for name, m in parts.items()]
    out = net(x)
    for h in hooks: h.remove()
    seen["stem"] = F.gelu(seen.pop("norm"))
    for name, y in seen.items(): assert off(y[:1, :8], golden[f"esig.{name}"]) < LIMIT, name
    assert off(out, golden["esig.out"]) < LIMIT and off(wrap(out), golden["esig.frac"]) < 10*LIMIT
    cp.save_extractor(net, tmp_path/"again.pth", step=1)
    written, official = torch.load(tmp_path/"again.pth", weights_only=True)["noiser"], filled("esig")
    assert written.keys() == official.keys() and all(torch.equal(v, official[k]) for k, v in written.items())


# the detector


def calibrated(state, golden, part):
    "With running averages of the inputs."
    mark = f"{part}.override:"
    return state | {k.removeprefix(mark): v for k, v in golden.items() if k.startswith(mark)}


@pytest.fixture(scope="module")
def tiny(): return filled("dual_tiny")


def as_reduced(net):
    "The official package leaves out the shortcut of a stage's first block, which matters only where a width of .25 makes 32 and 16 equal."
    net.cnn.net.blocks[0][0].has_skip = False
    return net


def reduced(state, **how):
    copy = {k: v.clone() for k, v in state.items()} # weights are taken over as they are
    return as_reduced(cp.from_state(copy, heads=HEADS, **{"merged": 0} | how)[0])


@torch.inference_mode()
def steps(net, x):
    "Everything that is computed on the way to the logit, by golden name, with the official sign."
    seen, tower, cnn = {}, net.rgb.tower, net.cnn.net
    parts = {"clip_pre_ln": tower.pre_layrnorm, "clip_layer0": tower.encoder.layers[0], "clip_last_hidden": tower.encoder.layers[-1],
             "clip_feat": net.rgb, "sig_residual": net.extractor, "eff_stem_bn": cnn.bn1, "eff_block0": cnn.blocks[0], "eff_map": cnn.bn2,
             "eff_feat": net.cnn, "head_hidden_pre": net.body[0]}
    def keep(name):
        def hook(_, a, y): seen[name] = y[0] if isinstance(y, tuple) else y
        return hook
    hooks = [m.register_forward_hook(keep(name)) for name, m in parts.items()]
    logit = -net(x)[:, None]
    for h in hooks: h.remove()
    tokens = {k: v[:, :8] for k, v in seen.items() if k in ("clip_pre_ln", "clip_layer0", "clip_last_hidden")}
    corner = {k: seen[k][:1, :4, :16, :16] for k in ("eff_stem_bn", "eff_block0")}
    return seen | tokens | corner | {"logit": logit, "sig_frac": net.signature(x), "clip_in": net.rgb.see((x + 1)/2)}


@contextmanager
def exact(net):
    "A network in double precision, and in single precision again afterwards."
    with mock.patch.object(torch.Tensor, "float", lambda v: v): yield net.double()
    net.float()


def test_every_step_of_the_reduced_detector(tiny, golden):
    got = steps(reduced(tiny), golden["dual_tiny.x"])
    want = {k.removeprefix("dual_tiny."): v for k, v in golden.items() if k.startswith("dual_tiny.")}
    want["eff_stem_bn"] = F.silu(want["eff_stem_bn"]) # ours has the activation in it
    for k in got: assert off(got[k], want[k]) < (10*LIMIT if k == "sig_frac" else LIMIT), k
    assert len(got) == 13


def test_reduced_detector_that_reacts_to_its_input(tiny, golden):
    net, x = reduced(calibrated(tiny, golden, "dual_tiny")), golden["dual_tiny.x"]
    with exact(net): precise = steps(net, x.double())
    for k, times in (("logit", 1), ("eff_feat", 5), ("eff_map", 5)): assert off(precise[k], golden[f"dual_tiny.cal.{k}"]) < times*LIMIT, k
    got = steps(net, x)
    for k in ("logit", "eff_feat", "eff_map") if LIKE_OFFICIAL else (): assert off(got[k], golden[f"dual_tiny.cal.{k}"]) < LIMIT, k
    assert (got["eff_feat"][0] - got["eff_feat"][1]).abs().max() > .01


def test_statistics_of_the_batch(tiny, golden):
    net = reduced(tiny)
    for m in net.cnn.modules():
        if isinstance(m, nn.BatchNorm2d): m.train()
    before = {k: v.clone() for k, v in net.cnn.net.state_dict().items() if "running" in k}
    with torch.no_grad(): out = net.cnn(net.signature(golden["dual_tiny.x"]))
    assert off(out, golden["dual_tiny.eff_feat_bn_batch_stats"]) < 3*LIMIT
    names = cp._b0_names(net.cnn)
    for k, v in before.items(): # the first moves by a hundredth of the way
        moved = v + .01*(golden[f"dual_tiny.override:effnet_backbone.{names[k]}"] - v)
        assert off(net.cnn.net.state_dict()[k], moved) < 10*LIMIT, k


def test_wrong_networks_are_noticed(tiny, golden):
    "Each of these mistakes gives the logits that it gives in the official code, and not the right ones."
    state, x = calibrated(tiny, golden, "dual_tiny"), golden["dual_tiny.x"]
    without = state | {k: v*0 for k, v in state.items() if k.endswith("lora_B")}
    nets = {"lora_zero": reduced(without, merged=None), "double_merged": reduced(cp.apart(state, -1)), "no_frac": reduced(state)}
    nets["no_frac"].wrapped = False
    for name, net in nets.items():
        with torch.inference_mode():
            single = -net(x)[:, None]
            with exact(net): logit = -net(x.double())[:, None]
        for v in (logit, single)[:1 + LIKE_OFFICIAL]: assert off(v, golden[f"dual_tiny.cal.logit_{name}"]) < LIMIT, name
        assert (logit - golden["dual_tiny.cal.logit"]).abs().max() > 5e-4, name


def test_adapters_merge_as_they_do_in_the_official_code(tiny, golden):
    w, b, a, bb, x = (golden[f"lora.{k}"] for k in ("weight", "bias", "lora_A", "lora_B", "x"))
    saved = cp.apart({"weight": w, "lora_A": a, "lora_B": bb} | {"q.weight": w, "q.lora_A": a, "q.lora_B": bb}, -1)["q.weight"]
    assert off(saved, golden["lora.weight_saved_in_eval"]) < LIMIT and off(F.linear(x, saved, b), golden["lora.y_eval"]) < LIMIT
    q = "clip_backbone.encoder.layers.0.self_attn.q_proj.weight"
    assert off(cp.apart(tiny, -1)[q][:8, :8], golden["dual_tiny.l0_q_merged_weight_corner"]) < LIMIT
    net = reduced(tiny)
    q_proj = net.rgb.tower.encoder.layers[0].self_attn.q_proj
    assert off(q_proj.get_base_layer().weight + q_proj.get_delta_weight("default"), cp.apart(tiny, -1)[q]) < LIMIT


@pytest.fixture(scope="module")
def full(golden): return calibrated(filled("dual_full"), golden, "dual_full")


@pytest.fixture(scope="module")
def whole(full): return cp.from_state(full)


def test_full_detector(whole, golden, monkeypatch):
    net, times = whole
    assert times == 0 and sum(p.numel() for p in net.parameters()) == 309_160_640 and len(net.state_dict()) == 1015
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 5_482_621
    x = torch.stack([net.preprocess(picture(size)) for size in ("odd_301x267", "small_150x119")])
    got = steps(net, x)
    for k in ("clip_pre_ln", "clip_layer0", "clip_last_hidden", "clip_feat"): assert off(got[k][:1], golden[f"dual_full.{k}"]) < LIMIT, k
    assert off(got["clip_in"][:1, :, :16, :16], golden["dual_full.clip_in"]) < LIMIT
    assert off(got["sig_residual"][:1, :, ::4, ::4], golden["dual_full.sig_residual"]) < LIMIT
    assert (got["sig_frac"][:1, :, :32, :32] - golden["dual_full.sig_frac"]).abs().quantile(.999) < 10*LIMIT # one may have turned around
    if LIKE_OFFICIAL:
        assert off(got["eff_feat"], golden["dual_full.cal.eff_feat"]) < 5*LIMIT
        assert off(got["eff_map"][:1, :64], golden["dual_full.cal.eff_map"]) < 5*LIMIT
        assert off(got["logit"], golden["dual_full.cal.logit"]) < LIMIT
    with exact(net): precise = steps(net, x.double())
    assert off(precise["eff_feat"], golden["dual_full.cal.eff_feat"]) < 5*LIMIT
    assert off(precise["eff_map"][:1, :64], golden["dual_full.cal.eff_map"]) < 20*LIMIT
    assert off(precise["logit"], golden["dual_full.cal.logit"]) < LIMIT
    monkeypatch.setattr(net, "signature", lambda _: precise["sig_frac"].float()) # nothing has turned around: single precision will do
    assert off(steps(net, x)["logit"], golden["dual_full.cal.logit"]) < 10*LIMIT
    for wrong in ("lora_zero", "double_merged", "no_frac"): assert off(precise["logit"], golden[f"dual_full.cal.logit_{wrong}"]) > 100*LIMIT


def test_full_detector_from_merged_files(whole, full, golden):
    "What the weights say about their adapters, with the pretrained ones at hand and without."
    net, _ = whole
    q = "clip_backbone.encoder.layers.0.self_attn.q_proj.weight"
    state = cp.apart(full, -1)
    assert off(state[q][:8, :8], golden["dual_full.l0_q_merged_weight_corner"]) < LIMIT
    assert cp.times_merged(state) == cp.times_merged(state, full) == 1
    official = cp.official_state(net)
    assert official.keys() == full.keys() and {k: [*v.shape] for k, v in official.items()} == shapes("dual_full")
    assert all(torch.equal(v, full[k]) for k, v in official.items())


# preprocessing


def picture(size): return Image.open(FOLDER/f"img_{size}.png")


@pytest.mark.parametrize("size", ["small_150x119", "mixed_311x180", "odd_301x267"])
def test_preprocessing_is_exact(size, golden):
    preprocess = GenSign(streams="rgb", crop=256, weights="").preprocess
    pixels = torch.tensor(preprocess.pixels(picture(size)))
    assert pixels.shape == (256, 256, 3) and torch.equal(pixels[::4, ::4], golden[f"prep.{size.split('_')[0]}.u8"])
    assert off(preprocess(picture(size)), (pixels.permute(2, 0, 1)/255 - .5)/.5) < 1e-6


# files


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("more", [{}, {"val_acc": 99., "val_auc": 1., "val_ap": 1.}])
def test_every_form_and_prefix(prefix, more, tiny, golden, tmp_path):
    state = tiny | {"clip_backbone.embeddings.position_ids": torch.arange(17)[None]}
    torch.save({"model": {prefix + k: v for k, v in state.items()}, "optimizer": {}, "step": 5} | more, tmp_path/"x.pth")
    net, found = cp.load_official(tmp_path/"x.pth", heads=HEADS, merged=0)
    assert (found.step, found.merged, found.entries) == (5, 0, len(state)) and "encoder of 2 blocks, width 48, 56 px" in str(found)
    with torch.inference_mode(): assert off(-as_reduced(net)(golden["dual_tiny.x"])[:, None], golden["dual_tiny.logit"]) < LIMIT


def test_bare_entries_and_without_counters(tiny, golden, tmp_path):
    torch.save({k: v for k, v in tiny.items() if not k.endswith("num_batches_tracked")}, tmp_path/"x.pth")
    net, found = cp.load_official(tmp_path/"x.pth", heads=HEADS, merged=0)
    assert found.step is None and net.preprocess.crop == 64
    with torch.inference_mode(): assert off(-as_reduced(net)(golden["dual_tiny.x"])[:, None], golden["dual_tiny.logit"]) < LIMIT


@pytest.mark.parametrize("merged", [False, True])
def test_written_detectors_are_read(merged, tiny, golden, tmp_path):
    net = reduced(tiny)
    cp.save_official(net, tmp_path/"x.pth", merged=merged, step=2)
    content = torch.load(tmp_path/"x.pth", weights_only=True)
    assert content["step"] == 2 and {k: [*v.shape] for k, v in content["model"].items()} == shapes("dual_tiny")
    assert merged or all(torch.equal(v, tiny[k]) for k, v in content["model"].items())
    again, found = cp.load_official(tmp_path/"x.pth", heads=HEADS, original=tiny) # too small to tell without
    assert found.merged == merged
    with torch.inference_mode(): assert off(-as_reduced(again)(golden["dual_tiny.x"])[:, None], golden["dual_tiny.logit"]) < LIMIT
    with pytest.raises(InputError, match="x.pth: adapters are too small to tell"): cp.load_official(tmp_path/"x.pth", heads=HEADS)


def test_official_detectors_are_saved_like_others(tiny, tmp_path):
    net = cp.from_state(tiny, heads=HEADS, merged=0)[0]
    save_detector(net, tmp_path/"d")
    again = load_detector(tmp_path/"d")
    images = [np.random.default_rng(i).integers(0, 256, (40 + 30*i, 90, 3), dtype=np.uint8) for i in range(3)]
    assert (predict(again, images) == predict(net, images)).all() and again.preprocess == net.preprocess


def test_half_precision_is_widened(tiny, tmp_path):
    torch.save({"model": {k: v.half() if v.is_floating_point() else v for k, v in tiny.items()}}, tmp_path/"x.pth")
    net = cp.load_official(tmp_path/"x.pth", heads=HEADS, merged=0)[0]
    assert {v.dtype for k, v in net.state_dict().items() if "tracked" not in k} == {torch.float32}
    assert torch.equal(net.head.weight, -tiny["fusion_head.2.weight"].half().float())


A = "clip_backbone.encoder.layers.1.self_attn.v_proj.lora_A"


@pytest.mark.parametrize("changes, words", [
    ({"fusion_head.2.weight": None}, "no entry for fusion_head.2.weight"),
    ({A: None}, f"no entry for {A}"),
    ({"noiser.res_blocks.0.gn2.bias": None}, "no entry for noiser.res_blocks.0.gn2.bias"),
    ({"effnet_backbone._blocks.6._se_reduce.bias": None}, "no entry for effnet_backbone._blocks.6._se_reduce.bias"),
    ({"effnet_backbone._fc.weight": torch.ones(1000, 320)}, "unknown entry effnet_backbone._fc.weight"),
    ({f"effnet_backbone._blocks.{i}._bn1.bias": torch.ones(1) for i in (7, 8)}, "EfficientNet of 9 blocks, not 7"),
    ({"fusion_head.0.weight": torch.ones(256, 367)}, r"fusion_head.0.weight has shape \(256, 367\), not \(256, 368\)"),
    ({"clip_backbone.post_layernorm.bias": torch.full((48,), float("nan"))}, "post_layernorm.bias holds something else"),
    ({"clip_backbone.embeddings.position_embedding.weight": torch.ones(16, 48)}, "16 tokens"),
    ({"clip_backbone.embeddings.patch_embedding.weight": torch.ones(3)}, "1 dimensions, not 4"),
    ({"fusion_head.0.weight": "text"}, "no weights under model"),
])
def test_wrong_entries_are_named(changes, words, tiny, tmp_path):
    torch.save({"model": {k: v for k, v in (tiny | changes).items() if v is not None}}, tmp_path/"x.pth")
    with pytest.raises(InputError, match=f"x.pth: .*{words}"): cp.load_official(tmp_path/"x.pth", heads=HEADS, merged=0)


READERS = [cp.load_official, cp.load_dair, cp.load_extractor]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [torch.ones(3), {}, {"model": {}}, {"step": 3}, [1, 2], {"encoder": {"a": torch.ones(1)}}])
def test_files_of_another_kind_are_named(reader, content, tmp_path):
    torch.save(content, tmp_path/"x.pth")
    with pytest.raises(InputError, match="x.pth: no (weights|entry)"): reader(tmp_path/"x.pth")
    with pytest.raises(InputError, match="absent.pth: No such file"): reader(tmp_path/"absent.pth")


class Harmful:
    "An object that runs code when it is unpickled."
    def __reduce__(self): return os.mkdir, ("harm",)


@pytest.mark.parametrize("reader", READERS)
def test_nothing_is_executed(reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"fusion_head.2.bias": Harmful()}}, "x.pth")
    with pytest.raises(InputError, match="x.pth: holds a Python object .*mkdir.* is not opened"): reader("x.pth")
    assert not Path("harm").exists()


# training


def test_a_stage_learns_with_every_structure():
    "Gradients reach everything that a structure uses, and nothing else."
    net = da.DAIR(width=8).train()
    x = torch.rand(2, 3, 16, 16)*2 - 1
    for _, how in structures():
        net.zero_grad()
        F.mse_loss(net(x, how), x).backward()
        learning = {n for n, p in net.named_parameters() if p.grad is not None}
        stages = {n.split(".")[2] for n in learning if n.startswith("decoder.stages")}
        levels = {n.split(".")[2] for n in learning if n.startswith("encoder.levels")}
        assert stages == {str(i) for i in range(3 - len(how), 3)} and levels == {str(i) for i in range(len(how))}
        assert any(n.startswith("encoder.tail") for n in learning) == (len(how) == 3)
        cells = {n.split(".cells.")[1][0] for n in learning if n.startswith(f"decoder.stages.{3 - len(how)}.cells")}
        assert len(cells) == len(how[0].cells)
        assert any(".shuffle." in n for n in learning) == any(stage.up == "shuffle" for stage in how)


def test_only_the_detectors_own_parts_learn():
    torch.manual_seed(0)
    net = create("gensign", features=8, blocks=1).train()
    net.set_extractor(Extractor(8, 1))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimiser = torch.optim.Adam(net.parameters(), 1e-2) # all of them, as the official code does
    for _ in range(2): # of the first step, A has no gradient
        optimiser.zero_grad()
        net(torch.rand(4, 3, 32, 32)*2 - 1).square().sum().backward()
        optimiser.step()
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert {k for k in changed if k.startswith("rgb.")} == {k for k in before if "lora_" in k}
    assert {k.split(".")[0] for k in changed} == {"rgb", "cnn", "body", "head"}
