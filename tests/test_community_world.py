"Community Forensics as published, as a world of studies: choices of rows, trainings, scores, and what is said of missing files."
import io
import itertools
import re
import subprocess
import sys
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from aigid_repro.data.storage import InputError
from aigid_repro.detect import community_forensics as public
from aigid_repro.detect import parquet_stream as stream
from aigid_repro.detect import training
from aigid_repro.detect.community_forensics import Repository, Split, public_table
from aigid_repro.detect.community_world import Public, draw_real, model_type, world
from aigid_repro.detect.evaluation import bootstrap, per_generator
from aigid_repro.detect.scoring import IMAGE_COLUMNS
from aigid_repro.detect.studies import Training, as_run, embedded, identity, run_trainings
from aigid_repro.detect.summary import family_table, set_table, validation_ap

ROOMS = "commfor.model", "detect.community_world"
QUICK = dict(detector="high-pass-cnn", steps=2, batch=4, crop=32)
EVALUATED = {"GALIP": "GAN", "author/SDXL": "LatDiff", "Kvikontent/midjourney-v6": "LatDiff", "Stable Cascade": "other",
             "Firefly 3": "Commercial"}


def refused(*parts):
    "Expect one line which contains all parts."
    return pytest.raises(InputError, match="(?s)^" + "".join(f"(?=.*{re.escape(p)})" for p in parts) + r"[^\n]*$")


def png(*seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, models, labels=(1,), images=20, sources=("LAION", "COCO"), subset="Systematic", split="train", drop=()):
    "A shard of the documented columns, in groups of ten rows; real rows carry the paired model's name."
    rows = [(m, y, i) for m in models for y in labels for i in range(images)]
    n = len(rows)
    columns = {
        "image_name": [f"{i}.png" for i in range(n)], "format": ["PNG"]*n, "resolution": pa.array([[40, 40]]*n, pa.list_(pa.int64())),
        "mode": ["RGB"]*n, "image_data": pa.array([png(zlib.crc32(path.name.encode()), i) for i in range(n)], pa.binary()),
        "model_name": [m for m, _, _ in rows], "nsfw_flag": [False]*n, "prompt": pa.array([None]*n, pa.string()),
        "real_source": [sources[i % len(sources)] for *_, i in rows],
        "subset": [subset if isinstance(subset, str) else subset[m] for m, _, _ in rows], "split": [split]*n,
        "label": pa.array([y for _, y, _ in rows], pa.int64()),
        "architecture": [EVALUATED.get(m, "") if y else "real" for m, y, _ in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: v for k, v in columns.items() if k not in drop}), path, row_group_size=10)
    return path


def make(folder):
    "A small copy of the three repositories and of local real images."
    full, small = folder/"CommunityForensics"/"data", folder/"CommunityForensics-Small"/"data"
    bare = dict(drop=("architecture",))
    write(full/"systematic"/"part-00000-of-00002.parquet", ["a/one", "a/two"], **bare)
    write(full/"systematic"/"part-00001-of-00002.parquet", ["b/three", "author/sdxl"], **bare) # sdxl is evaluated
    write(full/"manual"/"part-00000-of-00001.parquet", ["BigGAN", "DiT", "ADM"], subset="Manual", sources=("ImageNet",), **bare)
    write(full/"publicEval"/"p-00000-of-00001.parquet", list(EVALUATED), (1, 0), 4, ("COCO", "FFHQ"), "Commercial", "test", **bare)
    for i, models in enumerate((list(EVALUATED)[:3], list(EVALUATED)[3:])):
        write(folder/"CommunityForensics-Eval"/"data"/f"CompEval-0000{i}-of-00002.parquet", models, (1, 0), 6, ("RAISE",), split="test")
    write(small/"train-00000-of-00001.parquet", ["a/one", "BigGAN", "author/SDXL"], (1, 0), sources=("VISION", "COCO"),
          subset={"a/one": "Systematic", "BigGAN": "Manual", "author/SDXL": "Systematic"}, **bare)
    for source, n in (("LAION", 120), ("coco", 30), ("FFHQ", 6)):
        (folder/"real"/source/"real").mkdir(parents=True)
        for i in range(n): (folder/"real"/source/"real"/f"{i:03}.png").write_bytes(png(zlib.crc32(source.encode()), i))
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("AIGID_CACHE", str(tmp_path/"cache"))


