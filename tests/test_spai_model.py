"""SPAI and its pretraining compute what the official code computes, step by step, from files in the official form.

Reference outputs in parity/spai came from the official code with weights that follow from their names and shapes.
"""

import json
import math
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from parity_weights import fill
from PIL import Image

from aigid_repro.data.storage import InputError
from aigid_repro.detect.detector import create, load_detector, save_detector
from aigid_repro.detect.training import predict
from aigid_repro.spai import checkpoints as cp
from aigid_repro.spai import frequency as fq
from aigid_repro.spai import model as md
from aigid_repro.spai import pretraining as pt

FOLDER = Path(__file__).parent/"parity"/"spai"
LIMIT = 1e-5 # of logits and probabilities
STEP_LIMIT = 2e-5 # of everything else, relative where values are above 1
TINY = ["grid150x200", "five70x90", "five69x91"]


def load(name):
    with np.load(FOLDER/name) as f: return dict(f)


@pytest.fixture(scope="module")
def tiny(): return load("golden_tiny.npz")


@pytest.fixture(scope="module")
def mfm(): return load("golden_mfm.npz")


@pytest.fixture(scope="module")
def base(): return load("golden_base.npz")


def filled(spec): return fill(json.loads((FOLDER/spec).read_text()))


def image(name): # (1, 3, h, w) in [0, 1]
    with Image.open(FOLDER/f"image_{name}.png") as f: pixels = np.array(f.convert("RGB"))
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32)/255)[None]


def furthest(ours, theirs): # largest difference, relative for numbers above 1
    theirs = np.asarray(theirs)
    assert np.shape(ours) == theirs.shape
    return (np.abs(np.asarray(ours) - theirs)/np.maximum(1, np.abs(theirs))).max()


@pytest.fixture(scope="module")
def tiny_state(tiny): return filled("spec_tiny.json") | {cp.MASK: torch.from_numpy(tiny["mask"]).long()}


@pytest.fixture(scope="module")
def detector(tiny_state, tmp_path_factory):
    "The tiny detector, read from a checkpoint."
    path = tmp_path_factory.mktemp("tiny")/"ckpt_epoch_3.pth"
    torch.save({"model": tiny_state, "optimizer": {"state": {}}, "lr_scheduler": {}, "max_accuracy": 1.5, "epoch": 3}, path)
    found, report = cp.load_official(path, heads=4)
    assert (report.form, report.entries, report.epoch, report.mask) == ("SPAI checkpoint", len(tiny_state), 3, True)
    assert found.sizes == md.Sizes(64, 16, 64, 3, 4, 6, projection=48, sca_heads=4, sca_dim=96)
    return found


@torch.inference_mode()
def steps(detector, x, minimum=4):
    "Everything that is computed on the way to the logit."
    seen = {}
    def block(i): return lambda _, a, y: seen.setdefault("blocks", {}).update({i: y[:, 1:]})
    def projected(i): return lambda _, a, y: seen.setdefault("projected", {}).update({i: y.flatten(0, -3)})
    hooks = [h for i in range(detector.sizes.depth) for h in (detector.encoder.blocks[i].register_forward_hook(block(i)),
                                                              detector.projections[i].register_forward_hook(projected(i)))]
    detector.minimum = minimum
    patches, counts = detector.patches(x)
    vectors = detector.spectral_vectors(patches)
    for h in hooks: h.remove()
    detector.minimum = 4
    fused, attention = detector.sca(vectors, counts)
    normed = detector.norm(fused)
    n = 6*detector.sizes.depth
    out = dict(patches=patches, spectral_vector=vectors, srs=vectors[:, :n], scv=vectors[:, n:], sca_attention=attention.T[None, :, None],
               fused_sca=fused, fused_norm=normed, logit=detector.head(detector.body(normed)))
    for name in ("blocks", "projected"): # (views, patches, blocks, tokens, width)
        out[name] = torch.stack([*seen[name].values()], 1).unflatten(0, (3, len(patches)))
    return out | {"prob": out["logit"].sigmoid()}


# spectra


