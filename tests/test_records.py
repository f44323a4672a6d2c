"Record tables: what is accepted, and each refusal by itself."
import io

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aigid_repro.data.records import (
    COMMFOR_COLUMNS,
    assert_no_leakage,
    check_leakage,
    fingerprint,
    from_csv,
    from_folders,
    from_parquet,
    open_image,
    to_parquet,
    validate,
)
from aigid_repro.data.storage import InputError


def picture(seed, size=64):
    "A smooth random picture."
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def refused(*parts):
    "Expect one line which contains all parts."
    return pytest.raises(InputError, match="(?s)^" + "".join(f"(?=.*{p})" for p in parts) + r"[^\n]*$")


@pytest.fixture
def tree(tmp_path):
    "GenImage-like tree: two generators, two splits, two images a class."
    n = 0
    for generator in ("Midjourney", "glide"):
        for split in ("train", "val"):
            for label in ("ai", "nature"):
                folder = tmp_path/"genimage"/generator/f"imagenet_{generator}"/split/label
                folder.mkdir(parents=True)
                for i in range(2):
                    picture(n := n + 1).save(folder/f"{i}.{'png' if label == 'ai' else 'JPEG'}")
    return tmp_path/"genimage"


@pytest.fixture
def table(tree):
    return from_folders(tree)


def with_cell(table, column, value, row=1):
    "The table with one cell replaced, whatever the type."
    cells = pd.Series([value if i == row else v for i, v in enumerate(table[column])], dtype=object)
    return table.assign(**{column: cells})


def test_folders(tree):
    families = {"glide": "pixel diffusion"}
    t = from_folders(tree, families=families)
    assert len(t) == 16 and list(t.id) == sorted(t.id) and t.equals(from_folders(tree, families=families))
    assert set(t.generator) == {"Midjourney", "glide"} and set(t.split) == {"train", "validation"}
    assert (t[t.label == 0].family == "real").all() and (t[t.id.str.contains("/ai/")].label == 1).all()
    assert set(t[t.label == 1].family) == {"unknown", "pixel diffusion"}
    assert set(from_folders(tree, split="test").split) == {"test"}
    assert set(from_folders(tree/"glide"/"imagenet_glide"/"val").generator) == {"imagenet_glide"}
    validate(t, check_images=True)


def test_forensynths_layout(tmp_path):
    for parts in (("progan", "car", "0_real"), ("progan", "cat", "1_fake"), ("deepfake", "0_real")):
        folder = tmp_path.joinpath(*parts)
        folder.mkdir(parents=True)
        picture(1).save(folder/"x.png")
    t = from_folders(tmp_path)
    assert list(t.generator) == ["deepfake", "progan", "progan"] and list(t.label) == [0, 0, 1]


def test_folders_refused(tmp_path):
    with refused("no such folder"): from_folders(tmp_path/"none")
    (tmp_path/"cats").mkdir()
    picture(0).save(tmp_path/"cats"/"a.png")
    with refused("no class folders", "0_real", "nature", "1_fake"): from_folders(tmp_path)
    (tmp_path/"real").mkdir()
    (tmp_path/"real"/"notes.txt").touch()
    with refused("hold no images", ".webp"): from_folders(tmp_path)


@pytest.mark.parametrize("column, value, parts", [
    ("label", 2, ("row 1", "label is 2", "0 for real")), ("label", "1", ("label is '1'",)),
    ("label", True, ("label is True",)), ("label", 1., ("label is 1.0",)), ("label", None, ("label is None",)),
    ("generator", None, ("row 1", "generator is None")),
    ("id", "", ("id is ''",)), ("image", b"", ("image is b''",)), ("image", 3, ("image is 3",)),
    ("split", float("nan"), ("split is nan",)), ("image", "gone.png", ("row 1", "gone.png", "no such file")),
    ("family", "real", ("row 1", "family is 'real'")), ("generator", "real", ("generated row names the model",))])
def test_bad_cells(table, column, value, parts):
    with refused(*parts): validate(with_cell(table, column, value))


def test_bad_tables(table):
    with refused("no column label"): validate(table.drop(columns="label"))
    with refused("no rows"): validate(table[:0])
    with refused("row 5", "earlier row"): validate(with_cell(table, "id", table.id[0], row=5))
    assert validate(table.assign(split="whatever", extra=1)) is not None


def test_corrupt_images(table, tmp_path):
    (tmp_path/"cut.png").write_bytes(open(table.image[0], "rb").read()[:200])
    t = with_cell(table, "image", str(tmp_path/"cut.png"))
    validate(t)
    with refused("row 1", "cut.png", "cannot be read"): validate(t, check_images=True)
    with refused("no such file"): open_image(tmp_path/"none.png")
    with refused("image of 3 bytes"): open_image(b"abc")
    with refused("cut.png"): assert_no_leakage(t)


def test_modes():
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        buffer = io.BytesIO()
        image = picture(0).convert("L" if mode == "LA" else "RGB").convert(mode)
        image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
        assert open_image(buffer.getvalue()).mode == "RGB"