@pytest.fixture
def here(copy): return Public(folder=str(copy), share=.2, validation=20, limit=9)


def epoch(world, **choice):
    "Stream and images of the first epoch of a training."
    s = world.data(Training(QUICK, **choice))(rank=0, processes=1, start=0)
    return s, list(itertools.islice(s, s.samples))


def column(path, name): return pq.read_table(path).column(name).to_pylist()


def origin(copy):
    "Encoded image -> what is known of it, over all training files."
    known = {}
    for path in (copy/"CommunityForensics").rglob("part-*.parquet"):
        t = pq.read_table(path).to_pandas()
        known |= {r.image_data: (r.model_name, r.real_source, path.name, i) for i, r in enumerate(t.itertuples())}
    return known | {f.read_bytes(): ("real", f.parent.parent.name, f.name, 0) for f in (copy/"real").rglob("*.png")}


# ---- what there is

def test_families(here):
    assert here.families() == {"GAN": ["BigGAN"], "LatDiff": ["a/one", "a/two", "b/three"], "LatDiff, manual": ["DiT"], "PixDiff": ["ADM"]}
    assert list(here.sources()) == ["FFHQ", "LAION", "coco"] and 80 < here.sources()["LAION"] < 120
    counts = here.model_counts()
    assert set(counts) == set(sum(here.families().values(), [])) and all(8 < n < 20 for n in counts.values())
    assert here.large in here.families()


def test_types():
    assert model_type("x", "latdiff") == "LatDiff" and model_type("GALIP", "real") == "GAN"
    assert [model_type(m) for m in EVALUATED] == ["GAN", "LatDiff", "LatDiff", "Other", "Commercial"]


def test_key(here, copy, tmp_path):
    key, changed = here.key(), [Public(**{**vars(here), **c}) for c in (dict(share=.1), dict(seed=1), dict(validation=8), dict(limit=8))]
    assert len({key, *(w.key() for w in changed)}) == 5
    moved = make(tmp_path/"moved")
    there = Public(**{**vars(here), "folder": str(moved)})
    assert there.key() == key and there.key() == key
    write(moved/"CommunityForensics"/"data"/"manual"/"part-00000-of-00001.parquet", ["BigGAN"])
    (moved/"CommunityForensics"/"data"/"manual"/"x").touch() # files that are fetched come anew, which a folder's time tells
    second = there.key()
    assert second != key and there.families().keys() == {"GAN", "LatDiff"}
    (moved/"real"/"FFHQ"/"real"/"000.png").unlink()
    assert there.key() not in (key, second)


def test_runs_are_found_again_elsewhere(copy, tmp_path, monkeypatch):
    "With AIGID_DATA as its folder, a run is known by its data alone."
    moved, found = make(tmp_path/"moved"), []
    w = Public(share=.2, limit=9)
    for place in (copy, moved):
        monkeypatch.setenv("AIGID_DATA", str(place))
        found.append((identity(as_run(Training(QUICK), w, ROOMS)), {f for f in w.rows().files}))
    assert found[0][0] == found[1][0] and not found[0][1] & found[1][1]


# ---- what a training draws

def test_training_rows(here, copy):
    s, images = epoch(here)
    known, counts = origin(copy), here.model_counts()
    made = [known[x] for x, y in images if y]
    assert len(made) == sum(counts.values()) == len(images)/2 and len(set(x for x, _ in images)) == len(images)
    assert pd.Series([m for m, *_ in made]).value_counts().to_dict() == counts
    assert all(known[x][0] == "real" for x, y in images if not y) and s.batch == 4
    assert [x for x, _ in images] == [x for x, _ in epoch(here)[1]]


