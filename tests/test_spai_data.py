"""SPAI's training views, learning rates and files equal the official ones; the protocol is counted by hand.

Golden data in `tests/parity/spai`: `augmentation.npz` (images) and `augmentation.json` (draws, as programs), made with the libraries of
the official code (albumentations 1.4.14, albucore 0.0.16, OpenCV 4.10); `golden_schedule.npz`, rates of the official schedule; `cli`,
results of the official command with a tiny model.
"""
import csv
import json
import subprocess
import sys
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
from aigid_repro.detect.evaluation import auc
from aigid_repro.spai import augmentation as aug
from aigid_repro.spai import lists, recipe

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


def test_learning_rates_are_official():
    from aigid_repro.detect.training import SCHEDULES, train_settings
    with np.load(FOLDER/"golden_schedule.npz") as g:
        steps, number, expected = int(g["epochs"]*g["steps_per_epoch"]), g["update_index"], g["lr"]
        warmup = float(g["warmup_epochs"]/g["epochs"])
    s = train_settings(steps=steps, warmup=warmup, lr=5e-4, schedule="spai")
    rates = s.lr*SCHEDULES["spai"](s)
    inside = number < steps - 1 # step i + 1 runs at the rate of number i
    assert inside.sum() == 12 and np.allclose(rates[number[inside] + 1], expected[inside], rtol=1e-12, atol=0)
    assert rates[0] == expected[0] and len(rates) == steps
    from aigid_repro.spai.pretraining import warm_cosine
    assert np.allclose(warm_cosine(number, 5e-4, 2.5e-7, 2.5e-7, 500, steps), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["spai", "mfm"])
def test_schedules_of_short_trainings_are_sound(name):
    from aigid_repro.detect.training import SCHEDULES, train_settings
    for steps in (1, 2, 3, 10):
        for warmup in (0., 1/7, .5):
            rates = SCHEDULES[name](train_settings(steps=steps, warmup=warmup))
            assert rates.shape == (steps,) and (rates > 0).all() and (rates <= 1).all()
    with pytest.raises(InputError, match="below 1"): SCHEDULES[name](train_settings(warmup=1.))


def test_recipes_are_settings():
    from aigid_repro.detect.training import train_settings
    for profile in (*recipe.PROFILES, "paper"):
        s = train_settings(**recipe.recipe(profile, "encoder.safetensors", options=dict(scv=False), seed=3))
        options = dict(s.options)
        assert options["pretrained"] == "encoder.safetensors" and options["scv"] is False and s.seed == 3
        assert s.augmentation == recipe.AUGMENTATION[profile] and s.augmentation.startswith("spai")
        assert json.loads(json.dumps(recipe.recipe(profile))) # numbers that JSON can hold
    assert recipe.recipe("mini", steps=7)["steps"] == recipe.recipe("paper", steps=7)["steps"] == 7
    with pytest.raises(InputError, match="no recipe for profile 'big'"): recipe.recipe("big")


def official(name):
    "Rows of a result of the official command."
    with open(FOLDER/"cli"/name, newline="") as f: return list(csv.DictReader(f))


@pytest.fixture
def folder(tmp_path):
    "A directory as in the golden files: two images and a text file; and more that is no image of it."
    (tmp_path/"imgs"/"below").mkdir(parents=True)
    for name, size in (("a.png", 3), ("b.png", 4)): Image.new("RGB", (size, size)).save(tmp_path/"imgs"/name)
    Image.new("RGB", (2, 2)).save(tmp_path/"imgs"/"below"/"c.png")
    (tmp_path/"imgs"/"notes.txt").write_text("nothing to see")
    (tmp_path/"imgs"/"empty.png").touch()
    return tmp_path/"imgs"


def test_results_of_a_list_are_official(folder, tmp_path):
    images = lists.read_list(FOLDER/"cli"/"list_input.csv", folder)
    scores = np.float32([r["mytag"] for r in official("list_output.csv")])
    written = lists.write_scores(images, scores, tmp_path/"out"/"new", "mytag")
    assert written == tmp_path/"out"/"new"/"list_input.csv"
    assert written.read_bytes() == (FOLDER/"cli"/"list_output.csv").read_bytes()


