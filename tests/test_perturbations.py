"""Perturbations equal the official codes, depend on the image alone, and give three scenarios from one pass.

Golden data: `tests/parity/{commfor,spai,gapl}/perturbations.npz` and `tests/parity/commfor/augmentation.npz`. Those of SPAI and GAPL
are windows of 64 x 64 px, at 8 px and (the image being a part of the original) 24 px from the corner.
"""
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from aigid_repro.data.corpus import png
from aigid_repro.data.photos import photo_dir, pool
from aigid_repro.data.storage import InputError
from aigid_repro.detect import perturbations as P
from aigid_repro.detect.evaluation import average_precision

FOLDER = Path(__file__).parent/"parity"
PILLOW, OPENCV, SWAPPED = ({"codec": c} for c in ("pillow", "opencv", "swapped"))
COMMFOR = { # golden array: perturbation, severity, random part
    "robust_rotation30": ("rotation", 30, {"sign": 1}), "rotate_m15": ("rotation", 15, {"sign": -1}),
    "robust_resize0.3_down": ("resize", .3, {"direction": -1}), "robust_resize0.3_up": ("resize", .3, {"direction": 1}),
    "robust_jpeg_pil_q68": ("jpeg", 68, PILLOW), "robust_jpeg_pil_q36": ("jpeg", 36, PILLOW),
    "jpeg_cv2_q75": ("jpeg", 75, OPENCV), "jpeg_cv2_q90": ("jpeg", 90, OPENCV), "shear_0_12": ("shear", 12, {"axis": "y", "sign": 1})}
WINDOWS = {
    "spai": (8, {"blur3": ("blur-kernel", 3, {}), "blur7": ("blur-kernel", 7, {}), "jpeg50": ("jpeg-swapped", 50, SWAPPED),
                 "webp50": ("webp-swapped", 50, {"swapped": True}), "scale95": ("scale", .95, {})}),
    "gapl": (24, {**{f"blur_sigma{s}": ("blur-scipy", s, {}) for s in (1, 2, 3)},
                  **{f"jpeg_q{q}": ("jpeg-pillow", q, PILLOW) for q in (50, 90)}})}


def load(paper, name="perturbations"):
    with np.load(FOLDER/paper/f"{name}.npz") as stored: return dict(stored)


@pytest.fixture(scope="module")
def photos():
    "Eight photos, 128 wide and 112 high."
    files = pool().file.iloc[:8]
    return [np.asarray(Image.open(photo_dir()/f).convert("RGB").resize((293, 256), Image.Resampling.BOX))[70:182, 60:188] for f in files]


@pytest.mark.parametrize("name", COMMFOR)
def test_community_forensics_is_exact(name):
    golden = load("commfor", "augmentation")
    assert np.array_equal(P.apply(golden["aug_base"], *COMMFOR[name]), golden[f"aug_{name}"])


def test_blur_is_exact(photos):
    base = load("commfor", "augmentation")["aug_base"]
    assert np.array_equal(P.apply(base, "blur", 1.3, {}), load("commfor")["blur_sigma1.3"])
    from torchvision.transforms.functional import gaussian_blur
    for sigma in P.GRIDS["commfor"]["blur"]:
        for p in photos:
            expected = np.asarray(gaussian_blur(Image.fromarray(p), 1 + 2*round(4*sigma), sigma)).astype(int)
            # one value in 100,000 may depend on the processor's order of summation
            difference = abs(P.apply(p, "blur", sigma, {}) - expected)
            assert difference.max() <= 1 and np.count_nonzero(difference) < 1e-5*p.size + 1


@pytest.mark.parametrize("paper, name", [(paper, name) for paper, (_, names) in WINDOWS.items() for name in names])
def test_other_papers_are_exact(paper, name):
    golden, (at, operations) = load(paper), WINDOWS[paper]
    operation, severity, drawn = operations[name]
    assert P.choices(operation, "any image") == drawn # the name alone fixes everything
    window = P.perturb(golden["image"], operation, severity, "any image")[at:at + 64, at:at + 64]
    difference = abs(window.astype(int) - golden[name])
    assert difference.max() <= (2 if "jpeg" in name or "webp" in name else 0) # codecs differ between versions
    assert np.mean(difference > 0) < .02


def distance(a, b):
    h, w = b.shape[:2]
    if a.shape != b.shape: a = cv2.resize(a, (w, h), interpolation=cv2.INTER_CUBIC)
    return abs(a.astype(int) - b).mean()


def mild_to_strong():
    for grid in P.GRIDS.values():
        for name, severities in grid.items():
            if name != "scale" or max(severities) <= 1: yield name, tuple(severities)


