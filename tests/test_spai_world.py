"SPAI's lists as a world of studies: the order of training images, interrupted evaluations, and what is said of missing and wrong files."
import itertools
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from aigid_repro.data.storage import InputError
from aigid_repro.detect import networks, training  # noqa: F401 - registers the detectors
from aigid_repro.detect.detector import create
from aigid_repro.detect.evaluation import check_predictions, thresholds
from aigid_repro.detect.scoring import IMAGE_COLUMNS
from aigid_repro.detect.studies import Training, as_run, embedded, identity, run_trainings
from aigid_repro.spai import world as module
from aigid_repro.spai.lists import LISTS, over_generators, over_sources, pairs, training_list
from aigid_repro.spai.pretraining import preset
from aigid_repro.spai.world import ListedImages, Published, logits_of, training_records, world

ROOMS = "spai.model", "spai.world"
QUICK = dict(detector="high-pass-cnn", steps=2, batch=4, crop=16, sampling="natural")
HAVE = {"glide": "png", "sd3": "webp", "mjv5": "png", "coco": "jpg", "raise": "tif"}


def refused(*parts):
    "Expect one line which contains all parts."
    return pytest.raises(InputError, match="(?s)^" + "".join(f"(?=.*{re.escape(p)})" for p in parts) + r"[^\n]*$")


def picture(path, size=(24, 30)):
    "A file of noise that differs from all others."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32("/".join(path.parts[-3:]).encode())).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    return path


def add_list(folder, name, ending="png", n=3, images=""):
    "An official list and its images."
    files = [f"{name}/{i}.{ending}" for i in range(n)]
    for i, f in enumerate(files): picture(folder/(images or "lists")/f, (70 + i, 140))
    (folder/"lists").mkdir(exist_ok=True)
    (folder/f"lists/test_{name}.csv").write_text("image,class,split\n" + "".join(f"{f},{LISTS[name].label},test\n" for f in files))


