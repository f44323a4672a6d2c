"Public benchmarks: every layout in miniature; found, missing, corrupt, surplus; labels, pairing, streams, and the audit of formats."
import io
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aigid_repro.data.records import open_image, validate
from aigid_repro.data.storage import InputError
from aigid_repro.detect import community_forensics as cf
from aigid_repro.detect.community_forensics import Repository, Split
from aigid_repro.detect.evaluation import per_generator
from aigid_repro.gensign.world import benchmark_records, format_audit
from aigid_repro.public.benchmark_check import audit, audit_text, check, check_text, get, headers, report_text
from aigid_repro.public.benchmarks import image_bytes, images, place_of, records, usable
from aigid_repro.public.catalogue import Generator, about_text, benchmarks, find_benchmark, list_text
from aigid_repro.spai.lists import LISTS, over_sources, pairs

N, SHARED = 2, 3 # images of each generator and class; images of a shared real set


def refused(*parts):
    "Expect one line which contains all parts."
    return pytest.raises(InputError, match="(?s)^" + "".join(f"(?=.*{re.escape(str(p))})" for p in parts) + r"[^\n]*$")


def noise(key, size=(5, 6)):
    return Image.fromarray(np.random.default_rng(zlib.crc32(key.encode())).integers(0, 256, (*size, 3), dtype=np.uint8))


def pictures(folder, n=N, ending="png", size=(5, 6)):
    "Files of noise; no two are the same."
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): noise(f"{'/'.join(folder.parts[-5:])}/{i}", size).save(folder/f"{i}.{ending}")


def both(folder, names=("0_real", "1_fake")):
    for name in names: pictures(folder/name)


def small(name, **changes):
    "An entry that expects N images where some are expected, or where the number is not known."
    e = find_benchmark(name)
    return e._replace(generators=tuple(g._replace(generated=N, real=0 if g.real == 0 else N) for g in e.generators),
                      lenders=dict.fromkeys(e.lenders, SHARED), slack=0., **changes)


def forensynths(data):
    for g in find_benchmark("ForenSynths").generators:
        folder = data/"ForenSynths/test"/(g.name.upper() if g.name == "biggan" else g.name)
        if g.name == "progan": # classes
            for y in ("0_real", "1_fake"): pictures(folder/"car"/y, 1), pictures(folder/"cat"/y, 1)
        else: both(folder)
    both(data/"ForenSynths/train/car"), both(data/"ForenSynths/val/car")


def universal(data):
    place = data/"UniversalFakeDetect/diffusion_datasets"
    for g in find_benchmark("ufd").generators[:8]: pictures(place/g.name/"1_fake")
    for lender in ("imagenet", "laion"): pictures(place/lender/"0_real", SHARED, "jpg")
    both(data/"UniversalFakeDetect/CNN_synth_testset/crn")


def genimage(data):
    folders = {"Midjourney": "Midjourney/imagenet_midjourney", "SDv1.4": "stable_diffusion_v_1_4/imagenet_ai_0419_sdv4",
               "SDv1.5": "stable_diffusion_v_1_5", "ADM": "ADM/imagenet_ai_0508_adm", "GLIDE": "glide", "Wukong": "WUKONG",
               "VQDM": "VQDM", "BigGAN": "imagenet_ai_0419_biggan"}
    assert set(folders) == {g.name for g in find_benchmark("GenImage").generators}
    for f in folders.values(): both(data/"GenImage"/f/"val", ("nature", "ai")), both(data/"GenImage"/f/"train", ("nature", "ai"))


def synthbuster(data):
    for g in find_benchmark("Synthbuster").generators: pictures(data/"synthbuster"/g.name.replace("-", "_"))
    pictures(data/"synthbuster/RAISE", SHARED, "TIF")


def aigc(data):
    names = {"SDXL": "sd_xl", "SDv1.4": "stable_diffusion_v_1_4", "SDv1.5": "stable_diffusion_v_1_5", "WFIR": "whichfaceisreal"}
    for g in find_benchmark("AIGCDetectBenchmark").generators: both(data/"AIGCDetect_testset/test"/names.get(g.name, g.name.lower()))


