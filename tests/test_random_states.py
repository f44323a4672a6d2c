"""The augmentation program equals the official code on fixed parameters and whole draws; draws follow its distributions.

Golden data: `tests/parity/commfor/augmentation.npz` (images), `augmentation.json` (official draws), `image_a.png`.
"""
import io
import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms

from aigid_repro.data.photos import photo_dir, pool
from aigid_repro.data.records import open_image
from aigid_repro.data.storage import InputError
from aigid_repro.detect import random_states as aug

FOLDER = Path(__file__).parent/"parity"/"commfor"
PLACE = dict(top=3, left=6, height=89, width=97)
FIXED = { # golden array: program that makes it from `aug_base` (96 high, 110 wide)
    **{f"jpeg_pil_q{q}": [("jpeg", dict(quality=q, codec="pillow"))] for q in (75, 90, 100)},
    **{f"jpeg_cv2_q{q}": [("jpeg", dict(quality=q, codec="opencv"))] for q in (75, 90, 100)},
    "resize_bilinear_81": [("resize", dict(size=81, kernel="bilinear"))],
    "resize_bicubic_113": [("resize", dict(size=113, kernel="bicubic"))],
    **{f"rrc_{k}": [("resized_crop", dict(**PLACE, size=72, kernel=k))] for k in aug.KERNELS},
    "rrc_size_pair_bilinear": [("resized_crop", dict(**PLACE, size=[72, 72], kernel="bilinear"))],
    "rotate_7.5": [("rotate", dict(angle=7.5))],
    "rotate_m15": [("rotate", dict(angle=-15))],
    "translate_9_m5": [("translate", dict(dx=9, dy=-5))],
    "shear_10_m5": [("shear", dict(x=10, y=-5))],
    "shear_0_12": [("shear", dict(x=0, y=12))],
    "pad_l4_t1_r5_b3_v97": [("pad", dict(left=4, top=1, right=5, bottom=3, grey=97, size=[110, 96]))],
    "crop_10_20_70": [("crop", dict(top=10, left=20, height=70, width=70))],
    "hflip": [("hflip", {})],
    "vflip": [("vflip", {})],
    "cutout_i20_j30_h17_w25_v183": [("cutout", dict(top=20, left=30, height=17, width=25, grey=183))],
    "robust_rotation30": [("rotate", dict(angle=30))],
    "robust_resize0.3_down": [("resize", dict(size=s, kernel="bilinear")) for s in ([67, 77], [96, 110])],
    "robust_resize0.3_up": [("resize", dict(size=s, kernel="bilinear")) for s in ([124, 143], [96, 110])],
    **{f"robust_jpeg_pil_q{q}": [("jpeg", dict(quality=q, codec="pillow"))] for q in (68, 36)},
}


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER/"augmentation.npz") as stored: return dict(stored)


@pytest.fixture(scope="module")
def photos():
    "Four photos at 512 x 512."
    return [np.asarray(Image.open(photo_dir()/f).convert("RGB").resize((512, 512), Image.Resampling.BOX))
            for f in pool().file.iloc[:4]]


def official_draw(trace):
    "An official draw as a program."
    program, steps = [], iter(trace)
    for step in steps:
        name, p = step["op"], {k: v for k, v in step.items() if k != "op"}
        box = {new: p[old] for old, new in dict(i="top", j="left", h="height", w="width").items() if old in p}
        if name.startswith("jpeg"): name, p = "jpeg", dict(quality=p["q"], codec={"jpeg_pil": "pillow"}.get(name, "opencv"))
        elif name in ("resize", "resized_crop"): p = dict(**box, size=p["size"], kernel=p["interp"])
        elif name == "crop": p = box
        elif name == "erase": name, p = "cutout", dict(**box, grey=int(p["value"]))
        elif name == "rotate": p = dict(angle=p["angle"])
        elif name == "affine" and any(p["shear"]): name, p = "shear", dict(zip("xy", p["shear"]))
        elif name == "affine": name, p = "translate", dict(zip(("dx", "dy"), p["translate"]))
        elif name == "pad":
            p = dict(zip(("left", "top", "right", "bottom"), p["ltrb"]), grey=p["fill"], size=next(steps)["size"])
        program.append((name, p))
    return program


def test_every_fixed_array_has_a_program(golden):
    assert {f"aug_{k}" for k in FIXED} | {"aug_base"} == {k for k in golden if k.startswith("aug_")}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_parameters_are_exact(golden, name):
    assert np.array_equal(aug.apply_program(golden["aug_base"], FIXED[name], exact=True), golden[f"aug_{name}"])