def test_masks_are_exact(mfm, base, tiny):
    def bits(x): return np.unpackbits(x).reshape(224, 224)
    assert (fq.centred_disc(224, 16).numpy() == bits(mfm["mfm.mask224_r16_low"])).all()
    assert (fq.centred_disc(32, 5).numpy() == mfm["mfm.mask32_r5_low"]).all()
    assert (fq.centred_disc(32, 3, 9).numpy() == mfm["mfm.mask32_r3_9_band"]).all()
    assert (fq.offcentre_disc(224, 16).numpy() == bits(base["mask"])).all()
    assert (fq.offcentre_disc(64, 6).numpy() == tiny["mask"]).all()
    assert (fq.offcentre_disc(32, 5).numpy() == mfm["filter.mask32_r5"]).all()
    assert (fq.offcentre_disc(32, 3, 9).numpy() == mfm["filter.mask32_r3_r9"]).all()


def test_filters_are_exact(mfm):
    x, disc = torch.from_numpy(mfm["mfm.x01"]), fq.offcentre_disc(32, 5)
    assert furthest(fq.keep(x, disc), mfm["filter.low"]) < 1e-6 and furthest(fq.keep(x, ~disc), mfm["filter.high"]) < 1e-6
    for name, low in (("low", True), ("high", False)):
        kept = pt.masks(torch.tensor([low, low]), fq.centred_disc(32, 5))
        assert furthest(pt.corrupt(x, kept), mfm[f"mfm.corrupted_{name}"]) < 1e-6


def test_the_three_normalised_views(tiny, detector):
    patches = detector.patches(image("150x200"))[0]
    for ours, name in zip(fq.views(patches[:2], detector.disc), ("orig", "low", "high")):
        assert furthest(ours, tiny[f"grid150x200.{name}"]) < STEP_LIMIT


def test_five_crops_in_order(tiny, detector):
    for name in ("70x90", "69x91"):
        first = fq.normalise(detector.patches(image(name))[0])[:, :, 0, 0]
        assert furthest(first, tiny[f"five{name}.orig_first_pixels"]) < 1e-6


def test_small_images_are_reflected():
    golden = load("golden_images.npz")
    with Image.open(FOLDER/"pre_17x13.png") as f: pixels = torch.from_numpy(np.array(f.convert("RGB"))).permute(2, 0, 1)
    assert (md.reflect(pixels, 224).numpy() == golden["small_out_u8"]).all()
    assert all((v.numpy() == golden["small_out_u8"]).all() for v in md.SPAI.patches(detector_shell(), [pixels])[0])


def detector_shell(): # cuts patches of 224 px, nothing else
    with torch.device("meta"): shell = md.SPAI()
    shell.disc = torch.zeros(1)
    return shell.eval()


def test_value_of_a_byte():
    values = torch.arange(256, dtype=torch.uint8)*torch.tensor(1/255)
    assert (values.numpy() == load("golden_images.npz")["value_of_each_byte"]).all()


# pretraining


def test_coin_tosses(mfm):
    torch.manual_seed(0)
    assert (pt.choose(32).numpy() == mfm["mfm.mask_choice_seed0"]).all()


def test_losses(mfm):
    prediction, target = (torch.from_numpy(mfm[f"mfm.{k}"]) for k in ("pred", "target"))
    def loss(name, kept=None, **options):
        return abs(pt.frequency_loss(prediction, target, kept, **options).item() - mfm[f"mfm.loss_{name}"])
    assert furthest(pt.spectral_distance(prediction, target), mfm["mfm.loss_gamma1_map"]) < 2e-6
    assert loss("patch2_mean", patches=2) < 1e-6 and loss("avg_mean", average=True) < 1e-6
    for variant, options in (("gamma1", {}), ("gamma2", dict(gamma=2)), ("focal", dict(focal=True))):
        assert loss(f"{variant}_mean", **options) < 1e-6
        for name, low in (("low", True), ("high", False)):
            assert loss(f"{variant}_masked_{name}input", pt.masks(torch.tensor([low, low]), fq.centred_disc(32, 5)), **options) < 1e-6


@torch.inference_mode()
def test_pretraining_model_read_from_its_file(mfm, tmp_path):
    torch.save({"model": filled("spec_mfm_tiny.json")}, tmp_path/"mfm.pth")
    x = torch.from_numpy(mfm["mfm.x01"])
    for target in pt.TARGETS:
        model, found = cp.load_mfm(tmp_path/"mfm.pth", heads=4, radius=5, target=target)
        assert found.unused == {"cls_pos_embed": 1, "actual_cls_token": 1, "cls_blocks": 13, "cls_norm": 2} and not found.missing
        for name, low in (("low", torch.tensor([True]*2)), ("high", torch.tensor([False]*2))):
            loss, reconstruction = model(x, low)
            encoded = model.encode(fq.normalise(pt.corrupt(x, pt.masks(low, model.disc))))
            assert furthest(encoded, mfm[f"mfm.model_enc_{name}input"]) < STEP_LIMIT
            assert furthest(reconstruction, mfm[f"mfm.model_rec_{name}input"]) < STEP_LIMIT
            assert abs(loss.item() - mfm[f"mfm.model_loss_{target}_{name}input"]) < LIMIT


