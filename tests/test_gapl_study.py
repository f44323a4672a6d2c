"""GAPL's experiments: the official schedule and prototypes, the two stages at toy size, the way from predictions to effects."""
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from aigid_repro.data.storage import InputError, root
from aigid_repro.detect import studies
from aigid_repro.detect.detector import create, load_detector
from aigid_repro.detect.results import products
from aigid_repro.detect.studies import Training, as_run, embedded, identity
from aigid_repro.detect.summary import invent
from aigid_repro.detect.training import predict, train, train_settings
from aigid_repro.gapl import attention, components, dictionary, robustness, stages
from aigid_repro.gapl.encoders import merged
from aigid_repro.gapl.prototypes import prototypes
from aigid_repro.gapl.recipe import PROFILES, ROOMS, gapl_schedule, option, recipe
from aigid_repro.review.claims import read_claims

FOLDER = Path(__file__).parent/"parity"/"gapl"
ITEMS = {"table4_components": components, "fig05_prototypes": dictionary, "fig06_robustness": robustness, "fig07_attention": attention}


def load(name):
    with np.load(FOLDER/name) as f: return dict(f)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "The smoke corpus in a cache of its own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIGID_CACHE", str(tmp_path_factory.mktemp("cache")))
        stages._drawn.cache_clear()
        found = embedded("smoke")
        found.prepare(1)
        yield found


def run_of(world, seed=0, training=None, **options):
    return as_run(Training(recipe("smoke", options=options, precision="no") | (training or {}), seed), world, ROOMS)


# the official code's numbers


@pytest.mark.parametrize("name", ["e3_i10_w20", "e2_i25_w20", "e10_i8_w20"])
def test_schedule(name):
    epochs, length, warmup = (int(part[1:]) for part in name.split("_"))
    rates = 1e-4*gapl_schedule(train_settings(steps=epochs*length, epoch=length, warmup=warmup/100))
    np.testing.assert_allclose(rates, load("golden_schedule.npz")[name], rtol=1e-9)


@pytest.mark.parametrize("number", [16, 64])
def test_prototypes(number):
    golden = load("golden_pca.npz")
    found = prototypes(golden["real_features"], golden["fake_features"], number)
    assert found.shape == (number, 128) and np.abs(found - golden[f"prototypes{number}"]).max() < 1e-5
    swapped = prototypes(golden["fake_features"], golden["real_features"], number)
    assert np.abs(swapped - golden[f"prototypes{number}"]).max() > .1 # the real half comes first


# stages


def test_typical_generators_of_the_corpus(world):
    families = world.families()
    of = {g: f for f, members in families.items() for g in members}
    chosen = [stages.typical_generators(families, 3, s) for s in range(8)]
    assert chosen == [stages.typical_generators(families, 3, s) for s in range(8)] and len(set(chosen)) > 3
    assert all(len({of[g] for g in c}) == 3 for c in chosen)
    with pytest.raises(InputError, match="generators are there"): stages.typical_generators(families, 10**6)


def test_start(world):
    "The projection has learned; prototypes are orthonormal axes of either class, and follow from the seed."
    def started(seed, **options):
        run = run_of(world, seed, **options)
        training, _ = studies.parts(run)
        settings = train_settings(seed=seed, **training.train)
        torch.manual_seed(seed)
        detector = create("gapl", **dict(settings.options))
        before = detector.projection.weight.clone()
        stages.start(detector, training, world, settings)
        return detector, before
    detector, before = started(0)
    assert not torch.equal(detector.projection.weight, before) and detector.prototypes.shape == (8, 128)
    for half in detector.prototypes.chunk(2): torch.testing.assert_close(half @ half.T, torch.eye(4), atol=1e-5, rtol=0)
    assert torch.equal(started(0)[0].prototypes, detector.prototypes) and not torch.equal(started(1)[0].prototypes, detector.prototypes)
    random = started(0, origin="random")[0]
    assert torch.equal(random.projection.weight, detector.projection.weight) and not torch.equal(random.prototypes, detector.prototypes)
    assert torch.equal(started(0, mapping="none")[0].projection.weight, detector.projection.weight)
    assert not torch.equal(started(0, types=1)[0].prototypes, detector.prototypes)


