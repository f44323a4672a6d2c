"GenSign's data sets as a world of studies: layouts, what is missing, the order of training images, and interrupted evaluations."
import itertools
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from aigid_repro.data.records import validate
from aigid_repro.data.storage import InputError
from aigid_repro.detect import networks, training  # noqa: F401 - registers the detectors
from aigid_repro.detect.detector import create
from aigid_repro.detect.evaluation import bootstrap, check_predictions, per_generator, thresholds
from aigid_repro.detect.scoring import IMAGE_COLUMNS
from aigid_repro.detect.studies import Training, run_trainings
from aigid_repro.gensign import world as module
from aigid_repro.gensign.world import BENCHMARKS, Benchmark, Published, Shuffled, benchmark_records, format_audit, training_records, world

QUICK = dict(detector="high-pass-cnn", steps=2, batch=4, crop=16, sampling="natural")
ROOMS = "gensign.model", "gensign.world"
SHARE = .25 # held out of the small training sets
UFD, AIGC, AIGI = "UniversalFakeDetect/CNN_synth_testset", "aigcdetectbenchmark/Test", "AIGIBench/test"


def refused(*parts):
    "Expect one line which contains all parts."
    return pytest.raises(InputError, match="(?s)^" + "".join(f"(?=.*{re.escape(p)})" for p in parts) + r"[^\n]*$")


def pictures(folder, n=3, size=(24, 30), ending="png"):
    "Files of noise; no two are the same."
    folder.mkdir(parents=True)
    for i in range(n):
        rng = np.random.default_rng(zlib.crc32("/".join((*folder.parts[-5:], str(i))).encode()))
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder/f"{i:04}.{ending}", quality=95)


def both(folder, names=("0_real", "1_fake"), **how):
    for name in names: pictures(folder/name, **how)


def make(data):
    "Something of every layout."
    for k in ("car", "cat"): both(data/"ForenSynths/train"/k, n=10, size=(20, 33))
    both(data/"ForenSynths/val/car")
    for g in ("ProGAN/car", "ProGAN/cat", "crn", "whichfaceisreal"): both(data/UFD/g, size=(70, 40))
    for lender in ("imagenet", "laion"): pictures(data/"UniversalFakeDetect/diffusion_datasets"/lender/"0_real", 4, ending="jpg")
    for g in ("guided", "ldm_200_cfg", "dalle"): pictures(data/"UniversalFakeDetect/diffusion_datasets"/g/"1_fake", 2)
    for g in ("biggan", "whichfaceisreal", "stable_diffusion_v_1_5", "stylegan/bedroom"): both(data/AIGC/g)
    for g in ("BlendFace", "SocialRF", "R3GAN/cats"): both(data/AIGI/g, n=2)
    both(data/"AIGIBench/train/ProGAN/car")
    for g in ("stable_diffusion_v_1_4/imagenet_ai_0419_sdv4", "BigGAN/imagenet_ai_0419_biggan"):
        for split in ("train", "val"):
            pictures(data/"GenImage"/g/split/"nature", 8, ending="JPEG")
            pictures(data/"GenImage"/g/split/"ai", 8)
    both(data/"GenImage/imagenet_ai_0424_wukong/val", ("nature", "ai"))
    return data


@pytest.fixture(scope="module")
def made(tmp_path_factory): return make(tmp_path_factory.mktemp("data"))


@pytest.fixture
def copy(made, tmp_path): return shutil.copytree(made, tmp_path/"copy")


@pytest.fixture
def here(copy): return Published(str(copy), share=SHARE)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("AIGID_CACHE", str(tmp_path/"cache"))


def counts(records): return {g: tuple(int((t.label == y).sum()) for y in (0, 1)) for g, t in records.groupby("generator")}


# ---- layouts

@pytest.mark.parametrize("benchmark, found", [
    ("UniversalFakeDetect", dict(progan=(6, 6), crn=(3, 3), guided=(4, 2), ldm_200_cfg=(4, 2), dalle=(4, 2))),
    ("AIGCDetectBenchmark", {"BigGAN": (3, 3), "WFIR": (3, 3), "SDv1.5": (3, 3), "StyleGAN": (3, 3)}),
    ("AIGIBench", dict(BlendFace=(2, 2), SocialRF=(2, 2), R3GAN=(2, 2))),
    ("GenImage", {"SDv1.4": (8, 8), "BigGAN": (8, 8), "Wukong": (3, 3)})])