def test_results_of_a_directory_are_official(folder, tmp_path):
    images = lists.list_folder(folder)
    written = lists.write_scores(images, np.float32([r["spai"] for r in official("imgs.csv")]), tmp_path/"out")
    assert written.name == "imgs.csv" and written.read_bytes() == (FOLDER/"cli"/"imgs.csv").read_bytes()
    again = lists.read_list(written, folder) # a result is a list
    assert again.rows.drop(columns="spai").equals(images.rows) and again.files == images.files


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_images_are_known_by_content(tmp_path, kind):
    Image.new("RGB", (4, 4)).save(tmp_path/"named.txt", kind)
    assert lists.is_image(tmp_path/"named.txt") and lists.list_folder(tmp_path).rows.image.tolist() == ["named.txt"]


HEAD = "image,class,split\n"
BAD = {"no column class": "image,split\na.png,test\n",
       "no column image, split": "file,class\na.png,0\n",
       "column class occurs twice": "image,class,class,split\na.png,0,0,test\n",
       "an empty file": "",
       "not a CSV file": HEAD + "\"a\"x.png,0,test\n",
       "line 3: class is 'fake'": HEAD + "a.png,0,test\nb.png,fake,test\n",
       "line 2: class is ''": HEAD + "a.png,,test\n",
       "line 2: no image": HEAD + ",0,test\n",
       "line 2: unknown split 'validation'": HEAD + "a.png,0,validation\n",
       "line 4: image 'a.png' is in split test twice, first in line 2": HEAD + "a.png,0,test\nb.png,0,test\na.png,1,test\n",
       "line 3: 4 values, not 3": HEAD + "a.png,0,test\nb.png,0,test,x\n",
       "2 of 3 images are missing": HEAD + "a.png,0,test\nx.png,0,test\ny.png,0,test\nz.png,0,val\n",
       "no rows of split test, only of train, val": HEAD + "a.png,0,train\na.png,0,val\n",
       "only of none": HEAD}


@pytest.mark.parametrize("words", BAD)
def test_bad_lists_say_what_is_wrong(folder, words):
    (folder/"bad.csv").write_text(BAD[words])
    with pytest.raises(InputError, match=words) as e: lists.read_list(folder/"bad.csv")
    assert "bad.csv" in str(e.value)


def test_other_bad_inputs(folder, tmp_path):
    (folder/"latin.csv").write_bytes(HEAD.encode() + "ä.png,0,test\n".encode("latin-1"))
    for path, words in ((folder/"none.csv", "No such file"), (folder/"latin.csv", "not UTF-8"), (folder, "directory")):
        with pytest.raises(InputError, match=words): lists.read_list(path)
    with pytest.raises(InputError, match="unknown split 'tests'"): lists.read_list(FOLDER/"cli"/"list_input.csv", folder, "tests")
    with pytest.raises(InputError, match="no images directly"): lists.list_folder(tmp_path)
    with pytest.raises(InputError, match="no such folder"): lists.list_folder(tmp_path/"none")


def test_roots_belong_to_lists(folder, tmp_path):
    for name in ("one.csv", "two.csv"): (tmp_path/name).write_text(HEAD + "a.png,0,test\n")
    inputs = [tmp_path/"one.csv", folder, tmp_path/"two.csv"]
    for roots in ([folder], [folder, folder]):
        assert [i.files[0] for i in lists.read_inputs(inputs, roots)] == [folder/"a.png"]*3
    with pytest.raises(InputError, match="images are missing"): lists.read_inputs(inputs) # each list's own folder
    with pytest.raises(InputError, match="3 root folders for 2 lists"): lists.read_inputs(inputs, [folder]*3)
    (folder/"one.csv").write_text(HEAD + "a.png,0,test\n")
    with pytest.raises(InputError, match="written to one.csv"): lists.read_inputs([inputs[0], folder/"one.csv"], [folder])