OPTIONS = {}, dict(adapt="none"), dict(mapping="none"), dict(adapt="none", mapping="none"), dict(origin="random")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(f"{k} {v}" for k, v in o.items()) or "whole")
def test_saved_detector(world, options, monkeypatch):
    "What is kept, what is not, and that it is found again."
    run = run_of(world, **options)
    detector, _ = stages.detector_of(run)
    folder = Path(studies.cache_dir("detectors"))/identity(run)
    names = {k.split(".")[0] for k in detector.state_dict()}
    of_encoder = [k for k in detector.state_dict() if k.startswith("encoder.")]
    assert bool(of_encoder) == (options.get("adapt") != "none") and all("lora_" in k for k in of_encoder)
    assert ("prototypes" in names) == ("mapping" in names) == (options.get("mapping") != "none") and {"projection", "head"} <= names
    assert (folder/"model.safetensors").stat().st_size < 3e6 # the encoder's own weights (13 MB) come by name
    monkeypatch.setattr(stages, "make", None)
    again, images = load_detector(folder), world.images("test", 2)[1]
    assert (predict(again, images) == predict(stages.detector_of(run)[0], images)).all()


def test_stage_two_changes_what_it_should(world):
    "Adapters, projection, mapping and head learn; prototypes and the encoder stay."
    run = run_of(world, training=dict(steps=3))
    training, _ = studies.parts(run)
    settings = train_settings(seed=0, **training.train)
    torch.manual_seed(0)
    first = create("gapl", **dict(settings.options))
    stages.start(first, training, world, settings)
    last = stages.make(training, world, settings, Path())
    before, after = (torch.nn.Module.state_dict(d) for d in (first, last))
    changed = {k for k in after if not torch.equal(before[k], after[k])}
    assert {"projection.weight", "head.weight", "mapping.in_proj_weight"} <= changed
    assert all("lora_" in k or k.split(".")[0] in ("projection", "head", "mapping") for k in changed)
    assert any("lora_B" in k for k in changed)


def test_frozen_detectors_are_scored_from_stored_features(world):
    run = run_of(world, adapt="none")
    found = stages.scored(run).set_index("id").logit
    plain = world.score(stages.detector_of(run)[0], "no").set_index("id").logit
    assert len(found) > 100 and set(found.index) == set(plain.index)
    np.testing.assert_allclose(found, plain.loc[found.index], atol=1e-4)


def test_merged_adapters_score_alike(world):
    run = run_of(world, training=dict(steps=3))
    images = world.images("test", 3)[1]
    detector, _ = stages.detector_of(run)
    plain = predict(detector, images)
    with merged(detector): np.testing.assert_allclose(predict(detector, images), plain, atol=1e-4)
    assert (predict(detector, images) == plain).all() # taken out again
    for_good, _ = robustness.merged_detector(run)
    np.testing.assert_allclose(predict(for_good, images), plain, atol=1e-4)


def test_an_interrupted_training_goes_on(world, tmp_path):
    "With dropout in the adapters; a fresh start is given, the stored state wins."
    settings = train_settings(**recipe("smoke", steps=4, options=dict(dropout=.3, origin="random", weights=""), precision="no"))
    data = world.data(Training({}, 0))

    def fresh():
        torch.manual_seed(0)
        return create("gapl", **dict(settings.options))

    class Stop(Exception):
        pass

    class StopAt(list):
        def append(self, entry):
            super().append(entry)
            if entry[0] == 3: raise Stop
    whole = train(settings, data, model=fresh()).state_dict()
    with pytest.raises(Stop): train(settings, data, checkpoint=tmp_path/"c", every=2, log=StopAt(), model=fresh())
    log = []
    resumed = train(settings, data, checkpoint=tmp_path/"c", every=2, log=log, model=fresh()).state_dict()
    assert [step for step, _ in log] == [2, 3] and all(torch.equal(whole[k], resumed[k]) for k in whole)


# presets and plans


