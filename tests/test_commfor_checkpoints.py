"""Official weights in every form; the network that they make equals the official one; the official learning rates.

Golden data: `tests/parity/commfor/checkpoints.npz`, made with the official code and weights of the rule in `fill`;
`image_a.png`, `image_b.png`; `00000845.png`, a test image of the official repository.
"""
import copy
import dataclasses
import json
import math
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_weights import fill
from PIL import Image
from safetensors.torch import load_file, save_file

from aigid_repro.commfor import checkpoints as cp
from aigid_repro.commfor.model import CommForViT
from aigid_repro.data.storage import InputError
from aigid_repro.detect import training

FOLDER = Path(__file__).parent/"parity"/"commfor"
SPECS = {"small_384": ("small", 384, 2025), "small_224": ("small", 224, 2024), "tiny_224": ("tiny", 224, 2026)} # last: input seed
LIMIT = 1e-5


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER/"checkpoints.npz") as stored: return dict(stored)


@pytest.fixture(scope="module")
def detectors():
    "The three detectors with golden weights, read as bare state dicts."
    found = {}
    def get(name, folder=None):
        if name not in found:
            size, image, _ = SPECS[name]
            state = fill({k: tuple(v.shape) for k, v in CommForViT(size, image).state_dict().items()})
            save_file(state, folder/"weights.safetensors")
            found[name], report = cp.load_official(folder/"weights.safetensors")
            assert (report.size, report.image, report.patch, report.tensors) == (size, image, 16, 152)
        return found[name]
    return get


@pytest.fixture(params=SPECS)
def case(request, detectors, tmp_path):
    "Name of a golden network and the detector."
    return request.param, detectors(request.param, tmp_path)


def random_input(name):
    _, image, seed = SPECS[name]
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 3, image, image)).astype(np.float32))


def normalised(detector, crop): # uint8 (h, w, 3) -> (1, 3, h, w)
    return detector.preprocess.normalise(torch.from_numpy(crop.transpose(2, 0, 1).astype(np.float32)/255))[None]


def furthest(ours, theirs): return np.abs(ours.numpy() - theirs).max()


def crc(x): return zlib.crc32(np.ascontiguousarray(x).tobytes())


@torch.inference_mode()
def test_network_on_random_inputs(case, golden):
    "Embedding, class token after every block, features and logit."
    name, detector = case
    x, seen, vit = random_input(name), {}, detector.vit
    assert crc(x.numpy()) == golden[f"{name}_input_crc32"]
    hooks = [vit.blocks[0].register_forward_pre_hook(lambda _, a: seen.update(embed=a[0][:, :4, :32])),
             vit.head.register_forward_pre_hook(lambda _, a: seen.update(features=a[0])),
             *(b.register_forward_hook(lambda _, a, y, i=i: seen.update({i: y[:, 0, :16]})) for i, b in enumerate(vit.blocks))]
    logit = detector(x)
    for h in hooks: h.remove()
    assert furthest(seen["embed"], golden[f"{name}_rand_embed"]) < LIMIT
    assert furthest(torch.stack([seen[i] for i in range(12)]), golden[f"{name}_rand_block_cls16"]) < LIMIT
    assert furthest(seen["features"], golden[f"{name}_rand_features"]) < LIMIT
    assert furthest(logit, golden[f"{name}_rand_logit"][:, 0]) < LIMIT


@torch.inference_mode()
def test_network_on_images(case, golden):
    name, detector = case
    x = torch.cat([normalised(detector, golden[f"eval_{SPECS[name][1]}_{i}_u8"]) for i in "ab"])
    features = detector.features(x)
    assert furthest(features, golden[f"{name}_image_features"]) < LIMIT
    assert furthest(detector.vit.head(features), golden[f"{name}_image_logit"]) < LIMIT


@pytest.mark.parametrize("name", ["small_384", "small_224"])
@torch.inference_mode()
def test_from_file_to_logit(name, detectors, tmp_path, golden):
    "A test image of the official repository, through the detector's own preprocessing."
    detector = detectors(name, tmp_path)
    x = detector.preprocess(Image.open(FOLDER/"00000845.png"))[None]
    assert furthest(detector.features(x), golden[f"{name}_testimages_features"]) < LIMIT
    assert furthest(detector(x), golden[f"{name}_testimages_logit"][:, 0]) < LIMIT


@pytest.mark.parametrize("name", ["small_224", "tiny_224"])
@torch.inference_mode()
def test_network_in_double_precision(name, detectors, tmp_path, golden):
    vit = copy.deepcopy(detectors(name, tmp_path).vit).double() # past `forward`, whose logit is in single precision
    assert furthest(vit(random_input(name).double()), golden[f"{name}_rand_logit64"]) < 1e-10


@pytest.mark.parametrize("name, image", [("small_224", "a"), ("small_384", "a"),
                                         ("small_224", "b"), ("small_384", "b")])