@pytest.mark.parametrize("name", FIXED)
def test_fast_is_within_one_level_a_step(golden, name):
    fast, expected = aug.apply_program(golden["aug_base"], FIXED[name]), golden[f"aug_{name}"]
    difference = abs(fast.astype(int) - expected)
    passes = 2*sum(n == "resize" for n, _ in FIXED[name]) # a resize rounds after rows and after columns
    assert difference.max() <= max(1, passes) and np.mean(difference > 1) < 1e-3


@pytest.mark.parametrize("seed", ["43", "46", "53"])
def test_official_draws_replay(golden, seed):
    program = official_draw(json.loads((FOLDER/"augmentation.json").read_text())[seed])
    image = Image.open(FOLDER/"image_a.png")
    assert np.array_equal(aug.apply_program(image, program, exact=True), golden[f"trace_{seed}_u8"])
    difference = abs(aug.apply_program(image, program).astype(int) - golden[f"trace_{seed}_u8"])
    assert np.mean(difference) < .5 # the fast way stays close, JPEG steps included
    h, w = image.size[::-1]
    for step in program: h, w = aug.size_after(step, h, w)
    assert (h, w) == (224, 224)


def test_fast_steps_are_within_one_level_of_exact_ones(photos):
    "Step by step over whole drawn programs: same shape, at most one level, no drift of brightness."
    drift, beyond, values = {}, 0, 0
    for i in range(40):
        pixels = photos[i%4]
        for name, p in aug.draw_program(np.random.default_rng([1, i])):
            fast, exact = (aug.OPERATIONS[name](pixels, e, **p) for e in (False, True))
            assert fast.shape == exact.shape and fast.dtype == np.uint8
            difference = fast.astype(int) - exact
            assert abs(difference).max() <= 1 + ("size" in p), (name, p) # a resize has two passes, see there
            beyond, values = beyond + np.sum(abs(difference) > 1), values + difference.size
            drift.setdefault(name, []).append(difference.mean())
            pixels = exact
    assert beyond/values < 1e-5
    assert max(abs(np.mean(v)) for v in drift.values()) < .002


@pytest.mark.parametrize("mode", aug.MODES)
def test_every_program_keeps_room_for_the_crop(mode):
    rng = np.random.default_rng(2)
    for i in range(200):
        shape = h, w = [(512, 512), (300, 260), (1024, 400), (224, 1000)][i%4]
        size = (224, 384, 64)[i%3]
        for step in aug.draw_program(rng, size, 5, mode, shape):
            if step[0] == "pad": assert tuple(step[1]["size"]) == ((w, h) if mode == "official" else (h, w))
            if step[0] == "resized_crop": assert step[1]["size"] == (size if mode == "official" else [size, size])
            h, w = aug.size_after(step, h, w)
            assert min(h, w) >= size
        assert (h, w) == (size, size)


def test_sizes_follow_from_the_program_alone(photos):
    for i in range(12):
        pixels = photos[0][:400 - 20*i, :300]
        size = pixels.shape[:2]
        for step in aug.draw_program(np.random.default_rng(i), 64, image_size=size, mode=aug.MODES[i%2]):
            pixels, size = aug.apply_program(pixels, [step]), aug.size_after(step, *size)
            assert pixels.shape == (*size, 3)


def _ours(name, n, size=(256, 300)):
    rng, found = np.random.default_rng(3), []
    while len(found) < n:
        if (p := aug.DRAWS[name](rng, *size, 224, "official")) is not None: found.append(p)
    return found


def _theirs(name, size=(256, 300)):
    "One draw by torchvision, which the official code uses."
    h, w = size
    if name == "resized_crop":
        return dict(zip(("top", "left", "height", "width"), transforms.RandomResizedCrop.get_params(
            torch.empty(3, h, w), [.9, 1.], [3/4, 4/3])))
    if name == "cutout":
        return dict(zip(("top", "left", "height", "width"), transforms.RandomErasing.get_params(
            torch.empty(3, h, w), (.02, .06), (.3, 3.3), [0.])[:4]))
    degrees, shear = ((0., 0.), (-15., 15., -15., 15.)) if name == "shear" else ((-15., 15.), None)
    angle, shift, _, (x, y) = transforms.RandomAffine.get_params(degrees, (.1, .1), None, shear, [w, h])
    return {"rotate": dict(angle=angle), "translate": dict(dx=shift[0], dy=shift[1]), "shear": dict(x=x, y=y)}[name]