@pytest.mark.parametrize("name", ITEMS)
def test_plans(name):
    module = ITEMS[name]
    for profile in (*PROFILES, "paper"):
        settings = module.preset(profile)
        runs = module.plan(settings, None)
        assert len({f["run"] for f, _ in runs}) == len(runs)
        for _, training in runs: train_settings(seed=training.seed, **training.train)
        assert not any(str(root()) in v for v in json.dumps(asdict(settings)).split('"')) # no path of this machine
        assert {t.seed for _, t in module.plan(settings, None, seed=3)} == {3000 + t.seed for _, t in runs}
    with pytest.raises(InputError, match="'huge'"): module.preset("huge")


@pytest.mark.parametrize("profile", ["smoke", "mini", "gpu", "paper"])
def test_detectors_are_trained_once_for_all_items(profile):
    def trainings(name): return [t for _, t in ITEMS[name].plan(ITEMS[name].preset(profile), None)]
    parts = trainings("table4_components")
    whole = [t for t in parts if t.train == recipe(profile)]
    assert len(whole) == components.SEEDS[profile] and whole == trainings("fig07_attention")
    assert all(t in trainings(name) for name in ("fig05_prototypes", "fig06_robustness") for t in whole)
    assert sum(t in parts for t in trainings("fig05_prototypes")) == 2*len(whole)
    assert sum(t in parts for t in trainings("fig06_robustness")) == 2*len(whole)


def test_options_of_the_variants():
    rows = dict(components.preset("mini").trained)
    found = {row: tuple(option(train, name) for name in ("adapt", "mapping", "origin")) for row, train in rows.items()}
    assert found == {"no part": ("none", "none", None), "PM": ("none", None, "random"), "LoRA": ("lora", "none", None),
                     "PCA + PM": ("none", None, None), "PM + LoRA": ("lora", None, "random"), "PCA + PM + LoRA": ("lora", None, None)}
    variants = [(n, types, option(t, "types", 3), option(t, "origin", "pca")) for n, types, t in dictionary.preset("mini").trained]
    assert variants == [(16, 3, 3, "pca"), (32, 3, 3, "pca"), (64, 3, 3, "pca"), (64, 0, 3, "random"), (64, 1, 1, "pca"), (64, 2, 2, "pca"),
                        (64, 4, 4, "pca")]


# from predictions to effects


def invented(name):
    "Predictions with a known effect."
    module = ITEMS[name]
    if name == "table4_components":
        worth = dict(zip(components.ROWS, (.1, .6, 1.5, 1., 2., 2.8)))
        return invent(module.plan(module.preset("mini"), None), lambda f: worth[f["detector"]], images=60)
    if name == "fig05_prototypes": return invent(module.plan(module.preset("mini"), None), lambda f: .5 + .7*min(f["types"], 3), images=60)
    rng, kinds = np.random.default_rng(0), [("real", "real", 0), ("waifu2x", "manual", 1), ("Real-ESRGAN", "unseen", 1)]
    about = [dict(id=f"{f}/{i}", label=y, generator=f, family=f, set=s, source=str(i), crop=str(i), split="test", seed=seed)
             for seed in range(3) for f, s, y in kinds for i in range(40)]
    if name == "fig07_attention":
        w = rng.dirichlet(np.full(16, .1), len(about))
        shifted = [np.roll(np.sort(v), 0 if a["label"] else 8) for v, a in zip(w, about)] # the largest weights on the own half
        weights = pd.DataFrame(np.array(shifted, np.float32), columns=attention.weight_columns(16))
        runs = [f"GAPL, seed {a['seed']}" for a in about]
        return pd.DataFrame(about).assign(detector="GAPL", run=runs, logit=0., used_at_start=15.).join(weights)
    hard = {("none", 0.): 0, ("jpeg-pillow", 90.): .3, ("jpeg-pillow", 50.): 1.2, ("blur-scipy", 1.): .5, ("blur-scipy", 3.): 2.}
    return pd.DataFrame([a | dict(detector=d, run=f"{d}, seed {a['seed']}", perturbation=p, severity=v,
                                  logit=(2*a["label"] - 1)*1.5 - lost*(d != robustness.GAPL)*a["label"] + rng.normal())
                         for a in about for d in (robustness.GAPL, robustness.FROZEN, robustness.CNN) for (p, v), lost in hard.items()])