def aigi(data):
    for g in find_benchmark("AIGIBench").generators: both(data/"AIGIBench/test"/{"StyleSwim": "StyleSwin"}.get(g.name, g.name))
    both(data/"AIGIBench/test/Newest"), both(data/"AIGIBench/train/ProGAN")


def chameleon(data): both(data/"Chameleon/test")


def drct(data):
    for g in find_benchmark("DRCT").generators:
        pictures(data/"DRCT-2M"/g.name/"val2017"), pictures(data/"DRCT-2M"/g.name/"train2017", 1)
    pictures(data/"DRCT-2M/coco/val2017", SHARED, "jpg"), pictures(data/"DRCT-2M/coco/train2017", 1)


def spai(data):
    for key, v in LISTS.items():
        pictures(data/"spai/images"/key, SHARED if v.label == 0 else N, "png" if v.label else "jpg")
        rows = [f"images/{key}/{p.name},{v.label},test\n" for p in sorted((data/"spai/images"/key).iterdir())]
        (data/"spai/lists").mkdir(exist_ok=True)
        (data/f"spai/lists/{key}.csv").write_text("image,class,split\n" + "".join(rows))


MAKERS = {"ForenSynths": forensynths, "UniversalFakeDetect": universal, "GenImage": genimage, "Synthbuster": synthbuster,
          "AIGCDetectBenchmark": aigc, "AIGIBench": aigi, "Chameleon": chameleon, "DRCT-2M": drct}
PARQUET = {"CommunityForensics-Eval": "data/CompEval-{:05}-of-00002.parquet",
           "CommunityForensics-Public": "data/publicEval/x-{:05}-of-00002.parquet",
           "CommunityForensics-Small": "data/train-{:05}-of-00002.parquet"}