@pytest.mark.parametrize("name", ["resized_crop", "cutout", "rotate", "translate", "shear"])
def test_draws_follow_the_distributions_of_torchvision(name):
    torch.manual_seed(0)
    ours, theirs = _ours(name, 1500), [_theirs(name) for _ in range(1500)]
    for key in theirs[0]:
        assert ks_2samp([p[key] for p in ours], [p[key] for p in theirs]).pvalue > 1e-3, key


def test_each_type_happens_as_often_as_it_should():
    programs = [aug.draw_program(np.random.default_rng([4, i])) for i in range(1500)]
    for name in aug.TYPES:
        mean = np.mean([sum(n == name for n, _ in p[1:-1]) for p in programs])
        expected = .5 if name in ("hflip", "vflip", "cutout") else 1
        assert math.isclose(mean, expected, abs_tol=.1), name
    # order: two kinds that happen once each come in both orders
    pairs = [[n for n, _ in p if n in ("jpeg", "rotate")] for p in programs]
    first = [p[0] == "jpeg" for p in pairs if sorted(p) == ["jpeg", "rotate"]]
    assert .35 < np.mean(first) < .65


def test_programs_survive_storage(photos):
    program = aug.draw_program(np.random.default_rng(5))
    stored = json.loads(json.dumps(program))
    assert aug.program_name(stored) == aug.program_name(program)
    assert np.array_equal(aug.apply_program(photos[0], stored), aug.apply_program(photos[0], program))


def test_the_callable_is_a_function_of_its_arguments(photos):
    source = photos[1].copy()
    source.flags.writeable = False # also read-only arrays, as Pillow gives them
    augment = aug.RandomStates(224)
    one, again = (augment(source, np.random.default_rng(6)) for _ in range(2))
    assert one.shape == (224, 224, 3) and one.dtype == np.uint8 and np.array_equal(one, again)
    assert np.array_equal(source, photos[1])
    clean = aug.RandomStates(96, mode="clean", types=("rotate", "pad"), exact=True)
    assert {n for i in range(30) for n, _ in clean.program((80, 90), np.random.default_rng(i))} == {"resize", "rotate", "pad", "crop"}


@pytest.mark.parametrize("program, words", [
    ([("sharpen", {})], "unknown operation 'sharpen'"),
    ([("resize", dict(size=8, kernel="cubic"))], "unknown kernel 'cubic'"),
    ([("jpeg", dict(quality=80, codec="mozjpeg"))], "unknown codec 'mozjpeg'"),
    ([("crop", dict(top=0, left=500, height=20, width=20))], "leaves the image"),
])
def test_wrong_programs_say_what_is_wrong(photos, program, words):
    with pytest.raises(InputError, match=words): aug.apply_program(photos[0], program)


@pytest.fixture(scope="module")
def encoded():
    buffer = io.BytesIO()
    Image.open(FOLDER/"image_a.png").crop((0, 0, 60, 40)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("form", [
    ("PNG", "RGB", {}), ("PNG", "RGB", dict(compress_level=0)), ("PNG", "RGB", dict(transparency=(1, 2, 3))),
    ("PNG", "L", {}), ("PNG", "P", {}), ("PNG", "RGBA", {}), ("PNG", "1", {}), ("JPEG", "RGB", {}), ("WEBP", "RGB", {}),
])
def test_decoding_equals_pillow(encoded, form):
    kind, mode, options = form
    buffer = io.BytesIO()
    Image.open(io.BytesIO(encoded)).convert(mode).save(buffer, kind, **options)
    pixels = aug.decode(buffer.getvalue())
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, np.asarray(open_image(buffer.getvalue())))


def test_damaged_files_end_as_with_pillow(encoded):
    "Refused by both, or read by both to the same pixels (damage that Pillow overlooks)."
    rng, refused = np.random.default_rng(7), 0
    for i in range(200):
        data = bytearray(encoded)
        if i%2: data[rng.integers(8, len(data) - 12)] ^= 1 + int(rng.integers(255))
        else: data = data[:rng.integers(1, len(data) - 20)]
        try: expected = np.asarray(open_image(bytes(data)))
        except InputError:
            refused += 1
            with pytest.raises(InputError, match="cannot be read"): aug.decode(bytes(data))
        else: assert np.array_equal(aug.decode(bytes(data)), expected)
    assert refused > 100
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + encoded[24:29]
    bomb = encoded[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded[33:]
    with pytest.raises(InputError): aug.decode(bomb)