def test_pools_and_sources(here, copy):
    known = origin(copy)
    def made(**choice): return [known[x] for x, y in epoch(here, **choice)[1] if y]
    assert {m for m, *_ in made(pool="manual")} == {"BigGAN", "DiT", "ADM"}
    assert {m for m, *_ in made(pool="systematic")} == {"a/one", "a/two", "b/three"}
    assert {s for _, s, *_ in made(pool="systematic", sources=("laion",))} == {"LAION"}
    assert {s for _, s, *_ in made(sources=("ImageNet", "COCO"))} == {"ImageNet", "COCO"}
    assert {known[x][1] for x, y in epoch(here, reals=("COCO", "ffhq"))[1] if not y} == {"coco", "FFHQ"}
    one, two = (epoch(here, images=7, seed=s)[1] for s in (0, 1))
    assert len(one) == 14 and set(one) != set(two) and sum(y for _, y in one) == 7
    with refused("unknown pool 'all'"): here.data(Training(QUICK, pool="all"))
    with refused("'SDXL'", "evaluation models never train"): here.data(Training(QUICK, generators=("SDXL",)))
    with refused("no real images of source 'ImageNet'", "known: FFHQ, LAION, coco"): here.data(Training(QUICK, reals=("ImageNet",)))
    with refused("no generated images of source 'FFHQ'"): here.data(Training(QUICK, sources=("FFHQ",)))


def test_few_images_repeat(here):
    n = here.model_counts()["ADM"]
    s, images = epoch(here, generators=("ADM",), images=2*n + 3)
    times = pd.Series([x for x, y in images if y]).value_counts()
    assert len(times) == n and times.value_counts().to_dict() == {2: n - 3, 3: 3} and len(images) == 4*n + 6
    again = list(itertools.islice(here.data(Training(QUICK, generators=("ADM",), images=2*n + 3))(start=5), s.samples - 5))
    assert again == images[5:] # resumed


def test_official_choice_of_real_images():
    rows = pd.DataFrame({"source": ["A"]*5 + ["B"]*40 + ["C"]*90, "row": range(135)})
    got = draw_real(rows, 65, 0).source.value_counts()
    assert got.to_dict() == {"A": 5, "B": 30, "C": 30} and draw_real(rows, 270, 0).row.value_counts().eq(2).all()


def test_reads_only_groups_with_chosen_rows(here, copy, monkeypatch):
    read, opened, true, schema = [], [], stream.read_group, stream.check_schema
    monkeypatch.setattr(stream, "read_group", lambda g, files: read.append(g) or true(g, files))
    here.prepare(1)
    read.clear()
    monkeypatch.setattr(stream, "check_schema", lambda p: opened.append(p.name) or schema(p))
    s, images = epoch(here, generators=("a/two",), reals=("FFHQ",)) # rows 20 to 39 of one of the shards
    assert opened == ["part-00000-of-00002.parquet"] and not {g.number for g in s.groups if g.path} - {2, 3}
    assert len(read) == len(s.groups) <= 3 and len(images) == 2*here.model_counts()["a/two"]
    taken = {r for g in s.groups if g.path for r in (g.start + g.rows).tolist()}
    assert not taken & set(np.flatnonzero(stream.held_out("part-00000-of-00002.parquet", 40, .2)))


def test_a_lonely_damaged_row(tmp_path):
    "Its group offers no other image, so the next group does."
    path = write(tmp_path/"a.parquet", ["a", "b"], (1, 0), 10)
    t = pq.read_table(path)
    image = t.column("image_data").to_pylist()
    image[3] = image[3][:50]
    pq.write_table(t.set_column(t.schema.get_field_index("image_data"), "image_data", pa.array(image)), path, row_group_size=10)
    s = stream.ParquetStream([path], rows={path: [3, 17, 25]}, share=0, epochs=1)
    with pytest.warns(UserWarning, match="row 3: PNG cut off"): got = [x for x, _ in s]
    assert sorted(got) == sorted([image[17], image[17], image[25]])


