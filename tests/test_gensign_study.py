"""GenSign's three stages and experiments: what ships, what is reused, what simulation does to labels, and the way to effects."""
import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

from aigid_repro.data.storage import InputError, root
from aigid_repro.detect import studies
from aigid_repro.detect.detector import create, load_detector, save_detector
from aigid_repro.detect.studies import Training, as_run, embedded, identity
from aigid_repro.detect.summary import invent
from aigid_repro.detect.training import change_of, train_settings
from aigid_repro.gensign import components, extractors, generalization, learning, reconstructor, robustness, simulation
from aigid_repro.gensign.augmentation import Simulation, make_known, self_augmentation, simulation_name
from aigid_repro.gensign.recipe import ROOMS, Origin, detector_of, make_ready, origin_of, recipe, scored
from aigid_repro.review.claims import read_claims

ITEMS = {"ablation_streams": components, "ablation_simulation": simulation, "table1_generators": generalization}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "The smoke corpus in a cache of its own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIGID_CACHE", str(tmp_path_factory.mktemp("cache")))
        reconstructor.reconstructor.cache_clear()
        extractors.extractor.cache_clear()
        found = embedded("smoke")
        found.prepare(1)
        yield found


# what comes with the kit


def wanted():
    "Names of all stages that trainings of profile mini build on."
    trains = [t.train for module in (components, simulation, generalization, robustness)
              for _, t in module.plan(module.preset("mini"), None)]
    origins = {o for t in trains if (o := origin_of(t))}
    sources = {s.source for o in origins if (s := o.settings()).source}
    return ({extractors.extractor_name(o.settings()) for o in origins}
            | {reconstructor.reconstructor_name(s) for s in sources})


def test_stages_of_mini_are_shipped_and_nothing_else_is():
    shipped = {p.stem for p in (root()/"data"/"gensign").glob("*.safetensors")}
    assert shipped == wanted()


def test_shipped_stages_say_how_they_were_made():
    for path in (root()/"data"/"gensign").glob("*.safetensors"):
        with safe_open(path, "pt") as f: about = json.loads(f.metadata()["gensign"])
        made = reconstructor.ReconstructorSettings if about["kind"] == "reconstructor" else extractors.ExtractorSettings
        assert set(about["settings"]) == set(made.__dataclass_fields__) and about["settings"]["steps"] > 0
        state, _ = learning.read(path)
        assert all(v.isfinite().all() for v in state.values())


def test_shipped_reconstructor_reconstructs():
    "Unseen photos; the limits are two decibels below what was measured."
    from aigid_repro.data.photos import render, sample_crops
    photos = [render(c, 128) for c in sample_crops("validation", 1, 128)]
    settings = reconstructor.preset("mini", batch=16)
    x = learning.batch_of(photos, settings, 0)
    net = reconstructor.reconstructor(reconstructor.preset("mini"))
    for (depth, plans), limit in zip(reconstructor.by_depth(3, 4).items(), (31, 30, 26)):
        assert min(reconstructor.psnr(net, x, plans)) > limit, depth


# stages build on each other


def test_stages_are_trained_once_and_found_again(world, monkeypatch):
    train = recipe("smoke", options=dict(weights="", adapt="none"), precision="no")
    run = as_run(Training(train), world, ROOMS)
    make_ready([train])
    monkeypatch.setattr(extractors, "learn", lambda *a, **k: pytest.fail("stage II again"))
    monkeypatch.setattr(reconstructor, "learn", lambda *a, **k: pytest.fail("stage I again"))
    detector, _ = detector_of(run)
    known = extractors.extractor(Origin(profile="smoke").settings()).state_dict()
    assert all(torch.equal(v, known[k]) for k, v in detector.extractor.state_dict().items())
    monkeypatch.setattr(studies, "learn", lambda *a, **k: pytest.fail("trained again"))
    first, second = scored(run), scored(run)
    assert np.array_equal(first.logit, second.logit)