@pytest.mark.parametrize("name, severities", sorted(set(mild_to_strong())))
def test_stronger_is_farther_from_clean(photos, name, severities):
    drawn = [P.choices(name, f"photo {i}") | ({"direction": -1} if name == "resize" else {}) for i in range(len(photos))]
    far = [np.mean([distance(P.apply(p, name, s, d), p) for p, d in zip(photos, drawn)]) for s in severities]
    assert far[0] > 0 and (len(far) == 1 or far[-1] > far[0])
    if name != "rotation": assert (np.diff(far) > 0).all() # beyond 45 degrees the corners come back


def test_draws_belong_to_the_image(photos):
    p, other = photos[:2]
    for name, known in P.PERTURBATIONS.items():
        drawn = P.choices(name, "a")
        assert drawn == P.choices(name, "a") and drawn.keys() == known.draws.keys()
        severity = next(g[name] for g in P.GRIDS.values() if name in g)[0]
        before = p.copy()
        one = P.perturb(p, name, severity, "a")
        P.perturb(other, name, severity, "b")
        assert np.array_equal(one, P.perturb(p, name, severity, "a")) and np.array_equal(p, before)
        assert one.dtype == np.uint8 and one.flags.writeable and one.flags.c_contiguous and not np.shares_memory(one, p)
    many = pd.DataFrame([P.choices("shear", f"{i}") for i in range(400)])
    assert many.groupby(["axis", "sign"]).size().between(70, 130).all()
    assert [P.choices("shear", f"{i}", seed=1) for i in range(50)] != many.iloc[:50].to_dict("records")


def test_an_image_keeps_its_direction_over_severities(photos):
    for i in range(6):
        sign = P.choices("rotation", f"photo {i}")["sign"]
        for s in (15, 45):
            assert np.array_equal(P.perturb(photos[0], "rotation", s, f"photo {i}"), P.apply(photos[0], "rotation", s, {"sign": sign}))


@pytest.mark.parametrize("name", P.PERTURBATIONS)
def test_any_shape(name):
    severities = next(g[name] for g in P.GRIDS.values() if name in g)
    for shape in ((1, 1, 3), (3, 40, 3), (61, 17, 3)):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        out = P.perturb(pixels, name, severities[-1], "x")
        assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[2] == 3 and out.size
        if name not in ("scale", "crop", "social-a", "social-b"): assert out.shape == shape


@pytest.mark.parametrize("call, words", [
    (lambda p: P.perturb(p, "fog", 1, "a"), "unknown perturbation 'fog'; known: rotation, shear"),
    (lambda p: P.perturb(p, "jpeg", 0, "a"), "quality, 1 to 100 in steps of 1"),
    (lambda p: P.perturb(p, "jpeg", 70.5, "a"), "quality, 1 to 100 in steps of 1"),
    (lambda p: P.perturb(p, "blur", float("nan"), "a"), "sigma in px, 0 to 10"),
    (lambda p: P.perturb(p, "blur-kernel", 4, "a"), "3 to 31 in steps of 2"),
    (lambda p: P.perturb(p, "crop", 1.2, "a"), "0.05 to 1"),
    (lambda p: P.perturb(p, "noise", "much", "a"), "'much' is not allowed"),
    (lambda p: P.perturb(p.astype(float), "noise", 2, "a"), "not float64"),
    (lambda p: P.perturb(p[..., 0], "noise", 2, "a"), r"\(height, width, 3\)"),
    (lambda p: P.perturb(Image.fromarray(p), "noise", 2, "a"), "not Image"),
    (lambda p: P.grid_of("ojha"), "unknown grid 'ojha'; known: commfor"),
    (lambda p: P.grid_of({"jpeg": (90, 190)}), "190 is not allowed"),
    (lambda p: P.robustness({}, pd.DataFrame({"image": [png(p)]})), "no column id"),
    (lambda p: P.robustness({}, [p]), "give one for each image"),
    (lambda p: P.robustness({}, [p], ["a", "b"]), "1 images, but 2 ids"),
    (lambda p: P.robustness({}, [p, p], ["a", "a"]), "'a' stands for two images"),
])
def test_bad_input_is_named(photos, call, words):
    with pytest.raises(InputError, match=words): call(photos[0])