def test_processes(here):
    data = here.data(Training(QUICK, images=10))
    parts = [list(itertools.islice(s := data(rank=r, processes=2, start=0), s.samples//2)) for r in (0, 1)]
    assert len({x for p in parts for x, _ in p}) == 20 and data(rank=0, processes=2, start=0).batch == 2


def test_small(copy):
    w = Public(folder=str(copy), train="CommunityForensics-Small", share=.2, limit=9)
    assert w.families() == {"GAN": ["BigGAN"], "LatDiff": ["a/one"]} and set(w.sources()) == {"COCO", "VISION"}
    s, images = epoch(w, pool="manual")
    assert sum(y for _, y in images) == w.model_counts()["BigGAN"] == len(images)/2 and not s.files
    file = copy/"CommunityForensics-Small"/"data"/"train-00000-of-00001.parquet"
    names = dict(zip(column(file, "image_data"), column(file, "model_name")))
    assert {names[x] for x, y in images if y} == {"BigGAN"} and "author/SDXL" not in {names[x] for x, _ in images}


# ---- trainings and scores

def test_studies(here, copy, monkeypatch):
    "Every choice that the studies make, trained and scored, and found again."
    choices = {"both": {}, "two models": dict(generators=("a/one", "ADM"), images=12), "reals": dict(reals=("LAION",), images=8),
               "sources": dict(pool="systematic", sources=("COCO",), images=5)}
    plan = [(dict(run=name, detector="CNN", choice=name), Training(QUICK, i, **c)) for i, (name, c) in enumerate(choices.items())]
    p = run_trainings(plan, here, ROOMS, jobs=1)
    assert {*IMAGE_COLUMNS, "logit", "run", "choice", "seed"} <= set(p) and len(p) == 4*(20 + 60)
    test, validation = p[p.split == "test"], p[p.split == "validation"]
    assert set(test.generator) == set(EVALUATED) and test.id.nunique() == 60 and (p.crop == p.id).all()
    kinds = test[test.label == 1].groupby("generator")["set"].first().to_dict()
    assert kinds == dict(zip(EVALUATED, ["manual", "systematic", "systematic", "manual", "unseen"]))
    assert set(test.family) == {"GAN", "LatDiff", "Other", "Commercial", "real"} and set(test.family[test.label == 0]) == {"real"}
    assert not set(here.families()["LatDiff"]) & set(test.generator) and set(validation.generator) <= set(here.model_counts())
    assert validation.groupby(["run", "label"]).size().eq(10).all()

    def untouched(*_, **__): raise AssertionError("trained, scored or read again")
    for place, name in ((training, "train"), (training, "predict"), (stream, "read_group"), (public, "evaluation_records")):
        monkeypatch.setattr(place, name, untouched)
    assert run_trainings(plan, here, ROOMS, jobs=1).equals(p)

    families = family_table(p, ["choice"], validation=True)
    assert len(families) == 4*4 and families[["ap", "accuracy", "validation_accuracy"]].notna().all(axis=None)
    for run, t in families.groupby("run"):
        published = public_table(test[test.run == run].drop(columns=["set", "run"]))
        types = published[published.level == "type"].set_index("name")
        assert t.set_index("family").ap.to_dict() == pytest.approx(types.ap.to_dict())
        assert t.set_index("family").accuracy.to_dict() == pytest.approx(types.accuracy.to_dict())
    assert set(set_table(families)["set"]) == {"systematic", "manual", "unseen"} and 0 < validation_ap(p)["CNN"] <= 1
    assert per_generator(test, metrics=["ap"]).groupby("run").size().eq(5).all() # with sets: real images are in the set of their pair
    assert (per_generator(validation, metrics=["ap"]).n_real == per_generator(validation, metrics=["ap"]).n_generated).all()
    one = test[test.run == "both"]
    assert bootstrap(one, n=50).n == 60 # one photograph, one draw


def test_evaluation_without_architecture(copy):
    from aigid_repro.detect.detector import create
    w = Public(folder=str(copy), evaluation="PublicEval", share=.2, validation=8, limit=9)
    p = w.score(create("high-pass-cnn"), "no")
    test = p[(p.split == "test") & (p.label == 1)]
    assert test.groupby("generator").family.first().to_dict() == {m: "Other" if t == "other" else t for m, t in EVALUATED.items()}
    assert list(p) == [*IMAGE_COLUMNS, "logit"] and p.logit.dtype == np.float32 and len(test) == 20


def test_validation_is_held_out(here, copy):
    here.prepare(1)
    seen = {x for x, _ in epoch(here)[1]}
    held = column(here._held_out(), "image_data")
    assert len(set(held)) == 20 and not set(held) & seen and set(held) <= set(origin(copy))
    with refused("no generated images are held out", "share"): Public(**{**vars(here), "share": 1e-9}).prepare(1)


def test_images(here, copy):
    "Images of a study are those that their ids name."
    about, pixels = here.images("test", 3, seed=1)
    assert list(about) == IMAGE_COLUMNS and len(about) == len(pixels) == 4*2*3 and set(about.split) == {"test"}
    assert about[about.label == 1].groupby("family").generator.unique().map(list).to_dict() == {
        "GAN": ["GALIP"], "LatDiff": ["Kvikontent/midjourney-v6"], "Other": ["Stable Cascade"], "Commercial": ["Firefly 3"]}
    assert (per_generator(about.assign(run="r", logit=0.), metrics=["ap"])[["n_real", "n_generated"]] == 3).all(axis=None)
    for i in (0, 5, 20):
        _, name, row = about.id[i].split("/")
        file = copy/"CommunityForensics-Eval"/"data"/name
        assert np.array_equal(Image.open(io.BytesIO(column(file, "image_data")[int(row)])), pixels[i])
        assert column(file, "label")[int(row)] == about.label[i] and column(file, "model_name")[int(row)] == about.generator[i]
    about, pixels = here.images("train", 1000)
    n = sum(here.model_counts().values())
    assert about.label.value_counts().to_dict() == {0: n, 1: n} and not about.id.duplicated().any() and len(pixels) == 2*n
    assert set(about.generator[about.label == 0]) == {"real"} and set(about.set) == {"real", "systematic", "manual"}
    with refused("split 'all'"): here.images("all", 3)


# ---- what is missing

def test_missing(copy, tmp_path, monkeypatch):
    monkeypatch.delenv("AIGID_DATA", raising=False)
    with refused("AIGID_DATA"): world("paper")
    monkeypatch.setenv("AIGID_DATA", str(tmp_path/"nothing"))
    with refused("nothing", "data/systematic/*.parquet (Systematic)", "(Manual)", "(CompEval)", "no real training images",
                 "nothing/real/<data set>/real", "community_forensics.download"): world("paper")
    monkeypatch.setenv("AIGID_DATA", str(copy))
    w = world("paper")
    assert w == Public()
    for ask in (w.families, w.sources, lambda: w.prepare(1), lambda: w.data(Training(QUICK))):
        with refused("Systematic incomplete", "Manual incomplete", "CompEval incomplete"): ask()
    with refused("no real training images", "elsewhere/<data set>/real"): world("paper", real="elsewhere")
    with refused("unknown data 'CIFAR'", "CommunityForensics-Small"): world("paper", train="CIFAR")
    (moved := make(tmp_path/"moved")/"CommunityForensics"/"data"/"systematic"/"part-00001-of-00002.parquet").unlink()
    with refused("no part-00001-of-00002.parquet"): Public(folder=str(moved.parents[3])).prepare(1)


def test_complete_copy(copy, monkeypatch):
    "Where the published counts fit, nothing is refused and no limit is needed."
    splits = {"Systematic": ("systematic/*", 80, 4), "Manual": ("manual/*", 60, 3), "CompEval": ("CompEval-*", 60, 5)}
    for name in ("CommunityForensics", "CommunityForensics-Eval"):
        of = {s: Split(f"data/{p}.parquet", n, m) for s, (p, n, m) in splits.items() if (s == "CompEval") == name.endswith("Eval")}
        monkeypatch.setitem(public.REPOSITORIES, name, Repository(f"OwensLab/{name}", of))
    w = Public(folder=str(copy), share=.2, validation=8)
    w.prepare(1)
    assert len(w.model_counts()) == 6


def test_bad_evaluation(copy, tmp_path, monkeypatch):
    moved = make(tmp_path/"moved")
    w = Public(folder=str(moved), share=.2, limit=9)
    write(moved/"CommunityForensics-Eval"/"data"/"CompEval-00000-of-00002.parquet", ["Photoshop"], (1, 0), 4)
    with refused("CompEval: the type of 'Photoshop'"): w.families()


def test_world_of_profiles():
    assert world("smoke") == embedded("smoke") and world("mini") == embedded("mini") and world("gpu").kind == "embedded"
    with refused("pocket"): world("pocket")
    code = "import sys, aigid_repro.detect.community_world as w; w.world('smoke'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
