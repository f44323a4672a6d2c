"SPAI's experiments: presets, encoders that come with the kit, and the way from weights to verdicts."
import importlib
import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

from aigid_repro.data.storage import InputError, root
from aigid_repro.detect.results import find_items
from aigid_repro.spai import augmentation, model, pretraining  # noqa: F401 - registers views and detector
from aigid_repro.spai.recipe import pretrained, recipe, sizes

MODULES = ["detectors", "components", "radius", "robustness", "resolution", "similarity"]


def module(name): return importlib.import_module(f"aigid_repro.spai.{name}")


@pytest.mark.parametrize("radius", [2.3, 5., 8.])
def test_encoders_of_mini_are_shipped(radius):
    s = pretraining.preset("mini", radius=radius)
    path = pretraining.find_encoder(pretraining.encoder_name(s))
    assert path.parent == root()/"data"/"encoders" and path.exists()
    encoder = pretraining.load_encoder(pretrained("mini", radius))
    assert encoder.settings == {k: v for k, v in sizes("mini").items() if k != "radius"}
    assert all((w.map - torch.eye(48)).abs().max() > .1 for w in encoder.whitening)


def test_an_encoder_that_learned_nothing_is_made_again(monkeypatch, tmp_path):
    s = pretraining.preset("mini", steps=0)
    shipped = pretraining.load_encoder(pretraining.encoder_name(s))
    again = pretraining.pretrain(s, pretraining.real_photos()).encoder
    for name, value in shipped.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-3, atol=1e-3*float(value.abs().max()) + 1e-8)
    other = pretraining.encoder(pretraining.preset("mini", steps=1, batch=2), precision="no") # not shipped: made, and found again
    assert pretraining.find_encoder(other).parent.name == "encoders" and other.startswith("mfm-r2.3-")
    monkeypatch.setattr(pretraining, "pretrain", None)
    assert pretraining.encoder(pretraining.preset("mini", steps=1, batch=2)) == other


@pytest.mark.parametrize("name", MODULES)
def test_presets(name):
    for profile in ("smoke", "mini"):
        settings = module(name).preset(profile)
        assert not any(str(root()) in v for v in json.dumps(asdict(settings)).split('"')) # no path of this machine
    with pytest.raises(InputError, match="'huge'"): module(name).preset("huge")


def test_every_item_has_claims_and_a_notebook():
    claims = pd.read_csv(root()/"data"/"claims.csv").query("paper == 'spai'")
    items = {i.item: i for i in find_items("spai")}
    assert set(claims.item) == set(items) and all(i.notebook.exists() for i in items.values())
    assert {i.module for i in items.values()} == {f"aigid_repro.spai.{m}" for m in MODULES}


def test_a_stored_detector_keeps_what_its_first_batch_settled(tmp_path):
    from aigid_repro.data.corpus import png
    from aigid_repro.detect.detector import load_detector, save_detector
    from aigid_repro.detect.training import predict, train, train_settings
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(4)]
    records = pd.DataFrame({"image": [png(v) for v in images], "label": [0, 1, 0, 1]})
    detector = train(train_settings(**recipe("smoke", pretrained("mini"), batch=4, precision="no")), records)
    assert detector.settle_srs.deviation.min() > 0 and detector.settle_scv.deviation.min() > 0
    save_detector(detector, tmp_path)
    assert (predict(load_detector(tmp_path), images) == predict(detector, images)).all()
    assert "pretrained" not in json.loads((tmp_path/"config.json").read_text())["settings"] # its encoder is among its weights


def test_similarity_scores_as_the_detector_does(monkeypatch):
    from aigid_repro.detect.detector import create
    from aigid_repro.detect.studies import Training, as_run, embedded
    from aigid_repro.detect.training import predict
    from aigid_repro.spai.recipe import ROOMS
    study, world = module("similarity"), embedded("smoke")
    detector = create("spai", **dict(recipe("mini", pretrained("mini"))["options"])).eval()
    monkeypatch.setattr(study, "trained", lambda run: (detector, "no"))
    table = study.measured(dict(run=as_run(Training({}, 3), world, ROOMS), crops=2))
    about, images = world.images("test", 2)
    assert table.id.tolist() == about.id.tolist() and set(table.seed) == {3}
    np.testing.assert_allclose(table.logit, predict(detector, images), atol=1e-4)
    assert table.filter(regex="^(ol|oh|lh)_").abs().max(axis=None) <= 1 + 1e-6


def test_ways_to_look_name_what_is_unknown():
    with pytest.raises(InputError, match="all patches, centre, made small"):
        module("resolution").look(np.zeros((200, 200, 3), np.uint8), "corner", 128)


def test_released_encoder_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("AIGID_DATA", str(tmp_path))
    with pytest.raises(InputError, match="mfm_pretrain_vit_base.pth"): pretrained("paper")
    with pytest.raises(InputError, match="radius 16 only"): pretrained("paper", radius=8)
