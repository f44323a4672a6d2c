"""SPAI's training views equal the official library on fixed parameters and whole draws.

Golden data: `tests/parity/spai/augmentation.npz` (images) and `augmentation.json` (draws, as programs), made with the libraries of the
official code: albumentations 1.4.14, albucore 0.0.16, OpenCV 4.10.
"""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms

from aigid_repro.data.photos import photo_dir, pool
from aigid_repro.data.storage import InputError
from aigid_repro.spai import augmentation as aug

FOLDER = Path(__file__).parent/"parity"/"spai"


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER/"augmentation.npz") as stored: return dict(stored)


@pytest.fixture(scope="module")
def drawn():
    return json.loads((FOLDER/"augmentation.json").read_text())


@pytest.fixture(scope="module")
def photo():
    pixels = np.asarray(Image.open(photo_dir()/pool().file.iloc[1]).convert("RGB").resize((220, 192), Image.Resampling.BOX))
    assert not pixels.flags.writeable # as Pillow gives them
    return pixels


def test_fixed_parameters_are_exact(golden):
    base, numbers = golden["base"], {name: name.split("_")[1:] for name in golden}
    for name, n in numbers.items():
        if name.startswith("rrc"): ours = aug.resized_crop(base, *map(int, n[1:]), 48)
        elif name.startswith("resize"): ours = aug.resize(base[:58, :61], int(n[0]))
        elif name.startswith("blur"): ours = aug.blur(base, int(n[0]), float(n[1]))
        elif name.startswith("jpeg"): ours = aug.jpeg(base, int(n[0]), "swapped")
        elif name == "noise": ours = aug.add_noise(golden["noise_base"], golden["noise_field"])
        else: continue
        assert np.array_equal(ours, golden[name]), name
    assert sum(n.startswith(("rrc", "resize", "blur", "jpeg")) or n == "noise" for n in golden) == 11


def test_rotations_keep_the_official_box(golden, drawn):
    for h, w, angle, *box in drawn["boxes"]: assert list(aug.inner_box(h, w, angle)) == box
    for name in (n for n in golden if n.startswith("rotate")):
        base = golden["base"][:, :40] if "tall" in name else golden["base"]
        ours, expected = aug.rotate(base, float(name.split("_")[-1])), golden[name]
        # the official code's OpenCV rounds source positions to 1/32 px
        assert ours.shape == expected.shape and abs(ours.astype(int) - expected).max() <= 2
        assert "90" not in name or np.array_equal(ours, expected)


def test_official_draws_replay(golden, drawn):
    exact = 0
    for seed, program in drawn["traces"].items():
        ours = golden["base"]
        for name, p in program:
            if name == "noise": ours = aug.add_noise(ours, golden[p["field"]])
            else: ours = aug.apply_program(ours, [(name, p)])
        difference, names = abs(ours.astype(int) - golden[f"trace_{seed}"]), [n for n, _ in program]
        if "rotate" not in names: assert not difference.any()
        else: assert difference.max() <= 2 or "jpeg" in names and difference.mean() < 2
        exact += not difference.any()
    assert exact == 4 and {n for p in drawn["traces"].values() for n, _ in p} == set(aug.OPERATIONS)


def test_crops_follow_the_distribution_of_torchvision():
    torch.manual_seed(0)
    rng, keys = np.random.default_rng(0), ("top", "left", "height", "width")
    ours = np.array([[aug.crop_place(rng, 256, 300)[k] for k in keys] for _ in range(1000)])
    theirs = np.array([transforms.RandomResizedCrop.get_params(torch.empty(3, 256, 300), [.2, 1.], [3/4, 4/3]) for _ in range(1000)])
    assert all(ks_2samp(a, b).pvalue > 1e-3 for a, b in zip(ours.T, theirs.T))


def test_crops_of_long_images_are_official(golden):
    "Where few of the ten attempts fit: the same distribution as the official library's, the centred rectangle included."
    rng = np.random.default_rng(1)
    for h, w in ((300, 40), (40, 300)):
        left, top, right, bottom = golden["crops"][(golden["crops"][:, :2] == (h, w)).all(1), 2:].T
        ours = pd.DataFrame([aug.crop_place(rng, h, w) for _ in range(400)])
        for key, theirs in dict(top=top, left=left, height=bottom - top, width=right - left).items():
            assert ks_2samp(ours[key], theirs).pvalue > 1e-3, (h, w, key)


def test_the_same_state_draws_the_same_views(photo):
    before = photo.copy()
    for codec in aug.CODECS:
        augment = aug.SpaiAugmentation(48, codec=codec)
        programs, again = (augment.programs(photo.shape[:2], np.random.default_rng(6)) for _ in range(2))
        assert programs == again and len(programs) == 4 and programs[0] != programs[1]
        stored = json.loads(json.dumps(programs)) # plain data
        expected = np.concatenate([aug.apply_program(photo, p) for p in stored], 1)
        assert np.array_equal(augment(photo, np.random.default_rng(6)), expected) and expected.shape == (48, 192, 3)
        assert {p["codec"] for i in range(9) for q in augment.programs((192, 220), np.random.default_rng(i))
                for n, p in q if n == "jpeg"} == {codec}
    assert np.array_equal(photo, before)


def test_codecs_differ_in_nothing_but_jpeg():
    official, plain = (aug.SpaiAugmentation(codec=c).programs((300, 400), np.random.default_rng(8)) for c in aug.CODECS)
    unlike = [(a, b) for p, q in zip(official, plain) for a, b in zip(p, q) if a != b]
    assert unlike and all(a[0] == b[0] == "jpeg" and a[1]["quality"] == b[1]["quality"] for a, b in unlike)


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (16, 16), (1000, 30)])
def test_any_image_gives_four_views(shape):
    pixels = np.random.default_rng(9).integers(0, 256, (*shape, 3), np.uint8)
    for i in range(20): assert aug.SpaiAugmentation(32)(pixels, np.random.default_rng(i)).shape == (32, 128, 3)


def test_the_training_loop_takes_views_side_by_side(photo):
    from aigid_repro.data.corpus import png
    from aigid_repro.detect import networks  # noqa: F401 - registers the network
    from aigid_repro.detect.training import train, train_settings
    records = pd.DataFrame({"image": [png(photo[:96, :96]), png(photo[96:, 96:])], "label": [0, 1]})
    log = []
    train(train_settings(steps=2, batch=2, crop=32, augmentation="spai", precision="no"), records, log=log)
    assert len(log) == 2 and np.isfinite([loss for _, loss in log]).all()


@pytest.mark.parametrize("program, words", [
    ([("sharpen", {})], "unknown operation 'sharpen'"),
    ([("jpeg", dict(quality=80, codec="mozjpeg"))], "unknown codec 'mozjpeg'"),
    ([("resized_crop", dict(top=0, left=500, height=20, width=20, size=8))], "leaves the image"),
])
def test_wrong_programs_say_what_is_wrong(photo, program, words):
    with pytest.raises(InputError, match=words): aug.apply_program(photo, program)