def test_preprocessing_is_exact(name, image, golden):
    size, side, _ = SPECS[name]
    preprocess = CommForViT(size, side).preprocess
    crop = golden[f"eval_{side}_{image}_u8"]
    tensor = preprocess(Image.open(FOLDER/f"image_{image}.png"))
    assert torch.equal(dataclasses.replace(preprocess, mean=(0.,)*3, std=(1.,)*3)(Image.open(FOLDER/f"image_{image}.png")),
                       torch.from_numpy(crop.transpose(2, 0, 1).astype(np.float32)/255))
    assert crc(tensor.numpy()) == golden[f"eval_{side}_{image}_tensor_crc32"]


@pytest.mark.parametrize("side", [224, 384])
@pytest.mark.parametrize("image", "ab")
def test_normalisation_is_exact(side, image, golden):
    x = normalised(CommForViT("tiny", side), golden[f"eval_{side}_{image}_u8"])
    assert crc(x.numpy()) == golden[f"eval_{side}_{image}_tensor_crc32"]


@pytest.fixture(scope="module")
def weights():
    "Tensors of a small network, with the official names."
    torch.manual_seed(0)
    return CommForViT("mini", 64, 8).state_dict()


def equal(detector, state): return all(torch.equal(v, state[k]) for k, v in detector.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("vit", ["vit.", ""])
@pytest.mark.parametrize("form", ["bare state dict", "training checkpoint", "safetensors"])
def test_every_form_and_prefix(weights, tmp_path, form, prefix, vit):
    state = {prefix + vit + k.removeprefix("vit."): v.clone() for k, v in weights.items()}
    path = tmp_path/("x.safetensors" if form == "safetensors" else "x.pt")
    if form == "safetensors": save_file(state, path)
    else: torch.save(state if form == "bare state dict" else {"model": state}, path)
    detector, found = cp.load_official(path)
    assert equal(detector, weights) and not detector.training
    assert (found.prefix, found.tensors) == (prefix + vit, len(weights)) and (found.size, found.image, found.patch) == ("mini", 64, 8)
    assert found.form == ("bare state dict" if form == "safetensors" else form) and found.epoch is None


def test_a_checkpoint_as_the_official_loop_writes_it(weights, tmp_path):
    "Model, optimiser, scheduler and scaler states, and the counters."
    model = CommForViT("mini", 64, 8)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 10)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimiser.step(); scheduler.step()
    torch.save(dict(model=weights, optimizer=optimiser.state_dict(), scheduler=scheduler.state_dict(), scaler={"scale": 65536.},
                    epoch=3, itr=1200), tmp_path/"x_ckpt.pt")
    detector, found = cp.load_official(tmp_path/"x_ckpt.pt")
    assert equal(detector, weights) and (found.form, found.epoch, found.iteration) == ("training checkpoint", 3, 1200)
    assert "training checkpoint (epoch 3, iteration 1200), ViT mini, input 64 px, patch 8 px" in str(found)


@pytest.mark.parametrize("settings", [("tiny", 224, 16), ("small", 384, 16), ("tiny", 224, 32)])
def test_hub_form_and_back(settings, tmp_path):
    detector = CommForViT(*settings)
    cp.save_hub(detector, tmp_path/"hub")
    stored = load_file(tmp_path/"hub"/"model.safetensors")
    assert set(stored) == set(detector.state_dict()) and len(stored) == 152 and all(k.startswith("vit.") for k in stored)
    assert json.loads((tmp_path/"hub"/"config.json").read_text()) == dict(
        device="cuda", freeze_backbone=False, input_size=settings[1], model_size=settings[0], patch_size=settings[2])
    again, found = cp.load_official(tmp_path/"hub")
    assert equal(again, stored) and equal(detector, stored) and found.form == "hub folder" and found.prefix == "vit."
    assert again.settings == dict(zip(("size", "image", "patch"), settings)) and again.preprocess == detector.preprocess


def test_half_precision_is_told_and_widened(weights, tmp_path):
    torch.save({k: v.half() for k, v in weights.items()}, tmp_path/"half.pt")
    detector, found = cp.load_official(tmp_path/"half.pt")
    assert found.dtype == "float16" and equal(detector, {k: v.half().float() for k, v in weights.items()})


def change(state, **changes):
    "The state with some tensors replaced (underscores for dots: `norm__weight`), or removed with None."
    changed = state | {k.replace("__", "."): v for k, v in changes.items()}
    return {k: v for k, v in changed.items() if v is not None}


