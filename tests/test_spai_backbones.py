"""Other encoders under SPAI give what the libraries' own forward passes give; trained detectors go into files in the official form."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as Tower

from aigid_repro.data.storage import InputError
from aigid_repro.detect.detector import create, load_detector, save_detector
from aigid_repro.spai import backbones as bb
from aigid_repro.spai import checkpoints as cp
from aigid_repro.spai import frequency as fq
from aigid_repro.spai.model import score_images
from aigid_repro.spai.pretraining import Encoder, MaskedFrequencyModel, save_encoder

FOLDER = Path(__file__).parent/"parity"/"spai"
SMALL = dict(size="mini", image=28, patch=7, width=24, depth=3, heads=3, radius=2, front="pixels", white=False, projection=16,
             sca_heads=2, sca_dim=16)
TINY = dict(image=64, patch=16, width=64, depth=3, heads=4, radius=6, projection=48, sca_heads=4, sca_dim=96) # that of spec_tiny.json
OTHERS = ["clip", "dinov2"]


def spec(name): return {k: tuple(v) for k, v in json.loads((FOLDER/name).read_text()).items()}


def shaken(module): # norms and biases that are not the initial ones
    with torch.no_grad():
        for p in module.parameters(): p.add_(.1*torch.randn_like(p))
    return module.eval()


def detector(backbone="mfm", **options):
    torch.manual_seed(0)
    return create("spai", **SMALL, backbone=backbone, **options)


# features


@torch.inference_mode()
def test_clip_features_are_those_of_the_second_norms():
    torch.manual_seed(0)
    tower = shaken(Tower(32, 8, 24, 3, 3, mlp_ratio=4, act_layer=QuickGELU, output_dim=24))
    clip = bb.CLIP(32, 8, 24, 3, 3).eval()
    left = clip.load_state_dict({k.replace("transformer.resblocks", "blocks"): v for k, v in tower.state_dict().items()}, strict=False)
    assert not left.missing_keys and {k.split(".")[0] for k in left.unexpected_keys} == {"ln_post", "proj"}
    seen, x = [], torch.randn(2, 3, 32, 32)
    for block in tower.transformer.resblocks: block.ln_2.register_forward_hook(lambda _, a, y: seen.append(y))
    tower(x)
    assert all(torch.allclose(a[:, 1:], b, atol=1e-5) for a, b in zip(seen, clip.features(x), strict=True))


@torch.inference_mode()
def test_dinov2_features_are_outputs_of_blocks():
    torch.manual_seed(0)
    size = dict(img_size=28, patch_size=7, embed_dim=24, depth=3, num_heads=3, init_values=1e-5, num_classes=0)
    vit = shaken(timm.models.VisionTransformer(**size))
    dino = bb.DINOv2(28, 7, 24, 3, 3).eval()
    left = dino.load_state_dict(vit.state_dict(), strict=False)
    assert not left.missing_keys and set(left.unexpected_keys) == {"norm.weight", "norm.bias"}
    x = torch.randn(2, 3, 28, 28)
    theirs = vit.forward_intermediates(x, norm=False, output_fmt="NLC", intermediates_only=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, dino.features(x), strict=True))


def test_published_sizes():
    with torch.device("meta"):
        dino, clip = create("spai", backbone="dinov2"), create("spai", backbone="clip")
    assert (dino.sizes.patch, dino.encoder.pos_embed.shape) == (14, (1, 257, 768))
    assert (clip.sizes.patch, clip.encoder.positional_embedding.shape) == (16, (197, 768))
    vit = timm.create_model("vit_base_patch14_dinov2", img_size=224, num_classes=0)
    assert dino.encoder.state_dict().keys() == vit.state_dict().keys() - {"norm.weight", "norm.bias"}
    assert type(dino.encoder.blocks[0]) is type(vit.blocks[0])
    assert 85e6 < sum(p.numel() for p in dino.encoder.parameters()) < 87e6 > sum(p.numel() for p in clip.encoder.parameters()) > 85e6


@pytest.mark.parametrize("backbone", OTHERS)
def test_views_get_the_constants_of_the_backbone(backbone):
    net, seen = detector(backbone).eval(), []
    net.encoder.embed, embed = lambda x: seen.append(x) or embed(x), net.encoder.embed
    patches = torch.rand(2, 3, 28, 28)
    net.spectral_vector(patches)
    mean, std = {"clip": (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD), "dinov2": (fq.MEAN, fq.STD)}[backbone]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    low, high = fq.split(patches, net.disc)
    assert torch.allclose(seen[0], (torch.cat([patches, low, high]) - mean)/std, atol=1e-6)


# in the detector


@pytest.mark.parametrize("backbone", OTHERS)
def test_frozen_or_not_and_stored(backbone, tmp_path):
    net = detector(backbone).train()
    net(torch.rand(2, 3, 28, 112)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in net.encoder.parameters())
    learning = detector(backbone, frozen=False).train()
    learning(torch.rand(2, 3, 28, 112)).sum().backward()
    unused = {n for n, p in learning.encoder.named_parameters() if p.grad is None}
    # CLIP's features end before the MLP of the last block
    assert all(n.startswith("blocks.2.") and ".mlp." in n for n in unused) and bool(unused) == (backbone == "clip")
    save_detector(net.eval(), tmp_path/"d")
    images = [np.random.default_rng(i).integers(0, 256, (*s, 3), dtype=np.uint8) for i, s in enumerate([(70, 90), (20, 40)])]
    again = load_detector(tmp_path/"d")
    assert again.settings["backbone"] == backbone and (score_images(again, images) == score_images(net, images)).all()


def test_mfm_keeps_its_names():
    net = detector()
    names = {n for n in net.state_dict() if n.startswith("encoder.")}
    assert names == {f"encoder.{n}" for n in Encoder(28, 7, 24, 3, 3).state_dict()}
    assert create("spai", **SMALL).settings == SMALL # the default


@pytest.mark.parametrize("options, words", [
    (dict(backbone="vgg"), "unknown backbone 'vgg'; known: mfm, clip, dinov2"),
    (dict(backbone="clip", pretrained="nothing"), "weights 'nothing' of CLIP ViT-B/16 cannot be had .*run once with network access"),
    (dict(backbone="dinov2", pretrained="nothing"), "weights 'nothing' of DINOv2 ViT-B/14 cannot be had .*run once with network access"),
    (dict(backbone="mfm", pretrained="nothing.safetensors"), "nothing.safetensors: no such file"),
])
def test_what_cannot_be_had_is_named(options, words):
    with pytest.raises(InputError, match=words): detector(**options)


@pytest.mark.parametrize("backbone", OTHERS)
def test_no_network(backbone, monkeypatch):
    def no_network(*a, **kw): raise OSError("We couldn't connect\nmore")
    monkeypatch.setattr(open_clip, "create_model", no_network)
    monkeypatch.setattr(timm, "create_model", no_network)
    published = bb.backbone_of(backbone).published
    with pytest.raises(InputError, match=rf"weights '{published}' .* \(We couldn't connect\)"): detector(backbone, pretrained=published)


def test_weights_by_name(monkeypatch):
    "What the library hands over goes into the detector, if it fits."
    class Model: visual = shaken(Tower(28, 7, 24, 3, 3, mlp_ratio=4, act_layer=QuickGELU, output_dim=24))
    asked = []
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **kw: asked.append((a, kw)) or Model)
    net = detector("clip", pretrained="openai")
    assert torch.equal(net.encoder.conv1.weight, Model.visual.conv1.weight) and "pretrained" not in net.settings
    assert asked == [(("ViT-B-16-quickgelu",), dict(pretrained="openai", force_image_size=28))]
    vit = shaken(timm.models.VisionTransformer(img_size=28, patch_size=7, embed_dim=24, depth=3, num_heads=3, num_classes=0))
    monkeypatch.setattr(timm, "create_model", lambda *a, **kw: asked.append((a, kw)) or vit)
    assert torch.equal(detector("dinov2", pretrained="lvd142m").encoder.pos_embed, vit.pos_embed)
    assert asked[1] == (("vit_base_patch14_dinov2",), dict(pretrained=True, pretrained_cfg="lvd142m", img_size=28, num_classes=0))
    with pytest.raises(InputError, match="openai: an encoder of .*'depth': 3.*, not .*'depth': 2"):
        create("spai", **SMALL | dict(depth=2), backbone="clip", pretrained="openai")


def test_dinov2_weights_from_a_file(tmp_path):
    "timm's own file goes in without a network, its positions resampled from 518 px."
    vit = timm.create_model("vit_base_patch14_dinov2", num_classes=0)
    torch.save(vit.state_dict(), tmp_path/"dinov2.pth")
    dino = bb.build("dinov2", dict(image=224, patch=14, width=768, depth=12, heads=12), tmp_path/"dinov2.pth")
    assert torch.equal(dino.blocks[7].mlp.fc1.weight, vit.blocks[7].mlp.fc1.weight) and dino.pos_embed.shape[1] == 257
    assert torch.equal(dino.pos_embed[:, 0], vit.pos_embed[:, 0])


# the official form


def tiny(**options):
    torch.manual_seed(0)
    return shaken(create("spai", **TINY | options))


def test_a_written_checkpoint_has_the_official_names_and_shapes(tmp_path):
    net = tiny()
    cp.save_official(net, tmp_path/"spai.pth", epoch=4)
    content = torch.load(tmp_path/"spai.pth", weights_only=True) # plain values only
    official = spec("spec_tiny.json") | {cp.MASK: (64, 64)}
    assert {k: tuple(v.shape) for k, v in content["model"].items()} == official and content["epoch"] == 4
    assert all(v.dtype == (torch.int64 if k == cp.MASK else torch.float32) for k, v in content["model"].items())
    assert content["config"] == {"MODEL": {"VIT": {"NUM_HEADS": 4}, "PATCH_VIT": {"MINIMUM_PATCHES": 4}}}
    assert [p.name for p in tmp_path.iterdir()] == ["spai.pth"]


def test_the_full_checkpoint_has_324_entries():
    with torch.device("meta"): net = create("spai")
    net.disc = fq.offcentre_disc(224, 16)
    state = cp.official_state(net)
    assert {k: tuple(v.shape) for k, v in state.items()} == spec("spec.json") | {cp.MASK: (224, 224)}
    assert len(state) == 324 and sum(v.numel() for v in state.values()) == 139_945_243


@pytest.mark.parametrize("switch", [{}, dict(srs=False), dict(scv=False), dict(heads=2, radius=7)])
def test_reading_undoes_writing(switch, tmp_path):
    net = tiny(**switch)
    cp.save_official(net, tmp_path/"spai.pth", epoch=0)
    again, found = cp.load_official(tmp_path/"spai.pth")
    assert (again.sizes, again.srs, again.scv) == (net.sizes, net.srs, net.scv) and (found.epoch, found.minimum, found.mask) == (0, 4, True)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
    x = [torch.rand(3, 150, 200), torch.rand(3, 70, 90)]
    with torch.inference_mode(): assert torch.equal(again(x), net(x))
    cp.save_official(again, tmp_path/"twice.pth", epoch=0)
    once, twice = (torch.load(tmp_path/f"{n}.pth", weights_only=True)["model"] for n in ("spai", "twice"))
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)


def test_writing_undoes_reading():
    "Of a file in the official form every entry that counts comes back."
    theirs = {k: torch.randn(s) for k, s in spec("spec_tiny.json").items()} | {cp.MASK: fq.offcentre_disc(64, 6).long()}
    ours = cp.official_state(cp.from_state(theirs, heads=4)[0])
    counts = {k for k in theirs if not cp._UNUSED.match(k)}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in counts)
    assert len(theirs) - len(counts) == 25 # as spec_tiny.json lists


def test_pretraining_files(tmp_path):
    torch.manual_seed(0)
    model = shaken(MaskedFrequencyModel(Encoder(32, 16, 64, 3, 4), 5))
    cp.save_mfm(model, tmp_path/"mfm.pth", epoch=299)
    content = torch.load(tmp_path/"mfm.pth", weights_only=True)
    assert {k: tuple(v.shape) for k, v in content["model"].items()} == spec("spec_mfm_tiny.json") and content["epoch"] == 299
    again, found = cp.load_mfm(tmp_path/"mfm.pth", radius=5)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items()) and not found.missing
    assert again.encoder.settings == model.encoder.settings
    save_encoder(again.encoder, tmp_path/"encoder.safetensors")
    net = create("spai", **TINY | dict(image=32, radius=3), pretrained=str(tmp_path/"encoder.safetensors"))
    assert torch.equal(net.encoder.pos_embed, model.encoder.pos_embed)


def test_what_has_no_official_form_is_refused(tmp_path):
    for options, words in [(dict(merge="centre"), "merged by 'centre'"), (dict(backbone="clip"), "another backbone"),
                           (dict(white=True), "whitened"), (dict(front="residuals"), "residuals"),
                           (dict(settle=True), "settled"), (dict(radius=2.3), "none of SPAI's discs")]:
        with pytest.raises(InputError, match=words): cp.save_official(tiny(**options), tmp_path/"x.pth")
    with pytest.raises(InputError, match="name one"): cp.save_official(tiny(), tmp_path/"x.safetensors")
    model = MaskedFrequencyModel(Encoder(32, 16, 64, 1, 4, front="residuals"), 5)
    with pytest.raises(InputError, match="residuals"): cp.save_mfm(model, tmp_path/"x.pth")
    assert not [*tmp_path.iterdir()]
    (tmp_path/"file").write_text("")
    with pytest.raises(InputError, match="cannot write"): cp.save_official(tiny(), tmp_path/"file"/"x.pth")
