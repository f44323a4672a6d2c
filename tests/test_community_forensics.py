"Public data of Community Forensics: schema, local copies, counts, choice of real images, stream, scoring, table."
import io
import itertools
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from aigid_repro.data.records import validate
from aigid_repro.data.storage import InputError
from aigid_repro.detect import community_forensics as public
from aigid_repro.detect import networks, training  # noqa: F401 - registers the detectors
from aigid_repro.detect.community_forensics import (
    Repository,
    Split,
    check,
    check_schema,
    download,
    evaluation_models,
    evaluation_records,
    image_fault,
    local_files,
    model_counts,
    public_table,
    sample_real,
    score_public,
    select_real,
    shards,
)
from aigid_repro.detect.detector import create
from aigid_repro.detect.evaluation import mean_over_generators, per_generator
from aigid_repro.detect.parquet_stream import ParquetStream, held_out

MODELS = {"author/latent": "LatDiff", "author/latent2": "LatDiff", "StyleGAN2": "GAN", "Firefly": "Commercial"}


def refused(*parts):
    "Expect one line which contains all parts."
    return pytest.raises(InputError, match="(?s)^" + "".join(f"(?=.*{p})" for p in parts) + r"[^\n]*$")


def png(seed, size=48):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, first=0, images=2, group=5, drop=(), pack=None, **changes):
    "A shard of the documented schema: `images` generated and as many real rows for each model."
    rows = [(m, y, i) for m in MODELS for y in (1, 0) for i in range(images)]
    n = len(rows)
    columns = {
        "image_name": pa.array([f"{i}.png" for i in range(n)]), "format": pa.array(["PNG"]*n),
        "resolution": pa.array([[48, 48]]*n, pa.list_(pa.int64())), "mode": pa.array(["RGB"]*n),
        "image_data": pa.array([png(first + i) for i in range(n)], pa.binary()), "model_name": pa.array([m for m, _, _ in rows]),
        "nsfw_flag": pa.array([False]*n), "prompt": pa.array([None]*n, pa.string()), "real_source": pa.array(["COCO"]*n),
        "subset": pa.array(["Systematic"]*n), "split": pa.array(["test"]*n), "label": pa.array([y for _, y, _ in rows], pa.int64()),
        "architecture": pa.array([MODELS[m] if y else "real" for m, y, _ in rows])}
    columns |= {k: v if isinstance(v, pa.Array) else pa.array(v) for k, v in changes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: v for k, v in columns.items() if k not in drop}), path, row_group_size=group, **pack or {})
    return path


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "Local copy: three shards of 16 rows in groups of 5, 5, 5, 1."
    folder = tmp_path_factory.mktemp("copy")
    for i in range(3): write(folder/"data"/f"CompEval-0000{i}-of-00003.parquet", first=100*i)
    return folder


@pytest.fixture(scope="module")
def files(copy): return shards(copy, "CompEval")


# ---- schema and local copies

def test_schema_accepted(files, tmp_path):
    assert check_schema(files[0]).num_rows == 16
    check_schema(write(tmp_path/"a.parquet", nsfw_flag=["no"]*16, drop=("architecture", "prompt", "image_name")))
    check_schema(write(tmp_path/"a.parquet", architecture=pa.nulls(16), model_name=pa.array(["x"]*16).dictionary_encode()))
    large = dict(image_data=pa.array([b"x"]*16, pa.large_binary()), prompt=pa.array(["x"]*16, pa.large_string()))
    check_schema(write(tmp_path/"a.parquet", **large))


@pytest.mark.parametrize("column", public.NEEDED)
def test_schema_missing(tmp_path, column):
    with refused("a.parquet", f"no column '{column}'", "fetch the file again"): check_schema(write(tmp_path/"a.parquet", drop=(column,)))


@pytest.mark.parametrize("column, values, parts", [
    ("label", ["1"]*16, ("'label' is string, not int64",)), ("label", [1.]*16, ("'label' is double",)),
    ("image_data", ["x"]*16, ("'image_data' is string, not binary",)), ("model_name", [1]*16, ("'model_name' is int64",)),
    ("model_name", pa.nulls(16), ("'model_name' is null",)), ("resolution", ["48x48"]*16, ("'resolution' is string, not list",)),
    ("nsfw_flag", [1]*16, ("'nsfw_flag' is int64, not bool or string",)), ("architecture", [1]*16, ("'architecture' is int64",))])