MODELS = ["GALIP", "DFGAN", "Dalle2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for maker in (*MAKERS.values(), spai): maker(data)
    return data


def folder_of(data, name): return place_of(name, data)


@pytest.fixture
def copy(made, tmp_path):
    "A copy of one benchmark's folder, on its own."
    return lambda name: Path(shutil.copytree(folder_of(made, name), tmp_path/folder_of(made, name).name))


@pytest.fixture
def listed(monkeypatch):
    "SPAI's lists, expected as small as they are here."
    for key, v in LISTS.items(): monkeypatch.setitem(LISTS, key, v._replace(count=SHARED if v.label == 0 else N))


def shard(path, first=0, models=MODELS, group=4, **columns):
    "A shard: N generated and N real rows for each model, all images different."
    rows = [(m, y, i) for m in models for y in (1, 0) for i in range(N)]
    data = []
    for k in range(len(rows)):
        noise(f"{first + k}", (4 + k, 5)).save(buffer := io.BytesIO(), "PNG")
        data.append(buffer.getvalue())
    columns = {"image_data": pa.array(data, pa.binary()), "label": [y for _, y, _ in rows], "model_name": [m for m, _, _ in rows],
               "real_source": ["COCO"]*len(rows)} | columns
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


@pytest.fixture
def community(tmp_path, monkeypatch):
    "A repository in miniature, and what is expected of it."
    def make(name, repeat=0):
        repository, split = find_benchmark(name).hub
        r = cf.REPOSITORIES[repository]
        of = Split(r.splits[split].pattern, 4*N*len(MODELS), len(MODELS))
        monkeypatch.setitem(cf.REPOSITORIES, repository, Repository(r.name, {**r.splits, split: of}))
        return [shard(tmp_path/repository/PARQUET[name].format(i), 100*i*(1 - repeat)) for i in (0, 1)]
    return make


def scored(table, entry):
    "Metrics of a detector that reads the labels off the table: pairing must give every generator its real images."
    p = table.assign(run="r", logit=2.*table.label - 1 + .01*np.random.default_rng(0).normal(size=len(table)))
    return per_generator(p.drop(columns="image"), entry.reals, metrics=["ap", "accuracy"]).set_index("generator")


# ---- catalogue

def test_catalogue():
    assert len(benchmarks()) == 12 and all(find_benchmark(n.lower().replace("-", " ")) is e for n, e in benchmarks().items())
    with refused("unknown benchmark 'nothing'", *benchmarks()): find_benchmark("nothing")
    text = list_text()
    assert all(sum(line.startswith(f"{n} ") for line in text.splitlines()) == 1 for n in benchmarks())
    for name, e in benchmarks().items():
        about = about_text(name)
        assert e.where in about and all(line in about for line in e.tree.strip().splitlines()) and "1 = generated" in about
    assert "general knowledge" in about_text("Chameleon") and "not known" in about_text("Synthbuster")


def test_the_list_needs_no_networks():
    code = ("import sys; from aigid_repro.public.benchmark_check import check_text; from aigid_repro.public.catalogue import list_text; "
            "list_text(); sys.exit(any(m in sys.modules for m in ('torch', 'torchvision', 'timm', 'transformers', 'sklearn')))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- folders

@pytest.mark.parametrize("name", MAKERS)
def test_complete(made, name):
    found = check(small(name), made, decode=True)
    t = found.table.set_index("name")
    assert found.complete and not len(found.problems) and not found.surplus, report_text(found)
    wanted = [g for g in find_benchmark(name).generators if not g.optional]
    assert {g.name for g in wanted} <= set(t.index) and (t.loc[[g.name for g in wanted], "generated"] == N).all()
    lenders = t[t.kind == "real set"]
    assert set(lenders.index) == set(find_benchmark(name).lenders) and (lenders.real == SHARED).all()
    assert check(name, made).status == "complete" if name == "AIGIBench" else check(name, made).status == "incomplete"


@pytest.mark.parametrize("name", MAKERS)
def test_labels_and_pairing(made, name):
    entry = find_benchmark(name)
    t, faults = usable(name, made)
    assert not faults and set(t["set"]) == {name} and set(t.split) == {"test"}
    validate(t)
    assert not t.image.str.contains("/train").any() and not t.image.str.contains("ForenSynths/val/").any()
    real = t.image.str.contains("0_real|nature|RAISE|coco|laion")
    assert (t.label == (~real).astype(int)).all() and (t.real_set == "").eq(t.label == 1).all()
    m = scored(t, entry)
    assert set(m.index) >= {g.name for g in entry.generators if not g.optional} and (m.ap == 1).all() and (m.accuracy == 1).all()
    shared = entry.reals == "all"
    assert all(r.n_generated == N and r.n_real == (SHARED if shared or r.Index in benchmark_lenders(entry) else N) for r in m.itertuples())
    assert not (t.generator[t.label == 0] == "real").any() if not shared else (t.generator[t.label == 0] == "real").all()


def benchmark_lenders(entry): return {g.name for g in entry.generators if g.lender}


def test_shared_real_images_are_rows_of_each_borrower(made):
    t = records("ufd", made)
    lent = t[t.real_set.isin(["laion", "imagenet"])]
    assert t.id.is_unique and len(lent) == 8*SHARED and lent.image.nunique() == lent.source.nunique() == 2*SHARED
    assert set(lent[lent.generator == "guided"].real_set) == {"imagenet"} and set(lent[lent.generator == "dalle"].real_set) == {"laion"}
    assert set(t[t.generator == "crn"].real_set) == {"", "crn"}


def test_other_names(made):
    t = records("AIGIBench", made)
    assert {"Newest", "StyleSwim"} <= set(t.generator) and set(t[(t.generator == "Newest") & (t.label == 1)].family) == {"unknown"}
    assert "BigGAN" not in set(records("ForenSynths", made).generator) and "biggan" in set(records("ForenSynths", made).generator)


@pytest.mark.parametrize("name", ["UniversalFakeDetect", "GenImage", "AIGIBench"])
def test_agrees_with_the_world_of_gensign(made, name):
    ours, (theirs, _) = records(name, made), benchmark_records(made, name)
    if name == "AIGIBench": theirs["generator"] = theirs.generator.replace("StyleSwin", "StyleSwim")
    key = ["generator", "label", "image"]
    pd.testing.assert_frame_equal(ours[key].sort_values(key, ignore_index=True), theirs[key].sort_values(key, ignore_index=True))


# ---- what is wrong

def test_missing_generator_and_half_a_generator(copy):
    place = copy("ForenSynths")
    shutil.rmtree(place/"test/stylegan"), shutil.rmtree(place/"test/crn/0_real"), (place/"test/imle/1_fake/0.png").unlink()
    found = check(small("ForenSynths"), place)
    states = found.table.set_index("name").state
    assert found.status == "incomplete" and states["stylegan"] == "missing" and states["crn"] == states["imle"] == "incomplete"
    assert (states.drop(["stylegan", "crn", "imle"]) == "complete").all()
    assert usable("ForenSynths", place).faults == {"stylegan": "no folder", "crn": "no real images"}
    text, status = check_text("ForenSynths", place)
    assert status == 1 and "missing" in text and "github.com/PeterWang512" in text and "{0_real,1_fake}" in text and "about 5,991" in text


def test_missing_real_sets(copy):
    place = copy("UniversalFakeDetect")
    shutil.rmtree(place/"diffusion_datasets/laion")
    found = check(small("ufd"), place)
    assert found.status == "incomplete" and found.table.set_index("name").state["laion"] == "missing"
    t, faults = usable("ufd", place)
    assert set(t.generator) == {"guided", "crn"} and set(faults.values()) == {"no real images (laion)"} and len(faults) == 7
    place = copy("Synthbuster")
    shutil.rmtree(place/"RAISE")
    with refused("no generator of Synthbuster can be scored", "no real images", "aigid data check"): records("Synthbuster", place)


def test_corrupt_files(copy):
    place = copy("GenImage")
    folder = place/"VQDM/val/ai"
    (folder/"0.png").write_text("404 not found")
    (folder/"1.png").write_bytes(b"")
    found = check(small("GenImage"), place)
    row = found.table.set_index("name").loc["VQDM"]
    assert found.status == "corrupt" and (row.generated, row.unreadable, row["empty"]) == (2, 1, 1)
    assert set(found.problems.file) == {str(folder/n) for n in ("0.png", "1.png")}
    text, status = check_text("GenImage", place)
    assert status == 1 and "unreadable (1):" in text and "empty (1):" in text and "0.png" in text


def test_cut_off_files_show_when_decoded(copy):
    place = copy("Chameleon")
    noise("large", (60, 60)).save(place/"test/1_fake/0.png")
    data = (place/"test/1_fake/0.png").read_bytes()
    (place/"test/1_fake/0.png").write_bytes(data[:len(data)//2])
    assert check(small("Chameleon"), place).complete
    found = check(small("Chameleon"), place, decode=True)
    assert found.status == "corrupt" and found.problems.problem.tolist() == ["unreadable"]


def test_the_same_file_twice(copy):
    place = copy("DRCT-2M")
    kind = place/"sd-turbo/val2017"
    shutil.copy(kind/"0.png", kind/"9.png"), shutil.copy(kind/"0.png", place/"sdxl-turbo/val2017/0.png")
    found = check(small("DRCT"), place) # of two generators: nothing to say
    assert found.complete and found.table.set_index("name").loc["sd-turbo", ["state", "duplicates"]].tolist() == ["more", 1]
    shutil.copy(kind/"1.png", place/"coco/val2017/9.png")
    found = check(small("DRCT"), place)
    assert found.status == "corrupt" and "real and generated" in set(found.problems.problem)


def test_surplus(copy):
    place = copy("Synthbuster")
    pictures(place/"newest", 3)
    (place/"firefly/prompts.csv").write_text("a"), (place/"README.md").write_text("b"), (place/".DS_Store").write_text("c")
    found = check(small("Synthbuster"), place)
    assert found.complete and found.surplus == ["newest: 3 images (no generator of that name)",
                                                "firefly: 1 files that are no images, such as prompts.csv"]
    assert "newest" not in set(records("Synthbuster", place).generator)
    place = copy("ForenSynths")
    pictures(place/"test/crn/loose")
    assert check(small("ForenSynths"), place).surplus == ["test/crn/loose: 2 images (images outside of class folders)"]


def test_an_optional_set_may_be_absent_but_not_in_part(copy):
    place = copy("UniversalFakeDetect")
    states = check(small("ufd"), place).table.set_index("name").state
    assert states["progan"] == "optional" and states["crn"] == "complete"
    shutil.rmtree(place/"CNN_synth_testset/crn/1_fake")
    assert check(small("ufd"), place).status == "incomplete" and usable("ufd", place).faults == {"crn": "no generated images"}


# ---- which folder

@pytest.mark.parametrize("name", MAKERS)
def test_one_level_too_high_works_and_too_low_is_told(made, name):
    place = folder_of(made, name)
    assert place.parent == made and len(records(name, made)) == len(records(name, place))
    low = next(p for p in sorted(place.rglob("*.png")) if not re.search("train|ForenSynths/val/", str(p))).parent
    # AIGIBench takes any name, so a folder within it is a benchmark with nothing in class folders
    with refused(low, "nothing of", "" if name == "AIGIBench" else place.resolve()): records(name, low)
    with refused("there is no such folder", find_benchmark(name).where): check(name, made/"elsewhere")


def test_a_folder_of_something_else(tmp_path, made):
    both(tmp_path/"photos/holiday")
    with refused(tmp_path, "nothing of GenImage", "github.com/GenImage-Dataset"): check("GenImage", tmp_path)
    with refused(tmp_path, "no data/CompEval-*.parquet", "OwensLab/CommunityForensics-Eval"): check("CompEval", tmp_path)
    with refused(tmp_path, "none of SPAI's lists", "mever-team/spai"): check("SPAI", tmp_path)
    shutil.copytree(folder_of(made, "GenImage"), tmp_path/"other/GenImage")
    for name in ("AIGIBench", "AIGCDetectBenchmark"): # same names of generators
        with refused(f"nothing of {name}"): records(name, tmp_path/"other")
    shutil.copytree(folder_of(made, "ForenSynths"), tmp_path/"other/CNN_synth_testset")
    shutil.copytree(made/"UniversalFakeDetect/diffusion_datasets", tmp_path/"other/diffusion_datasets")
    assert records("ufd", tmp_path/"other").generator.nunique() == 19


def test_a_generator_within_a_benchmark(made):
    found = check(small("GenImage"), made/"GenImage/Midjourney")
    assert found.status == "incomplete" and any(str(made/"GenImage") in n for n in found.notes)


def test_the_same_twice(copy):
    place = copy("GenImage")
    both(place/"Vqdm/val", ("nature", "ai"))
    with refused("VQDM", "Vqdm", "keep one", "GenImage alone"): check("GenImage", place)
    both(place.parent/"gen image/ADM/val", ("nature", "ai"))
    with refused("GenImage and gen image are both GenImage"): check("GenImage", place.parent)


def test_a_link_upward_is_not_followed(copy):
    place = copy("GenImage")
    before = len(records("GenImage", place))
    (place/"BigGAN").mkdir(exist_ok=True)
    for link, goal in ((place/"again", place), (place/"BigGAN/up", place.parent), (place/"BigGAN/self", place/"BigGAN")):
        link.symlink_to(goal, target_is_directory=True)
    assert len(records("GenImage", place)) == before


def test_a_link_to_elsewhere_is_followed(copy, tmp_path):
    place = copy("Synthbuster")
    shutil.move(place/"RAISE", tmp_path/"elsewhere")
    (place/"RAISE").symlink_to(tmp_path/"elsewhere", target_is_directory=True)
    assert (records("Synthbuster", place).label == 0).sum() == SHARED


def test_the_deepest_class_folder_counts(tmp_path):
    "As in `data.records`: what stands above it may be anything."
    from aigid_repro.data.records import from_folders
    for y, name in enumerate(("0_real", "1_fake")): pictures(tmp_path/"ForenSynths/test/biggan/fake"/name, 1 + y)
    ours, kit = records("ForenSynths", tmp_path), from_folders(tmp_path/"ForenSynths")
    assert ours.label.value_counts().to_dict() == kit.label.value_counts().to_dict() == {0: 1, 1: 2}


# ---- lists

def test_lists(made, copy, listed):
    entry = find_benchmark("SPAI")
    found = check("SPAI", made/"spai", decode=True)
    assert found.complete and not found.surplus and not len(found.problems) and len(found.table) == 18
    t = records("SPAI", made/"spai")
    validate(t)
    m = scored(t, entry)
    assert (m.n_real == 5*SHARED).all() and (m.n_generated == N).all() and set(m.index) == {v.title for v in LISTS.values() if v.label}
    assert set(t[t.label == 0].source) == set(t[t.label == 0].real_set) == {k for k, v in LISTS.items() if not v.label}
    by = over_sources(pairs(t.drop(columns="image").assign(run="r", logit=t.label.astype(float))))
    assert len(by) == 13 and (by.auc == 1).all() and (by.n_sources == 5).all()
    assert len(records("SPAI", made/"spai/lists")) == len(t)
    with pytest.raises(InputError): records("SPAI", made/"spai/images")


def test_lists_with_faults(copy, listed):
    place = copy("SPAI")
    (place/"lists/sd3.csv").unlink(), (place/"images/flux/0.png").unlink(), (place/"images/coco/0.jpg").write_text("no image")
    (place/"lists/mine.csv").write_text("image,class,split\n")
    (place/"lists/glide.csv").write_text((place/"lists/glide.csv").read_text().replace(",1,", ",0,"))
    found = check("SPAI", place)
    states = found.table.set_index("name").state
    assert found.status == "incomplete and corrupt" and states["SD3"] == "missing" and states["Flux"] == states["Glide"] == "incomplete"
    assert found.problems[["name", "problem"]].to_numpy().tolist() == [["coco", "unreadable"]]
    assert found.surplus == ["mine.csv: not one of the 18 lists"] and any("images are missing" in n for n in found.notes)
    faults = usable("SPAI", place).faults
    assert set(faults) == {"SD3", "Flux: files", "Glide"} and faults["SD3"] == "no list"
    assert faults["Flux: files"] == "1 of 2 images are missing, the first is images/flux/0.png"
    assert not any(str(place.parent) in f for f in faults.values()) and faults["Glide"].startswith("lists/glide.csv: rows")
    t = records("SPAI", place)
    validate(t)
    assert (t.generator == "Flux").sum() == N - 1 and (t.real_set == "coco").sum() == SHARED
    assert check_text("SPAI", place)[1] == 1


def test_a_list_without_one_real_image_or_without_any(copy):
    place = copy("SPAI")
    (place/"images/raise/1.jpg").unlink(), shutil.rmtree(place/"images/fodb")
    found = usable("SPAI", place)
    assert found.faults == {"raise: files": "1 of 3 images are missing, the first is images/raise/1.jpg",
                            "fodb": "3 of 3 images are missing, the first is images/fodb/0.jpg"}
    assert found.records.real_set.value_counts().drop("").to_dict() == dict(coco=3, imagenet=3, openimages=3, **{"raise": 2})
    assert check("SPAI", place).status.startswith("incomplete")


# ---- parquet files

@pytest.mark.parametrize("name", PARQUET)
def test_parquet(community, tmp_path, name):
    files = community(name)
    entry, repository = find_benchmark(name), tmp_path/find_benchmark(name).hub[0]
    # the catalogue knows more images of a model than there are here
    found = check(entry._replace(generators=()), tmp_path, decode=True)
    assert found.complete and not len(found.problems), report_text(found)
    assert found.table.set_index("name").loc["GALIP", "generated"] == 2*N and "2 files, 24 of 24 rows, 3 of 3 models" in found.notes[0]
    for root in (tmp_path, repository, repository/"data", files[0].parent): assert len(records(name, root)) == 4*N*len(MODELS)
    t = records(name, tmp_path)
    assert set(t["set"]) == {name} and t.id.is_unique and (t.family.eq("real") == t.label.eq(0)).all() and set(t.real_set) == {"", "COCO"}
    m = scored(t, entry)
    paired = entry.reals == "paired"
    assert set(m.index) == set(MODELS) and (m.n_real == (2*N if paired else 6*N)).all() and (m.ap == 1).all()
    if paired: assert m.family.to_dict() == {"GALIP": "GAN", "DFGAN": "GAN", "Dalle2": "Commercial"}


def test_streams(community, tmp_path):
    community("CommunityForensics-Eval")
    t = records("CompEval", tmp_path)
    heights = [*range(4, 4 + 2*N*len(MODELS))]*2
    assert [open_image(v).height for v in images(t)] == heights
    order = np.random.default_rng(0).permutation(len(t))
    assert [open_image(v).height for v in images(t.iloc[order])] == [heights[i] for i in order]
    assert [open_image(image_bytes(v)).height for v in t.image[10:14]] == heights[10:14]
    assert image_bytes(b"abc") == b"abc" and list(images(["a.png", b"b"])) == ["a.png", b"b"]
    with refused("no row 99"): image_bytes(t.image[0].replace("#0", "#99"))
    with refused("there is no such file"): image_bytes(str(tmp_path/"no.parquet#0"))
    with refused("No such file"): image_bytes(tmp_path/"no.png")


def test_parquet_with_faults(community, tmp_path):
    files = community("CommunityForensics-Public")
    files[1].unlink()
    found = check("PublicEval", tmp_path)
    assert found.status == "incomplete" and any(files[1].name in n for n in found.notes)
    files = community("CommunityForensics-Eval")
    files[1].write_bytes(files[1].read_bytes()[:-50])
    found = check("CompEval", tmp_path)
    assert found.status == "incomplete and corrupt" and found.problems.file.tolist() == [str(files[1])]
    with refused(files[1].name, "damaged"): records("CompEval", tmp_path)
    assert check_text("CompEval", tmp_path)[1] == 1
    community("CommunityForensics-Eval")
    shard(files[1], 50, models=MODELS[:2] + [""])
    shard(files[0], label=[1]*4*len(MODELS))
    t, faults = usable("CompEval", tmp_path)
    assert faults == {"Dalle2": "no real images", "no model name": "no real images"} and set(t.generator) == set(MODELS[:2])


def test_images_of_parquet_files_are_looked_at_when_asked(community, tmp_path):
    files = community("CommunityForensics-Eval", repeat=1) # both shards hold the same images
    entry = find_benchmark("CompEval")._replace(generators=())
    assert check(entry, tmp_path).complete
    found = check(entry, tmp_path, decode=True)
    assert set(found.problems.problem) == {"twice"} and len(found.problems) == 2*N*len(MODELS) and found.complete
    data = [noise(str(i), (40, 40)) for i in range(2*N*len(MODELS))]
    for i, image in enumerate(data): image.save(buffer := io.BytesIO(), "PNG"); data[i] = buffer.getvalue()
    data[0], data[1], data[3], data[7] = b"", data[1][:-100], data[2], data[4]
    shard(files[0], image_data=pa.array(data, pa.binary()))
    found = check(entry, tmp_path, decode=True)
    at = {int(f.rpartition("#")[2]): p for f, p in zip(found.problems.file, found.problems.problem) if files[0].name in f}
    assert at == {0: "empty", 1: "unreadable", 3: "twice", 7: "real and generated"} and found.status == "corrupt"
    assert found.table.set_index("name").loc["GALIP", ["empty", "unreadable", "duplicates"]].tolist() == [1, 1, 1]


# ---- audit

def test_audit_of_files(tmp_path):
    for i in range(15):
        pictures(tmp_path/f"Chameleon/test/0_real/{i}", 1, "jpg", (20 + i%3, 31))
        pictures(tmp_path/f"Chameleon/test/1_fake/{i}", 1, "png", (16, 16))
    t = records("Chameleon", tmp_path)
    found = audit(t)
    assert found.images == 30 and found.auc["format"] == 1 and found.auc["bytes, width, height"] == 1
    theirs = format_audit(t)
    pd.testing.assert_frame_equal(found.formats[theirs.columns.tolist()], theirs, check_dtype=False)
    text = audit_text(found)
    assert "JPEG" in text and "PNG" in text and "format 1.000" in text
    h = headers(t, 4, more=lambda image: {"tables": len(getattr(image, "quantization", {}))})
    assert len(h) == 8 and (h.tables[h.format == "JPEG"] == 2).all() and not h.tables[h.format == "PNG"].any()
    Path(t.image[0]).write_text("no image")
    assert audit(t).formats.set_index(["label", "format"]).images[1, "unreadable"] == 1
    few = audit(t, n=5)
    assert np.isnan(few.auc["format"]) and "too few images" in audit_text(few)


def test_audit_of_equal_files_finds_nothing(tmp_path):
    for i in range(60): pictures(tmp_path/f"Chameleon/test/{('0_real', '1_fake')[i%2]}/{i}", 1, "bmp", (8, 8))
    found = audit(records("Chameleon", tmp_path))
    assert found.auc == {"format": .5, "bytes, width, height": .5}


def test_audit_of_parquet_rows(tmp_path):
    models = [f"m{i}" for i in range(10)]
    shard(tmp_path/"data/CompEval-00000-of-00001.parquet", models=models, group=30) # 40 rows in groups of 30 and 10
    t = records("CompEval", tmp_path)
    h = headers(t, 100)
    assert len(h) == 16 + 10 and set(h.format) == {"PNG"} and (h.bytes > 50).all() # the first 16 of each group
    assert audit(t).images == 26


# ---- fetching

def test_get(monkeypatch, tmp_path):
    assert "aigid data get CommunityForensics-Eval DIR" in about_text("CompEval") and "data get" not in about_text("GenImage")
    asked = []
    monkeypatch.setattr(cf, "download", lambda *a: asked.append(a) or [])
    for name in ("CompEval", "PublicEval", "Small"): get(name, tmp_path, 1)
    assert asked == [("CommunityForensics-Eval", "CompEval", tmp_path/"CommunityForensics-Eval", 1),
                     ("CommunityForensics", "PublicEval", tmp_path/"CommunityForensics", 1),
                     ("CommunityForensics-Small", "train", tmp_path/"CommunityForensics-Small", 1)]
    for name, e in benchmarks().items():
        if e.form == "parquet": continue
        with refused(name, "can't be fetched", e.where, e.tree.split()[0], "aigid data check"): get(name, tmp_path)


def test_a_new_benchmark_is_an_entry(tmp_path):
    entry = find_benchmark("Synthbuster")._replace(name="Faces", also=(), alias={}, lenders={"FFHQ": 2}, generators=(
        Generator("A", "GAN", 2, 0, "FFHQ"), Generator("B", "GAN", 2, 0, "FFHQ")))
    for f in ("A", "B", "FFHQ"): pictures(tmp_path/"Faces"/f)
    assert check(entry, tmp_path).complete and len(records(entry, tmp_path)) == 6 and set(records(entry, tmp_path)["set"]) == {"Faces"}