@pytest.fixture(scope="module")
def smooth():
    import torch

    from aigid_repro.detect.detector import Detector
    torch.set_num_threads(1)
    class Smooth(Detector):
        def forward(self, x): return .05 - (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
    return Smooth()


GRID = {"crop": (.8, .5), "rotation": (20, 50), "noise": (5,), "jpeg": (68,)}


def test_one_pass_scores_every_version_once(photos, smooth):
    from aigid_repro.detect.training import predict
    ids = [f"photo {i}" for i in range(4)]
    long = P.robustness({"a": smooth, "b": smooth}, photos[:4], ids, GRID)
    assert list(long) == ["id", "perturbation", "severity", "detector", "logit"] and len(long) == 4*7*2
    assert not long.duplicated(["id", "perturbation", "severity", "detector"]).any()
    for row in long[long.detector == "b"].itertuples():
        p = photos[ids.index(row.id)]
        version = p if row.perturbation == "none" else P.perturb(p, row.perturbation, row.severity, row.id)
        assert np.isclose(row.logit, predict(smooth, [version])[0], atol=1e-6)


def test_order_company_and_memory_change_nothing(photos, smooth):
    ids = [f"photo {i}" for i in range(5)]
    key = ["id", "perturbation", "severity"]
    whole = P.robustness({"a": smooth}, photos[:5], ids, GRID).set_index(key).logit
    records = pd.DataFrame({"id": ids, "image": [png(p) for p in photos[:5]]}).iloc[[3, 0]]
    part = P.robustness({"a": smooth}, records, grid={"jpeg": (68,), "crop": (.5,)}, batch=3, memory=0).set_index(key).logit
    assert len(part) == 6 and np.allclose(part, whole.loc[part.index], atol=1e-6)
    other = P.robustness({"a": smooth}, photos[:5], ids, GRID, seed=1).set_index(key).logit
    assert not np.allclose(other, whole, atol=1e-6) and np.allclose(other.xs("none", level=1), whole.xs("none", level=1), atol=1e-6)


def table(shift, rows=((0, "real", 0.), (0, "real", 1.), (1, "g", .5), (1, "g", 2.), (1, "h", 3.), (1, "h", 4.))):
    "Clean logits of two photos and what two generators made of them; the perturbation shifts the two classes."
    clean = pd.DataFrame([dict(id=str(i), label=y, generator=g, family="f" if y else "real", source=f"p{i%2}", crop=f"p{i%2}", logit=v,
                               set="test" if y else "real") for i, (y, g, v) in enumerate(rows)])
    moved = clean.assign(logit=clean.logit + clean.label.map(dict(enumerate(shift))), perturbation="blur", severity=2.)
    return pd.concat([clean.assign(perturbation="none", severity=0.), moved], ignore_index=True).assign(detector="d")


def test_three_scenarios():
    p = table((1., -2.)) # photos rise by 1, generated images fall by 2
    found = P.scenarios(p, by=None).set_index(["scenario", "generator"]).ap
    real, g, h = np.array([0, 1.]), np.array([.5, 2]), np.array([3., 4])
    expected = {"none": (real, g, h), "both": (real + 1, g - 2, h - 2), "generated": (real, g - 2, h - 2), "real": (real + 1, g, h)}
    for scenario, (r, *made) in expected.items():
        for name, m in zip("gh", made):
            assert np.isclose(found[scenario, name], average_precision([0, 0, 1, 1], np.r_[r, m]))
    assert np.isclose(found["none", "g"], (1 + 2/3)/2) and np.isclose(found["both", "g"], (1/3 + 2/4)/2) # by hand
    mean = P.scenarios(p).set_index("scenario")
    assert np.isclose(mean.ap["both"], (found["both", "g"] + found["both", "h"])/2)
    assert np.isclose(mean.change["real"], mean.ap["real"] - mean.ap["none"]) and mean.change["none"] == 0
    assert (mean.worst_generator == "g").all() and list(mean.perturbation) == ["none", "blur", "blur", "blur"]


def test_runs_and_families_stay_apart():
    runs = pd.concat([table(s).assign(run=f"run {i}", seed=i) for i, s in enumerate([(0, 0), (0, -9)])], ignore_index=True)
    found = P.scenarios(runs, metrics=("auc", "ap"), by="family").set_index(["run", "scenario"])
    assert (found.change["run 0"] == 0).all() and found.change["run 1", "both"] < -.5 and found.change["run 1", "real"] == 0
    assert found.seed["run 1"].eq(1).all() and len(found) == 8
    assert list(found.loc[[("run 1", "both")]].auc) == [0]


@pytest.mark.parametrize("spoil, words", [
    (lambda p: p[1:], "score all images of all runs under one grid"),
    (lambda p: p[p.perturbation != "none"], "score all images"),
    (lambda p: p.drop(columns="severity"), "no column severity"),
    (lambda p: pd.concat([p, p]), "scored the image twice"),
])
def test_incomplete_predictions_are_named(spoil, words):
    with pytest.raises(InputError, match=words): P.scenarios(spoil(table((0, 0))))


def test_tables_need_no_torch():
    code = ("import sys; from aigid_repro.detect import perturbations; "
            "sys.exit(any(m in sys.modules for m in ('torch', 'torchvision', 'matplotlib.pyplot')))")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