def test_schema_mistyped(tmp_path, column, values, parts):
    with refused("a.parquet", *parts, "write it as"): check_schema(write(tmp_path/"a.parquet", **{column: values}))


def test_truncated(files, tmp_path):
    data = files[0].read_bytes()
    path = tmp_path/"cut.parquet"
    for size in (0, 3, 100, len(data)//2, len(data) - 1):
        path.write_bytes(data[:size])
        for f in (check_schema, lambda p: model_counts([p]), lambda p: list(evaluation_records([p])), lambda p: ParquetStream([p])):
            with refused("cut.parquet", "damaged or not a parquet", "fetch it again"): f(path)
    with refused("none.parquet", "correct the path"): check_schema(tmp_path/"none.parquet")


def test_damaged_page(files, tmp_path):
    "Zeros in the place of the images: counting does not read them, everything else says so."
    data, footer = bytearray(files[0].read_bytes()), check_schema(files[0])
    for g in range(footer.num_row_groups):
        c = next(c for i in range(13) if (c := footer.row_group(g).column(i)).path_in_schema == "image_data")
        at = c.dictionary_page_offset or c.data_page_offset
        data[at:at + c.total_compressed_size] = bytes(c.total_compressed_size)
    path = tmp_path/"hollow.parquet"
    path.write_bytes(data)
    assert model_counts([path]).equals(model_counts(files[:1]))
    with refused("hollow.parquet", "damaged"): list(evaluation_records([path]))
    with refused("hollow.parquet", "damaged"): next(iter(ParquetStream([path])))


def test_shards(copy, tmp_path):
    assert [p.name for p in shards(copy, "CompEval")] == [f"CompEval-0000{i}-of-00003.parquet" for i in range(3)]
    with refused("unknown split 'Comp'", "Systematic", "CompEval"): shards(copy, "Comp")
    with refused("no data/systematic/", "download"): shards(copy, "Systematic")
    with refused("no such folder"): shards(tmp_path/"none", "train")


def test_check(copy, tmp_path):
    def toy(rows, rounded=0): return Repository("x/toy", {"CompEval": Split("data/CompEval-*.parquet", rows, 4, rounded)})
    t = check(copy, toy(48))
    assert (t.state[0], t.shards[0], t.rows[0], t.detail[0]) == ("complete", 3, 48, "")
    assert check(copy, toy(50, 2)).state[0] == check(copy, toy(46, 2)).state[0] == "complete"
    assert check(copy, toy(51, 2)).state[0] == "incomplete"
    assert "more rows" in check(copy, toy(40)).detail[0]
    part = write(tmp_path/"data"/"CompEval-00001-of-00003.parquet")
    t = check(tmp_path, toy(48))
    assert t.state[0] == "incomplete" and "no CompEval-00000-of-00003.parquet, CompEval-00002" in t.detail[0]
    part.write_bytes(part.read_bytes()[:50])
    assert "damaged" in check(tmp_path, toy(0)).detail[0] and check(tmp_path, toy(0)).state[0] == "incomplete"
    assert list(check(tmp_path, "CommunityForensics").state) == ["missing"]*4
    with refused("unknown repository", "CommunityForensics-Small"): check(tmp_path, "Small")
    with refused("no such folder"): check(tmp_path/"none", toy(1))


def test_published_counts():
    "The table of the dataset card, and sums that the paper prints."
    full = public.REPOSITORIES["CommunityForensics"].splits
    assert full["Systematic"].rows + full["Manual"].rows == 2_693_516 and full["Systematic"].models + full["Manual"].models == 4782
    assert full["PublicEval"].rows == public.find_split("CompEval").rows == 51_836


def test_download(monkeypatch, tmp_path):
    import huggingface_hub
    asked = []

    class Hub:
        def list_repo_tree(self, name, folder, repo_type):
            assert (name, repo_type) == ("OwensLab/CommunityForensics", "dataset")
            return [type("File", (), {"path": f"{folder}/{i}.parquet"}) for i in (2, 0, 1)]
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **k: asked.append((name, k["local_dir"])))
    got = download("CommunityForensics", "Manual", tmp_path, limit=2)
    assert got == [tmp_path/"data"/"manual"/f"{i}.parquet" for i in (0, 1)]
    assert asked == [(f"data/manual/{i}.parquet", tmp_path) for i in (0, 1)]

    def offline(*_, **__): raise ConnectionError("no\nroute")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with refused("Manual can't be fetched", "no route", "check network"): download("CommunityForensics", "Manual", tmp_path)
    monkeypatch.setattr(Hub, "list_repo_tree", lambda *_, **__: [])
    with refused("the repository has changed"): download("CommunityForensics", "Manual", tmp_path)
    with refused("unknown split"): download("CommunityForensics", "train", tmp_path)