def test_a_failed_result_leaves_the_old_one(folder, tmp_path):
    images = lists.list_folder(folder)
    before = lists.write_scores(images, [0, 1], tmp_path).read_bytes()
    outside = "between 0 and 1"
    for scores, options, words in (([0], {}, "1 scores for 2 images"), ([0, np.nan], {}, outside), ([0, 2.], {}, outside),
                                   ([0, 1], dict(tag="split"), "choose another tag")):
        with pytest.raises(InputError, match=words): lists.write_scores(images, scores, tmp_path, **options)
    (folder/"own.csv").write_text(HEAD + "a.png,0,test\n")
    with pytest.raises(InputError, match="would replace the list"): lists.write_scores(lists.read_list(folder/"own.csv"), [0], folder)
    assert (tmp_path/"imgs.csv").read_bytes() == before and (folder/"own.csv").read_text().startswith(HEAD)


def test_lists_become_records(folder):
    images = lists.read_list(FOLDER/"cli"/"list_input.csv", folder)
    records = lists.to_records(images, "SD3", "latent diffusion", "raise", "x/")
    rows = records[["id", "label", "generator", "source"]].values.tolist()
    assert rows == [["x/b.png", 1, "SD3", "x/b.png"], ["x/a.png", 0, "real", "raise"]]
    assert records.extra.tolist() == ["x", "y"] and (records.split == "test").all()
    assert lists.to_records(lists.read_list(images.path, folder, "val")).split.tolist() == ["validation"]


def test_complete_lists_are_complete(tmp_path):
    (tmp_path/"a.png").touch()
    for v in lists.LISTS.values():
        for i in range(v.count): (tmp_path/f"{i}.png").touch(exist_ok=True)
        rows = "".join(f"{i}.png,{v.label},test\n" for i in range(v.count))
        (tmp_path/f"set_{v.title.replace('.', '_')}.csv").write_text(HEAD + rows)
    (tmp_path/"other.csv").write_text("nothing")
    seen = lists.check(tmp_path)
    assert len(seen) == 18 and (seen.state == "complete").all() and seen.rows.sum() == 17_638 and not seen.detail.any()
    records = lists.evaluation_records(tmp_path, names=("mjv61", "raise"))
    assert len(records) == 1638 and set(records.generator) == {"MJv6.1", "real"} and set(records.source[records.label == 0]) == {"raise"}
    (tmp_path/"637.png").unlink()
    (tmp_path/"set_Flux.csv").unlink()
    again = lists.check(tmp_path).set_index("list")
    assert again.state.value_counts().to_dict() == {"incomplete": 17, "missing": 1} and "1 images are missing" in again.detail["mjv61"]
    with pytest.raises(InputError, match="no list for flux"): lists.evaluation_records(tmp_path)
    (tmp_path/"mj-v6.1.csv").write_text(HEAD)
    with pytest.raises(InputError, match="both look like the list mjv61"): lists.check(tmp_path)


def numbers(seed=0, sources=("coco", "imagenet", "raise"), n=40):
    "Predictions of two runs on three generators and as many sources."
    rng, kinds = np.random.default_rng(seed), [(1, g, "f", "", i + 1) for i, g in enumerate(("Glide", "Flux", "MJv5"))]
    kinds += [(0, "real", "real", s, .7*i) for i, s in enumerate(sources)]
    table = pd.concat([pd.DataFrame({"run": run, "label": label, "generator": g, "family": f, "source": s, "logit": rng.normal(mean, 1, n)})
                       for run in "ab" for label, g, f, s, mean in kinds], ignore_index=True)
    return table.assign(id=table.index.astype(str), set="clean", axis="x")


def test_protocol_is_the_mean_of_pairs():
    table = numbers()
    pairs = lists.pairs(table)
    assert len(pairs) == 18 and (pairs.axis == "x").all() and set(pairs.n_real) == set(pairs.n_generated) == {40}
    for run, g, s, value in pairs[["run", "generator", "source", "auc"]].values:
        p = table[(table.run == run) & ((table.generator == g) | (table.source == s))]
        real, made = (p.logit[p.label == k].to_numpy() for k in (0, 1))
        assert np.isclose(value, (made[:, None] > real).mean()) # counted over pairs of images
    per_generator = lists.over_sources(pairs)
    assert len(per_generator) == 6 and set(per_generator.n_sources) == {3} and set(per_generator.worst_source) == {"raise"}
    assert np.allclose(per_generator.auc, lists.pooled(table).auc) # sources of equal size
    overall = lists.over_generators(per_generator).set_index("run")
    assert np.isclose(overall.auc["a"], pairs[pairs.run == "a"].auc.mean()) and overall.worst_generator.tolist() == ["Glide"]*2
    groups = lists.over_groups(per_generator)
    assert groups.group.tolist() == [g for g in lists.GROUPS for _ in "ab"] and np.isclose(groups.auc.mean(), overall.auc.mean())


