"""GAPL computes what the official code computes, step by step, from files in the official form.

Reference outputs in parity/gapl came from the official code with weights that follow from their names and shapes
(`golden.npz`: ViT-L/14, `golden_small.npz`: a tower of three blocks), and with the published prototypes and projection.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_weights import fill
from PIL import Image
from torch import nn

from aigid_repro.data.storage import InputError
from aigid_repro.detect.detector import Preprocessing, create, load_detector, save_detector
from aigid_repro.detect.training import predict
from aigid_repro.gapl import checkpoints as cp
from aigid_repro.gapl import encoders as en
from aigid_repro.gapl.model import GAPL

FOLDER = Path(__file__).parent/"parity"/"gapl"
LIMIT = 1e-5 # of the reduced network, as a share of the largest entry
HEADS = 4 # of the reduced encoder, which are in no file


def load(name):
    with np.load(FOLDER/name) as f: return dict(f)


@pytest.fixture(scope="module")
def golden(): return load("golden_small.npz")


@pytest.fixture(scope="module")
def prototypes(): return {int(k.removeprefix("pca_3type_num")): torch.from_numpy(v) for k, v in load("official_prototypes.npz").items()}


def filled(spec): return fill(json.loads((FOLDER/spec).read_text()))


def random_input(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


X = random_input(20251215, 4, 3, 56, 56)


def off(ours, theirs): # largest difference, as a share of the largest entry
    theirs = torch.from_numpy(np.asarray(theirs))
    assert ours.shape == theirs.shape
    return ((ours.detach() - theirs).abs().max()/theirs.abs().max()).item()


def sharp(state):
    "Weights with an attention far from uniform: scales and axes show."
    names = {"cross_attention.in_proj_weight": 12, "fc.weight": 30}
    return {k: v*names.get(k, 1) for k, v in state.items()}


@pytest.fixture(scope="module")
def state(): return filled("spec_small.json")


@pytest.fixture
def detector(state, prototypes, tmp_path):
    "The reduced detector, read from a file."
    torch.save({"model": state, "prototype": prototypes[64]}, tmp_path/"checkpoint.pt")
    return cp.load_official(tmp_path/"checkpoint.pt", heads=HEADS)[0]


@torch.inference_mode()
def steps(detector, x):
    "Everything that is computed on the way to the logit, by golden name."
    seen, tower = {}, detector.encoder.tower
    def keep(name):
        def hook(_, a, y): seen[name] = y[0] if isinstance(y, tuple) else y
        return hook
    parts = {"embeddings": tower.embeddings, "pre_ln": tower.pre_layrnorm, "proj": detector.projection, "pooled": detector.encoder}
    parts |= {f"layer{i}": layer for i, layer in enumerate(tower.encoder.layers)}
    hooks = [m.register_forward_hook(keep(name)) for name, m in parts.items()]
    logit = detector(x)[:, None]
    for h in hooks: h.remove()
    unit = F.normalize(seen["proj"])
    fc_in, weights = detector.mapped(unit)
    out = seen | {"proj_unit": unit, "fc_in": fc_in, "logit": logit, "prob": logit.sigmoid()}
    return out if weights is None else out | {"attn_out": fc_in[:, None], "attn_w": weights[:, None], "return_y_weights": weights[:, None]}


def compare(got, golden, part, limit=LIMIT):
    "All arrays of one part of a golden file."
    names = [k for k in golden if k.startswith(f"{part}/")]
    assert names
    for k in names: assert off(got[k.removeprefix(f"{part}/")], golden[k]) < limit, k


# the reduced network


def test_every_step(detector, golden):
    assert len([k for k in golden if k.startswith("n64/")]) == 14
    compare(steps(detector, X), golden, "n64")
    assert off(detector.embed(X), golden["n64/proj_unit"]) < LIMIT and off(detector.features(X), golden["n64/fc_in"]) < LIMIT


@pytest.mark.parametrize("part", ["n16", "n32", "sharp16", "sharp32", "sharp64"])
def test_prototypes_and_sharp_attention(part, state, golden, prototypes):
    number = int(part[-2:])
    detector = cp.from_state(sharp(state) if "sharp" in part else state, prototypes[number], heads=HEADS)
    got = steps(detector, X)
    assert got["attn_w"].shape == (4, 1, number) and ("sharp" not in part or got["attn_w"].max() > 2/number)
    compare(got, golden, part)


@pytest.mark.parametrize("part", ["n64_loraB0", "sharp64_loraB0"])
def test_without_adapters(part, state, golden, prototypes):
    "Adapters that are zero, and none at all."
    weights = {k: v*0 if "lora_B" in k else v for k, v in (sharp(state) if "sharp" in part else state).items()}
    zero = cp.from_state(weights, prototypes[64], heads=HEADS)
    bare = cp.from_state({k.replace(".base_layer", ""): v for k, v in weights.items() if "lora_" not in k}, prototypes[64], heads=HEADS)
    assert (zero.adapt, bare.adapt) == ("lora", "none")
    for detector in (zero, bare): compare(steps(detector, X), golden, part)


def test_stage_one(golden):
    detector = cp.from_state(filled("spec_stage1_small.json"), heads=HEADS)
    assert detector.mapping is None
    assert [n for n, p in detector.named_parameters() if p.requires_grad] == ["projection.weight", "head.weight"]
    compare(steps(detector, X), golden, "stage1")


def test_a_wrong_network_is_noticed(state, golden, prototypes):
    "Each of these changes alone is far beyond the limit."
    def wrong(change=None, prototypes=prototypes[64], **changed):
        detector = cp.from_state(sharp(state) | changed, prototypes, heads=HEADS)
        if change: change(detector)
        return min(off(v, golden[f"sharp64/{k}"]) for k, v in steps(detector, X).items() if k in ("logit", "attn_w"))
    def heads(d): d.mapping.num_heads, d.mapping.head_dim = 8, 16
    def scale(d):
        for m in d.modules():
            if hasattr(m, "scaling") and isinstance(m.scaling, dict): m.scaling["default"] = 1.
    turned = state["cross_attention.in_proj_weight"].roll(128, 0)*12 # value, query, key
    swapped = state["feature_extractor.encoder.layers.1.self_attn.q_proj.lora_B.default.weight"].flip(0)
    assert wrong() < LIMIT
    for change in (heads, scale): assert wrong(change) > 100*LIMIT
    assert wrong(**{"cross_attention.in_proj_weight": turned}) > 100*LIMIT
    assert wrong(**{"feature_extractor.encoder.layers.1.self_attn.q_proj.lora_B.default.weight": swapped}) > 100*LIMIT
    assert wrong(prototypes=prototypes[64].flip(1)) > 100*LIMIT


def test_one_training_step(state, golden, prototypes):
    "Loss, gradients, and the weights after one step of AdamW; the bias of the keys has no gradient but rounding."
    detector = cp.from_state(sharp(state), prototypes[64], heads=HEADS)
    before = {k: v.clone() for k, v in nn.Module.state_dict(detector).items()}
    weights = [p for p in detector.parameters() if p.requires_grad]
    assert len(weights) == 24
    loss = F.binary_cross_entropy_with_logits(detector(X)[:, None], torch.from_numpy(golden["train/labels"]))
    loss.backward()
    assert off(loss, golden["train/loss"]) < LIMIT
    query_and_value = torch.arange(384).sub(128).div(128, rounding_mode="floor") != 0
    named = dict(detector.named_parameters())
    def ours(k): return next(iter(cp.rename({k: 0})))
    def rows(k, v): return v[query_and_value] if k.endswith("in_proj_bias") else v
    grads = [k.removeprefix("train/grad/") for k in golden if k.startswith("train/grad/")]
    assert len(grads) == 18
    for k in grads: assert off(rows(k, named[ours(k)].grad), rows(k, golden[f"train/grad/{k}"])) < LIMIT, k
    optimiser = torch.optim.AdamW(weights, 1e-4, weight_decay=.01)
    assert off(nn.utils.clip_grad_norm_(weights, 1.), golden["train/grad_norm"]) < LIMIT
    optimiser.step()
    for k in grads: assert off(rows(k, named[ours(k)]), rows(k, golden[f"train/after/{k}"])) < LIMIT, k
    with torch.no_grad(): assert off(detector(X)[:, None], golden["train/logit_after"]) < LIMIT
    for k, v in nn.Module.state_dict(detector).items():
        assert torch.equal(v, before[k]) == (k not in named or not named[k].requires_grad), k


# the full network


@pytest.fixture(scope="module")
def full(prototypes):
    "The full detector, and everything on its way to the logit."
    detector = cp.from_state(filled("spec.json"), prototypes[64])
    return detector, steps(detector, random_input(20260412, 2, 3, 224, 224)), load("golden.npz")


def test_full_network(full):
    detector, got, golden = full
    assert sum(p.numel() for p in detector.parameters()) == 305_736_320 and len(detector.state_dict()) == 541 + 1
    assert sum(p.numel() for p in detector.parameters() if p.requires_grad) == 2_556_544
    for k in [k for k in golden if "_first4" in k]: assert off(got[k.removesuffix("_first4")][:, :4], golden[k]) < 1e-4, k
    assert off(got["layer23"].mean(1), golden["layer23_token_mean"]) < 1e-4
    for k in ("pooled", "proj", "proj_unit", "attn_w", "attn_out", "fc_in", "logit", "prob"): assert off(got[k], golden[k]) < 1e-4, k


@torch.inference_mode()
def test_full_network_with_other_heads(full, prototypes):
    "Fewer prototypes, sharp attention, and the projection of stage 1, on the same features."
    detector, got, golden = full
    features, own = got["pooled"], {k: v.clone() for k, v in detector.state_dict().items() if not k.startswith("encoder.")}
    def head(rows):
        heads = GAPL("clip", "", dict(width=1024, layers=1, heads=1, mlp=1, image=14), crop=14, prototypes=len(rows)).eval()
        heads.load_state_dict(heads.state_dict() | own | {"prototypes": rows})
        return heads
    for number in (16, 32):
        heads = head(prototypes[number])
        assert off(heads.from_encoder(features)[:, None], golden[f"n{number}/logit"]) < 1e-4
        assert off(heads.mapped(heads.project(features))[1][:, None], golden[f"n{number}/attn_w"]) < 1e-4
    heads = head(prototypes[64])
    heads.set_start(projection=load("official_stage1.npz")["foren_proj.weight"])
    for k, v in zip(("proj_unit", "attn_w", "logit"), (unit := heads.project(features), heads.mapped(unit)[1][:, None],
                                                        heads.from_encoder(features)[:, None])):
        assert off(v, golden[f"stage1init/{k}"]) < 1e-4, k
    heads = head(prototypes[64])
    heads.mapping.in_proj_weight *= 12
    heads.head.weight *= 30
    assert off(heads.mapped(heads.project(features))[1][:, None], golden["sharp64/attn_w"]) < 1e-3
    assert off(heads.from_encoder(features)[:, None], golden["sharp64/logit"]) < 1e-3


# preprocessing


@pytest.fixture(scope="module")
def transforms(): return load("golden_preprocess.npz")


def picture(size): return Image.open(FOLDER/f"image_{size}.png")


@pytest.mark.parametrize("size", ["300x260", "150x400", "301x263", "101x97"])
def test_preprocessing_is_exact(size, transforms):
    with torch.device("meta"): preprocess = GAPL("clip", "").preprocess
    assert torch.equal(preprocess(picture(size)), torch.from_numpy(transforms[f"eval/{size}"]))
    reflected = replace(preprocess, padding="symmetric")(picture(size))
    assert torch.equal(reflected, preprocess(picture(size))) == (min(picture(size).size) >= 224)


@pytest.mark.parametrize("size", ["300x260", "150x400", "101x97"])
def test_preprocessing_of_validation_is_exact(size, transforms):
    preprocess = replace(en.ClipVision.preprocess, crop=224, resize=256, padding="constant")
    assert torch.equal(preprocess(picture(size)), torch.from_numpy(transforms[f"val/{size}"]))


def test_preprocessing_with_the_constants_of_clip(transforms):
    clip = Preprocessing(224, mean=(.48145466, .4578275, .40821073), std=(.26862954, .26130258, .27577711), padding="constant")
    assert torch.equal(clip(picture("300x260"))[:, ::8, ::8], torch.from_numpy(transforms["eval_clipstats/300x260"]))


# files


def test_published_small_files(prototypes, tmp_path):
    "Rows are unit vectors, orthogonal within each half; what is written is read."
    for number, rows in prototypes.items():
        assert rows.shape == (number, 128)
        for half in rows.chunk(2): assert (half @ half.T - torch.eye(number//2)).abs().max() < 1e-6
        cp.save_prototypes(rows, tmp_path/"p.pt")
        assert torch.equal(cp.load_prototypes(tmp_path/"p.pt"), rows)
    projection = torch.from_numpy(load("official_stage1.npz")["foren_proj.weight"])
    cp.save_stage1(projection, tmp_path/"stage1.pt")
    again = cp.load_stage1(tmp_path/"stage1.pt")
    assert torch.equal(again, projection) and again.shape == (128, 1024)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", ["prototype", "propVec"])
def test_every_form_and_prefix(prefix, key, state, golden, prototypes, tmp_path):
    position = {f"{prefix}feature_extractor.embeddings.position_ids": torch.arange(17)[None]}
    model = {prefix + k: v for k, v in state.items()} | position
    torch.save({"model": model, key: prototypes[64], "epoch": 4}, tmp_path/"x.pt")
    detector, found = cp.load_official(tmp_path/"x.pt", heads=HEADS)
    assert found.form == ("released detector" if key == "prototype" else "training checkpoint") and found.epoch == 4
    assert found.entries == 80 and "encoder of 3 blocks, width 64, 56 px, adapters lora, 64 prototypes" in str(found)
    with torch.inference_mode(): assert off(detector(X)[:, None], golden["n64/logit"]) < LIMIT


def test_written_names_and_shapes_are_the_official_ones(detector, state, prototypes, tmp_path):
    cp.save_official(detector, tmp_path/"x.pt", epoch=2)
    content = torch.load(tmp_path/"x.pt", weights_only=True)
    assert [*content] == ["model", "prototype", "epoch"] and torch.equal(content["prototype"], prototypes[64])
    assert [*content["model"]] == [*state] and all(torch.equal(v, state[k]) for k, v in content["model"].items())
    again, found = cp.load_official(tmp_path/"x.pt", heads=HEADS)
    assert all(torch.equal(v, detector.state_dict()[k]) for k, v in again.state_dict().items()) and found.epoch == 2
    with torch.device("meta"): ours = cp._renamed(GAPL("clip", "").state_dict(), {v: k for k, v in cp._NAMES.items()})
    spec = json.loads((FOLDER/"spec.json").read_text())
    assert {k: list(v.shape) for k, v in ours.items() if k != "prototypes"} == spec and len(spec) == 541


def test_half_precision_is_widened(state, prototypes, tmp_path):
    torch.save({"model": {k: v.half() for k, v in state.items()}, "prototype": prototypes[16].half()}, tmp_path/"half.pt")
    detector = cp.load_official(tmp_path/"half.pt", heads=HEADS)[0]
    assert {v.dtype for v in detector.state_dict().values()} == {torch.float32}
    assert torch.equal(detector.head.weight, state["fc.weight"].half().float())


@pytest.mark.parametrize("changes, words", [
    ({"fc.weight": None}, "no entry for head.weight"),
    ({"foren_proj.weight": None}, "no entry projection.weight"),
    ({"feature_extractor.encoder.layers.2.self_attn.v_proj.lora_B.default.weight": None}, "no entry for encoder.*v_proj.lora_B"),
    ({"cross_attention.out_proj.bias": None}, "no entry for mapping.out_proj.bias"),
    ({"fc.bias": torch.ones(1)}, "unknown entry head.bias"),
    ({"foren_proj.weight": torch.ones(128, 65)}, r"projection.weight has shape \(128, 65\), not \(128, 64\)"),
    ({"feature_extractor.post_layernorm.bias": torch.full((64,), float("nan"))}, "post_layernorm.bias holds something else"),
    ({"feature_extractor.embeddings.position_embedding.weight": torch.ones(16, 64)}, "16 tokens"),
    ({"feature_extractor.embeddings.patch_embedding.weight": torch.ones(3)}, "1 dimensions, not 4"),
    ({"fc.weight": "text"}, "neither a state dict"),
])
def test_wrong_entries_are_named(changes, words, state, prototypes, tmp_path):
    torch.save({"model": {k: v for k, v in (state | changes).items() if v is not None}, "prototype": prototypes[64]}, tmp_path/"x.pt")
    with pytest.raises(InputError, match=f"x.pt: .*{words}"): cp.load_official(tmp_path/"x.pt", heads=HEADS)


@pytest.mark.parametrize("content, words", [
    ({"prototype": None}, "prototypes: no matrix"),
    ({}, "under 'prototype' or 'propVec'"),
    ({"prototype": torch.ones(64, 64)}, r"prototypes has shape \(64, 64\), not \(64, 128\)"),
])
def test_wrong_prototypes_are_named(content, words, state, tmp_path):
    torch.save({"model": state} | content, tmp_path/"x.pt")
    with pytest.raises(InputError, match=words): cp.load_official(tmp_path/"x.pt", heads=HEADS)


def test_files_of_another_kind_are_named(state, tmp_path):
    def message(reader, content):
        torch.save(content, tmp_path/"x.pt")
        with pytest.raises(InputError) as e: reader(tmp_path/"x.pt")
        return str(e.value)
    projection = torch.ones(128, 64)
    assert "read it with load_stage1" in message(cp.load_official, projection)
    assert "read it with load_stage1" in message(cp.load_official, {"model": {"foren_proj.weight": projection}, "propVec": None})
    assert "a linear probe" in message(cp.load_stage1, {"model": {"weight": torch.ones(1, 1024), "bias": torch.ones(1)}})
    assert "no file of stage 1" in message(cp.load_stage1, {"model": state})
    assert "no matrix" in message(cp.load_stage1, torch.ones(3)) and "no matrix" in message(cp.load_prototypes, {"prototype": projection})
    assert "neither" in message(cp.load_official, {"model": {}}) and "no matrix" in message(cp.load_prototypes, projection.int())
    with pytest.raises(InputError, match="absent.pt: No such file"): cp.load_official(tmp_path/"absent.pt")


class Harmful:
    "An object that runs code when it is unpickled."
    def __reduce__(self): return os.mkdir, ("harm",)


@pytest.mark.parametrize("reader", [cp.load_official, cp.load_stage1, cp.load_prototypes])
def test_nothing_is_executed(reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"foren_proj.weight": Harmful()}}, "x.pt")
    with pytest.raises(InputError, match="x.pt: holds a Python object .*mkdir.* is not opened"): reader("x.pt")
    assert not Path("harm").exists()


# encoders


TINY = dict(width=24, layers=2, heads=3, mlp=48, image=32, patch=8)


@pytest.fixture
def whole_clip(tmp_path):
    "A small CLIP with texts, as transformers saves it; its vision tower."
    from transformers import CLIPConfig, CLIPModel
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
    model = CLIPModel(CLIPConfig(text_config=sizes | {"vocab_size": 50}, vision_config=sizes | {"image_size": 32, "patch_size": 8})).eval()
    model.save_pretrained(tmp_path/"clip")
    return tmp_path/"clip", model.vision_model


@torch.inference_mode()
def test_local_folders_and_files_of_clip(whole_clip, tmp_path):
    folder, tower = whole_clip
    x = torch.rand(2, 3, 32, 32)
    torch.save({f"module.vision_model.{k}": v for k, v in tower.state_dict().items()}, tmp_path/"tower.pt")
    for source in (folder, folder/"model.safetensors", tmp_path/"tower.pt"):
        assert torch.equal(en.ClipVision(source, **TINY).eval()(x), tower(pixel_values=x).pooler_output)


def test_openai_weights_come_from_the_hub_or_from_open_clip(monkeypatch, whole_clip):
    import huggingface_hub
    import open_clip
    from open_clip.transformer import QuickGELU, VisionTransformer
    folder, tower = whole_clip
    asked, x = [], torch.rand(2, 3, 32, 32)
    theirs = VisionTransformer(32, 8, 24, 2, 3, mlp_ratio=2, act_layer=QuickGELU, output_dim=10).eval()
    def model(*a, **kw):
        asked.append((a, kw))
        return SimpleNamespace(visual=theirs)
    def no_network(*a, **kw): raise OSError("no route to anywhere")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a: asked.append(a) or folder/"model.safetensors")
    monkeypatch.setattr(open_clip, "create_model", no_network)
    with torch.inference_mode(): assert torch.equal(en.ClipVision("openai", **TINY).eval()(x), tower(pixel_values=x).pooler_output)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    monkeypatch.setattr(open_clip, "create_model", model)
    own = en.ClipVision("openai", **TINY).eval()
    theirs.proj = None
    with torch.inference_mode(): assert torch.allclose(own(x), theirs(x), atol=1e-5)
    assert asked == [("openai/clip-vit-large-patch14", "model.safetensors"), (("ViT-L-14-quickgelu",), {"pretrained": "openai"})]
    monkeypatch.setattr(open_clip, "create_model", no_network)
    with pytest.raises(InputError, match=r"weights 'openai' of CLIP ViT-L/14 cannot be had \(no route to anywhere\); run once"):
        create("gapl", encoder="clip", weights="openai")


def randomise(detector):
    "Adapters that do something."
    torch.manual_seed(0)
    for n, p in detector.named_parameters():
        if "lora_B" in n: nn.init.normal_(p, std=.05)
    return detector


@pytest.mark.parametrize("settings", [dict(), dict(encoder="clip", weights="", options=[*TINY.items()], crop=32)])
def test_training_touches_adapters_and_heads_alone(settings):
    torch.manual_seed(0)
    detector = create("gapl", origin="random", prototypes=8, **settings).train()
    before = {k: v.clone() for k, v in nn.Module.state_dict(detector).items()}
    optimiser = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], .01)
    for _ in range(2): # of the first step, A has no gradient
        optimiser.zero_grad()
        detector(torch.rand(4, 3, 32, 32)).square().sum().backward()
        optimiser.step()
    changed = {k for k, v in nn.Module.state_dict(detector).items() if not torch.equal(v, before[k])}
    heads = {f"mapping.{k}" for k in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")}
    assert changed == {k for k in before if "lora_" in k} | heads | {"projection.weight", "head.weight"}
    assert len(detector.encoder.targets()) and len([k for k in changed if "lora_A" in k]) == (32 if not settings else 6)


@pytest.mark.parametrize("settings", [dict(), dict(encoder="clip", weights="", options=[*TINY.items()], crop=32)])
@torch.inference_mode()
def test_merged_adapters(settings):
    detector, x = randomise(create("gapl", origin="random", **settings)).eval(), torch.rand(3, 3, 32, 32)
    detector.head.weight *= 100
    apart, before = detector(x), {k: v.clone() for k, v in nn.Module.state_dict(detector).items()}
    with en.merged(detector):
        assert off(detector(x), apart) < 1e-5
        assert sum(not torch.equal(v, before[k]) for k, v in nn.Module.state_dict(detector).items()) == (32 if not settings else 6)
    assert all(torch.equal(v, before[k]) for k, v in nn.Module.state_dict(detector).items()) and torch.equal(detector(x), apart)


@pytest.mark.parametrize("settings", [
    dict(), dict(mapping="paper"), dict(mapping="none"), dict(adapt="none"), dict(adapt="full", mapping="none"), dict(weights=""),
    dict(options=[["front", "pixels"], ["stem_stride", 1]]), dict(encoder="clip", weights="", options=[*TINY.items()], crop=32)])
def test_saved_and_loaded(settings, tmp_path):
    detector = randomise(create("gapl", **{"origin": "random", "crop": 48} | settings)).eval()
    images = [np.random.default_rng(i).integers(0, 256, (40 + 9*i, 60, 3), dtype=np.uint8) for i in range(3)]
    save_detector(detector, tmp_path/"d")
    again = load_detector(tmp_path/"d")
    assert (predict(again, images) == predict(detector, images)).all() and again.preprocess == detector.preprocess
    assert again.preprocess.padding == "constant"
    size = (tmp_path/"d"/"model.safetensors").stat().st_size/1e6
    assert size < (3 if "weights" not in settings and settings.get("adapt") != "full" else 17)
    assert (size < 3) == ("weights" not in settings and settings.get("adapt") != "full" or "encoder" in settings)


def test_another_encoder_under_the_same_name_is_noticed(whole_clip, tmp_path):
    folder, tower = whole_clip
    settings = dict(encoder="clip", weights=str(folder), options=[*map(list, TINY.items())], crop=32)
    save_detector(create("gapl", **settings), tmp_path/"d")
    assert load_detector(tmp_path/"d").settings == settings
    tower.post_layernorm.weight.data *= 2
    torch.save(tower.state_dict(), folder/"pytorch_model.bin")
    (folder/"model.safetensors").unlink()
    with pytest.raises(InputError, match="trained with another encoder"): load_detector(tmp_path/"d")
    (folder/"pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="no model.safetensors or pytorch_model.bin"): load_detector(tmp_path/"d")


def test_frozen_norms_keep_their_averages():
    for adapt in ("none", "lora"):
        detector = GAPL(adapt=adapt, weights="", origin="random").train()
        before = {k: v.clone() for k, v in detector.encoder.named_buffers() if "running" in k}
        detector(torch.rand(4, 3, 64, 64))
        assert len(before) > 90 and all(torch.equal(v, before[k]) for k, v in detector.encoder.named_buffers() if "running" in k)
        assert {n.split(".")[-1] for n, m in detector.encoder.named_modules() if m.training} <= {"lora_dropout", "default"}
    detector = GAPL(adapt="full", weights="", origin="random").train()
    before = {k: v.clone() for k, v in detector.encoder.named_buffers() if "running" in k}
    detector(torch.rand(4, 3, 64, 64))
    assert not any(torch.equal(v, before[k]) for k, v in detector.encoder.named_buffers() if k in before)


def test_the_two_forms_of_attention():
    "One head without biases and without an output projection is the paper's form."
    torch.manual_seed(0)
    paper = GAPL("clip", "", TINY, crop=32, mapping="paper", origin="random").eval()
    code = GAPL("clip", "", TINY, crop=32, mapping="code", heads=1, origin="random").eval()
    state = code.state_dict() | {k: v for k, v in paper.state_dict().items() if not k.startswith("mapping.")}
    weights = torch.cat([getattr(paper.mapping, k).weight.data for k in ("query", "key", "value")])
    state |= {"mapping.in_proj_weight": weights, "mapping.out_proj.weight": torch.eye(128)}
    code.load_state_dict(state | {k: torch.zeros_like(state[k]) for k in ("mapping.in_proj_bias", "mapping.out_proj.bias")})
    x = torch.rand(3, 3, 32, 32)
    with torch.inference_mode():
        assert off(code.attention(x), paper.attention(x)) < 1e-6 and off(code(x), paper(x)) < 1e-5
        code.mapping.num_heads, code.mapping.head_dim = 4, 32
        assert off(code(x), paper(x)) > 1e-4