def make(folder):
    "A training list of 12 and 8 images, of the official folders, and five evaluation lists."
    for split, n in (("train", 6), ("val", 4)):
        for i in range(n): picture(folder/"ldm"/split/"bird"/f"{i}.png")
        for i in range(n//2):
            picture(folder/"coco"/f"{split}{i}.jpg", (20, 33))
            picture(folder/"lsun/train/cat/0_real"/f"{split}{i}.webp")
        (folder/f"ldm/{split}/real_coco.txt").write_text("".join(f"{split}{i}.jpg\n" for i in range(n//2)))
        (folder/f"ldm/{split}/real_lsun.txt").write_text("".join(f"cat_{split}{i}.webp\n" for i in range(n//2)))
    training_list(folder/"ldm", folder/"coco", folder/"lsun", folder/"spai/train.csv")
    for name, ending in HAVE.items(): add_list(folder/"spai", name, ending)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory): return make(tmp_path_factory.mktemp("data"))


@pytest.fixture
def copy(made, tmp_path): return shutil.copytree(made, tmp_path/"copy")


@pytest.fixture
def here(copy): return Published(str(copy/"spai"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("AIGID_CACHE", str(tmp_path/"cache"))


def stream(made, **where):
    t = training_records(made/"spai/train.csv")
    return ListedImages(t.image.tolist(), t.label.tolist(), **where)


def content(batch): return [(zlib.crc32(x.tobytes()), y) for x, y in batch]


def first(n, made, **where): return content(itertools.islice(stream(made, **where), n))


def loaded(n, made, workers, **where):
    loader = DataLoader(stream(made, **where), where["batch"], num_workers=workers, collate_fn=list)
    return [x for b in itertools.islice(loader, n) for x in content(b)]


def break_file(path): path.write_bytes(path.read_bytes()[:200])


def write_train(here, *lines): (Path(here.folder)/"train.csv").write_text("image,class,split\n" + "\n".join(lines) + "\n")


# ---- the stream

def test_each_image_once_an_epoch(made):
    whole = first(36, made)
    epochs = [whole[i:i + 12] for i in (0, 12, 24)]
    assert all(len(set(e)) == 12 and set(e) == set(epochs[0]) and sum(y for _, y in e) == 6 for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and whole == first(36, made) != first(36, made, seed=1)


@pytest.mark.parametrize("start", [1, 12, 29, 10**9])
def test_starts_anywhere(made, start, monkeypatch):
    opened, true = [], module.open_image
    monkeypatch.setattr(module, "open_image", lambda f: opened.append(f) or true(f))
    assert first(7, made, start=start) == first(start % 12 + 7, made, start=start - start % 12)[start % 12:]
    assert len(opened) == 2*7 + start % 12


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_steps_whoever_loads_them(made, workers, processes):
    "A step's images, in order, for any number of processes and workers, from the beginning or resumed."
    whole, share = first(32, made), 4//processes
    for start in (0, 8):
        parts = [loaded((32 - start)//4, made, workers, batch=share, rank=r, processes=processes, start=start) for r in range(processes)]
        steps = [p[i:i + share] for i in range(0, len(parts[0]), share) for p in parts]
        assert sum(steps, []) == whole[start:]


def test_a_damaged_image(copy):
    whole, t = first(12, copy), training_records(copy/"spai/train.csv")
    bad = next(Path(f) for f in t.image if f.endswith(".png"))
    at = whole.index(content(zip([np.asarray(Image.open(bad))], [1.]))[0])
    break_file(bad)
    with pytest.warns(UserWarning, match=f"{bad.name}.*stands in"): seen = first(13, copy)
    assert seen.pop(at) == seen[at] and seen[:11] == whole[:at] + whole[at + 1:]
    for f in t.image: break_file(Path(f))
    with pytest.warns(UserWarning), refused("8 images in a row"): first(1, copy)


def test_bad_settings(made):
    for wrong in (dict(batch=0), dict(start=-1), dict(rank=1), dict(rank=-1)):
        with refused("batch must be at least 1"): stream(made, **wrong)


# ---- what trains

def test_training_rows(here):
    assert here.families() == {"latent diffusion": ["LDM"]} and here.sources() == {"coco": 3, "lsun": 3}
    data = here.data(Training(QUICK))
    assert data().batch == 4 and data(processes=2, rank=1).batch == 2 and len(data().files) == 12 and sum(data().labels) == 6
    few, other = (here.data(Training(QUICK, s, images=2))() for s in (0, 1))
    assert len(few.files) == 4 and sum(few.labels) == 2 and few.files != other.files
    coco = here.data(Training(QUICK, reals=("coco",)))()
    assert len(coco.files) == 9 and not any("0_real" in f for f in coco.files)
    assert here.data(Training(QUICK, generators=("LDM",)))().files == data().files
    for choice in (dict(pool="manual"), dict(sources=("coco",)), dict(generators=("LDM", "Glide"))):
        with refused("one generator, LDM"): here.data(Training(QUICK, **choice))
    with refused("no real images of source 'ffhq'", "coco, lsun"): here.data(Training(QUICK, reals=("ffhq",)))
    with refused("7 real images asked for, 6"): here.data(Training(QUICK, images=7))


def test_two_steps(here):
    losses = []
    for workers in (0, 1, 2):
        settings = training.train_settings(seed=3, **QUICK)
        detector = training.train(settings, here.data(Training(QUICK, 3)), log=(log := []), workers=workers)
        losses.append([v for _, v in log])
    assert len(losses[0]) == 2 and losses[0] == losses[1] and np.isfinite(losses).all() and not detector.training


def test_study(here, monkeypatch):
    "Trained and scored, and found again."
    plan = [(dict(run=f"reals {r}", detector="CNN"), Training(QUICK, reals=r)) for r in ((), ("coco",))]
    with pytest.warns(UserWarning, match="5 of 18"): p = run_trainings(plan, here, ROOMS, jobs=1)
    assert len(p) == 2*(8 + 15) and p.groupby("run").logit.nunique().gt(10).all()
    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr(module, "logits_of", None)
    with pytest.warns(UserWarning): assert run_trainings(plan, here, ROOMS, jobs=1).equals(p)


# ---- scores

def test_predictions(here):
    p = here.score(create("high-pass-cnn"), "no")
    assert [*p] == [*IMAGE_COLUMNS, "logit"] and p.logit.dtype == np.float32
    p = check_predictions(p.assign(run="r"))
    test, validation = p[p.split == "test"], p[p.split == "validation"]
    assert test.groupby(["label", "generator", "set"]).size().to_dict() == {
        (0, "real", "real"): 6, (1, "Glide", "below 0.5 MP"): 3, (1, "MJv5", "above 1 MP"): 3, (1, "SD3", "0.5 to 1 MP"): 3}
    assert set(test[test.label == 0].source) == {"coco", "raise"} and set(validation[validation.label == 0].source) == {"coco", "lsun"}
    assert set(validation.generator) == {"LDM", "real"} and set(validation["set"]) == {"trained", "real"} and (p.crop == p.id).all()
    table = over_sources(pairs(test.drop(columns="set")))
    assert table.n_sources.eq(2).all() and over_generators(table).n_generators[0] == 3 and np.isfinite(thresholds(validation)["r"])


@pytest.mark.parametrize("name, settings", [("high-pass-cnn", {}), ("spai", dict(size="mini"))])
def test_each_image_gets_its_own_logit(here, name, settings):
    detector = create(name, **settings).eval()
    p = Published(here.folder, augment=False).score(detector, "no").set_index("id")
    rows = [here.training("val"), *here.lists()[0].values()]
    for r in (r for t in rows for r in t.itertuples()):
        single = training.predict(detector, [Image.open(r.image).convert("RGB")])[0]
        assert p.logit[r.id] == pytest.approx(single, abs=1e-4), r.id


def test_validation_is_augmented_once(here):
    detector = create("high-pass-cnn")
    official, again, plain = (w.score(detector, "no") for w in (here, here, Published(here.folder, augment=False)))
    assert official.equals(again) and official.drop(columns="logit").equals(plain.drop(columns="logit"))
    differ = official.logit != plain.logit
    assert differ[official.split == "validation"].all() and not differ[official.split == "test"].any()


def test_interrupted_evaluation_continues(here, monkeypatch):
    detector, calls, true = create("high-pass-cnn"), [], module.logits_of
    def counted(detector, images, *how):
        calls.append(len(calls))
        if len(calls) == 4: raise KeyboardInterrupt
        return true(detector, images, *how)
    monkeypatch.setattr(module, "logits_of", counted)
    with pytest.raises(KeyboardInterrupt): here.score(detector, "no")
    whole = here.score(detector, "no")
    assert len(calls) == 4 + 3 # validation and two lists were done; the third, and two more
    monkeypatch.setattr(module, "logits_of", None)
    assert here.score(detector, "no").equals(whole)
    monkeypatch.setattr(module, "logits_of", counted)
    stored = sorted(module.cache_dir("spai", "scores").iterdir())
    assert len(stored) == 6
    stored[0].write_bytes(b"half")
    assert here.score(detector, "no").equals(whole) and len(calls) == 8
    with Image.open(place := Path(here.folder)/"lists/glide/1.png") as image: image.resize((64, 64)).save(place)
    changed = here.score(detector, "no").logit
    assert (changed != whole.logit).sum() == 1 and np.isfinite(changed).all() and len(calls) == 9
    here.score(create("high-pass-cnn"), "no") # other weights
    assert len(calls) == 9 + 6


def test_photographs_do_not_share_a_batch(monkeypatch):
    batches, true = [], module.predict
    monkeypatch.setattr(module, "predict", lambda d, images, *a, **k: batches.append(len(images)) or true(d, images, *a, **k))
    images = [np.zeros(s, np.uint8) for s in ((64, 64, 3),)*5 + ((100, 100, 3),)*2 + ((64, 64, 3),)]
    assert len(logits_of(create("high-pass-cnn"), iter(images), pixels=9000)) == 8 and batches == [3, 3, 1, 1]
    assert len(logits_of(create("high-pass-cnn"), iter([]))) == 0


def test_images(here, monkeypatch):
    about, pixels = here.images("test", 2)
    assert [*about] == IMAGE_COLUMNS and about.groupby(about.id.str.split("/").str[0]).size().to_dict() == dict.fromkeys(HAVE, 2)
    assert len(pixels) == 10 and [x.shape[1] for x in pixels] == [140]*10 and len(pixels[3:5]) == 2
    more = here.images("test", 5)[0]
    assert len(more) == 15 and set(about.id) <= set(more.id)
    assert len({tuple(here.images("test", 2, seed)[0].id) for seed in range(5)}) > 1
    assert here.images("train", 4)[0].label.value_counts().to_dict() == {0: 4, 1: 4}
    monkeypatch.setattr(module, "open_image", None) # decoded when asked for
    assert len(here.images("test", 2)[1]) == 10
    with refused("split 'val'", "train and test"): here.images("val", 2)


# ---- what is missing or wrong

def test_missing_lists(here, copy):
    shutil.rmtree(copy/"spai/lists/glide")
    add_list(copy/"spai", "firefly")
    (copy/"spai/lists/test_firefly.csv").write_text("image,class,split\nfirefly/0.png,0,test\n")
    with pytest.warns(UserWarning) as said: here.prepare(1)
    message = str(said[0].message)
    assert "\n" not in message and "4 of 18 evaluation lists are scored" in message
    assert "no list for sd13, sd14, flux, dalle2, sd2, sdxl, gigagan, mjv61, dalle3, imagenet, openimages, fodb;" in message
    assert "glide: " in message and "3 of 3 images are missing" in message and "rows of the wrong class" in message
    assert "coco: 3 images instead of 1000" in message and "Fetch" in message and "no train.csv" not in message
    assert set(here.score(create("high-pass-cnn"), "no").generator) == {"LDM", "real", "SD3", "MJv5"}


def test_a_complete_copy_says_nothing(here, copy, monkeypatch, recwarn):
    for name, v in LISTS.items():
        monkeypatch.setitem(LISTS, name, v._replace(count=3))
        if name not in HAVE: add_list(copy/"spai", name)
    here.prepare(1)
    assert not recwarn.list and len(here.lists()[0]) == 18


def test_without_training_list(here, copy):
    (copy/"spai/train.csv").unlink()
    with pytest.warns(UserWarning, match="no train.csv, so no training and no validation"): here.prepare(1)
    assert set(here.score(create("high-pass-cnn"), "no").split) == {"test"}
    with refused("train.csv: there is no training list", "spai.lists.training_list"): here.data(Training(QUICK))


def test_without_evaluation_lists(here, copy):
    shutil.rmtree(copy/"spai/lists")
    with pytest.warns(UserWarning, match="0 of 18"): here.prepare(1)
    assert set(here.score(create("high-pass-cnn"), "no").split) == {"validation"}
    with refused("lists: no evaluation list"): here.images("test", 2)


def test_nothing_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("AIGID_DATA", str(tmp_path))
    for f in (lambda: world("paper"), lambda: Published().prepare(1), lambda: Published().score(create("high-pass-cnn"), "no")):
        with refused(f"{tmp_path}/spai: neither train.csv nor an evaluation list", "lists/glide.csv", "training_list"): f()
    monkeypatch.delenv("AIGID_DATA")
    with refused("set AIGID_DATA"): world("paper")


def test_images_elsewhere(tmp_path):
    add_list(tmp_path, "glide", images="pictures")
    assert not Published(str(tmp_path)).lists()[0]
    assert Published(str(tmp_path), "pictures").score(create("high-pass-cnn"), "no").generator.tolist() == ["Glide"]*3


def test_two_files_of_one_list(here, copy):
    shutil.copy(copy/"spai/lists/test_glide.csv", copy/"spai/lists/glide_old.csv")
    with refused("glide_old.csv", "test_glide.csv", "keep one"): here.key()


def test_a_damaged_evaluation_image(here, copy, monkeypatch):
    break_file(copy/"spai/lists/mjv5/1.png")
    detector = create("high-pass-cnn")
    with refused("mjv5/1.png", "cannot be read as an image"): here.score(detector, "no")
    picture(copy/"spai/lists/mjv5/1.png")
    calls, true = [], module.logits_of
    monkeypatch.setattr(module, "logits_of", lambda *a: calls.append(1) or true(*a))
    assert len(here.score(detector, "no")) == 23 and len(calls) == 3 # mjv5 and the two after it


@pytest.mark.parametrize("line, parts", [
    ("a.png,2,train", ["line 3", "class is '2'"]), ("a.png,1,training", ["line 3", "unknown split 'training'"]),
    ("b.png,0,train", ["line 3", "twice"]), ("a.png,1", ["line 3", "2 values, not 3"]), ("a.png,0,train", ["one class only"]),
    ("gone.png,1,train", ["1 of 2 images are missing", "gone.png"])])
def test_wrong_rows(here, copy, line, parts):
    for name in "ab": picture(copy/f"spai/{name}.png")
    write_train(here, "b.png,0,train", line)
    with refused("train.csv", *parts): here.data(Training(QUICK))


def test_wrong_files(here, copy):
    picture(copy/"spai/a.png")
    write_train(here, "a.png,1,train")
    with refused("no rows of split val"): here.score(create("high-pass-cnn"), "no")
    (copy/"spai/train.csv").write_text("image,label\na.png,1\n")
    with refused("no column class, split"): here.training()
    (copy/"spai/train.csv").write_text("")
    with refused("an empty file"): here.training()


# ---- identity

def test_key(here, copy, made):
    key = here.key()
    assert Published(str(made/"spai")).key() == key != Published(here.folder, augment=False).key()
    add_list(copy/"spai", "firefly")
    more = here.key()
    (copy/"spai/lists/coco/0.jpg").unlink()
    less = here.key()
    write_train(here, "b.png,0,train")
    assert len({key, more, less, here.key()}) == 4


def test_runs_are_found_again_elsewhere(copy, made, monkeypatch):
    found = []
    for place in (copy, made):
        monkeypatch.setenv("AIGID_DATA", str(place))
        found.append(identity(as_run(Training(QUICK), world("paper"), ROOMS)))
    assert found[0] == found[1]


def test_world_of_profiles():
    assert world("smoke") == embedded("smoke") and world("mini") == embedded("mini") and world("gpu") == embedded("gpu", size=256)
    assert world("gpu", size=320).size == 320 and all(world(p).size >= preset(p).image for p in ("smoke", "mini", "gpu"))
    with refused("pocket"): world("pocket")