def test_csv(table, tree):
    listing = tree/"list.csv"
    relative = [str(p)[len(str(tree)) + 1:] for p in table.image]
    pd.DataFrame({"path": relative, "label": table.label, "model": ["NA" if v else "" for v in table.label]}).to_csv(
        listing, index=False)
    t = from_csv(listing, columns={"image": "path", "generator": "model"})
    assert set(t.generator) == {"real", "NA"} and list(t.id) == relative and (t.source == t.id).all()
    with refused("list.csv", "no column 'file'", "path, label, model"): from_csv(listing, columns={"image": "file"})
    with refused("no column image"): from_csv(listing)
    with refused("no such file"): from_csv(tree/"none.csv")
    listing.write_text("")
    with refused("list.csv", "not a readable CSV"): from_csv(listing)
    listing.write_bytes(b"image,label,generator\n\xff\xfe.png,1,x\n")
    with refused("UTF-8"): from_csv(listing)
    listing.write_text("image,label,generator\na.png,fake,x\n")
    with refused("row 0", "label is 'fake'"): from_csv(listing)


def test_parquet(table, tmp_path):
    file = to_parquet(table.assign(crop="c"), tmp_path/"out"/"t.parquet")
    t = from_parquet(file)
    assert isinstance(t.image[0], bytes) and list(t.id) == list(table.id) and set(t.crop) == {"c"}
    assert t.image[3] == open(table.image[3], "rb").read()
    picks = from_parquet(file.parent, filters=[("generator", "==", "glide")])
    assert set(picks.generator) == {"glide"} and len(picks) == 8
    with refused("correct the filters"): from_parquet(file, filters=[("model", "==", "x")])
    with refused("no rows"): from_parquet(file, filters=[("generator", "==", "x")])
    with refused("no .parquet files"): from_parquet(tmp_path/"genimage")
    with refused("none.parquet"): from_parquet(tmp_path/"none.parquet")
    with refused("there is no such file"): to_parquet(with_cell(table, "image", "gone.png"), tmp_path/"x.parquet")
    assert not (tmp_path/"x.parquet").exists()


def test_damaged_parquet(table, tmp_path):
    file = to_parquet(table, tmp_path/"t.parquet")
    good, whole = from_parquet(file), file.read_bytes()
    file.write_bytes(whole[:len(whole)//2])
    with refused("t.parquet", "damaged", "delete it and run again"): from_parquet(file)
    rng = np.random.default_rng(0)
    for at in rng.integers(4, len(whole) - 8, 60): # a single flipped bit anywhere
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.integers(8)]) + whole[at + 1:])
        try: pd.testing.assert_frame_equal(from_parquet(file), good)
        except InputError as e: assert "t.parquet" in str(e) and "\n" not in str(e)


def test_footer_is_covered(table, tmp_path):
    file = to_parquet(table, tmp_path/"t.parquet")
    data = pq.read_table(file)
    pq.write_table(data.slice(0, 3), file) # keeps the metadata, loses rows
    with refused("checksum differs"): from_parquet(file)


def test_hub_schema(table, tmp_path):
    image = [{"bytes": open(p, "rb").read(), "path": None} for p in table.image]
    hub = pd.DataFrame({"image_data": image, "model_name": table.generator, "label": table.label, "real_source": "COCO",
                        "architecture": np.where(table.label == 1, "GAN", "real"), "split": "test"})
    hub.to_parquet(tmp_path/"a.parquet")
    hub.to_parquet(tmp_path/"b.parquet")
    t = from_parquet(tmp_path, columns={**COMMFOR_COLUMNS, "family": "architecture"})
    assert len(t) == 32 and t.id.is_unique and set(t.real_set) == {"COCO"} and set(t.family) == {"GAN", "real"}
    assert open_image(t.iloc[20]).size == (64, 64)


def test_leakage(table, tmp_path):
    assert check_leakage(table).empty and list(check_leakage(table))[-1] == "detail" and assert_no_leakage(table) is table
    train, val = (table.index[table.split == s] for s in ("train", "validation"))
    with refused("share: same source", r"\(s\)"): assert_no_leakage(table.assign(source="s"))
    assert check_leakage(table.assign(source="s")).pairs.tolist() == [64]
    assert not len(check_leakage(table.assign(source="s"), source=None))
    copy = with_cell(table, "image", table.image[train[0]], row=val[0])
    with refused("identical file"): assert_no_leakage(copy)
    Image.open(table.image[train[0]]).convert("RGB").resize((50, 50)).save(tmp_path/"near.jpg", quality=60)
    near = check_leakage(with_cell(table, "image", str(tmp_path/"near.jpg"), row=val[0]))
    assert near.reason.tolist() == ["similar picture"]
    assert (near.id_a[0], near.id_b[0]) == (table.id[train[0]], table.id[val[0]])


def test_fingerprint_is_stable():
    bits, thumbnail = fingerprint(picture(0))
    assert bits.shape == (63,) and set(bits.tolist()) == {-1, 1} and abs((thumbnail.astype(float)**2).sum() - 1) < .01
