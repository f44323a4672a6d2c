"Profile paper: what each item needs, that the plan tells it as it is, and what runs with the half of it."
import importlib
import inspect
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pandas as pd
import pytest
import torch
import toy
from test_community_world import make as make_community
from test_gensign_world import make as make_gensign
from test_spai_world import make as make_spai

from aigid_repro.commfor import generalization, types
from aigid_repro.data import storage
from aigid_repro.data.storage import InputError
from aigid_repro.detect import community_forensics as community
from aigid_repro.detect.results import find_items, items, read_run
from aigid_repro.public.catalogue import find_benchmark
from aigid_repro.public.weights import CATALOGUE, named
from aigid_repro.review import reproduce as runner
from aigid_repro.review import requirements as module
from aigid_repro.review.reproduce import exit_code, lacking_text, reproduce
from aigid_repro.review.requirements import LEFT_OUT, MISSING, PARTLY, paper_plan, plan_text, settings_of, trainings_of, world_of

HOPELESS = {"data/audit", "spai/table4_radius", "review/simulated_generators"} # no data in the world make these run in profile paper


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A miniature of all public data, with empty files for weights."
    data = tmp_path_factory.mktemp("data")
    for make in (make_community, make_spai, make_gensign): make(data)
    (data/"coco/train2017").mkdir()
    shutil.copy(next((data/"real").rglob("*.png")), data/"coco/train2017")
    for w in CATALOGUE:
        if w.cache: continue
        (data/"weights"/w.place).parent.mkdir(exist_ok=True)
        if w.folder(): (data/"weights"/w.place).mkdir()
        (data/"weights"/w.place/w.files[-1] if w.folder() else data/"weights"/w.place).touch()
    return data


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    "A copy that may be damaged, in place of published sizes its own; caches with backbones, and a GPU."
    data = shutil.copytree(made, tmp_path/"public data")
    for name, r in list(community.REPOSITORIES.items()):
        sizes = {s: sum(community.open_parquet(f).metadata.num_rows for f in (data/name).glob(v.pattern)) for s, v in r.splits.items()}
        splits = {s: community.Split(v.pattern, sizes[s], v.models) for s, v in r.splits.items()}
        monkeypatch.setitem(community.REPOSITORIES, name, community.Repository(r.name, splits))
    hub = tmp_path/"hub"
    for w in CATALOGUE:
        if w.cache == "hub":
            snapshot = hub/f"models--{w.hub.replace('/', '--')}"/"snapshots"/"abc"
            snapshot.mkdir(parents=True)
            (snapshot.parents[1]/"refs").mkdir()
            (snapshot.parents[1]/"refs"/"main").write_text("abc")
            for f in w.files: (snapshot/f).touch()
        elif w.cache:
            (tmp_path/"torch/hub/checkpoints").mkdir(parents=True, exist_ok=True)
            (tmp_path/"torch/hub/checkpoints"/w.place).touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path/"torch"))
    monkeypatch.setenv("AIGID_CACHE", str(tmp_path/"cache"))
    monkeypatch.delenv("AIGID_DATA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return data


@pytest.fixture(scope="module")
def nothing():
    "The plan of someone who has nothing."
    with pytest.MonkeyPatch.context() as m:
        m.delenv("AIGID_DATA", raising=False)
        m.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nowhere")
        m.setenv("TORCH_HOME", "/nowhere")
        m.setattr(torch.cuda, "is_available", lambda: False)
        yield paper_plan(), plan_text(paper_plan())


def of(plan, key): return next(r for r in plan.itertuples() if r.item == key)


# ---- what is needed

def test_every_item_has_needs_or_a_reason(nothing):
    plan, _ = nothing
    assert list(plan.item) == [i.key for i in items()]
    assert set(plan.item[plan.runs == LEFT_OUT]) == HOPELESS and plan.why[plan.runs == LEFT_OUT].str.len().min() > 20
    for r in plan.itertuples():
        if r.runs == LEFT_OUT: continue
        assert r.runs == "no" and r.missing and any(n.kind == "data" for n in r.needs), r.item
        assert all(n.state == MISSING and n.command and (n.required or n.one_of or n.lost) for n in r.needs), r.item


def test_commands_name_what_exists(nothing):
    plan, text = nothing
    commands = {n.command for needs in plan.needs for n in needs}
    fetched = {c.split("aigid weights get ")[1] for c in commands if "aigid weights get" in c}
    checked = {w for c in commands for w in re.findall(r"aigid weights check (\S+)", c)}
    assert {"commfor-384", "clip-l14", "vgg16", "gapl"} <= fetched and checked == {"spai", "mfm"}
    for name in fetched | checked: assert named(name)[0].name == name
    assert all(named(n)[0].hub or named(n)[0].url for n in fetched) # the others can't be fetched by a program
    data = {m for c in commands for m in re.findall(r"aigid data check (\S+)", c)}
    assert {"SPAI", "UniversalFakeDetect"} <= data and all(find_benchmark(n).name == n for n in data)
    patterns = {(r.name, s.pattern) for r in community.REPOSITORIES.values() for s in r.splits.values()}
    for c in (c for c in commands if c.startswith("hf ")):
        words = c.replace("'", "").split()
        found = {(words[2], p) for p in words[words.index("--include") + 1:]}
        assert found - {("OwensLab/CommunityForensics", "data/metadata/*.csv")} <= patterns and found
    for name in {n.name for needs in plan.needs for n in needs if n.kind == "weights"}: assert named(name)[0].name == name
    assert text.endswith("make reproduce PROFILE=paper DATA=/path/to/folder") and "33 items 0 can run, 0 in part, 30 not; 3 have" in text
    for c in commands: assert c in text.replace(".venv/bin/", "")


def test_worlds_are_those_that_open(copy, monkeypatch):
    monkeypatch.setenv("AIGID_DATA", str(copy))
    seen = set()
    for item in items():
        name = next((m for m, n in module._imports(item) if n == "world"), None)
        assert (world := world_of(item)) is None or importlib.import_module(name).world("paper") == world
        seen.add(name)
    assert len(seen) == 5 and None in seen


def test_all_there(copy):
    plan = paper_plan(data=copy)
    assert set(plan.item[plan.runs == LEFT_OUT]) == HOPELESS and not (plan.runs == "no").any()
    assert of(plan, "commfor/fig13_length").runs == of(plan, "gapl/table3_architectures").runs == "yes"
    spai, = {n for needs in plan.needs for n in needs if n.name == "SPAI"}
    assert spai.state == PARTLY and "sd14" in spai.parts and "glide" in spai.parts and dict(zip(spai.parts, spai.faults))["glide"]
    assert not any("(" in m or str(copy) in m for m in (*(m for r in plan.missing for m in r), *spai.faults))
    row = of(plan, "gensign/spectra")
    assert row.runs == "partly" and {"UniversalFakeDetect/crn", "AIGIBench/SimSwap"} - set(row.missing) == {"UniversalFakeDetect/crn"}
    text = plan_text(plan, copy)
    assert f"DATA is {copy}: of 33" in text and "give the folder" not in text and "optional for gensign" in text


def test_commands_can_be_typed(nothing, copy):
    commands = {n.command for needs in nothing[0].needs for n in needs if n.command.split(" ")[0] not in ("put", "fetch", "unpack", "run")}
    for c in commands: # the folder has a space in its name
        words = [w for w in shlex.split(module.runnable(c, copy), comments=True)]
        assert "DATA" not in words and Path(words[words[0].startswith("AIGID_DATA=")]).name in ("aigid", "hf", "python", "curl")
        for w in words:
            if str(copy.parent) in w and "-c" not in words: assert str(copy) in w and w.split("=")[-1].startswith(str(copy))
        if "-c" in words: assert compile(words[2], "", "exec") and f"'{copy}/ldm'" in words[2] and f"'{copy}/spai/train.csv'" in words[2]
    assert len(commands) > 15


GONE = {"CommunityForensics-Eval": ("commfor/fig01_scaling", "no", "CommunityForensics-Eval"),
        "CommunityForensics/data/manual": ("commfor/fig01_scaling", "no", "CommunityForensics"),
        "CommunityForensics/data/systematic/part-00000-of-00002.parquet": ("commfor/fig01_scaling", "no", "CommunityForensics"),
        "CommunityForensics-Small": ("gapl/fig03_scaling", "no", "CommunityForensics-Small"),
        "real": ("commfor/fig08_features", "no", "real training images"),
        "weights/commfor-model-384": ("commfor/fig03_types", "partly", "commfor-384"),
        "weights/gapl-checkpoint.pt": ("gapl/table3_architectures", "partly", "gapl"),
        "weights/mfm_pretrain_vit_base.pth": ("spai/resolution", "no", "mfm"),
        "spai/train.csv": ("spai/components", "no", "SPAI's training list"),
        "ldm/train/bird/0.png": ("spai/components", "no", "SPAI's training list"),
        "spai/lists/test_mjv5.csv": ("spai/table1_generators", "partly", "SPAI/mjv5"),
        "ForenSynths/train": ("gensign/signatures", "no", "ForenSynths, training set"),
        "UniversalFakeDetect": ("gensign/table1_generators", "partly", "UniversalFakeDetect"),
        "coco/train2017": ("gensign/spectra", "no", "coco/train2017")}

@pytest.mark.parametrize("path", GONE)
def test_one_thing_is_gone(copy, path):
    key, verdict, name = GONE[path]
    shutil.rmtree(copy/path) if (copy/path).is_dir() else (copy/path).unlink()
    row = of(paper_plan(item=key, data=copy), key)
    assert row.runs == verdict and name in row.missing, row.missing


def test_any_benchmark_will_do_but_one_it_must_be(copy):
    for folder in ("AIGIBench", "aigcdetectbenchmark"): shutil.rmtree(copy/folder)
    assert of(paper_plan(item="gensign/spectra", data=copy), "gensign/spectra").runs == "partly"
    shutil.rmtree(copy/"UniversalFakeDetect")
    row = of(plan := paper_plan(item="gensign/spectra", data=copy), "gensign/spectra")
    assert row.runs == "no" and row.missing == ("UniversalFakeDetect", "AIGCDetectBenchmark", "AIGIBench")
    assert plan_text(plan, copy).count("one of several for gensign/spectra") == 3


def test_lists_of_both_classes(copy):
    for name in ("coco", "raise"): (copy/f"spai/lists/test_{name}.csv").unlink()
    row = of(paper_plan(item="spai/robustness", data=copy), "spai/robustness")
    need, = (n for n in row.needs if n.name == "SPAI")
    assert row.runs == "no" and need.detail.startswith("3 of 18 lists can be scored; a real and a generated")


def test_folders_that_contradict_each_other_stop_their_items_alone(copy):
    shutil.copy(copy/"spai/lists/test_coco.csv", copy/"spai/lists/coco-new.csv")
    plan = paper_plan(data=copy)
    assert of(plan, "spai/components").runs == "no" and of(plan, "gapl/fig03_scaling").runs == "yes"
    assert "both look like the list coco" in plan_text(plan, copy).replace("\n     ", " ")


def test_without_a_gpu(copy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = paper_plan(data=copy).query("runs != @LEFT_OUT")
    assert set(plan.item[plan.runs != "no"]) == {"commfor/table1_composition"}
    assert {m for r in plan.itertuples() for m in r.missing if r.runs == "no"} == {"gpu"}


def test_reading_settings_makes_nothing(copy, tmp_path):
    paper_plan(paper="spai", data=copy)
    assert not list((tmp_path/"cache").rglob("*.safetensors"))


# ---- read off the same code that runs

def test_released_detectors_are_those_that_tables_look_for(copy, monkeypatch):
    monkeypatch.setenv("AIGID_DATA", str(copy))
    world, asked = SimpleNamespace(score=lambda *_: pd.DataFrame({"logit": [0.]})), []
    found = {}
    for item in items():
        code = importlib.import_module(item.module)
        if not hasattr(code, "run_released"): continue
        checkpoints = importlib.import_module(f"aigid_repro.{item.paper}.checkpoints")
        monkeypatch.setattr(checkpoints, "load_official", lambda path: asked.append(Path(path).name) or (None, None))
        asked.clear()
        code.run_released(world)
        found[item.module.removeprefix("aigid_repro.")] = tuple(asked)
    assert "generalization.run_networks(" in inspect.getsource(types.run_study)
    assert "run_released(" in inspect.getsource(generalization.run_networks)
    assert module.RELEASED == found | {"commfor.types": found["commfor.generalization"]}


def test_the_study_that_builds_a_training_by_itself(monkeypatch):
    from aigid_repro.gapl import scaling
    from aigid_repro.review import generators
    item, = find_items(item="review/more_generators")
    planned = []
    def record(plan, *_, **__):
        planned.extend(t.train for _, t in plan)
        return pd.DataFrame([f | dict(which=f["detector"]) for f, _ in plan])
    for code in (scaling, generators): monkeypatch.setattr(code, "run_trainings", record)
    settings, world = settings_of(item), SimpleNamespace(families=lambda: {"LatDiff": [f"m{i}" for i in range(600)]}, large="LatDiff")
    generators.run_study(settings, world, profile="paper")
    assert {t["detector"] for t in planned} == {"gapl", "commfor-vit"}
    def names(trains): return {n.name for n in module.weights_of(item, trains, [])}
    monkeypatch.setenv("AIGID_DATA", "/nowhere")
    assert names(planned) == names(trainings_of(item, settings)) == {"clip-l14", "vit-small-384"}


# ---- running

@pytest.fixture
def project(tmp_path, monkeypatch):
    "Three real items in a project of their own."
    root = toy.make(tmp_path/"project")
    keys = "commfor/table1_composition", "spai/table4_radius", "commfor/fig13_length"
    rows = [f"{i.paper},{i.item},{i.notebook},{i.module},title" for i in items() if i.key in keys]
    (root/"data/items.csv").write_text("\n".join(["paper,item,notebook,module,title", *rows]) + "\n")
    return root


def test_run_what_can_be_run(project, copy, monkeypatch, capfd):
    shutil.move(copy/"CommunityForensics/data/manual", copy.parent/"later")
    monkeypatch.chdir(copy.parent)
    rows = reproduce("paper", root=project, data="public data") # relative to where one is
    said = capfd.readouterr().out
    assert [r["status"] for r in rows] == ["done", "not run", "left out"] and exit_code(rows) == 1
    assert said.index("what is missing") < said.index("commfor/table1_composition: running")
    assert "commfor/fig13_length: not run (missing: CommunityForensics)" in said and "commfor/fig13_length: not run" in lacking_text(rows)
    folder = project/"results/paper/commfor/table1_composition"
    assert read_run(folder)["missing"] == ["CommunityForensics/manual"] and (folder/"table.csv").exists()
    assert not (project/"results/paper/commfor/fig13_length").exists() and "AIGID_DATA" not in runner.os.environ

    assert reproduce("paper", item="table1_composition", root=project, data=copy)[0]["status"] == "up to date"
    shutil.move(copy.parent/"later", copy/"CommunityForensics/data/manual")
    row, = reproduce("paper", item="table1_composition", root=project, data=copy)
    assert row["status"] == "done" and "running (CommunityForensics/manual was missing when it was run)" in capfd.readouterr().out
    assert read_run(folder)["missing"] == []
    shutil.rmtree(copy/"CommunityForensics") # what was made is not lost with the data
    for name in ("CommunityForensics-Eval", "CommunityForensics-Small"): shutil.rmtree(copy/name)
    assert reproduce("paper", item="table1_composition", root=project, data=copy)[0]["status"] == "up to date"


def test_reasons_and_places_of_data_are_not_in_results(copy):
    "Otherwise moving the data would make partial items run again."
    first = paper_plan(item="spai/robustness", data=copy)
    moved = paper_plan(item="spai/robustness", data=shutil.move(copy, copy.parent/"elsewhere"))
    assert first.missing.tolist() == moved.missing.tolist() and "SPAI/glide" in first.missing[0]
    assert "glide (" in " ".join(plan_text(first, copy.parent/"elsewhere").split())


def test_words_above_the_data_do_not_count(copy):
    from aigid_repro.commfor import composition
    place = copy.parent/"manual systematic eval"
    shutil.move(copy, place)
    for gone in ("manual", "systematic"): shutil.rmtree(place/"CommunityForensics/data"/gone)
    row = of(paper_plan(item="commfor/table1_composition", data=place), "commfor/table1_composition")
    assert composition.public_files(place)[0] and {"CommunityForensics/manual", "CommunityForensics/systematic"} <= set(row.missing)


def test_what_is_lacking_is_asked_for_as_the_run_was(copy):
    rows = [dict(item="spai/components", status="not run", message="missing: SPAI")]
    last = lacking_text(rows, data=copy, paper="spai", item=None).splitlines()[-1]
    words = shlex.split(last.partition(": ")[2])
    assert Path(words[0]).name == "aigid"
    assert words[1:] == ["reproduce", "--profile", "paper", "--data", str(copy), "--paper", "spai", "--plan"]
    assert lacking_text(rows).endswith("aigid reproduce --profile paper --plan") and lacking_text([]) == ""


def test_every_command_of_a_line_can_be_typed(nothing, copy, monkeypatch):
    "Also one that stands at the end of a sentence, and with a space in the folder's name."
    monkeypatch.setattr(module.sys, "executable", str(storage.root()/".venv/bin/python"))
    commands = {n.command for needs in nothing[0].needs for n in needs}
    for c in (module.runnable(c, copy) for c in commands):
        assert not re.search(r"(?<!/)\b(aigid (weights|data)|hf download|python -c) ", c), c
    assert any(f"then run: AIGID_DATA='{copy}' .venv/bin/aigid weights check spai" in module.runnable(c, copy) for c in commands)


def test_without_data(project, monkeypatch, capsys):
    monkeypatch.delenv("AIGID_DATA", raising=False)
    rows = reproduce("paper", root=project)
    assert [r["status"] for r in rows] == ["not run", "not run", "left out"] and exit_code(rows) == 1
    assert "make reproduce PROFILE=paper DATA=/path/to/folder" in capsys.readouterr().out
    assert not list((project/"results").rglob("run.json"))


def test_a_folder_that_is_not_there(project, monkeypatch):
    with pytest.raises(InputError, match="dato: no such folder; DATA= names the one"): reproduce("paper", root=project, data="dato")
    monkeypatch.setenv("AIGID_DATA", "nowhere")
    with pytest.raises(InputError, match="nowhere: no such folder; AIGID_DATA names"): paper_plan()
    assert not (project/"results").exists()


def test_other_items_need_nothing(finished, monkeypatch, capsys):
    monkeypatch.delenv("AIGID_DATA", raising=False)
    assert paper_plan(finished).runs.tolist() == ["yes"] and "of 1 items 1 can run" in plan_text(paper_plan(finished))
    row, = reproduce("paper", root=finished)
    assert row["status"] == "done" and "missing" in read_run(finished/"results/paper/toy/coin")
    assert reproduce(root=finished)[0]["status"] == "up to date" and "missing" not in read_run(finished/"results/mini/toy/coin")


# ---- a user's own photos

@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path/"my photos").mkdir()
    shutil.copy(next((storage.root()/"data/photos").glob("*.webp")), tmp_path/"my photos")
    monkeypatch.setenv("AIGID_PHOTOS", str(tmp_path/"my photos"))
    monkeypatch.setenv("AIGID_CACHE", str(tmp_path/"cache"))
    return tmp_path/"my photos"


def test_items_about_the_embedded_corpus_are_left_out_on_own_photos(own, project, capsys):
    without = {i.key for i in items() if world_of(i) is None} | {"review/simulated_generators"}
    assert {i.key for i in items() if module.embedded_only(i)} == without > {"data/audit", "commfor/table1_composition"}
    stale = project/"results/mini-own-photos/commfor/table1_composition"
    for _ in range(2):
        row, = reproduce(item="table1_composition", root=project)
        assert row["status"] == "left out" and "about the embedded corpus" in row["message"] and exit_code([row]) == 0
        assert not (stale/"run.json").exists()
        stale.mkdir(parents=True, exist_ok=True)
    assert "commfor/table1_composition: left out (it is about the embedded corpus" in capsys.readouterr().out


def test_results_on_own_photos_say_how_to_make_them_again(own, tmp_path, monkeypatch):
    item, = items(toy.make(tmp_path/"project"))
    def told(profile):
        run = runner.run_item(item, dict(profile=profile, seed=0))
        return run["command"], run.get("photos"), run.get("generators")
    made = f"make reproduce PROFILE=mini PAPER={item.paper} ITEM={item.item}"
    assert told("mini") == (f"AIGID_PHOTOS='{own}' {made}", str(own), None)
    monkeypatch.setenv("AIGID_GENERATORS", "tiny/sd, flux/vae")
    assert told("mini") == (f"AIGID_PHOTOS='{own}' AIGID_GENERATORS='tiny/sd, flux/vae' {made}", str(own), "tiny/sd, flux/vae")
    assert read_run(item.folder("mini"))["generators"] == "tiny/sd, flux/vae"
    assert told("smoke") == (made.replace("mini", "smoke"), None, None)
    monkeypatch.delenv("AIGID_PHOTOS")
    assert told("mini") == (made, None, None)


# ---- rooms that no experiment reads

def test_data_of_users_rooms_counts_for_no_item(tmp_path, monkeypatch):
    assert {"public", "score"} <= {p.name for p in storage.package_dir().iterdir()}
    assert runner._papers() == {"commfor", "spai", "gapl", "gensign"}
    monkeypatch.setattr(runner, "_room_stamp", lambda m: "") # code is the next test's
    project = toy.make(tmp_path/"project")
    of_paper = [replace(i, root=project) for i in {i.paper: i for i in items()}.values()]
    before = [runner.stamp(i, {}) for i in of_paper]
    def add(room):
        (project/"data"/room).mkdir()
        (project/"data"/room/"any.json").write_text(json.dumps(room))
        return {i.paper for i, b in zip(of_paper, before) if runner.stamp(i, {}) != b}
    assert add("public") == add("score") == set()
    assert add("gapl") == {"gapl", "review"}


def test_code_of_users_rooms_counts_for_no_item(tmp_path, monkeypatch):
    for room in ("data", "detect", "review", "spai", "gapl", "public", "score"):
        (tmp_path/room).mkdir()
        for name in ("__init__", "radius", "scaling", "generators"): (tmp_path/room/f"{name}.py").write_text("x = 1\n")
    for m in (storage, runner): monkeypatch.setattr(m, "package_dir", lambda: tmp_path)
    modules = [f"aigid_repro.{m}" for m in ("spai.radius", "gapl.scaling", "review.generators")]
    before = [runner._room_stamp(m) for m in modules]
    def add(room):
        (tmp_path/room/"new.py").write_text("x = 2\n")
        return {m.split(".")[1] for m, b in zip(modules, before) if runner._room_stamp(m) != b}
    assert add("public") == add("score") == set()
    assert add("gapl") == {"gapl", "review"}