@pytest.mark.parametrize("name", ITEMS)
def test_products_of_invented_predictions(name):
    "Everything is derived from predictions alone, has a caption, and does not depend on how strings are stored."
    made, module = invented(name), ITEMS[name]
    files = products(module.__name__, made)
    assert {Path(f).stem for f in files} == {*module.captions, "effects"}
    text = made.select_dtypes(["object", "string"]).columns
    stored = products(module.__name__, made.astype(dict.fromkeys(text, "category")))
    assert {k for k in files if k.endswith(".csv") and files[k] != stored[k]} == set()
    effects = module.effects(made)
    assert np.isfinite(effects.value).all() and (effects.n == 3).all()


@pytest.mark.parametrize("name", ITEMS)
def test_every_effect_is_claimed(name):
    claims = read_claims().query(f"paper == 'gapl' and item == '{name}'").set_index("id")
    effects = ITEMS[name].effects(invented(name)).set_index("claim")
    assert set(effects.index) == set(claims.index) and (effects.unit == claims.unit[effects.index]).all()


def test_known_effects_are_found():
    def effects(name): return ITEMS[name].effects(invented(name)).set_index("claim")
    parts = effects("table4_components")
    assert all(parts.value[f"gapl-table4-{p}-ap"] > 3 for p in components.PARTS) and parts.low["gapl-table4-lora-ap"] > 0
    fig5 = effects("fig05_prototypes")
    assert fig5.low["gapl-fig5-random-ap"] > 0 and fig5.value["gapl-fig5-one-type-ap"] > 3
    assert all(abs(fig5.value[f"gapl-fig5-{end}-ap"]) < 3 for end in ("four-types", "number"))
    fig6 = effects("fig06_robustness")
    assert fig6.low["gapl-fig6-blur"] > 5 and fig6.low["gapl-fig6-jpeg-ap"] > 0
    fig7 = effects("fig07_attention")
    assert fig7.high["gapl-fig7-sparse"] < 50 and fig7.low["gapl-fig7-halves"] > 20
    assert fig7.high["gapl-fig7-learned"] < -40 # 15 of 16 at the start


def test_a_shift_of_the_scores_is_calibration():
    "The mapping changes no order here, and its gain is all at 0.5."
    made = invented("table4_components")
    whole = made[made.detector == components.WHOLE]
    alone = whole.assign(detector="LoRA", run=whole.run.str.replace(components.WHOLE, "LoRA", regex=False), logit=whole.logit + 3)
    others = made[~made.detector.isin([components.WHOLE, "LoRA"])]
    made = pd.concat([others, whole.assign(logit=whole.logit - whole.logit.mean()), alone])
    found = components.effects(made).set_index("claim")
    assert abs(found.value["gapl-table4-mapping-ap"]) < 1e-9 and found.value["gapl-table4-mapping"] > 10
    np.testing.assert_allclose(found.value["gapl-table4-calibration"], found.value["gapl-table4-mapping"], atol=1e-6)


def test_attention_is_that_of_the_detector(world):
    run = run_of(world, origin="random")
    table = attention.attention_of(dict(run=run, crops=2))
    about, images = world.images("test", 2)
    mine = about.id[about.set.isin(["real", "systematic", "manual", "unseen"])]
    assert table.id.tolist() == mine.tolist()
    detector, _ = stages.detector_of(run)
    np.testing.assert_allclose(table.logit, predict(detector, [images[i] for i in mine.index]), atol=1e-4)
    x = detector.preprocess.tensor(torch.from_numpy(np.stack([detector.preprocess.pixels(images[i]) for i in mine.index])))
    with torch.inference_mode(): weights = detector.attention(x).numpy()
    np.testing.assert_allclose(table[attention.weight_columns(8)], weights, atol=1e-6)


@pytest.mark.parametrize("name", ITEMS)
def test_modules_come_without_torch(name):
    import subprocess
    import sys
    code = f"import sys, {ITEMS[name].__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