# ---- counts

def test_model_counts(files, tmp_path):
    t = model_counts(files).set_index("model")
    assert t.generated.to_dict() == t.real.to_dict() == dict.fromkeys(MODELS, 6) and t.architecture.to_dict() == MODELS
    assert evaluation_models(files) == tuple(sorted(MODELS))
    bare = model_counts([write(tmp_path/"a.parquet", drop=("architecture",), model_name=pa.array(["m"]*16).dictionary_encode())])
    assert bare.to_dict("records") == [{"model": "m", "architecture": "", "generated": 8, "real": 8}]
    with refused("a.parquet", "row 3: label is 2"): model_counts([write(tmp_path/"a.parquet", label=[1, 0, 1, 2] + [0]*12)])
    with refused("row 3: label is None"): model_counts([write(tmp_path/"a.parquet", label=[1, 0, 1, None] + [0]*12)])
    with refused("at least one shard"): model_counts([])


# ---- real images

@pytest.mark.parametrize("sizes, target, wanted", [
    ({"a": 10, "b": 20, "c": 30}, 60, {"a": 10, "b": 20, "c": 30}), # exactly all
    ({"a": 10, "b": 20, "c": 30}, 59, {"a": 10, "b": 20, "c": 29}), # 3*10 <= 59, 2*20 <= 49, 30 > 29
    ({"a": 10, "b": 20, "c": 30}, 50, {"a": 10, "b": 20, "c": 20}), # 2*20 <= 40
    ({"a": 10, "b": 20, "c": 30}, 49, {"a": 10, "b": 20, "c": 20}), # 2*20 > 39: ceil(39/2) for both
    ({"a": 10, "b": 20, "c": 30}, 30, {"a": 10, "b": 10, "c": 10}), ({"a": 10, "b": 20, "c": 30}, 28, {"a": 10, "b": 10, "c": 10}),
    ({"big": 100, "x": 5, "y": 5}, 50, {"x": 5, "y": 5, "big": 40}), ({"a": 0, "b": 4}, 3, {"a": 0, "b": 3}), ({}, 5, {})])
def test_select_real(sizes, target, wanted):
    assert select_real(sizes, target) == wanted


def test_select_real_properties():
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = {str(i): int(n) for i, n in enumerate(rng.integers(0, 10**rng.integers(1, 7), rng.integers(1, 12)))}
        target = int(rng.integers(0, 1.3*sum(sizes.values()) + 2))
        got = select_real(sizes, target)
        capped = [s for s in got if got[s] < sizes[s]]
        assert got.keys() == sizes.keys() and all(0 <= got[s] <= sizes[s] for s in sizes)
        assert min(target, sum(sizes.values())) <= sum(got.values()) <= max(0, target + len(sizes) - 1)
        assert len({got[s] for s in capped}) <= 1 # one cap
        assert not capped or max(got.values()) == got[capped[0]] # no source gives more than a capped one
        assert got == select_real(dict(reversed(sizes.items())), target)
    with refused("at least 0"): select_real({"a": 1}, -1)


def test_sample_real(tmp_path):
    for source, n in (("LAION", 9), ("COCO", 3)):
        for which in ("real", "fake"):
            (tmp_path/source/which/"deep").mkdir(parents=True)
            for i in range(n): (tmp_path/source/which/("deep" if i % 2 else ".")/f"{i}.png").write_bytes(png(i))
        (tmp_path/source/"real"/"list.csv").touch()
    files = local_files(tmp_path)
    assert {s: len(f) for s, f in files.items()} == {"LAION": 9, "COCO": 3} and all("real" in p.parts for f in files.values() for p in f)
    got = sample_real(files, 8)
    assert {s: len(set(f)) for s, f in got.items()} == {"COCO": 3, "LAION": 5} and set(got["LAION"]) <= set(files["LAION"])
    assert got == sample_real({s: f[::-1] for s, f in files.items()}, 8) != sample_real(files, 8, seed=1)
    assert len(local_files(tmp_path, "fake")["COCO"]) == 3
    with refused("no images below"): local_files(tmp_path/"COCO")


