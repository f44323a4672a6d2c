"""The photo pool is whole, its splits share nothing, and bad files end in a line that names file and remedy."""
import io
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from aigid_repro.data import photos
from aigid_repro.data.storage import InputError, file_hash


@pytest.fixture
def copied(tmp_path):
    "A pool of its own: the table and two photos of the real one."
    table = photos.pool().head(2)
    for f in table.file: shutil.copy(photos.photo_dir()/f, tmp_path)
    table.to_csv(tmp_path/"photos.csv", index=False)
    return tmp_path, table


@pytest.fixture
def originals(tmp_path):
    "Two invented originals with index and credits."
    (tmp_path/"originals").mkdir()
    rng, files = np.random.default_rng(0), ["000_Red_by_A.png", "001_blue.png"]
    for f in files: Image.fromarray(rng.integers(0, 255, (90, 120, 3), np.uint8)).save(tmp_path/"originals"/f)
    pd.DataFrame({"file": files, "package": "p", "version": "1", "path": files,
                  "sha256": [file_hash(tmp_path/"originals"/f) for f in files]}).to_csv(
        tmp_path/"index.csv", index=False)
    pd.DataFrame({c: ["x", "x"] for c in photos.CREDITS} | {"file": files, "keep": "yes"}).to_csv(
        tmp_path/"credits.csv", index=False)
    return tmp_path


def build(folder): return photos.build_pool(folder, folder/"credits.csv", folder/"out")


def test_pool_is_whole():
    table = photos.pool()
    assert photos.check_pool() == len(table) >= 150
    assert {p.name for p in photos.photo_dir().glob("*.webp")} == set(table.file)
    assert (table.author != "").all() and (table.licence != "").all() and table.basis.isin(["file", "package"]).all()
    assert sum((photos.photo_dir()/f).stat().st_size for f in table.file) < 30e6


def test_every_photo_is_in_the_credits_and_nothing_else():
    credits = photos.read_table(photos.photo_dir()/"credits.csv", photos.CREDITS, "")
    assert (credits.keep == "yes").sum() == len(photos.pool())
    assert (credits.reason[credits.keep == "no"] != "").all()


def test_photos_without_metadata():
    for f in photos.pool().file.sample(10, random_state=0):
        with Image.open(photos.photo_dir()/f) as image:
            assert not image.getexif() and not {"icc_profile", "xmp", "exif"} & set(image.info)
            assert max(image.size) <= 1600


def test_splits_are_disjoint_and_large_enough():
    table = photos.pool()
    assert table.photo.is_unique and table.sha256_source.is_unique
    assert table.groupby("group").split.nunique().max() == 1
    counts = table.split.value_counts()
    assert counts["test"] >= 40 and counts["train"] >= 45 and counts["generator"] >= 60
    assert (photos.assign_splits(table) == table.split).all()


@pytest.mark.parametrize("harm", ["missing", "cut off", "altered"])
def test_bad_photo_names_file_and_remedy(copied, harm):
    folder, table = copied
    path = folder/table.file.iloc[0]
    if harm == "missing": path.unlink()
    elif harm == "cut off": path.write_bytes(path.read_bytes()[:500])
    else: path.write_bytes(path.read_bytes() + b"?")
    for read in (lambda: photos.open_photo(table.photo.iloc[0], folder=folder), lambda: photos.check_pool(folder)):
        with pytest.raises(InputError, match="git checkout") as e: read()
        assert path.name in str(e.value)
    assert photos.open_photo(table.photo.iloc[1], folder=folder).mode == "RGB"


def test_unverified_photo_must_still_be_an_image(copied):
    folder, table = copied
    (folder/table.file.iloc[0]).write_bytes(b"no image")
    with pytest.raises(InputError, match="not a readable image"):
        photos.open_photo(table.photo.iloc[0], verify=False, folder=folder)


def test_missing_table_and_unknown_names(tmp_path):
    with pytest.raises(InputError, match="photos.csv.*git checkout"): photos.pool(tmp_path)
    with pytest.raises(InputError, match="no split 'dev'"): photos.sample_crops("dev", 2)
    with pytest.raises(InputError, match="no photo 'x'"): photos.open_photo("x")


def test_builder_makes_the_same_pool_again(originals):
    first, second = build(originals), build(originals)
    assert first.equals(second) and len(first) == 2
    assert photos.check_pool(originals/"out") == 2


def test_builder_leaves_out_what_credits_leave_out(originals):
    build(originals)
    (originals/"out"/"mine.webp").write_bytes(b"")
    credits = pd.read_csv(originals/"credits.csv")
    credits.assign(keep=["no", "yes"]).to_csv(originals/"credits.csv", index=False)
    assert build(originals).photo.tolist() == ["001-blue"]
    assert {p.name for p in (originals/"out").glob("*.webp")} == {"001-blue.webp", "mine.webp"}


@pytest.mark.parametrize("harm, words", [("altered", "altered"), ("missing", "not found"), ("no image", "readable")])
def test_builder_refuses_bad_originals(originals, harm, words):
    path = originals/"originals"/"000_Red_by_A.png"
    if harm == "missing": path.unlink()
    else: path.write_bytes(b"no image")
    if harm == "no image": # the index knows the broken file
        index = pd.read_csv(originals/"index.csv")
        index.assign(sha256=[file_hash(originals/"originals"/f) for f in index.file]).to_csv(
            originals/"index.csv", index=False)
    with pytest.raises(InputError, match=words) as e: build(originals)
    assert "000_Red_by_A.png" in str(e.value) and "again" in str(e.value)
    assert not (originals/"out"/"photos.csv").exists()


def test_builder_wants_complete_tables(originals):
    pd.read_csv(originals/"credits.csv").head(1).to_csv(originals/"credits.csv", index=False)
    with pytest.raises(InputError, match="001_blue.png"): build(originals)
    (originals/"index.csv").unlink()
    with pytest.raises(InputError, match="index.csv"): build(originals)


def test_same_seed_same_crops_and_pixels():
    crops = photos.sample_crops("validation", 3, seed=5)
    assert crops == photos.sample_crops("validation", 3, seed=5) != photos.sample_crops("validation", 3, seed=6)
    assert len({c.id for c in crops}) == len(crops)
    for c in crops[:6]:
        pixels = photos.render(c)
        assert pixels.shape == (128, 128, 3) and pixels.dtype == np.uint8 and (photos.render(c) == pixels).all()


def test_crops_survive_a_table():
    crops = photos.sample_crops("validation", 2)
    text = pd.DataFrame(crops).to_csv(index=False)
    again = [photos.Crop(**row) for row in pd.read_csv(io.StringIO(text)).to_dict("records")]
    assert again == crops


def test_crops_show_something_and_lie_in_their_photo():
    table, crops = photos.pool(), photos.sample_crops("validation", 6)
    for c in crops:
        assert 0 <= c.left <= table.width[c.photo] - c.region and 0 <= c.top <= table.height[c.photo] - c.region
        assert 43 <= c.region <= 107 and table.split[c.photo] == "validation"
        spread, fine = photos.detail(photos.region(c))
        assert spread > photos.MIN_SPREAD and fine > photos.MIN_DETAIL