def test_learning_rates():
    golden = load("golden_images.npz")
    per_epoch, epochs, warm = (int(golden[f"schedule_{k}"]) for k in ("steps_per_epoch", "epochs", "warmup_epochs"))
    ours = pt.warm_cosine(golden["schedule_update_index"], 5e-4, 2.5e-7, 2.5e-7, warm*per_epoch, epochs*per_epoch)
    assert np.allclose(ours, golden["schedule_lr"], rtol=1e-9, atol=0)


def test_pretraining_learns_removed_frequencies_alone():
    "Two pictures are learned by heart, better than an empty prediction does; no gradient where frequencies were seen."
    rng = np.random.default_rng(0)
    photos = [np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((32, 32))) for _ in range(2)]
    settings = pt.preset("smoke", image=32, depth=1, radius=3, steps=200, batch=8, warmup=10, lr=5e-3, area=(1, 1))
    log, (x, low) = [], pt.batch_of(photos, settings, 999)
    trained = pt.pretrain(settings, photos, log=log)
    empty = pt.frequency_loss(torch.zeros_like(x), fq.normalise(x), pt.masks(low, trained.disc))
    with torch.no_grad(): assert trained(x, low)[0] < .9*empty < .9*log[0][1]
    out = torch.randn(2, 3, 32, 32, requires_grad=True)
    kept = pt.masks(torch.tensor([True, False]), fq.centred_disc(32, 3))
    pt.frequency_loss(out, torch.zeros(2, 3, 32, 32), kept).backward()
    assert fq.keep(out.grad, kept).abs().max() < 1e-6 < fq.keep(out.grad, ~kept).abs().max()


# the detector, tiny


@pytest.mark.parametrize("case", TINY)
def test_every_step_of_the_tiny_detector(case, tiny, detector):
    got = steps(detector, [image(case.removeprefix("grid").removeprefix("five"))[0]])
    for name in ("spectral_vector", "fused_sca", "fused_norm", "srs", "scv", "sca_attention"):
        if f"{case}.{name}" in tiny: assert furthest(got[name], tiny[f"{case}.{name}"]) < STEP_LIMIT, name
    assert furthest(got["logit"], tiny[f"{case}.logit"]) < LIMIT
    if case == "five69x91": return
    assert furthest(got["prob"], tiny[f"{case}.prob"]) < LIMIT
    for view, blocks, projected in zip(("orig", "low", "high"), got["blocks"], got["projected"]):
        assert furthest(blocks.mean(2), tiny[f"{case}.vit_tokmean_{view}"]) < STEP_LIMIT
        assert furthest(blocks.std(2), tiny[f"{case}.vit_tokstd_{view}"]) < STEP_LIMIT
        assert furthest(blocks[:, :, [0, 5, 15]], tiny[f"{case}.vit_some_{view}"]) < STEP_LIMIT
        assert furthest(projected[:1, :, [0, 5]], tiny[f"{case}.proj_some_{view}"]) < STEP_LIMIT


def test_sharp_attention_and_context(tiny, tiny_state):
    "Soft-max maps far from uniform: scales and axes would show."
    alpha = "mfvit.features_processor.original_features_processor.alpha"
    sharp = tiny_state | {"patch_aggregator": tiny_state["patch_aggregator"]*200, alpha: tiny_state[alpha]*100}
    detector = cp.from_state(sharp, heads=4)[0]
    got = steps(detector, [image("150x200")[0]])
    assert got["sca_attention"].amax(-1).max() > .5
    for name in ("spectral_vector", "sca_attention", "fused_sca", "fused_norm"):
        assert furthest(got[name], tiny[f"grid150x200_sharp.{name}"]) < 1e-4, name
    assert furthest(got["logit"], tiny["grid150x200_sharp.logit"]) < 2e-5