# ---- damaged images

def test_image_fault():
    for form, options in (("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("BMP", {}), ("TIFF", {})):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(png(0))).save(buffer, form, **options)
        assert image_fault(buffer.getvalue()) == "", form
        if form in ("PNG", "JPEG", "WEBP"):
            for size in (12, 50, len(buffer.getvalue())//2, len(buffer.getvalue()) - 3):
                assert image_fault(buffer.getvalue()[:size]), (form, size)
    assert image_fault(png(0) + b"appended") == ""
    whole, rng = png(0), np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 40): # no flipped bit of a PNG is missed
        assert image_fault(whole[:at] + bytes([whole[at] ^ 1 << rng.integers(8)]) + whole[at + 1:])
    assert image_fault(b"") and image_fault(None) and image_fault(b"<html>not found</html>")


# ---- stream

def tagged(path, rows=30, group=4, models=("a", "b", "c"), label=None, **changes):
    "Shard whose images are tags that pass for a JPEG."
    image = [b"\xff\xd8\xff" + f"{path.stem}-{i}".encode() + b"\xff\xd9" for i in range(rows)]
    labels = label if isinstance(label, list) else [i % 2 if label is None else label for i in range(rows)]
    table = {"image_data": image, "label": labels, "model_name": [models[i*len(models)//rows] for i in range(rows)]} | changes
    pq.write_table(pa.table(table), path, row_group_size=group)
    return path


@pytest.fixture(scope="module")
def tags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tags")
    return [tagged(folder/f"s{i}.parquet", rows) for i, rows in enumerate((30, 7, 41, 1))] # 79 rows


def stream(shards, **settings): return ParquetStream(shards, **{"share": 0, "buffer": 10, **settings})
def first(n, *args, **settings): return [x for x, _ in itertools.islice(stream(*args, **settings), n)]


def test_epochs(tags):
    s = first(79*3, tags)
    assert stream(tags).samples == 79 and len({x for x in s}) == 79
    epochs = [s[i:i + 79] for i in (0, 79, 158)]
    assert all(len(set(e)) == 79 for e in epochs) and len({tuple(e) for e in epochs}) == 3
    assert s == first(79*3, tags) != first(79*3, tags, seed=1)
    assert s != first(79*3, tags, buffer=1) and len(set(first(79, tags, buffer=1000))) == 79
    assert [x for x, _ in stream(tags, epochs=2)] == s[:158]
    image, label = next(iter(stream(tags)))
    assert type(image) is bytes and type(label) is float
    for x, y in stream(tags, epochs=1): assert y == int(x[3:-2].split(b"-")[1]) % 2
    again = stream(tags, epochs=1)
    assert list(again) == list(again)


def test_order_is_random(tags):
    "Groups of all shards mix, and rows within them."
    s = first(79, tags, buffer=1)
    shard = [x.split(b"-")[0] for x in s]
    changes = sum(a != b for a, b in itertools.pairwise(shard))
    assert changes > 8
    rows = [int(x[3:-2].split(b"-")[1]) for x in s]
    assert 0 < sum(b == a + 1 for a, b in itertools.pairwise(rows)) < 40


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes(tags, processes):
    parts = [first(1000, tags, rank=r, processes=processes, epochs=1) for r in range(processes)]
    assert sorted(sum(parts, [])) == sorted(first(79, tags)) and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 40, 78, 79, 80, 200])
def test_resume(tags, start):
    whole = first(300, tags)
    assert first(300 - start, tags, start=start) == whole[start:]
    r = [first(100, tags, rank=r, processes=2) for r in (0, 1)]
    used = (start + 1)//2, start//2
    assert [first(100 - u, tags, rank=i, processes=2, start=start) for i, u in enumerate(used)] == [r[i][u:] for i, u in enumerate(used)]


def test_resume_reads_no_skipped_image(tags, monkeypatch):
    read, true = [], ParquetStream._read
    monkeypatch.setattr(ParquetStream, "_read", lambda self, g, rows: read.extend(rows) or true(self, g, rows))
    first(19, tags, start=79*5 + 60)
    assert len(read) == 19


def loaded(tags, n, workers, **settings):
    return [x for x, _ in itertools.islice(DataLoader(stream(tags, **settings), settings.get("batch", 1), num_workers=workers), n)]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers(tags, workers):
    seen = [x for b in loaded(tags, 1000, workers, batch=5, epochs=1) for x in b]
    assert sorted(seen) == sorted(first(79, tags))


@pytest.mark.parametrize("processes, rank", [(1, 0), (2, 1)])
def test_resume_with_workers(tags, processes, rank):
    settings = dict(batch=4, rank=rank, processes=processes)
    whole = loaded(tags, 40, 2, **settings)
    for steps in (1, 17): assert loaded(tags, 40 - steps, 2, start=steps*4*processes, **settings) == whole[steps:]


def test_held_out(tags):
    parts = {p: [x for x, _ in stream(tags, part=p, share=.3, epochs=1)] for p in ("train", "validation")}
    assert sorted(sum(parts.values(), [])) == sorted(first(79, tags)) and 10 < len(parts["validation"]) < 40
    alone = [x for x, _ in stream(tags[:1], part="validation", share=.3, epochs=1)]
    assert set(alone) == {x for x in parts["validation"] if x.startswith(b"\xff\xd8\xffs0")} # whatever else is there
    assert [x for x, _ in stream(tags, part="validation", share=.3, epochs=1, rank=1, processes=2)]
    mask = held_out("x", 200_000)
    assert abs(mask.mean() - .01) < .001 and not (mask & held_out("y", 200_000)).sum() > 60


def test_exclude(tags):
    s = stream(tags, exclude=("b", "unheard of"), epochs=1)
    kept = list(s)
    assert len(kept) == s.samples < 79 and s.excluded == {"b": 79 - s.samples, "unheard of": 0}
    names = {(f.stem, i): n for f in tags for i, n in enumerate(pq.read_table(f, columns=["model_name"]).column(0).to_pylist())}
    tags_kept = [x[3:-2].decode().split("-") for x, _ in kept]
    assert {names[stem, int(row)] for stem, row in tags_kept} == {"a", "c"}
    assert sorted(x for x, _ in kept) == sorted(x for r in range(3) for x in first(99, tags, exclude=["b"], epochs=1, rank=r, processes=3))
    with refused("exclude less"): stream(tags, exclude=["a", "b", "c"])
    with refused("give a list"): stream(tags, exclude="b")


def test_loose_files(tags, tmp_path):
    fakes = tagged(tmp_path/"fake.parquet", label=1)
    with refused("generated images only", "files="): stream([fakes])
    with refused("real images only"): stream([tagged(tmp_path/"real.parquet", label=0)])
    loose = [tmp_path/f"{i}.jpg" for i in range(205)]
    for i, p in enumerate(loose): p.write_bytes(b"\xff\xd8\xff" + f"photo-{i}".encode() + b"\xff\xd9")
    seen = list(stream([fakes], files=loose, epochs=1))
    assert len(seen) == 235 and sum(y for _, y in seen) == 30 and all((b"photo" in x) == (y == 0) for x, y in seen)
    assert len({x for x, _ in seen}) == 235
    loose[3].write_bytes(b"")
    with pytest.warns(UserWarning, match="3.jpg: no bytes"): assert len(list(stream([fakes], files=loose, epochs=1))) == 235
    loose[3].unlink()
    with refused("3.jpg", "put the file back"): list(stream([fakes], files=loose, epochs=1))


def test_damaged_rows(tmp_path):
    image = pq.read_table(tagged(tmp_path/"a.parquet")).column("image_data").to_pylist()
    good = first(60, [tmp_path/"a.parquet"])
    image[5] = image[7] = b"" # of the group of rows 4 to 7
    path = tagged(tmp_path/"a.parquet", image_data=image)
    s = stream([path])
    with pytest.warns(UserWarning) as said: got = [x for x, _ in itertools.islice(s, 60)]
    assert [a for a, b in zip(got, good) if a == b] == [x for x in good if x[-4:-2] not in (b"-5", b"-7")]
    assert s.skipped == 4 and got.count(image[6]) == 4 and got.count(image[4]) == 4 # twice each: row 6 for 5, row 4 for 7
    assert "a.parquet, row 5: no bytes; left out" in " ".join(str(w.message) for w in said) and "(4 so far)" in str(said[-1].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert first(43, [path], start=17) == got[17:]
    path = tagged(tmp_path/"b.parquet", image_data=[b"?"]*30)
    with refused("b.parquet", "as are all"): first(1, [path])
    with refused("c.parquet, row 11: label is 3"): first(60, [tagged(tmp_path/"c.parquet", label=[0, 1]*5 + [0, 3] + [0, 1]*9)])


def test_bad_settings(tags):
    for settings in (dict(buffer=0), dict(batch=0), dict(start=-1), dict(rank=2, processes=2), dict(rank=-1)):
        with refused("at least"): stream(tags, **settings)
    with refused("unknown part 'test'", "train, validation"): stream(tags, part="test")
    with refused("no train rows in 0 shards"): stream([])
    with refused("take fewer workers"): first(1, tags, rank=0, processes=200)


def test_stream_feeds_the_loop(files):
    "What the loop asks for: a function of rank, processes and start."
    from functools import partial
    data = partial(ParquetStream, files, seed=0, buffer=8, batch=4, exclude=("Firefly",))
    x, y = next(iter(data(rank=0, processes=1, start=8)))
    assert Image.open(io.BytesIO(x)).size == (48, 48) and y in (0., 1.)


# ---- evaluation

def test_evaluation_records(files, tmp_path):
    blocks = list(evaluation_records(files, rows=6))
    t = validate(pd.concat(blocks, ignore_index=True), check_images=True)
    assert max(map(len, blocks)) <= 6 and len(t) == 48 and t.id[17] == f"{files[1].name}/1"
    assert (t.pair == t.generator).all() and set(t.generator) == set(MODELS) and set(t.source) == {"COCO"}
    assert t[t.label == 1].groupby("generator").family.first().to_dict() == MODELS and set(t[t.label == 0].family) == {"real"}
    bare = next(evaluation_records([write(tmp_path/"a.parquet", drop=("architecture", "real_source", "split"))]))
    assert set(bare[bare.label == 1].family) == {"unknown"} == set(bare.source) and set(bare.split) == {"test"}
    validate(bare)


def test_evaluation_refuses(files, tmp_path):
    image = [png(i) for i in range(16)]
    image[13] = image[13][:-30]
    with refused("a.parquet, row 13: PNG cut off"): list(evaluation_records([write(tmp_path/"a.parquet", image_data=image)], rows=5))
    with refused("row 2: no model_name"): list(evaluation_records([write(tmp_path/"a.parquet", model_name=["x", "x", None] + ["x"]*13)]))
    with refused("two shards are called"): list(evaluation_records([files[0], files[0]]))


@pytest.fixture(scope="module")
def detector():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return create("high-pass-cnn")


def test_score_public_continues(detector, files, tmp_path, monkeypatch):
    factors = dict(run="r", detector=detector.name, seed=0)
    whole = score_public(detector, files, folder=tmp_path/"whole", **factors)
    assert len(whole) == 48 and set(whole.set) == {"public"} and whole.logit.dtype == np.float32
    assert {"id", "label", "generator", "family", "source", "split", "set", "logit", "run"} <= set(whole) and "image" not in whole

    true, calls = training.predict, []
    def fails(detector, images, *args):
        calls.append(len(images))
        if sum(calls) > 20: raise KeyboardInterrupt
        return true(detector, images, *args)
    monkeypatch.setattr(training, "predict", fails)
    with pytest.raises(KeyboardInterrupt): score_public(detector, files, batch=4, folder=tmp_path/"part", **factors)
    assert len(list((tmp_path/"part").iterdir())) == 1 and sum(calls) == 24 # one whole shard, nothing half-done

    def counts(detector, images, *args): return calls.append(len(images)) or true(detector, images, *args)
    monkeypatch.setattr(training, "predict", counts)
    calls.clear()
    again = score_public(detector, files, batch=4, threads=2, folder=tmp_path/"part", **factors)
    pd.testing.assert_frame_equal(again, whole, rtol=1e-5)
    assert sum(calls) == 32
    next((tmp_path/"part").iterdir()).write_bytes(b"PAR1 no more") # a damaged result is computed again
    calls.clear()
    pd.testing.assert_frame_equal(score_public(detector, files, folder=tmp_path/"part", **factors), whole, rtol=1e-5)
    assert sum(calls) == 16


def test_score_public_knows_what_changed(detector, files, tmp_path):
    def results(): return len(list(tmp_path.glob("*.parquet")))
    a = score_public(detector, files[:1], folder=tmp_path)
    torch.manual_seed(1)
    b = score_public(create("high-pass-cnn"), files[:1], folder=tmp_path) # other weights
    assert results() == 2 and not np.allclose(a.logit, b.logit)
    score_public(detector, files[:1], folder=tmp_path, precision="bf16")
    assert results() == 3
    other = write(tmp_path/"x"/files[0].name, first=7) # other images of the same name
    assert not np.allclose(score_public(detector, [other], folder=tmp_path).logit, a.logit) and results() == 4
    assert score_public(detector, files[:1], folder=tmp_path, name="comprehensive").set[0] == "comprehensive" and results() == 4


def test_score_public_refuses(detector, files, tmp_path):
    with refused("no shards"): score_public(detector, [], folder=tmp_path)
    with refused("same name"): score_public(detector, [files[0]]*2, folder=tmp_path)
    bad = write(tmp_path/"bad.parquet", drop=("label",))
    with refused("no column 'label'"): score_public(detector, [files[0], bad], folder=tmp_path/"scores")
    assert not (tmp_path/"scores").exists() # before any work


def rows(generator, family, generated, real):
    return [dict(generator=generator, family=f, label=y, logit=v, id=f"{generator}{y}{i}", source="COCO")
            for y, f, vs in ((1, family, generated), (0, "real", real)) for i, v in enumerate(vs)]


HAND = pd.DataFrame(rows("A", "GAN", [2, 1], [-1, -2]) + rows("B", "LatDiff", [3, 1], [2, -1]) + rows("C", "LatDiff", [.5], [-.5])
                    + rows("Hourglass", "PixDiff", [-1, 4, -3], [-2, -4, -5]))


def test_public_table():
    t = public_table(HAND).set_index(["level", "name"])
    # Hourglass: ranks 4 (g), -1 (g), -2 (r), -3 (g): (1 + 1 + 3/4)/3; one of three generated ones found, all real ones: 4 of 6
    ap = {"A": 1, "B": (1 + 2/3)/2, "C": 1, "Hourglass": 2.75/3}
    acc = {"A": 1, "B": .75, "C": 1, "Hourglass": 4/6}
    assert t.loc["model"].ap.to_dict() == pytest.approx(ap) and t.loc["model"].accuracy.to_dict() == pytest.approx(acc)
    assert t.ap["mean", "over models"] == pytest.approx(sum(ap.values())/4)
    assert t.accuracy["mean", "over models"] == pytest.approx(sum(acc.values())/4)
    assert t.ap["type", "LatDiff"] == pytest.approx((ap["B"] + 1)/2) and list(t.loc["type"].index) == ["GAN", "LatDiff", "PixDiff"]
    assert t.ap["mean", "over types"] == pytest.approx((1 + (ap["B"] + 1)/2 + ap["Hourglass"])/3)
    assert t.loc["mean"].generated.tolist() == [8, 8] and t.real["type", "LatDiff"] == 3


def test_public_table_variants():
    plain = public_table(HAND)
    two = pd.concat([HAND.assign(set=s, run=r, logit=HAND.logit*f) for s, r, f in (("a", "x", 1), ("a", "y", 2), ("b", "x", -1))])
    t = public_table(two)
    assert list(t)[:2] == ["set", "run"] and len(t) == 3*len(plain)
    assert t[t.run == "y"].ap.tolist() == plain.ap.tolist() and (t[t.set == "b"].ap < plain.ap.max()).all()
    coded = two.assign(**{c: pd.Categorical(two[c]) for c in ("set", "run", "generator", "family", "source")}) # as stored
    pd.testing.assert_frame_equal(public_table(coded).astype({"set": str, "run": str}), t.astype({"set": str, "run": str}))
    unknown = public_table(HAND.assign(family=np.where(HAND.label == 1, "unknown", "real")))
    assert set(unknown.level) == {"model", "mean"} and len(unknown) == 5
    with refused("B: real images only"): public_table(HAND[(HAND.generator != "B") | (HAND.label == 0)])
    with refused("no rows"): public_table(HAND[:0])


def test_common_evaluation_agrees():
    "Real rows carry the paired generator's name, by which the common evaluation groups them, too."
    t = public_table(HAND)
    common = per_generator(HAND.assign(run="r", set="s"), metrics=["ap", "accuracy"])
    assert common.ap.tolist() == pytest.approx(t[t.level == "model"].ap.tolist())
    for by, name in (("generator", "over models"), ("family", "over types")):
        assert mean_over_generators(common, by).ap[0] == pytest.approx(t.set_index("name").ap[name])


def test_public_needs_no_torch():
    code = "import sys, aigid_repro.detect.community_forensics as p; p.public_table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