def test_names_tell_trainings_apart(world):
    changes = [{}, dict(share=.3), dict(share=0.), dict(traces="srm"), dict(streams="rgb"), dict(origin=dict(levels=1)),
               dict(origin=dict(reads="reconstruction")), dict(simulation=dict(levels=1)), dict(simulation=dict(models=10)),
               dict(simulation=dict(kernels=8))]
    runs = [identity(as_run(Training(recipe("smoke", **c)), world, ROOMS)) for c in changes]
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("traces, origin", [("network", dict(kind="noiseprint")), ("network", {}), ("srm", {})])
def test_saved_detectors_say_the_same(world, tmp_path, traces, origin):
    train = recipe("smoke", traces=traces, origin=origin, share=0., options=dict(weights="", adapt="none"))
    torch.manual_seed(0)
    detector = create("gensign", **dict(train["options"])).eval()
    save_detector(detector, tmp_path/"it")
    again, x = load_detector(tmp_path/"it"), torch.rand(2, 3, 32, 32)*2 - 1
    with torch.no_grad(): assert torch.equal(detector(x), again(x))
    assert dict(again.settings).get("origin", "") == dict(train["options"]).get("origin", "")


# simulation


class Identity:
    "A reconstructor without any fault."
    sizes = dict(levels=3)

    def reconstruct(self, x, plan): return x


def test_a_perfect_reconstructor_teaches_doubt():
    "Real photos are then relabelled at random: the best loss on them is the entropy of the share."
    change = self_augmentation(Simulation(), Identity(), .2)
    x, real = torch.zeros(64, 8, 8, 3, dtype=torch.uint8), torch.zeros(64)
    p = np.mean([change(x, real, np.random.default_rng(i))[1].mean().item() for i in range(400)])
    assert abs(p - .2) < .01
    entropy = -p*math.log(p) - (1 - p)*math.log(1 - p)
    loss, half = torch.nn.functional.binary_cross_entropy_with_logits, torch.full((64,), p, dtype=torch.double)
    losses = [loss(torch.full_like(half, v), half).item() for v in np.linspace(-4, 4, 81)]
    assert abs(min(losses) - entropy) < 1e-3 and abs(entropy - .5) < .02


def test_another_papers_detector_learns_with_simulation(world):
    from aigid_repro.commfor import recipe as commfor
    train = commfor.recipe("smoke") | dict(change=simulation_name(profile="smoke"), change_share=.5)
    detector, _ = detector_of(as_run(Training(train, 3), world, (*commfor.ROOMS, *ROOMS)))
    plain, _ = detector_of(as_run(Training(commfor.recipe("smoke"), 3), world, (*commfor.ROOMS, *ROOMS)))
    assert any(not torch.equal(a, b) for a, b in zip(detector.parameters(), plain.parameters()))


def test_a_reconstructor_wants_sides_of_eight():
    make_known(name := simulation_name(profile="smoke", share=1))
    changed = change_of(train_settings(change=name, change_share=1.), torch.device("cpu"))
    with pytest.raises(InputError, match="multiples of 8"):
        changed(torch.zeros(2, 30, 30, 3, dtype=torch.uint8), torch.zeros(2), np.random.default_rng(0))


# from predictions to claims


@pytest.mark.parametrize("item", ITEMS)
def test_effects_are_the_claims_of_the_table(item):
    module = ITEMS[item]
    made = invent(module.plan(module.preset("mini", seeds=2), None), lambda f: 1 + f.get("share", 0), images=20)
    claims = read_claims().query(f"paper == 'gensign' and item == '{item}'").set_index("id")
    effects = module.effects(made).set_index("claim")
    assert set(claims.index) - set(effects.index) <= {"gensign-table1-beats-trivial"} # trivial classifiers are not trained
    assert set(effects.index) <= set(claims.index) and (effects.unit == claims.unit[effects.index]).all()


@pytest.mark.parametrize("item", ITEMS)
def test_products_stand_in_captions(item):
    import matplotlib.pyplot as plt
    module = ITEMS[item]
    made = invent(module.plan(module.preset("smoke"), None), lambda f: 1., images=12)
    assert set(module.tables(made)) | set(module.figures(made)) == set(module.captions) and module.effects(made).claim.is_unique
    plt.close("all")


@pytest.mark.parametrize("module", [*ITEMS.values(), robustness])
def test_unknown_profiles(module):
    with pytest.raises(InputError, match="known: smoke|no profile"): module.preset("tiny")
