"""Training: one process and two agree, interrupted and uninterrupted agree, bad input is named."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from aigid_repro.data.corpus import png
from aigid_repro.data.storage import InputError
from aigid_repro.detect import networks
from aigid_repro.detect.detector import register
from aigid_repro.detect.training import train, train_settings

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(0)
    return pd.DataFrame([{"image": png(rng.integers(50*y, 150 + 100*y, (40, 40, 3), dtype=np.uint8)), "label": y} for y in [0, 1]*8])


def test_two_processes_train_what_one_trains(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    def run(*command):
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    run(SCRIPT, tmp_path/"one.safetensors")
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, tmp_path/"two.safetensors")
    one, two = load_file(tmp_path/"one.safetensors"), load_file(tmp_path/"two.safetensors")
    # gradients are averaged in another order, and Adam divides by their size
    assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=2e-4) for k in one)


@register("with-dropout")
class WithDropout(networks.HighPassCNN):
    def features(self, x): return torch.dropout(super().features(x), .5, self.training)


@pytest.mark.parametrize("detector", ["high-pass-cnn", "with-dropout"])
def test_same_seed_same_weights_and_resume_continues(records, tmp_path, detector):
    settings = train_settings(steps=6, batch=4, crop=32, precision="no", resample=.5, jpeg=.5, detector=detector)
    whole, again = (train(settings, records).state_dict() for _ in range(2))
    assert all(torch.equal(whole[k], again[k]) for k in whole)

    class Stop(Exception):
        pass

    class StopAt(list):
        def append(self, entry):
            super().append(entry)
            if entry[0] == 4:
                raise Stop
    with pytest.raises(Stop):
        train(settings, records, checkpoint=tmp_path/"c", every=2, log=StopAt())
    log = []
    resumed = train(settings, records, checkpoint=tmp_path/"c", every=2, log=log).state_dict()
    assert [step for step, _ in log] == [4, 5]
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_checkpoint_of_other_settings_is_refused(records, tmp_path):
    train(train_settings(steps=3, batch=4, crop=32), records, checkpoint=tmp_path/"c", every=2)
    with pytest.raises(InputError, match="other settings"):
        train(train_settings(steps=5, batch=4, crop=32), records, checkpoint=tmp_path/"c", every=2)


@pytest.mark.parametrize("change, words", [(dict(detector="hi-pass"), "high-pass-cnn"), (dict(batch=3), "even"),
                                           (dict(precision="fp8"), "precision"), (dict(options=(("width", 3),)), "width")])
def test_bad_settings_are_named(records, change, words):
    with pytest.raises(InputError, match=words):
        train(train_settings(**dict(steps=1, batch=4, crop=32) | change), records)


def test_one_class_is_refused(records):
    with pytest.raises(InputError, match="one class"):
        train(train_settings(steps=1, batch=4, crop=32), records[records.label == 1])
