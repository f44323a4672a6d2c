"""Studies: plans of every item at every profile, shared and interrupted trainings, streams, claims."""
import dataclasses
import importlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import IterableDataset

from aigid_repro.data.corpus import png
from aigid_repro.data.storage import InputError
from aigid_repro.detect import networks, studies  # noqa: F401 - networks registers the detectors
from aigid_repro.detect.results import items
from aigid_repro.detect.studies import Training, as_run, embedded, identity, run_trainings, trained
from aigid_repro.detect.summary import invent
from aigid_repro.detect.training import train, train_settings
from aigid_repro.review.claims import read_claims

COMMFOR = [i for i in items() if i.paper == "commfor"]
PLANNED = [i for i in COMMFOR if i.item.startswith(("fig01", "fig04", "fig05", "fig06", "fig13", "table2"))]
PROFILES = "smoke", "mini", "gpu", "paper"


def module_of(item):
    return importlib.import_module(item.module)


class PublicLike:
    "A public world's answers, without its files."
    kind, large = "public", "LatDiff"

    def families(self):
        return {"LatDiff": [f"author/model-{i}" for i in range(4000)], "GAN": ["StyleGAN3", "BigGAN"]}

    def model_counts(self):
        return {f"author/model-{i}": i for i in range(4000)}

    def sources(self):
        return {"laion": 9000, "coco": 3000, "ffhq": 2000}


def plan_of(item, profile):
    module, world = module_of(item), PublicLike() if profile == "paper" else embedded(profile)
    settings = module.preset(profile)
    if item.item == "fig01_scaling":
        return module.trainings(module.plan(settings, world.families(), world.large), settings)
    with_world = item.item.startswith(("fig04", "fig06b", "table2"))
    return module.plan(settings, world) if with_world else module.plan(settings)


@pytest.mark.parametrize("item", COMMFOR, ids=lambda i: i.item)
def test_unknown_profile_is_named(item):
    with pytest.raises(InputError, match="huge"): module_of(item).preset("huge")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("item", PLANNED, ids=lambda i: i.item)
def test_every_plan_is_made_of_valid_trainings(item, profile):
    plan = plan_of(item, profile)
    assert plan and len({f["run"] for f, _ in plan}) == len(plan)
    for _, training in plan:
        settings = train_settings(seed=training.seed, **training.train)
        if profile == "paper":
            assert settings.lr == 2e-5 and settings.batch == 512 and settings.schedule == "commfor" and settings.epoch > 0


@pytest.mark.parametrize("item", PLANNED, ids=lambda i: i.item)
def test_effects_are_those_of_the_claims(item):
    plan = [(f | {"role": f.get("role", "ours")}, t) for f, t in plan_of(item, "mini")]
    if item.item.startswith("table2"): plan.append((dict(run="t", detector="sharpness only", role="trivial"), SimpleNamespace(seed=0)))
    found = set(module_of(item).effects(invent(plan, lambda f: 1., images=6)).claim)
    claims = read_claims()
    assert found == set(claims.id[(claims.paper == "commfor") & (claims.item == item.item)])


def test_intervals_rest_on_five_runs_or_more():
    for item in PLANNED:
        groups = pd.DataFrame([{k: v for k, v in f.items() if k not in ("run", "subset", "draw")} for f, _ in plan_of(item, "mini")])
        assert groups.groupby(list(groups.columns), dropna=False).size().min() >= 5, item.item


@pytest.fixture
def world(tmp_path, monkeypatch):
    small = embedded("smoke")
    small.prepare(1)
    monkeypatch.setattr(studies, "cache_dir", lambda *parts: _made(tmp_path.joinpath(*parts)))
    return small


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


TINY = dict(detector="high-pass-cnn", steps=2, batch=4, crop=32)


def test_released_weights_take_part_where_they_are(tmp_path, monkeypatch):
    from aigid_repro.commfor import generalization
    from aigid_repro.commfor.checkpoints import save_hub
    from aigid_repro.commfor.model import CommForViT
    monkeypatch.setenv("AIGID_DATA", str(tmp_path))
    public = SimpleNamespace(score=lambda detector, precision: pd.DataFrame({"side": [detector.preprocess.crop]}))
    assert generalization.run_released(public) == []
    save_hub(CommForViT("mini", 224, 16), tmp_path/"weights/commfor-model-224")
    found, = generalization.run_released(public)
    assert found.iloc[0][["side", "role", "run"]].tolist() == [224, "released", "released weights at 224 px"]