def test_layouts(made, benchmark, found):
    t, faults = benchmark_records(made, benchmark)
    validate(t)
    assert counts(t) == found and set(t.split) == {"test"} and set(t["set"]) == {benchmark}
    assert set(faults) == set(BENCHMARKS[benchmark].families) - set(found) and set(faults.values()) == {"no folder"}
    assert not t.image.str.contains("/train/").any() and {"real"} == set(t[t.label == 0].family)
    families = t[t.label == 1].groupby("generator").family.first().to_dict()
    assert families == {g: BENCHMARKS[benchmark].families.get(g, "unknown") for g in found}
    assert {Path(i).parent.name.lower() in ("1_fake", "ai") for i in t[t.label == 1].image} == {True}


def test_expected_names():
    assert {b: (v.count, len(v.families)) for b, v in BENCHMARKS.items() if not v.open} == {
        "UniversalFakeDetect": (19, 19), "AIGCDetectBenchmark": (17, 17), "GenImage": (8, 8)}


@pytest.mark.parametrize("name, bare", [("imagenet_ai_0508_adm", "adm"), ("imagenet_glide", "glide"), ("Stable Diffusion v1.4", "sdv14"),
                                        ("imagenet_ai_0424_sdv5", "sdv15"), ("DALL-E 2", "dalle2"), ("sd_xl", "sdxl"),
                                        ("imagenet", "imagenet"), ("ldm_200", "ldm200"), ("AIGIBenchmark", "aigibench")])
def test_names(name, bare): assert module.letters(name) == bare


def test_shared_real_images(copy):
    def lent(**how):
        t = benchmark_records(copy, "UniversalFakeDetect", **how)[0]
        real = t[(t.label == 0) & t.generator.isin(["guided", "dalle", "ldm_200_cfg"])]
        assert t.id.is_unique and real.source.nunique() == len(real)*2//3
        return {g: {Path(i).parents[1].name for i in r.image} for g, r in real.groupby("generator")}
    assert lent() == {"guided": {"imagenet"}, "dalle": {"laion"}, "ldm_200_cfg": {"laion"}}
    assert lent(swap=True) == {"guided": {"laion"}, "dalle": {"imagenet"}, "ldm_200_cfg": {"imagenet"}}
    place = copy/"UniversalFakeDetect/diffusion_datasets"
    pictures(place/"guided/0_real", 1)
    assert counts(benchmark_records(copy, "UniversalFakeDetect")[0])["guided"] == (1, 2)
    assert counts(benchmark_records(copy, "UniversalFakeDetect", swap=True)[0])["guided"] == (4, 2)
    shutil.rmtree(place/"laion")
    t, faults = benchmark_records(copy, "UniversalFakeDetect")
    assert set(t.generator) == {"progan", "crn", "guided"} and faults["dalle"] == "no real images (laion)" and faults["san"] == "no folder"


def test_one_class_only(copy):
    shutil.rmtree(copy/AIGC/"biggan/1_fake")
    for f in (copy/AIGC/"whichfaceisreal/0_real").iterdir(): f.rename(f.with_suffix(".txt"))
    faults = benchmark_records(copy, "AIGCDetectBenchmark")[1]
    assert faults["BigGAN"] == "no generated images" and faults["WFIR"] == "no real images" and faults["VQDM"] == "no folder"


def test_the_same_twice(copy):
    both(copy/"GenImage/WUKONG")
    with refused("imagenet_ai_0424_wukong", "WUKONG", "keep one"): benchmark_records(copy, "GenImage")
    both(copy/"aigc_detect_benchmark/biggan")
    with refused("aigc_detect_benchmark", "aigcdetectbenchmark", "keep one"): benchmark_records(copy, "AIGCDetectBenchmark")