@pytest.mark.parametrize("changes, words", [
    (dict(vit__norm__weight=None), "no tensor norm.weight; get the file again"),
    (dict(vit__cls_token=None), "no tensor cls_token"),
    (dict(vit__fc_norm__weight=torch.ones(96)), "surplus tensor fc_norm.weight"),
    (dict(head__weight=torch.ones(1, 96)), "surplus tensor head.weight beside those under 'vit.'"),
    (dict(vit__head__weight=torch.ones(1000, 96)), r"head.weight has shape \(1000, 96\), not \(1, 96\); a classifier of many classes"),
    (dict(vit__norm__bias=torch.full((96,), float("nan"))), "norm.bias holds something else than finite"),
    (dict(vit__norm__bias=torch.ones(96, dtype=torch.int32)), "norm.bias holds something else than finite"),
    (dict(vit__pos_embed=torch.ones(1, 61, 96)), "pos_embed has 61 rows"),
    (dict(vit__pos_embed=torch.ones(5)), "too few dimensions"),
    (dict(vit__cls_token=torch.ones(1, 1, 768)), "768 channels fit none of mini, tiny, small"),
    (dict(vit__norm__bias="text"), "neither a state dict"),
])
def test_wrong_tensors_are_named(weights, tmp_path, changes, words):
    torch.save(change(weights, **changes), tmp_path/"x.pt")
    with pytest.raises(InputError, match=f"x.pt: .*{words}"): cp.load_official(tmp_path/"x.pt")


class Harmful:
    "An object that runs code when it is unpickled."
    def __reduce__(self): return os.mkdir, ("harm",)


def test_nothing_is_executed(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(weights | {"vit.more": Harmful()}, "x.pt")
    with pytest.raises(InputError, match="x.pt: holds a Python object .*mkdir.* is not opened"): cp.load_official("x.pt")
    assert not Path("harm").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_refused(weights, tmp_path, suffix):
    path, rng = tmp_path/f"x{suffix}", np.random.default_rng(0)
    if suffix == ".pt": torch.save(weights, path)
    else: save_file(weights, path)
    data = path.read_bytes()
    for part in (b"", b"<html>", rng.bytes(5000), data[:8], *(data[:n] for n in rng.integers(9, len(data) - 1, 10))):
        path.write_bytes(part)
        with pytest.raises(InputError, match=f"x{suffix}: "): cp.load_official(path)
    for place in rng.integers(0, 4000, 30): # the directory of the file, or weights, where damage may go unseen
        path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1:])
        try: cp.load_official(path)
        except InputError as e: assert f"x{suffix}: " in str(e)


def test_wrong_places_say_what_to_name(weights, tmp_path):
    def message(path):
        with pytest.raises(InputError) as e: cp.load_official(path)
        return str(e.value)
    assert "absent.pt: No such file" in message(tmp_path/"absent.pt")
    assert "a hub folder holds config.json and model.safetensors" in message(tmp_path)
    torch.save([1, 2], tmp_path/"list.pt")
    assert "list.pt: neither a state dict" in message(tmp_path/"list.pt") and "name one file: list.pt" in message(tmp_path)
    with tarfile.open(tmp_path/"weights.tar", "w") as t: t.add(tmp_path/"list.pt")
    assert "weights.tar: an archive; unpack it" in message(tmp_path/"weights.tar")
    (tmp_path/"model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS pointer" in message(tmp_path)


def test_config_must_fit(weights, tmp_path):
    cp.save_hub(CommForViT("mini", 64, 8), tmp_path/"hub")
    config = json.loads((tmp_path/"hub"/"config.json").read_text())
    wrong = {json.dumps(config | dict(patch_size=16)): "config.json says patch_size 16, the tensors 8", "{": "config.json: damaged",
             "[]": "config.json: no JSON object", '{"detector": "commfor-vit"}': "read it with load_detector"}
    for text, words in wrong.items():
        (tmp_path/"hub"/"config.json").write_text(text)
        with pytest.raises(InputError, match=words): cp.load_official(tmp_path/"hub")
    (tmp_path/"hub"/"config.json").unlink()
    assert cp.load_official(tmp_path/"hub")[1].size == "mini"


def test_only_its_own_kind_is_saved(tmp_path):
    with pytest.raises(InputError, match="not Linear"): cp.save_hub(torch.nn.Linear(2, 1), tmp_path)


@pytest.mark.parametrize("loader_length", [25, 30])
def test_learning_rates_equal_the_golden_list(golden, loader_length):
    assert np.allclose(training.chained_cosine(2e-5, 100, .2, loader_length), golden[f"lr_100_{loader_length}"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("iterations, share, loader_length", [(60, .5, 7), (60, .5, 1), (50, 0., 60), (300, .2, 39), (5, .9, 1)])
def test_learning_rates_equal_the_scheduler_of_torch(iterations, share, loader_length):
    "Also where epochs end within the warm-up."
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 1e-3)
    warmup = int(iterations*share)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, math.ceil(iterations/loader_length)*loader_length - warmup, 1e-6)
    rates = []
    for i in range(1, iterations + 1):
        if i < warmup: optimiser.param_groups[0]["lr"] = 1e-3*(i + 1)/warmup
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if i > warmup: scheduler.step()
        if i % loader_length == 0: scheduler.step()
    assert np.allclose(training.chained_cosine(1e-3, iterations, share, loader_length), rates, rtol=1e-9, atol=0)


@pytest.mark.parametrize("settings", [(1e-3, 10, 1., 5), (1e-3, 10, -.1, 5), (1e-3, 0, .2, 5), (1e-3, 10, .2, 0)])
def test_impossible_schedules_are_errors(settings):
    with pytest.raises(InputError, match="must be at least"): training.chained_cosine(*settings)