@torch.inference_mode()
def test_views_side_by_side_as_in_training(tiny, detector):
    got = steps(detector, image("64x256"), minimum=0)
    for name in ("logit", "prob", "fused_sca", "fused_norm"):
        assert furthest(got[name], tiny[f"trainlike64x256.{name}"]) < STEP_LIMIT
    assert len(got["patches"]) == 4
    detector.train()
    assert torch.equal(detector.patches(image("64x256"))[0], got["patches"])
    detector.eval()


@pytest.mark.parametrize("chunk", [1, 3, 32])
@torch.inference_mode()
def test_two_images_of_different_size_in_one_batch(chunk, tiny, detector):
    detector.chunk = chunk
    logits = detector([image("150x200")[0], image("70x90")[0]])
    detector.chunk = 0
    assert furthest(logits[:, None], tiny["list_of_two.logit"]) < LIMIT
    assert furthest(logits[:, None], tiny["list_of_two_fb3.logit"]) < LIMIT


def test_scores_of_files(tiny, detector):
    "Through both ways of the kit, from decoded images."
    files = [FOLDER/f"image_{n}.png" for n in ("150x200", "70x90", "69x91")]
    golden = np.concatenate([tiny["list_of_two.logit"], tiny["five69x91.logit"]])[:, 0]
    for images in ([Image.open(f) for f in files], (np.asarray(Image.open(f)) for f in files), files, [f.read_bytes() for f in files]):
        assert furthest(md.score_images(detector, images, precision="no"), golden) < LIMIT
    assert furthest(predict(detector, [Image.open(f) for f in files]), golden) < LIMIT


def test_attention_is_given_with_its_places(tiny, detector):
    for case in TINY[:2]:
        picture = Image.open(FOLDER/f"image_{case.removeprefix('grid').removeprefix('five')}.png")
        places, attention = md.patch_attention(detector, picture)
        assert furthest(attention.T[None, :, None], tiny[f"{case}.sca_attention"]) < STEP_LIMIT
        assert places == md.positions(picture.height, picture.width, 64)


@torch.inference_mode()
def test_images_do_not_see_each_other(detector):
    x = [torch.rand(3, h, w, generator=torch.Generator().manual_seed(h)) for h, w in [(64, 64), (300, 70), (10, 10), (130, 260)]]
    together, alone = detector(x), torch.cat([detector([v]) for v in x])
    assert torch.allclose(together, alone, atol=1e-6) and torch.allclose(detector(x[::-1]).flip(0), alone, atol=1e-6)


# the detector, full size


@pytest.fixture(scope="module")
def full():
    state = filled("spec.json")
    assert len(state) == 323 and sum(v.numel() for v in state.values()) == 139_945_243 - 224**2
    detector, network, unused = cp.from_state(state | {cp.MASK: fq.offcentre_disc(224, 16).long()})
    assert network == {} and unused["cls_blocks"] == 13 and sum(p.numel() for p in detector.parameters() if p.requires_grad) == 46_829_593
    return detector


def test_full_detector(full, base):
    "A wide image has two patches in the grid: five crops on the list path, of which three are different, the grid on the tensor path."
    x = image("224x448")
    patches, counts = full.patches([x[0]])
    assert counts.tolist() == [5] and torch.equal(patches[0], patches[2]) and torch.equal(patches[1], patches[3])
    with torch.inference_mode():
        once = full.spectral_vectors(patches[[0, 1, 4]])
        for case, rows in (("list224x448", [0, 1, 0, 1, 2]), ("tensor224x448", [0, 1])):
            vectors = once[rows]
            fused, attention = full.sca(vectors, torch.tensor([len(rows)]))
            normed = full.norm(fused)
            logit = full.head(full.body(normed))
            got = dict(spectral_vector=vectors, srs=vectors[:, :72], scv=vectors[:, 72:], sca_attention=attention.T[None, :, None],
                       fused_sca=fused, fused_norm=normed)
            for name, ours in got.items():
                if f"{case}.{name}" in base: assert furthest(ours, base[f"{case}.{name}"]) < STEP_LIMIT, name
            assert furthest(logit, base[f"{case}.logit"]) < LIMIT and furthest(logit.sigmoid(), base[f"{case}.prob"]) < LIMIT


# switches and storing