def test_an_archive_in_a_folder_of_its_name(copy, tmp_path):
    shutil.move(copy/"AIGIBench", tmp_path/"AIGIBenchmark/AIGIBench")
    assert set(benchmark_records(tmp_path, "AIGIBench")[0].generator) == {"BlendFace", "SocialRF", "R3GAN"}


def test_folders_that_lead_back(copy):
    (copy/UFD/"again").symlink_to(copy/"UniversalFakeDetect")
    (copy/"GenImage/elsewhere").mkdir()
    (copy/"GenImage/elsewhere/BigGAN").symlink_to(copy/AIGC/"biggan")
    shutil.rmtree(copy/"GenImage/BigGAN")
    assert counts(benchmark_records(copy, "GenImage")[0])["BigGAN"] == (3, 3)
    with refused("keep one"): benchmark_records(copy, "UniversalFakeDetect") # ends, and says why


# ---- what trains

def test_training_sets(here, copy):
    progan, sd = (training_records(copy, t, 0) for t in ("progan", "sdv14"))
    for t in (progan, sd): validate(t)
    assert progan.groupby(["label", "source"]).size().tolist() == [10]*4 and set(progan.source) == {"car", "cat"}
    assert len(sd) == 16 and set(sd.generator) == {"SDv1.4"} and not sd.image.str.contains("/val/|biggan").any()
    assert here.families() == {"GAN": ["ProGAN"]} and Published(str(copy), "sdv14", share=.3).families() == {"diffusion": ["SDv1.4"]}


def test_held_out_files(here, copy):
    def held(): return set(here.training("validation").image.str.split("/").str[-3:].str.join("/"))
    train, before = here.training(), held()
    assert not before & set(train.image.str.split("/").str[-3:].str.join("/")) and len(before) + len(train) == 40 and 4 <= len(before) <= 16
    (copy/"ForenSynths").rename(copy/"forensynths")
    assert held() == before
    for f in sorted((copy/"forensynths/train/cat/1_fake").iterdir())[::2]: f.unlink() # others keep their places
    assert held() <= before
    assert Published(str(copy), share=SHARE, validation=4).training("validation").label.tolist() == [0, 0, 1, 1]
    with refused("validation images of progan are not of both classes", "`share`"): Published(str(copy), share=0).training("validation")
    assert here.sources() == train[train.label == 0].source.value_counts().sort_index().to_dict()


def test_choices(here):
    data, rows = here.data(Training(QUICK)), here.training()
    assert data().share == 4 and data(processes=2, rank=1).share == 2 and sorted(data().files) == sorted(rows.image)
    few, other = (here.data(Training(QUICK, s, images=3))() for s in (0, 1))
    assert len(few.files) == 6 and sum(few.labels) == 3 and few.files != other.files
    cats = here.data(Training(QUICK, reals=("cat",), sources=("cat",)))()
    assert len(cats.files) == (rows.source == "cat").sum() and all("/cat/" in f for f in cats.files)
    assert here.data(Training(QUICK, generators=("ProGAN",)))().files == data().files
    for choice in (dict(pool="manual"), dict(generators=("ProGAN", "BigGAN"))):
        with refused("one generator, ProGAN"): here.data(Training(QUICK, **choice))
    for choice, what in ((dict(reals=("dog",)), "real"), (dict(sources=("dog",)), "generated")):
        with refused(f"no {what} training images of 'dog'", "car, cat"): here.data(Training(QUICK, **choice))
    with refused("99 real images asked for"): here.data(Training(QUICK, images=99))


# ---- the stream

def stream(made, batch=4, **where):
    t = training_records(made, "sdv14", 0)
    return Shuffled(t.image.tolist(), t.label.tolist(), **{"seed": 0, "batch": batch} | where)


def content(images): return [(zlib.crc32(x.tobytes()), y) for x, y in images]


def first(n, made, **where): return content(itertools.islice(stream(made, **where), n))


class Loaded(IterableDataset):
    "What `training.StreamedImages` is to a loader."
    def __init__(self, stream): self.stream = stream
    def __iter__(self): return iter(self.stream)


