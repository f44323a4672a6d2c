"""Scoring one's own images: every format that people have, damaged files, official numbers, interruption, the command line."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import zlib
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pillow_heif
import pytest
import torch
from parity_weights import fill
from PIL import Image
from safetensors.torch import save_file

from aigid_repro.cli import main
from aigid_repro.data.photos import open_photo
from aigid_repro.data.storage import InputError
from aigid_repro.detect import networks  # noqa: F401 - registers the network
from aigid_repro.detect.detector import create, save_detector
from aigid_repro.score import engine, run
from aigid_repro.score.files import encoded, read_image
from aigid_repro.score.inputs import Entry, entries
from aigid_repro.score.shelf import demo_folder, open_scorer

PARITY = Path(__file__).parent/"parity"
LIMIT = 1e-5


@pytest.fixture(scope="module")
def photo(): return open_photo("051-taj-mahal").crop((200, 100, 520, 340))


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    "A small detector that scores in no time."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("net")
    save_detector(create("high-pass-cnn", widths=(4, 8, 8)), folder)
    return str(folder)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    "A small detector whose time goes into products with matrices."
    torch.manual_seed(0)
    from aigid_repro.commfor import model  # noqa: F401 - registers the network
    folder = tmp_path_factory.mktemp("vit")
    save_detector(create("commfor-vit", size="mini", image=64, patch=8), folder)
    return str(folder)


# formats


FORMATS = {"PNG": {}, "JPEG": dict(quality=95), "WEBP": dict(lossless=True), "AVIF": dict(quality=95), "TIFF": {}, "BMP": {}, "GIF": {},
           "JPEG2000": {}, "PPM": {}}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_picture(kind, photo):
    got = read_image(encoded(photo, kind, **FORMATS[kind]))
    assert got.image.mode == "RGB" and got.format == kind and got.image.size == photo.size
    limit = 25 if kind == "GIF" else 4 # 256 colours
    assert np.abs(np.asarray(got.image, float) - np.asarray(photo, float)).mean() < limit


def test_heic(photo):
    buffer = io.BytesIO()
    pillow_heif.from_pillow(photo).save(buffer, quality=90)
    got = read_image(buffer.getvalue())
    assert got.format == "HEIF" and np.abs(np.asarray(got.image, float) - np.asarray(photo, float)).mean() < 4


def test_progressive_and_ink(photo):
    assert np.abs(np.asarray(read_image(encoded(photo, "JPEG", quality=95, progressive=True)).image, float) - np.asarray(photo)).mean() < 4
    ink = read_image(encoded(photo.convert("CMYK"), "JPEG", quality=95))
    assert ink.mode == "CMYK" and np.abs(np.asarray(ink.image, float) - np.asarray(photo, float)).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16", "F"])
def test_every_mode_becomes_eight_bits_of_rgb(mode, photo):
    grey = np.asarray(photo.convert("L"))
    image = {"I;16": lambda: Image.fromarray(grey.astype(np.uint16)*257), "F": lambda: Image.fromarray(grey.astype(np.float32)/255),
             "P": lambda: photo.quantize(256)}.get(mode, lambda: photo.convert(mode))()
    got = read_image(encoded(image, "TIFF" if mode == "F" else "PNG"))
    want = np.asarray(photo if mode in ("P", "RGBA") else photo.convert("1" if mode == "1" else "L").convert("RGB"), float)
    assert got.image.mode == "RGB" and np.abs(np.asarray(got.image, float) - want).mean() < (12 if mode == "P" else .01)
    assert ("transparency dropped" in got.notes) == (mode in ("LA", "RGBA")) and ("palette" in got.notes) == (mode == "P")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(orientation, photo):
    from PIL import ImageOps
    from PIL.ExifTags import Base
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    data = encoded(photo, "JPEG", exif=exif)
    with Image.open(io.BytesIO(data)) as stored: want = ImageOps.exif_transpose(stored).convert("RGB")
    got = read_image(data)
    assert got.image.size == want.size == (got.width, got.height) and (np.asarray(got.image) == np.asarray(want)).all()
    assert bool(got.notes) == (orientation > 1) and read_image(data, upright=False).image.size == photo.size


def test_animations_show_their_first_frame(photo):
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        film = encoded(photo, kind, save_all=True, append_images=[Image.new("RGB", photo.size)]*2)
        assert "first frame" in read_image(film).notes and np.asarray(read_image(film).image).mean() > 30


def bomb(width, height):
    "A PNG of a few hundred bytes whose header claims any size."
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 15_000, 2_000_000_000])
def test_bombs_are_refused_with_the_limit(side):
    with pytest.raises(InputError, match="limit of 100,000,000 pixels; raise it with --max-pixels"): read_image(bomb(side, side))


def test_text_bombs_are_refused(photo):
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_text("comment", "a"*(80*2**20), zip=True)
    with pytest.raises(InputError, match="cannot be decoded"): read_image(encoded(photo, "PNG", pnginfo=info))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3, 2), (9000, 11)])
def test_any_size_gets_a_score(size, net):
    rows = list(engine.score(open_scorer(net), [Image.new("RGB", size, "olive")]))
    assert not rows[0].error and math.isfinite(rows[0].logit)


def test_a_hundred_megapixels(net, tmp_path):
    Image.new("L", (10_000, 10_000)).save(tmp_path/"large.png")
    row, = engine.score(open_scorer(net), [tmp_path/"large.png"])
    assert not row.error and (row.width, row.height) == (10_000, 10_000)


# damage


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_give_a_picture_or_an_error(kind, photo):
    "Cut off anywhere, bits flipped anywhere: nothing but `InputError` comes out, and never without a reason."
    rng, whole = np.random.default_rng(zlib.crc32(kind.encode())), encoded(photo.resize((96, 72)), kind, **FORMATS[kind])
    for i in range(60):
        data = bytearray(whole)
        if i % 2: data = data[:int(rng.integers(0, len(data)))]
        for at in rng.integers(0, max(1, len(data)), int(rng.integers(0, 9))*bool(data)): data[at] ^= 1 << int(rng.integers(8))
        try: got = read_image(bytes(data), limit=4_000_000)
        except InputError as e: assert str(e) and "\n" not in str(e)
        else: assert got.image.mode == "RGB" and np.asarray(got.image).shape == (got.height, got.width, 3)


def test_a_folder_of_damaged_files_keeps_every_row(photo, net, tmp_path):
    rng, files = np.random.default_rng(0), tmp_path/"files"
    files.mkdir()
    for i in range(40):
        data = bytearray(encoded(photo.resize((90, 70)), ("PNG", "JPEG", "WEBP")[i % 3]))
        if i % 4 == 1: data = data[:len(data)//2]
        if i % 4 == 2:
            for at in rng.integers(0, len(data), 20): data[at] ^= 255
        # every fourth file has the name of another format, or none
        (files/f"{i:02}{('.png', '.jpg', '.webp', '.gif')[(i + i % 4) % 4]}").write_bytes(bytes(data) if i % 10 else b"")
    table, about = run.score_files(open_scorer(net), entries([files]), tmp_path/"out")
    assert table.path.tolist() == [str(p) for p in sorted(files.iterdir())] and len(table) == 40
    assert (table.error.ne("") == table.logit.isna()).all() and (table.error.ne("") == table.verdict.eq("")).all()
    assert about["errors"] == table.error.ne("").sum() >= 4 and table.error.eq("empty file").sum() == 4
    assert table.format[3] == "PNG" and table.path[3].endswith(".webp") # by content, not by name


def test_a_network_that_fails_costs_only_its_row(net, photo, monkeypatch):
    scorer, original = open_scorer(net), engine.logits_of
    def failing(scorer, pixels, *args):
        if any(v.shape[0] == 77 for v in pixels): raise RuntimeError("no memory left")
        return original(scorer, pixels, *args)
    monkeypatch.setattr(engine, "logits_of", failing)
    rows = list(engine.score(scorer, [photo, photo.crop((0, 0, 90, 77)), photo]))
    assert [bool(r.error) for r in rows] == [False, True, False] and "no memory left" in rows[1].error


# official numbers




@pytest.mark.parametrize("size", [224, 384])
def test_community_forensics_like_the_official_script(size, tmp_path):
    from aigid_repro.commfor.model import CommForViT
    with torch.device("meta"): shapes = {k: tuple(v.shape) for k, v in CommForViT("small", size).state_dict().items()}
    save_file(fill(shapes), tmp_path/"model.safetensors")
    with np.load(PARITY/"commfor"/"checkpoints.npz") as golden:
        want = [golden[f"small_{size}_testimages_logit"][0, 0], *golden[f"small_{size}_image_logit"][:, 0]]
    files = [PARITY/"commfor"/f"{n}.png" for n in ("00000845", "image_a", "image_b")]
    scorer = open_scorer(f"commfor-{size}", tmp_path/"model.safetensors")
    got = [r.logit for r in engine.score(scorer, files, precision="no")]
    assert np.abs(np.subtract(got, want)).max() < LIMIT and scorer.attends()
    with pytest.raises(InputError, match=f"weights for {size} px"):
        open_scorer(f"commfor-{608 - size}", tmp_path/"model.safetensors")


@pytest.fixture
def spai_weights(tmp_path):
    with np.load(PARITY/"spai"/"golden_tiny.npz") as f: mask = f["mask"]
    state = fill(json.loads((PARITY/"spai"/"spec_tiny.json").read_text())) | {"mfvit.frequencies_mask": torch.from_numpy(mask).long()}
    torch.save({"model": state}, tmp_path/"spai.pth")
    return tmp_path/"spai.pth"


@pytest.fixture
def four_heads(monkeypatch):
    "The reduced networks of the parity packs have four heads, which stands in no file."
    import aigid_repro.gapl.checkpoints as ga
    import aigid_repro.gensign.checkpoints as ge
    import aigid_repro.spai.checkpoints as sp
    for module, more in ((ga, {}), (ge, {"merged": 0}), (sp, {})): # their adapters are too small to tell whether they were merged
        monkeypatch.setattr(module, "load_official", partial(module.load_official, heads=4, **more))


def test_spai_like_the_official_command(spai_weights, four_heads, tmp_path, capsys):
    "A folder and a list, against the files that the official `infer` wrote."
    folder = tmp_path/"imgs"
    folder.mkdir()
    shutil.copy(PARITY/"spai"/"image_70x90.png", folder/"a.png")
    shutil.copy(PARITY/"spai"/"image_150x200.png", folder/"b.png")
    (folder/"notes.txt").write_text("no image")
    with open(PARITY/"spai"/"cli"/"imgs.csv", newline="") as f: want = {r["image"]: float(r["spai"]) for r in csv.DictReader(f)}
    common = ["--detector", "spai", "--weights", str(spai_weights), "--precision", "float32"]
    assert main(["score", str(folder), *common, "--output", str(tmp_path/"one.csv")]) == 0
    table = pd.read_csv(tmp_path/"one.csv")
    assert [Path(p).name for p in table.path] == [*want] and np.abs(table.score - [*want.values()]).max() < 1e-6
    shutil.copy(PARITY/"spai"/"cli"/"list_input.csv", folder/"list.csv")
    with open(PARITY/"spai"/"cli"/"list_output.csv", newline="") as f: rows = [*csv.DictReader(f)]
    assert main(["score", str(folder/"list.csv"), *common, "--output", str(tmp_path/"two"), "--html"]) == 0
    table = pd.read_csv(tmp_path/"two"/"scores.csv")
    assert len(table) == 3 and table.label.tolist() == [1, 0, 0] # all rows as given; the official command takes those of one split
    table = table[:2]
    assert table.path.tolist() == [r["image"] for r in rows] and np.abs(table.score - [float(r["mytag"]) for r in rows]).max() < 1e-6
    assert (tmp_path/"two"/"scores.html").read_text().count("attention over patches\"") == 6 # three images, said twice


def test_gapl_and_gensign_like_their_own_evaluation(four_heads, tmp_path):
    "Files in the official form, through the detector's own preprocessing and network, whose parity other tests show."
    gapl = fill(json.loads((PARITY/"gapl"/"spec_small.json").read_text()))
    for name, factor in (("cross_attention.in_proj_weight", 12), ("fc.weight", 10)): gapl[name] *= factor # so that images differ
    with np.load(PARITY/"gapl"/"official_prototypes.npz") as f: prototypes = torch.from_numpy(f["pca_3type_num64"])
    torch.save({"model": gapl, "prototype": prototypes}, tmp_path/"gapl.pt")
    torch.save({"model": fill(json.loads((PARITY/"gensign"/"spec_dual_tiny.json").read_text()))}, tmp_path/"gensign.pth")
    for name, files in (("gapl", sorted((PARITY/"gapl").glob("image_*.png"))), ("gensign", sorted((PARITY/"gensign").glob("img_*.png")))):
        scorer = open_scorer(name, next(tmp_path.glob(f"{name}.*")))
        with torch.inference_mode():
            x = [scorer.detector.preprocess(Image.open(f))[None] for f in files]
            want = [scorer.detector.eval()(v)[0].item() for v in x]
        got = [r.logit for r in engine.score(scorer, files, precision="no")]
        assert np.abs(np.subtract(got, want)).max() < LIMIT and np.ptp(want) > 10*LIMIT, name


# runs


def many(folder, n, photo):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        x, y = rng.integers(0, 100, 2)
        photo.crop((x, y, x + 70 + i, y + 80)).save(folder/f"{i:03}.png", compress_level=1)
    return folder


@pytest.mark.parametrize("detector", ["net", "transformer"])
def test_an_interrupted_run_goes_on_and_gives_the_same_bits(photo, detector, request, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PART", 8)
    scorer, four = open_scorer(request.getfixturevalue(detector)), run.Options(batch=4, precision="no")
    asked = entries([many(tmp_path/"images", 30, photo)])
    whole, _ = run.score_files(scorer, asked, tmp_path/"whole.parquet", four)
    original, seen = run.columns, []
    def stopping(*args):
        seen.append(args)
        if len(seen) == 20: raise KeyboardInterrupt
        return original(*args)
    monkeypatch.setattr(run, "columns", stopping)
    with pytest.raises(KeyboardInterrupt): run.score_files(scorer, asked, tmp_path/"again.parquet", four)
    assert not (tmp_path/"again.parquet").exists()
    scored, before = [], engine.logits_of
    monkeypatch.setattr(run, "columns", original)
    monkeypatch.setattr(engine, "logits_of", lambda s, pixels, *a: scored.extend(pixels) or before(s, pixels, *a))
    again, about = run.score_files(scorer, asked, tmp_path/"again.parquet", four)
    assert len(scored) == 14 and about["images"] == 30 # two parts were there
    assert (again.logit == whole.logit).all() and again.path.tolist() == whole.path.tolist()
    assert sorted(p.name for p in tmp_path.iterdir() if "again" in p.name) == ["again.parquet", "again.parquet.run.json"]


def test_scores_of_other_code_are_another_run(photo, net, tmp_path, monkeypatch):
    scorer, asked = open_scorer(net), entries([many(tmp_path/"images", 3, photo)])
    run.score_files(scorer, asked, tmp_path/"o.csv")
    monkeypatch.setattr(run, "source_hash", lambda *modules: "changed")
    with pytest.raises(InputError, match="another run"): run.score_files(scorer, asked, tmp_path/"o.csv")


@pytest.mark.parametrize("machine, like", [("x86_64", True), ("riscv64", False)])
def test_matrices_are_laid_out_where_the_processor_is_known(transformer, photo, monkeypatch, machine, like):
    "The way of multiplying is another, the logits are not."
    scorer, images = open_scorer(transformer), [photo.crop((i, i, i + 90, i + 80)) for i in range(5)]
    with torch.inference_mode():
        plain = engine.logits_of(scorer, [engine.prepare(scorer, v).pixels[0] for v in images])
    monkeypatch.setattr("platform.machine", lambda: machine)
    laid = not isinstance(engine.laid_out(scorer.detector), nullcontext)
    assert laid == (like and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    found = [r.logit for r in engine.score(scorer, images, precision="no")]
    assert np.abs(np.subtract(found, plain)).max() < 1e-6 and np.ptp(plain) > 1e-5


def test_parts_of_another_run_are_not_taken(photo, net, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PART", 4)
    asked, scorer, four = entries([many(tmp_path/"images", 9, photo)]), open_scorer(net), run.Options(batch=4)
    list(zip(range(1), run.parts(scorer, asked, four, tmp_path/".x")))
    assert len(list((tmp_path/".x").glob("*.parquet"))) == 1
    asked = asked[::-1]
    assert [p.path.iloc[0] for p in run.parts(scorer, asked, four, tmp_path/".x")] == [asked[0].path, asked[4].path, asked[8].path]


def test_two_runs_at_once_into_one_table_do_not_mix(photo, net, tmp_path, monkeypatch):
    "The second finishes while the first is under way; the first then keeps off."
    monkeypatch.setattr(run, "PART", 4)
    scorer, four = open_scorer(net), run.Options(batch=4)
    a, b = (entries([many(tmp_path/n, 12, photo.rotate(i))]) for i, n in enumerate("ab"))
    original, seen = run.columns, []
    def meanwhile(*args):
        seen.append(1)
        if len(seen) == 6: run.score_files(scorer, b, tmp_path/"o.csv", four)
        return original(*args)
    monkeypatch.setattr(run, "columns", meanwhile)
    with pytest.raises(InputError, match="another run"): run.score_files(scorer, a, tmp_path/"o.csv", four)
    table = pd.read_csv(tmp_path/"o.csv")
    assert table.path.tolist() == [e.path for e in b]


def test_tables_of_one_name_do_not_know_each_other(photo, net, tmp_path):
    scorer, asked = open_scorer(net), entries([many(tmp_path/"images", 3, photo)])
    run.score_files(scorer, asked[:1], tmp_path/"o.csv")
    run.score_files(scorer, asked[1:], tmp_path/"o.parquet")
    assert run.score_files(scorer, asked[:1], tmp_path/"o.csv")[0].path.tolist() == [asked[0].path]


def test_stopped_between_table_and_what_is_known_of_it(photo, net, tmp_path, monkeypatch):
    scorer, asked = open_scorer(net), entries([many(tmp_path/"images", 3, photo)])
    run.score_files(scorer, asked[:1], tmp_path/"o.csv")
    def stop(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(run, "_about", stop)
        with pytest.raises(KeyboardInterrupt): run.score_files(scorer, asked, tmp_path/"o.csv", overwrite=True)
    with pytest.raises(InputError): run.score_files(scorer, asked[:1], tmp_path/"o.csv") # the table is no longer this run's
    assert run.score_files(scorer, asked, tmp_path/"o.csv")[0].path.tolist() == [e.path for e in asked]


def test_a_lists_own_name_is_no_output(photo, net, tmp_path, capsys):
    many(tmp_path/"images", 2, photo)
    (tmp_path/"list.csv").write_text("image\nimages/000.png\n")
    for more in ([], ["--overwrite"]):
        assert main(["score", str(tmp_path/"list.csv"), "--detector", net, "--output", str(tmp_path/"list.csv"), *more]) == 2
        assert "one of the inputs" in capsys.readouterr().err
    assert (tmp_path/"list.csv").read_text() == "image\nimages/000.png\n"


def test_odd_names(photo, net, tmp_path):
    "Not UTF-8, line breaks, pipes, links that lead back."
    import os
    folder = tmp_path/"odd"
    folder.mkdir()
    data = encoded(photo.resize((80, 70)), "PNG")
    for name in (b"caf\xe9.png", b"a\rb\nc.png", "Zürich <b>\"1\".png".encode()):
        with open(os.fsencode(folder) + b"/" + name, "wb") as f: f.write(data)
    os.mkfifo(folder/"pipe.png")
    os.mkfifo(folder/"pipe")
    (folder/"back").symlink_to(folder)
    table, about = run.score_files(open_scorer(net), entries([folder]), tmp_path/"o.csv")
    again = pd.read_csv(tmp_path/"o.csv")
    assert len(table) == len(again) == 4 and about["errors"] == 1 and again.path.tolist() == table.path.tolist()
    assert any("caf\\xe9" in p for p in table.path) and any("a\\rb\\nc" in p for p in table.path)
    assert "a pipe or a device" in table.error[table.path.str.endswith("pipe.png")].iloc[0]


def test_copies_that_cannot_be_made_cost_no_score(net):
    "WebP has no images of more than 16,383 px."
    row, = engine.score(open_scorer(net), [Image.new("RGB", (17_000, 70), "olive")], variants=tuple(run.STABILITY.values()))
    assert not row.error and math.isfinite(row.logit) and sum(v != v for v in row.variants) == 1 and "copy could not be made" in row.notes
    assert run.verdict(open_scorer(net), row) in ("real", "generated")


@pytest.mark.parametrize("forward, said", [("x.mean()", r"\(\) for 3 images"), ("x.mean((1, 2, 3))[:, None]", r"\(3, 1\)"),
                                           ("(x, x)", "tuple")])
def test_a_network_of_another_shape_is_told_what_is_wanted(forward, said, net, photo, monkeypatch):
    scorer = open_scorer(net)
    monkeypatch.setattr(type(scorer.detector), "forward", eval(f"lambda self, x: {forward}"))
    with pytest.raises(InputError, match=said): list(engine.score(scorer, [photo.resize((70, 70))]*3))


def test_memory_does_not_grow_with_the_number_of_images(net, photo):
    "Images in flight are few, however many there are."
    flying, most = set(), []
    def values():
        for i in range(400):
            flying.add(i)
            yield Image.new("RGB", (64, 64), (i % 256, 0, 0))
    for i, _ in enumerate(engine.score(open_scorer(net), values(), batch=4)):
        flying.discard(i)
        most.append(len(flying))
    assert len(most) == 400 and max(most) <= 4*4


def test_large_images_wait_for_each_other(net):
    "At most 67 megapixels are on their way at once, besides what the next image needs."
    taken = []
    def values():
        for i in range(9):
            taken.append(i)
            yield Image.new("RGB", (7000, 7000)) # 49 megapixels
    for n, _ in enumerate(engine.score(open_scorer(net), values(), batch=16)): assert len(taken) <= n + 4 # of nine
    assert len(taken) == 9


def test_stability_says_unsure_where_a_verdict_flips(net, photo):
    from dataclasses import replace
    scorer = open_scorer(net)
    row = next(engine.score(scorer, [photo], variants=tuple(run.STABILITY.values())))
    values = sorted([row.logit, *row.variants])
    assert values[0] < values[-1]
    between = replace(scorer, calibration=replace(scorer.calibration, threshold=(values[0] + values[-1])/2))
    below = replace(scorer, calibration=replace(scorer.calibration, threshold=values[0] - 1))
    assert run.verdict(between, row) == "unsure" and run.verdict(below, row) == "generated"
    said = run.columns(between, Entry("x", Path("x")), row, run.Options(stability=True))
    assert said["spread"] > 0 and {f"score_{k}" for k in run.STABILITY} <= {*said}


@pytest.mark.parametrize("machine, possible, native, meant", [
    ("x86_64", True, True, "bf16"), ("x86_64", True, False, "no"), ("x86_64", False, True, "no"), ("aarch64", True, False, "bf16")])
def test_half_precision_is_for_processors_that_have_it(transformer, net, monkeypatch, machine, possible, native, meant):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: possible)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"): monkeypatch.setattr(torch.cpu, name, lambda: native, raising=False)
    assert [engine.precision_for(open_scorer(v)) for v in (transformer, net)] == [meant, "no"]


@pytest.mark.parametrize("possible", [True, False])
def test_half_precision_states_its_change(tmp_path, transformer, photo, monkeypatch, possible):
    "Also on a processor for which oneDNN has no products in half precision."
    if not possible:
        laid_out = torch.ops.mkldnn._reorder_linear_weight
        def only_single(weight):
            if weight.dtype != torch.float32: raise RuntimeError("the processor can't")
            return laid_out(weight)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", only_single)
    half = run.Options(precision="bf16")
    table, about = run.score_files(open_scorer(transformer), entries([many(tmp_path/"images", 12, photo)]), tmp_path/"out", half)
    assert about["options"]["precision"] == "bf16" and 0 < about["precision_change"] < .05 and (table.precision == "bf16").all()
    assert f"by at most {about['precision_change']:.4f}" in run.summary(table, about)


# the command line


def test_the_demonstration_tells_the_kits_generators_from_photographs(tmp_path, capsys):
    "Offline, with nothing to find: photographs and decoders that it was not trained on."
    from aigid_repro.score.demo import test_images
    t = test_images(12)
    t = t[t["set"].isin(["real", "systematic"])]
    for r in t.itertuples(): (tmp_path/f"{r.label}-{r.id.replace('/', '-')}.png").write_bytes(r.image)
    assert main(["score", str(tmp_path), "--output", str(tmp_path/"out")]) == 0
    said, table = capsys.readouterr().err, pd.read_csv(tmp_path/"out"/"scores.csv")
    assert "demonstration" in said and "no evidence" in said and "validation photographs" in table.threshold_source[0]
    label = table.path.str.contains("/1-")
    right = (table.verdict == "generated") == label
    assert right[label].mean() > .8 and right[~label].mean() > .8 and table.probability.between(0, 1).all()


def test_the_demonstration_is_small():
    assert sum(f.stat().st_size for f in demo_folder().iterdir()) < 2_000_000
    config = json.loads((demo_folder()/"config.json").read_text())
    assert config["calibration"]["images"] > 500 and "png" in config["measured"] and "demonstration" in config["notice"]


def test_json_is_one_object_a_line(photo, net, tmp_path, capsys):
    folder = many(tmp_path/"images", 3, photo)
    (folder/"bad.png").write_text("no image")
    assert main(["score", str(folder), "--detector", net, "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(r["path"]).name for r in rows] == ["000.png", "001.png", "002.png", "bad.png"]
    assert rows[3]["score"] is None and rows[3]["error"] and 0 < rows[0]["score"] < 1 and rows[0]["error"] == ""
    assert main(["score", str(folder), "--detector", net, "--json", "--output", str(tmp_path/"o.parquet")]) == 1
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["logit"] for r in again] == [r["logit"] for r in rows] and len(pd.read_parquet(tmp_path/"o.parquet")) == 4


def test_terminal(photo, net, tmp_path, capsys):
    folder = many(tmp_path/"images", 2, photo)
    assert main(["score", str(folder/"000.png"), str(folder/"*1.png"), "--detector", net]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "000.png" in out and "weights" in err and "native size" in err
    assert main(["score", str(folder), "--detector", net, "--stability", "--html", "--output", str(tmp_path/"o")]) == 0
    assert (tmp_path/"o"/"scores.html").exists() and "spread" in (tmp_path/"o"/"scores.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("words, said", [
    (["absent.png"], "no such file or folder"), (["IMAGES", "--detector", "resnet"], "unknown detector 'resnet'; known: demo, commfor-224"),
    (["IMAGES", "--detector", "spai"], "aigid weights get spai"), (["IMAGES", "--html"], "--html writes beside the scores"),
    (["IMAGES", "--detector", "gapl", "--weights", "absent.pt"], "absent.pt: there is no such file"),
    (["IMAGES", "--device", "warp"], "--device warp"), (["IMAGES", "--batch-size", "-1"], "--batch-size is -1"),
    (["IMAGES", "--load", "absent.py"], "absent.py: there is no such file"), (["IMAGES", "--max-pixels", "0"], "--max-pixels is 0")])
def test_bad_input_is_one_line(photo, tmp_path, monkeypatch, words, said, capsys):
    monkeypatch.setenv("AIGID_CACHE", str(tmp_path/"cache"))
    monkeypatch.delenv("AIGID_DATA", raising=False)
    many(tmp_path/"images", 1, photo)
    assert main(["score", *(str(tmp_path/"images") if w == "IMAGES" else w for w in words)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


def test_another_runs_scores_are_not_overwritten(photo, net, tmp_path, capsys):
    folder = many(tmp_path/"images", 2, photo)
    command = ["score", str(folder), "--detector", net, "--output", str(tmp_path/"o.csv")]
    assert main(command) == 0 and main(command) == 0 # the same run again
    before = (tmp_path/"o.csv").read_bytes()
    (folder/"000.png").unlink()
    assert main(command) == 2 and "--overwrite" in capsys.readouterr().err and (tmp_path/"o.csv").read_bytes() == before
    assert main([*command, "--overwrite"]) == 0 and len(pd.read_csv(tmp_path/"o.csv")) == 1


def test_pixels_limit(photo, net, tmp_path, capsys):
    folder = many(tmp_path/"images", 2, photo)
    assert main(["score", str(folder), "--detector", net, "--max-pixels", "100", "--json"]) == 1
    assert all("limit of 100 pixels" in json.loads(line)["error"] for line in capsys.readouterr().out.splitlines())


def test_calibration_travels_with_the_weights(photo, spai_weights, four_heads, tmp_path, capsys):
    folder = many(tmp_path/"images", 6, photo)
    (folder/"list.csv").write_text("image,label\n" + "".join(f"{i:03}.png,{i % 2}\n" for i in range(6)))
    common = ["--detector", "spai", "--weights", str(spai_weights)]
    assert main(["calibrate", str(folder/"list.csv"), *common]) == 0 and "threshold" in capsys.readouterr().out
    assert main(["score", str(folder/"list.csv"), *common, "--output", str(tmp_path/"o.csv")]) == 0
    table = pd.read_csv(tmp_path/"o.csv")
    assert table.threshold_source.str.contains("6 images given by the user").all() and table.probability.notna().all()
    side = spai_weights.with_name("spai.pth.calibration.json")
    side.write_text(json.dumps(json.loads(side.read_text()) | {"weights": "other"}))
    assert main(["score", str(folder/"list.csv"), *common]) == 2 and "belongs to other weights" in capsys.readouterr().err


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "The README's detector in one file, trained as it says, on the smallest corpus."
    readme = (Path(__file__).parents[1]/"README.md").read_text(encoding="utf8")
    text = next(b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "@register" in b)
    folder = tmp_path_factory.mktemp("own")
    assert 20 <= len(text.splitlines()) <= 30 and 'preset("mini")' in text
    (folder/"brightness.py").write_text(text.replace('preset("mini")', 'preset("smoke")').replace("steps=50", "steps=5"))
    subprocess.run([sys.executable, "brightness.py"], cwd=folder, check=True)
    return folder


def test_a_detector_of_ones_own_scores(own, tmp_path, capsys):
    for name, value in (("dark", 10), ("bright", 240)): Image.new("RGB", (80, 80), (value,)*3).save(tmp_path/f"{name}.png")
    mine = ["--detector", str(own/"brightness"), "--load", str(own/"brightness.py")]
    assert main(["score", str(tmp_path/"*.png"), *mine, "--json"]) == 0
    rows = {Path(r["path"]).stem: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["dark"]["verdict"] == "real" and rows["bright"]["verdict"] == "generated" and rows["dark"]["detector"] == "brightness"
    scorer = open_scorer(str(own/"brightness"))
    assert abs(rows["bright"]["logit"] - 9*(240/255 - scorer.detector.middle.item())) < 1e-5


def test_an_edited_file_is_another_detector(own, tmp_path, capsys, monkeypatch):
    from aigid_repro.detect import detector
    monkeypatch.setattr(detector, "_registry", dict(detector._registry))
    Image.new("RGB", (80, 80), (240,)*3).save(tmp_path/"bright.png")
    text = (own/"brightness.py").read_text()
    for name, t in (("a", text), ("b", text.replace("return 9*", "return -9*"))):
        (tmp_path/name).mkdir()
        (tmp_path/name/"brightness.py").write_text(t)
    command = ["score", str(tmp_path/"bright.png"), "--detector", str(own/"brightness"), "--output", str(tmp_path/"o.csv")]
    assert main([*command, "--load", str(tmp_path/"a"/"brightness.py")]) == 0
    assert main([*command, "--load", str(tmp_path/"b"/"brightness.py")]) == 2 and "another run" in capsys.readouterr().err


def test_own_calibration_goes_before_the_shipped_one(photo, tmp_path, capsys):
    shutil.copytree(demo_folder(), tmp_path/"copy")
    folder = many(tmp_path/"images", 6, photo)
    (folder/"list.csv").write_text("image,label\n" + "".join(f"{i:03}.png,{i % 2}\n" for i in range(6)))
    assert main(["calibrate", str(folder/"list.csv"), "--detector", str(tmp_path/"copy")]) == 0
    assert "too few to rely on" in open_scorer(str(tmp_path/"copy")).calibration.source


def test_a_detector_of_ones_own_is_evaluated(own, tmp_path, capsys):
    "On a public benchmark in its own folders: bright images are the generated ones, so everything is right."
    for kind, value in (("nature", 20), ("ai", 230)):
        (tmp_path/"GenImage"/"Midjourney"/"val"/kind).mkdir(parents=True)
        for i in range(4): Image.new("RGB", (90, 90), (value + i,)*3).save(tmp_path/"GenImage"/"Midjourney"/"val"/kind/f"{i}.png")
    mine = ["--detector", str(own/"brightness"), "--load", str(own/"brightness.py")]
    assert main(["evaluate", "--benchmark", "GenImage", "--root", str(tmp_path/"GenImage"), *mine, "--output", str(tmp_path/"out")]) == 1
    said = capsys.readouterr()
    table = pd.read_csv(tmp_path/"out"/"table.csv")
    mean = table[(table.level == "mean") & (table.protocol == "native")].iloc[0]
    assert mean.ap == mean.accuracy == 1 and "Midjourney" in said.out and "format" in said.err
    # seven of the eight generators are missing
    assert main(["evaluate", "--output", str(tmp_path/"out"), "--tables"]) == 1 and "Midjourney" in capsys.readouterr().out


def test_a_detector_of_ones_own_stands_in_the_table_of_all_papers(own, tmp_path):
    from aigid_repro.score.comparison import MEASURES, PAPERS, compare, comparison, paper_predictions
    from aigid_repro.score.shelf import load_file
    load_file(own/"brightness.py")
    mine = compare([open_scorer(str(own/"brightness"))], tmp_path/"out", profile="smoke")
    row = mine[mine.detector == "brightness"].iloc[0]
    assert row.paper == "yours" and row[MEASURES].between(0, 1).all() and row["AP systematic"] < .9 # brightness tells little
    assert "brightness" in (tmp_path/"out"/"comparison.md").read_text()
    papers = comparison(paper_predictions("mini"))
    assert set(papers.paper) == {name for name, *_ in PAPERS.values()} and papers[MEASURES].notna().to_numpy().all()