def test_unequal_sources_count_the_same():
    table = numbers()
    less = table[(table.source != "raise") | (table.index % 4 == 0)]
    per_source, together = lists.over_sources(lists.pairs(less)), lists.pooled(less)
    assert abs(per_source.auc - together.auc).min() > .002
    for run, g, value in per_source[["run", "generator", "auc"]].values:
        p = less[(less.run == run) & ((less.generator == g) | (less.label == 0))]
        weight = np.where(p.label == 1, 1, 1/p.groupby("source").id.transform("size"))
        assert np.isclose(value, auc(p.label, p.logit, weight))


def test_other_metrics_and_columns():
    table = numbers().rename(columns={"source": "real_set"}).drop(columns=["set", "family"])
    found = lists.over_sources(lists.pairs(table, "balanced_accuracy", "real_set"), "balanced_accuracy", "real_set")
    assert np.allclose(found.balanced_accuracy, lists.pooled(table, "balanced_accuracy").balanced_accuracy)


def test_predictions_that_lack_something():
    table = numbers()
    for bad, words in ((table[table.label == 1], "no real images"), (table.drop(columns="source"), "no column 'source'"),
                       (table[(table.run == "a") | (table.source != "coco")], "no real images of coco"),
                       (pd.concat([table, table]), "scored the image twice")):
        with pytest.raises(InputError, match=words): lists.pairs(bad)
    with pytest.raises(InputError, match="no group for generator 'Flux'"):
        lists.over_groups(lists.pooled(table), groups={"Glide": "x", "MJv5": "y"})


def test_lists_need_no_deep_learning_library():
    code = "import sys, aigid_repro.spai.lists; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_list_follows_the_rules(tmp_path):
    def put(name, text=""):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(text)
    for split in ("train", "val"):
        for name in ("b/2.png", "a/c/1.png", "real_lsun/3.png", "a/4.jpg"): put(f"ldm/{split}/{name}")
        put(f"ldm/{split}/real_coco.txt", "9.jpg\n8.jpg\n9.jpg\n")
        put(f"ldm/{split}/real_lsun/real_lsun.txt", "tvmonitor_x_7.png\n")
    for name in ("coco/8.jpg", "coco/9.jpg", "lsun/train/tvmonitor/0_real/x_7.png"): put(name)
    build = lambda: lists.training_list(tmp_path/"ldm", tmp_path/"coco", tmp_path/"lsun", tmp_path/"lists"/"t.csv", tmp_path)
    (tmp_path/"lists").mkdir()
    content = build().read_bytes()
    real = ["coco/8.jpg,0", "coco/9.jpg,0", "lsun/train/tvmonitor/0_real/x_7.png,0"]
    assert content.decode().split("\n") == ["image,class,split", *(f"{r},{s}" for s in ("train", "val") for r in (
        f"ldm/{s}/a/c/1.png,1", f"ldm/{s}/b/2.png,1", *real)), ""]
    assert build().read_bytes() == content and lists.read_list(tmp_path/"lists"/"t.csv", tmp_path, "train").labels.sum() == 2
    for name, text, words in (("ldm/val/real_lsun/real_lsun.txt", "cat\n", "not category_filename"),
                              ("ldm/val/real_lsun/real_lsun.txt", "cat_1.png\n", "1 of 4 real images are missing"),
                              ("ldm/val/x/real_coco.txt", "", "2 files real_coco.txt")):
        put(name, text)
        with pytest.raises(InputError, match=words): build()
    with pytest.raises(InputError, match="no .png files below"):
        lists.training_list(tmp_path/"coco", tmp_path/"coco", tmp_path/"lsun", tmp_path/"t.csv")
    assert (tmp_path/"lists"/"t.csv").read_bytes() == content