def test_each_image_once_an_epoch(made):
    whole = first(48, made)
    epochs = [whole[i:i + 16] for i in (0, 16, 32)]
    assert all(len(set(e)) == 16 and set(e) == set(epochs[0]) and sum(y for _, y in e) == 8 for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and whole == first(48, made) != first(48, made, seed=1)


@pytest.mark.parametrize("start", [1, 16, 29, 16*10**8])
def test_starts_anywhere(made, start, monkeypatch):
    opened, true = [], module.open_image
    monkeypatch.setattr(module, "open_image", lambda f: opened.append(f) or true(f))
    assert first(7, made, start=start) == first(start % 16 + 7, made, start=start - start % 16)[start % 16:]
    assert len(opened) == 2*7 + start % 16


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_steps_whoever_loads_them(made, workers, processes):
    "A step's images, in order, for any number of processes and workers, from the beginning or resumed."
    whole, share = first(24, made), 4//processes
    for start in (0, 8):
        parts = []
        for rank in range(processes):
            images = Loaded(stream(made, rank=rank, processes=processes, start=start))
            batches = DataLoader(images, share, num_workers=workers, collate_fn=content)
            parts.append(list(itertools.islice(batches, (24 - start)//4)))
        assert sum((p[i] for i in range(len(parts[0])) for p in parts), []) == whole[start:]


def test_a_damaged_image(copy):
    whole, t = first(16, copy), training_records(copy, "sdv14", 0)
    bad = Path(t[t.label == 1].image.iloc[-1])
    at = whole.index(content([(np.asarray(Image.open(bad)), 1.)])[0])
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.warns(UserWarning, match=f"ai/{bad.name}.*stands in"): seen = first(17, copy)
    assert seen.pop(at) == seen[at] and seen[:15] == whole[:at] + whole[at + 1:]
    for f in t.image: Path(f).write_bytes(b"")
    with pytest.warns(UserWarning), refused("8 images in a row"): first(1, copy)


def test_bad_settings(made):
    for wrong in (dict(batch=1, processes=2), dict(start=-1)):
        with refused("that is too small"): stream(made, **wrong)


def test_two_steps(here):
    losses = []
    for workers in (0, 2):
        settings = training.train_settings(seed=3, **QUICK)
        training.train(settings, here.data(Training(QUICK, 3)), log=(log := []), workers=workers)
        losses.append([v for _, v in log])
    assert len(losses[0]) == 2 and np.isfinite(losses).all() and losses[0][0] == losses[1][0]


# ---- scores

def test_study(here, monkeypatch):
    "The paper's detector, small: trained, scored, and found again."
    options = dict(rgb="lite0", weights="", features=4, blocks=1, hidden=8, crop=32)
    train = QUICK | dict(detector="gensign", options=tuple(options.items()), crop=32)
    plan = [(dict(run=f"reals {r}", detector="GenSign"), Training(train, reals=r)) for r in ((), ("cat",))]
    with pytest.warns(UserWarning, match="5 generators, 19 in the paper"): p = run_trainings(plan, here, ROOMS, jobs=1)
    assert [*p][:9] == [*IMAGE_COLUMNS, "logit"] and p.logit.dtype == np.float32 and p.groupby("run").size().nunique() == 1
    test, validation = p[p.split == "test"], p[p.split == "validation"]
    table = per_generator(check_predictions(test), threshold=thresholds(validation))
    assert len(table) == 2*(5 + 4 + 3) and set(table["set"]) == {"UniversalFakeDetect", "AIGCDetectBenchmark", "AIGIBench"}
    assert table[table.generator == "guided"].n_real.tolist() == [4, 4] and (p.crop == p.id).all() and set(validation["set"]) == {"trained"}
    assert bootstrap(test[test["set"] == "UniversalFakeDetect"], n=20).n == 2*6 + 2*3 + 2*4 + 3*2 # sources, shared ones once
    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr(training, "predict", None)
    with pytest.warns(UserWarning): assert run_trainings(plan, here, ROOMS, jobs=1).equals(p)


def test_each_image_gets_its_own_logit(here):
    "Images of several sizes, smaller than the detector's crop as well, and the same real image for several generators."
    detector = create("gensign", rgb="lite0", weights="", features=4, blocks=1, hidden=8, crop=32).eval()
    p = here.score(detector, "no").set_index("id").logit
    for r in here.test().itertuples():
        assert p[r.id] == pytest.approx(training.predict(detector, [Image.open(r.image).convert("RGB")])[0], abs=1e-4), r.id


@pytest.fixture
def predicted(monkeypatch):
    "Numbers of images that were scored, one for each part."
    calls, true = [], training.predict
    def counted(detector, images, **how):
        calls.append(len(images))
        if len(calls) == 4: raise KeyboardInterrupt
        return true(detector, images, **how)
    monkeypatch.setattr(training, "predict", counted)
    return calls


def test_interrupted_evaluation_continues(here, copy, predicted):
    detector = create("high-pass-cnn")
    with pytest.raises(KeyboardInterrupt): here.score(detector, "no")
    whole = here.score(detector, "no")
    n = len(predicted) - 4
    assert n + 3 == 1 + 5 + 4 + 3 and sum(predicted[:3] + predicted[4:]) == whole.source[whole.split == "test"].nunique() + len(
        whole[whole.split == "validation"]) # shared images once
    assert here.score(detector, "no").equals(whole) and len(predicted) == 4 + n
    stored = sorted(module.cache_dir("gensign", "scores").iterdir())
    stored[0].write_bytes(b"half")
    assert here.score(detector, "no").equals(whole) and len(predicted) == 5 + n
    Image.new("RGB", (50, 50)).save(place := copy/AIGC/"biggan/1_fake/0001.png")
    again = here.score(detector, "no").logit
    changed = whole.id.to_numpy()[((again - whole.logit).abs() > 1e-5).to_numpy()] # others may be in another batch
    assert changed.tolist() == [place.relative_to(copy).as_posix()] and len(predicted) == 6 + n
    with torch.no_grad(): next(detector.parameters()).mul_(2)
    here.score(detector, "no")
    assert len(predicted) == 6 + n + len(stored)


def test_swapped_real_images(here, copy):
    detector = create("high-pass-cnn")
    plain, swapped = (Published(str(copy), share=SHARE, swap_ufd_reals=s) for s in (False, True))
    a, b = (p.score(detector, "no").set_index("id").logit for p in (plain, swapped))
    assert len(a) == len(b) and set(a.index) != set(b.index) and (a[a.index.isin(b.index)] == b[a.index[a.index.isin(b.index)]]).all()
    assert plain.key() != swapped.key()


def test_a_damaged_test_image(here, copy):
    (copy/UFD/"crn/1_fake/0001.png").write_bytes(b"nothing")
    with refused("crn/1_fake/0001.png", "cannot be read as an image"): here.score(create("high-pass-cnn"), "no")


def test_images(here, monkeypatch):
    about, pixels = here.images("test", 1)
    assert [*about] == IMAGE_COLUMNS and len(about) == len(pixels) == 2*(5 + 4 + 3) and about.groupby("generator").label.sum().ge(1).all()
    assert pixels[0].ndim == 3 and [x.shape for x in pixels[2:4]] == [pixels[i].shape for i in (2, 3)]
    assert len(here.images("test", 99)[0]) == len(here.test())
    assert len({tuple(here.images("test", 1, seed)[0].id) for seed in range(5)}) > 1
    assert here.images("train", 4)[0].label.value_counts().to_dict() == {0: 4, 1: 4}
    monkeypatch.setattr(module, "open_image", None) # decoded when asked for
    assert len(here.images("test", 2)[1]) == len(here.images("test", 2)[0])
    with refused("split 'val'", "train and test"): here.images("val", 2)


# ---- what is missing or wrong

def test_missing_parts_are_named(here, copy):
    shutil.rmtree(copy/"aigcdetectbenchmark")
    shutil.rmtree(copy/"UniversalFakeDetect/diffusion_datasets/imagenet")
    with pytest.warns(UserWarning) as said: here.prepare(1)
    message = str(said[0].message)
    assert "\n" not in message and message.startswith(f"{copy}: UniversalFakeDetect: 4 generators, 19 in the paper; no folder: cyclegan, ")
    assert "no real images (imagenet): guided. AIGCDetectBenchmark: 0 generators, 17 in the paper; no folder: ProGAN, " in message
    assert "AIGIBench: 3 generators, 17 in the paper; no folder: InSwap, FaceSwap, SimSwap (see" in message and len(here.missing()) == 3
    assert set(here.test()["set"]) == {"UniversalFakeDetect", "AIGIBench"}


def test_a_complete_copy_says_nothing(here, monkeypatch, recwarn):
    monkeypatch.setattr(module, "BENCHMARKS", {b: Benchmark(t.generator.nunique(), dict.fromkeys(t.generator, "any"), BENCHMARKS[b].open)
                                               for b, (t, _) in here.evaluation().items()})
    here.prepare(1)
    assert not recwarn.list and not here.missing()


def test_no_training_images(here, copy):
    shutil.rmtree(copy/"ForenSynths/train")
    for f in (here.key, here.sources, lambda: here.prepare(1), lambda: here.data(Training(QUICK))):
        with refused(f"{copy}: no training images of progan", "forensynths/train/<class>/{0_real,1_fake}"): f()
    shutil.rmtree(copy/"GenImage/stable_diffusion_v_1_4")
    with refused("no training images of sdv14", "genimage/<SDv1.4>/train/{nature,ai}"): world("paper", folder=str(copy), train="sdv14")


def test_no_benchmark(here, copy):
    for folder in ("UniversalFakeDetect", "aigcdetectbenchmark", "AIGIBench"): shutil.rmtree(copy/folder)
    for f in (here.key, here.test, lambda: here.score(create("high-pass-cnn"), "no"), lambda: world("paper", folder=str(copy))):
        with refused(f"{copy}: no benchmark", "universalfakedetect/<generator> or aigcdetectbenchmark/<generator> or aigibench/<gen"): f()
    assert set(Published(str(copy), share=SHARE, benchmarks=("GenImage",)).test().generator) == {"SDv1.4", "BigGAN", "Wukong"}


def test_unknown_names():
    with refused("unknown data 'coco'", "progan, sdv14"): Published(train="coco")
    with refused("unknown data 'Synthbuster'", "AIGIBench"): Published(benchmarks=("GenImage", "Synthbuster"))


def test_worlds(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("AIGID_DATA", str(tmp_path/"nothing"))
    with refused(f"{tmp_path/'nothing'}: no training images"): world("paper")
    monkeypatch.delenv("AIGID_DATA")
    with refused("set AIGID_DATA"): world("paper")
    monkeypatch.setenv("AIGID_DATA", str(copy))
    assert world("paper", share=SHARE).key() == Published(str(copy), share=SHARE).key() and world("gpu").size == 256
    assert world("smoke").kind == world("mini").kind == "embedded"


def test_key_follows_the_files(here, copy):
    key = here.key()
    for folder in (UFD + "/crn/1_fake", "ForenSynths/train/cat/0_real", "UniversalFakeDetect/diffusion_datasets/laion/0_real"):
        shutil.copy(copy/AIGC/"biggan/0_real/0000.png", copy/folder/"new.png")
        assert here.key() != key
        (copy/folder/"new.png").unlink()
        assert here.key() == key
    shutil.rmtree(copy/"GenImage/BigGAN") # is not scored
    assert here.key() == key != Published(str(copy), share=.1).key()


def test_formats(copy):
    t = training_records(copy, "sdv14", 0)
    found = format_audit(t)
    assert found.drop(columns="kilobytes").values.tolist() == [[0, "JPEG", 1, 30, 24, 8], [1, "PNG", 1, 30, 24, 8]]
    Path(t[t.label == 0].image.iloc[0]).write_bytes(b"")
    assert format_audit(t).set_index(["label", "format"]).share.to_dict() == {(0, "JPEG"): 7/8, (0, "unreadable"): 1/8, (1, "PNG"): 1}
    assert format_audit(t, 5).groupby("label").images.sum().tolist() == [5, 5]


def test_import_is_quick():
    code = "import sys, aigid_repro.gensign.world; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