@pytest.mark.parametrize("switch", [{}, dict(srs=False), dict(scv=False), *(dict(merge=m) for m in md.MERGES[1:])])
def test_every_switch_trains_and_is_stored(switch, tmp_path):
    net = toy(**switch).train()
    net(torch.rand(2, 3, 32, 128)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    net.eval()
    save_detector(net, tmp_path/"d")
    images = [np.random.default_rng(i).integers(0, 256, s, dtype=np.uint8) for i, s in enumerate([(70, 90, 3), (20, 40, 3)])]
    assert (md.score_images(load_detector(tmp_path/"d"), images) == md.score_images(net, images)).all()
    assert np.allclose(predict(net, images), md.score_images(net, images, precision="no"), atol=1e-5)


@torch.inference_mode()
def test_crops_without_attention():
    nets = {m: create("spai", **TOY, merge=m).eval() for m in md.MERGES[1:]}
    for net in nets.values(): net.load_state_dict(nets["centre"].state_dict())
    x = torch.rand(1, 3, 60, 81)
    crops = [x[..., t:t + 32, c:c + 32] for t, c in [(0, 0), (0, 49), (28, 0), (28, 49), (14, 24)]]
    each = torch.cat([nets["centre"](c) for c in crops + [c.flip(-1) for c in crops]])
    assert torch.allclose(nets["centre"](x), each[4:5], atol=1e-6)
    assert torch.allclose(nets["ten-mean"](x), each.mean()[None], atol=1e-6)
    assert torch.allclose(nets["ten-max"](x), each.max()[None], atol=1e-6)


TOY = dict(size="mini", image=32, width=24, depth=2, projection=16, sca_heads=2, sca_dim=16, radius=3)


def toy(**options):
    torch.manual_seed(0)
    return create("spai", **TOY | options).eval()


def noise(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_memory_does_not_grow_with_the_number_of_images():
    "The encoder never sees more than three views of a chunk; images are asked for one at a time and let go when they are cut."
    net, seen, alive = toy(chunk=5), [], []
    net.encoder.blocks[0].register_forward_hook(lambda _, a, y: seen.append(len(y)))
    def images():
        for i in range(20):
            picture = noise(64, 64 + 32*(i%3), seed=i)
            alive.append(weakref.ref(picture))
            assert sum(r() is not None for r in alive) <= 2 # the one before is still being replaced
            yield picture
            del picture
    assert len(md.score_images(net, images(), precision="no")) == 20
    assert max(seen) == 15 and sum(seen) == 3*sum(2*(2 + i%3) for i in range(20))
    assert net.patches([torch.from_numpy(noise(64, 64)).permute(2, 0, 1)])[0].dtype == torch.uint8


@pytest.mark.parametrize("merge", md.MERGES)
@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
def test_chunks_do_not_change_logits_nor_their_order(merge, chunk):
    "Images that begin and end anywhere in a chunk, one longer than several chunks."
    net = toy(merge=merge)
    images = [noise(h, w, seed=h) for h, w in [(32, 64), (200, 150), (10, 10), (33, 70), (64, 64), (31, 96)]]
    alone = np.concatenate([net([torch.from_numpy(i).permute(2, 0, 1)]).detach().numpy() for i in images])
    net.chunk = chunk
    assert np.allclose(md.score_images(net, iter(images), precision="no"), alone, atol=1e-6)


def test_equal_patches_are_encoded_once():
    net, seen = toy(), []
    small = [noise(32, 32, seed=i) for i in range(3)] # five equal patches each
    blank = np.zeros((96, 96, 3), np.uint8)
    blank[:32, :32] = 7
    logits = md.score_images(net, [*small, blank], precision="no")
    net.encoder.blocks[0].register_forward_hook(lambda _, a, y: seen.append(len(y)))
    assert (md.score_images(net, [*small, blank], precision="no") == logits).all() and seen == [3*(3 + 2)]
    alone = torch.cat([net([torch.from_numpy(i).permute(2, 0, 1)]) for i in [*small, blank]]).detach()
    assert np.allclose(alone, logits, atol=1e-6)


def test_a_large_image_is_cut_without_a_copy():
    image = torch.zeros(1, 3, 3200, 3200, dtype=torch.uint8)
    views = toy().cut(image)
    assert len(views) == 10_000 and all(v.untyped_storage().data_ptr() == image.untyped_storage().data_ptr() for v in views)


def test_sixteen_bits_where_they_are_harmless(detector):
    "Logits stay within 0.01 of single precision; similarities, attention and head are in single precision."
    images = [noise(h, w, seed=w) for h, w in [(150, 200), (64, 64), (300, 130)]]
    exact = md.score_images(detector, images, precision="no")
    rounded = md.score_images(detector, images, precision="bf16")
    assert 0 < np.abs(exact - rounded).max() < 1e-2
    kinds = {}
    parts = dict(block=detector.encoder.blocks[0].mlp.fc1, projection=detector.projections[0].second, context=detector.context.first.first,
                 sca=detector.sca.to_kv, body=detector.body[0], head=detector.head)
    hooks = [m.register_forward_hook(lambda _, a, y, name=name: kinds.update({name: y.dtype})) for name, m in parts.items()]
    md.score_images(detector, images[:1], precision="bf16")
    for h in hooks: h.remove()
    half, single = torch.bfloat16, torch.float32
    assert kinds == dict(block=half, projection=half, context=single, sca=single, body=single, head=single)


def test_a_frozen_encoder_records_nothing():
    net = toy().train()
    seen = []
    net.encoder.blocks[-1].register_forward_hook(lambda _, a, y: seen.append(y))
    net(torch.rand(2, 3, 32, 128)).sum().backward()
    assert seen[0].grad_fn is None and all((p.grad is None) for p in net.encoder.parameters())
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_gradients_of_the_spectral_vector(detector):
    "Those of means, deviations and cosines as torch computes them."
    torch.manual_seed(0)
    z = torch.randn(3, 2, 7, 16, dtype=torch.float64, requires_grad=True)
    cosines = torch.stack([torch.cosine_similarity(z[a], z[b], dim=-1) for a, b in ((0, 1), (0, 2), (1, 2))], -1)
    plain = torch.stack([cosines.mean(1), cosines.std(1)], -1).flatten(1)
    weights = torch.randn(plain.shape, dtype=torch.float64)
    (theirs,) = torch.autograd.grad((plain*weights).sum(), z)
    ours = md.similarity(z)
    assert torch.allclose(ours, plain) and torch.allclose(torch.autograd.grad((ours*weights).sum(), z)[0], theirs)
    same = torch.ones(3, 1, 4, 8, requires_grad=True) # views alike in all tokens
    md.similarity(same).sum().backward()
    assert same.grad.isfinite().all()


# files


def yacs_like(path):
    "Write a checkpoint whose settings are objects of a class named as that of yacs, in a process that has such a class."
    code = f"""if True:
    import sys, types, numpy as np, torch
    class CfgNode(dict):
        def __init__(self, **entries):
            super().__init__(entries)
            self.__dict__.update(__immutable__=True, __renamed_keys__={{}}, __deprecated_keys__=set())
    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    for name in ('yacs', 'yacs.config'): sys.modules[name] = types.ModuleType(name)
    sys.modules['yacs.config'].CfgNode = CfgNode
    config = CfgNode(MODEL=CfgNode(VIT=CfgNode(NUM_HEADS=4), SWIN=CfgNode(NUM_HEADS=[3, 6])), PATCH_VIT=CfgNode(MINIMUM_PATCHES=1))
    torch.save(torch.load({str(path)!r}) | {{'config': config, 'max_accuracy': np.float64(3.)}}, {str(path)!r})"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_settings_of_yacs_are_read_and_nothing_of_them_is_run(tiny_state, tiny, tmp_path):
    torch.save({"model": tiny_state, "epoch": 0}, tmp_path/"spai.pth")
    yacs_like(tmp_path/"spai.pth")
    detector, found = cp.load_official(tmp_path/"spai.pth")
    assert detector.sizes.heads == 4 and (found.epoch, found.minimum) == (0, 1) and detector.minimum == 4
    assert furthest(md.score_images(detector, [FOLDER/"image_70x90.png"], precision="no")[:, None], tiny["five70x90.logit"]) < LIMIT
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/"spai.pth", weights_only=True) # the exception is local


class Harmful:
    "An object that runs code when it is unpickled."
    def __reduce__(self): return os.mkdir, ("harm",)


def test_nothing_is_executed(tiny_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": tiny_state, "config": Harmful()}, "x.pth")
    with pytest.raises(InputError, match="x.pth: holds a Python object .*mkdir.* is not opened"): cp.load_official("x.pth")
    assert not Path("harm").exists()


@pytest.mark.parametrize("changes, words", [
    ({"to_kv.weight": None}, "no entry sca.to_kv.weight"),
    ({"mfvit.vit.cls_token": None}, "no entry for encoder.cls_token"),
    ({"mfvit.vit.blocks.1.attn.q_bias": None}, r"no entry for encoder.blocks.1.attn.q_bias"),
    ({"mfvit.vit.norm.weight": torch.ones(64)}, "unknown entry encoder.norm.weight"),
    ({"text_encoder.weight": torch.ones(64)}, "unknown entry text_encoder.weight"),
    ({"cls_head.head.6.weight": torch.ones(2, 198)}, r"head.weight has shape \(2, 198\), not \(1, 198\)"),
    ({"norm.bias": torch.full((66,), float("inf"))}, "norm.bias holds something else than finite"),
    ({cp.MASK: torch.zeros(64, 64)}, "none of SPAI's discs"),
    ({cp.MASK: fq.centred_disc(64, 6).long()}, "none of SPAI's discs"),
    ({"mfvit.vit.pos_embed": torch.ones(1, 12, 64)}, "pos_embed has 12 rows"),
    ({"norm.bias": "text"}, "neither a state dict"),
])
def test_wrong_entries_are_named(tiny_state, tmp_path, changes, words):
    torch.save({"model": {k: v for k, v in (tiny_state | changes).items() if v is not None}}, tmp_path/"x.pth")
    with pytest.raises(InputError, match=f"x.pth: .*{words}"): cp.load_official(tmp_path/"x.pth", heads=4)


@pytest.mark.parametrize("switch, drop", [(dict(srs=False), 18), (dict(scv=False), 48)])
def test_ablated_checkpoints_are_recognised(tiny_state, switch, drop):
    width = 66 - drop
    state = {k: v for k, v in tiny_state.items() if "scv" not in switch or "original_features" not in k}
    shapes = {"to_kv.weight": (192, width), "to_out.0.weight": (width, 96), "norm.weight": (width,), "norm.bias": (width,),
              "cls_head.head.0.weight": (3*width, width), "cls_head.head.0.bias": (3*width,), "cls_head.head.3.weight": (3*width, 3*width),
              "cls_head.head.3.bias": (3*width,), "cls_head.head.6.weight": (1, 3*width)}
    detector, network, _ = cp.from_state(state | {k: torch.zeros(s) for k, s in shapes.items()}, heads=4)
    assert network.items() >= switch.items() and detector(torch.rand(1, 3, 64, 64)).shape == (1,)


def test_damaged_files_are_refused(tiny_state, tmp_path):
    path, rng = tmp_path/"x.pth", np.random.default_rng(0)
    torch.save({"model": tiny_state}, path)
    data = path.read_bytes()
    for part in (b"", b"<html>", rng.bytes(5000), data[:8], *(data[:n] for n in rng.integers(9, len(data) - 1, 5))):
        path.write_bytes(part)
        with pytest.raises(InputError, match="x.pth: "): cp.load_official(path, heads=4)
    with pytest.raises(InputError, match="absent.pth"): cp.load_official(tmp_path/"absent.pth")


def test_a_pretrained_encoder_goes_into_a_detector(tmp_path):
    torch.save({"model": filled("spec_mfm_tiny.json")}, tmp_path/"mfm.pth")
    encoder = cp.load_mfm(tmp_path/"mfm.pth", heads=4)[0].encoder
    pt.save_encoder(encoder, tmp_path/"encoder.safetensors")
    net = create("spai", image=32, patch=16, width=64, depth=3, heads=4, radius=3, projection=8, sca_heads=2, sca_dim=8,
                 pretrained=str(tmp_path/"encoder.safetensors"))
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in net.encoder.state_dict().items()) and "pretrained" not in net.settings


def test_segments_need_no_loop():
    "Sums over segments equal a loop over images with the plain formula."
    torch.manual_seed(0)
    sca = md.SpectralContextAttention(12, 3, 24, 0.)
    counts = torch.tensor([4, 1, 228, 5])
    x = torch.randn(int(counts.sum()), 12)
    out, attention = sca(x, counts)
    for part, o in zip(x.split(counts.tolist()), out):
        k, v = rearrange(sca.to_kv(part), "p (two h d) -> two h p d", two=2, h=3)
        weights = ((sca.query[:, None]*k).sum(-1)/math.sqrt(8)).softmax(-1)
        assert torch.allclose(sca.out((weights[..., None]*v).sum(1).flatten()), o, atol=1e-6)