def test_a_detector_is_trained_once(world, monkeypatch, tmp_path):
    run = as_run(Training(TINY, images=6), world)
    first = trained(run)[0].state_dict()
    folder = tmp_path/"detectors"/identity(run)
    from aigid_repro.detect import training
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("trained twice"))
    again = trained(run)[0].state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    monkeypatch.undo()
    (folder/"config.json").unlink() # as after an interruption between the two files
    monkeypatch.setattr(studies, "cache_dir", lambda *parts: _made(tmp_path.joinpath(*parts)))
    assert all(torch.equal(first[k], v) for k, v in trained(run)[0].state_dict().items()) and (folder/"config.json").exists()


def test_identity_knows_all_that_matters(world):
    base = Training(TINY, images=6)
    runs = [base, dataclasses.replace(base, seed=1), dataclasses.replace(base, images=5), dataclasses.replace(base, pool="manual"),
            dataclasses.replace(base, train=TINY | {"steps": 3})]
    assert len({identity(as_run(t, world)) for t in runs}) == len(runs)
    assert identity(as_run(base, world)) != identity(as_run(base, world, ["commfor.model"]))


def test_runs_of_one_name_are_refused(world):
    plan = [(dict(run="same", detector="d"), Training(TINY, s)) for s in (0, 1)]
    with pytest.raises(ValueError, match="'same'"): run_trainings(plan, world)


def test_too_few_images_are_named(world):
    with pytest.raises(InputError, match="1000 real images"): world.data(Training(TINY, images=1000))
    with pytest.raises(InputError, match="split 'night'"): world.images("night", 3)


class Stream(IterableDataset):
    "Endless, told apart by label; remembers how it was opened."
    opened = []

    def __init__(self, rank, processes, start):
        self.start = start
        Stream.opened.append((rank, processes, start))

    def __iter__(self):
        for i in range(self.start, 10_000):
            rng = np.random.default_rng(i)
            pixels = rng.integers(50*(i % 2), 150 + 100*(i % 2), (40, 40, 3), dtype=np.uint8)
            yield (png(pixels) if i % 3 else pixels), i % 2


def test_training_from_a_stream_learns_and_resumes(tmp_path):
    settings = train_settings(steps=12, batch=8, crop=32, precision="no", sampling="natural")
    log = []
    train(settings, Stream, log=log)
    assert [s for s, _ in log] == list(range(12)) and np.mean([v for _, v in log[-3:]]) < np.mean([v for _, v in log[:3]])

    class Stop(Exception):
        pass

    class StopAt(list):
        def append(self, entry):
            super().append(entry)
            if entry[0] == 9: raise Stop
    with pytest.raises(Stop): train(settings, Stream, checkpoint=tmp_path/"c", every=4, log=StopAt())
    log = []
    train(settings, Stream, checkpoint=tmp_path/"c", every=4, log=log)
    assert [s for s, _ in log] == [8, 9, 10, 11] and Stream.opened[-1] == (0, 1, 64)


@pytest.mark.parametrize("change, words", [(dict(augmentation="palin"), "plain"), (dict(schedule="linear"), "cosine"),
                                           (dict(sampling="odd"), "balanced or natural"),
                                           (dict(schedule="commfor"), "epoch")])
def test_unknown_parts_of_a_recipe_are_named(change, words):
    from aigid_repro.commfor import recipe  # noqa: F401 - registers schedule commfor
    rows = pd.DataFrame([{"image": png(np.full((40, 40, 3), 100*y, np.uint8)), "label": y} for y in (0, 1)])
    with pytest.raises(InputError, match=words): train(train_settings(**TINY | change), rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is possible")
def test_half_precision_of_the_paper_needs_a_gpu():
    rows = pd.DataFrame([{"image": png(np.full((40, 40, 3), 100*y, np.uint8)), "label": y} for y in (0, 1)])
    with pytest.raises(InputError, match="needs a GPU"): train(train_settings(**TINY, precision="fp16"), rows)
