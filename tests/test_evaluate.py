"Evaluation on public benchmarks: numbers that can be checked by hand, shortcuts that matching removes, interruptions, published numbers."

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from aigid_repro.data.storage import InputError
from aigid_repro.detect.detector import Detector, create, register
from aigid_repro.detect.evaluation import check_predictions
from aigid_repro.public.catalogue import Entry, Generator, find_benchmark
from aigid_repro.score import evaluate as module
from aigid_repro.score.calibration import Calibration
from aigid_repro.score.comparison import compare as compare_embedded
from aigid_repro.score.evaluate import checkpoint, counts, derive, evaluate, incomplete, summary_text
from aigid_repro.score.protocols import PROTOCOLS, Matching, compare, published
from aigid_repro.score.shelf import Scorer

NATIVE = ("native",)


class Counting(Detector):
    "Counts the images that it is shown, and may be interrupted by one of them."
    def __init__(self):
        super().__init__()
        self.seen, self.stop = 0, 0

    def forward(self, x):
        for _ in x:
            self.seen += 1
            if self.seen == self.stop: raise KeyboardInterrupt
        return self.logit(x)


@register("grey-level")
class GreyLevel(Counting):
    "The mean grey level, 127.5 being a logit of 0."
    def logit(self, x): return 255*x.mean((1, 2, 3)) - 127.5


@register("grid")
class Grid(Counting):
    "Steps at the borders of JPEG's blocks, compared with the steps elsewhere; blocks mean a real photograph."
    def logit(self, x):
        steps = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2))
        at = torch.arange(steps.shape[-1])%8 == 7
        return 100*(1 - steps[:, at].mean(1)/steps[:, ~at].mean(1))


@register("small")
class Small(Counting):
    "Small images are generated."
    def logit(self, x): return torch.full((len(x),), 300. - x.shape[-1])


def scorer_of(name, threshold=0.): return Scorer(name, create(name), "toy.pt", "0123", Calibration(threshold, 0., "a test"))


def grey(path, *levels, kind="png", size=(32, 32)):
    path.mkdir(parents=True)
    for i, v in enumerate(levels): Image.new("RGB", size, (v, v, v)).save(path/f"{i}.{kind}")


def pictures(n, size=256):
    "Pictures of different roughness, far from black and white."
    rng = np.random.default_rng(0)
    for _ in range(n):
        low = rng.integers(90, 160, (size//16, size//16), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(low).resize((size, size), Image.Resampling.BICUBIC), float)
        yield Image.fromarray((smooth + rng.normal(0, rng.uniform(1, 12), smooth.shape)).astype(np.uint8)).convert("RGB")


def about(value): return pytest.approx(value, abs=1e-5) # six digits are written


def run(benchmark, root, scorer, output, **how):
    "Evaluate; the table by level and name of one protocol, and what was said."
    said = []
    files = evaluate(benchmark, root, scorer, output, precision="no", batch=2, say=said.append, **how)
    return files, pd.read_csv(files["table"], keep_default_na=False, na_values=[""]), said


def at(table, name, protocol="native", level="generator"):
    return table[(table.protocol == protocol) & (table.name == name) & (table.level == level)].iloc[0]


@pytest.fixture
def synthbuster(tmp_path):
    grey(tmp_path/"data/synthbuster/dalle2", 50, 60, 70, 80)
    grey(tmp_path/"data/synthbuster/firefly", 5, 25, 45, 60)
    grey(tmp_path/"data/synthbuster/RAISE-1k", 10, 20, 30, 40)
    return tmp_path/"data"


def test_every_number_of_a_table_by_hand(synthbuster, tmp_path):
    files, t, said = run("synthbuster", synthbuster, scorer_of("grey-level", threshold=35 - 127.5), tmp_path/"out", protocols=NATIVE)
    easy, hard, mean, worst = at(t, "dalle2"), at(t, "firefly"), at(t, "mean", level="mean"), at(t, "firefly", level="worst")
    assert (easy.ap, easy.auc, easy.tpr_at_5, easy.accuracy) == (1, 1, 1, 7/8) # 40 is above the threshold
    assert hard.ap == about((1 + 1 + 3/5 + 4/8)/4) and hard.auc == 10/16 and hard.tpr_at_5 == .5
    assert hard.ap_real == about((1/2 + 2/3 + 3/5 + 4/6)/4)
    assert (hard.accuracy, hard.real_accuracy, hard.generated_accuracy) == (5/8, 3/4, 1/2)
    assert (hard.accuracy_half, hard.real_accuracy_half, hard.generated_accuracy_half) == (1/2, 1, 0) # nothing is brighter than 127
    assert mean.ap == about((1 + hard.ap)/2) and worst.ap == hard.ap and (mean.n_real, mean.n_generated) == (4, 8)
    assert mean.ap_low <= mean.ap <= mean.ap_high
    p = pd.read_parquet(files["predictions"])
    check_predictions(p)
    assert p.set_index("id").logit.loc["firefly/1.png"] == 25 - 127.5 and len(p) == 12 and set(p.run) == {"grey-level, native"}
    assert set(p.width) == {32} and set(p.format) == {"PNG"} and not {"image"} & set(p)
    assert "AUC without a pixel" in said[0]


def test_files_say_what_was_run(synthbuster, tmp_path):
    files, t, said = run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"out")
    notes = json.loads(files["run"].read_text())
    assert set(files) == {"audit", "predictions", "run", "table", "published", "page"}
    assert notes["benchmark"] == "Synthbuster" and notes["weights"] == "toy.pt" and notes["threshold_source"] == "a test"
    assert notes["missing"]["glide"] == "no folder" and len(notes["missing"]) == 7 and "python" in notes["versions"]
    assert notes["found"][0] == dict(name="dalle2", kind="generator", generated=4, real=0, expected_generated=1000, expected_real=0,
                                     short=True)
    assert notes["found"][-1] == dict(name="RAISE-1k", kind="real set", generated=0, real=4, expected_generated=None,
                                      expected_real=1000, short=True)
    page = files["page"].read_text()
    for words in ("NOT SCORED: dalle3: no folder", "not turned as EXIF says",
                  "dalle2 (4 of 1,000 generated), firefly (4 of 1,000 generated), RAISE-1k (4 of 1,000 real)",
                  "threshold 0 on the logit: a test", "centre 224 x 224 px", "JPEG of quality 90", "commfor table2, paper"):
        assert words in page, words
    assert str(tmp_path) not in page and page.splitlines()[0] == "# grey-level on Synthbuster"
    text = summary_text(tmp_path/"out")
    assert text.splitlines()[:5] == page.splitlines()[:5] and "## Generators" not in text
    assert list(dict.fromkeys(t.protocol)) == [*PROTOCOLS]


def test_spai_averages_over_real_sets_first(tmp_path):
    lists = tmp_path/"spai"
    for key, label, levels in (("sd3", 1, (30, 50)), ("flux", 1, (60,)), ("coco", 0, (10, 20, 40)), ("raise", 0, (55,))):
        grey(lists/key, *levels)
        lines = [f"{key}/{i}.png,{label},test" for i in range(len(levels))]
        (lists/f"{key}.csv").write_text("\n".join(["image,class,split", *lines]) + "\n")
    files, t, _ = run("SPAI", lists, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    sd3 = ((5/6) + 0)/2 # against coco: 2 + 3 of 6 pairs; against raise: none
    assert at(t, "SD3").auc == about(sd3) and at(t, "Flux").auc == 1
    assert at(t, "mean", level="mean").auc == about((sd3 + 1)/2)
    assert at(t, "coco", level="source").auc == about((5/6 + 1)/2) and at(t, "raise", level="source").real_accuracy == 1
    c = compare(t, "SPAI", "spai", "spai").query("own and level == 'mean'").set_index("item")
    assert c.published["table1"] == .91 and c.over["table1"] == "2 of 13" and c.difference["table1"] == about((sd3 + 1)/2 - .91)
    one = compare(t, "SPAI", "spai", "spai").query("own and name == 'SD3' and item == 'table1'").iloc[0]
    assert (one.published, one.native) == (.759, about(sd3))
    assert "Sets of real images" in files["page"].read_text()


def test_matched_jpeg_removes_what_only_the_format_knows(tmp_path):
    folder = tmp_path/"Chameleon/test"
    (folder/"0_real").mkdir(parents=True), (folder/"1_fake").mkdir()
    for i, picture in enumerate(pictures(16)): # the same pictures in both classes
        picture.save(folder/f"0_real/{i}.jpg", quality=60)
        picture.save(folder/f"1_fake/{i}.png")
    files, t, said = run("chameleon", tmp_path, scorer_of("grid"), tmp_path/"out")
    auc = t[t.level == "mean"].set_index("protocol").auc
    assert auc["native"] == 1 and auc["matched-jpeg"] == pytest.approx(.5, abs=.02)
    assert any(v.startswith("WARNING: format and size alone") for v in said) and "WARNING" in files["page"].read_text()
    notes = json.loads(files["run"].read_text())
    assert notes["matching"]["quality"] == 60 and "quality 60" in notes["changes"]["matched-jpeg"]
    assert set(pd.read_csv(files["audit"])["format"]) == {"JPEG", "PNG"}


def test_matched_size_removes_what_only_the_size_knows(tmp_path):
    grey(tmp_path/"Chameleon/0_real", *range(12), size=(600, 400))
    grey(tmp_path/"Chameleon/1_fake", *range(12), size=(256, 256))
    _, t, _ = run("chameleon", tmp_path, scorer_of("small"), tmp_path/"out")
    assert t[t.level == "mean"].set_index("protocol").auc.to_dict() == {"native": 1, "matched-jpeg": 1, "matched-size": .5}


def test_an_interrupted_run_continues(synthbuster, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 3)
    whole, _, _ = run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"whole")
    broken = scorer_of("grey-level")
    broken.detector.stop = 20 # 12 native ones are through, and some of matched-jpeg
    with pytest.raises(KeyboardInterrupt): run("synthbuster", synthbuster, broken, tmp_path/"parts")
    assert not (tmp_path/"parts/predictions.parquet").exists() and not (tmp_path/"parts/run.json").exists()
    again = scorer_of("grey-level")
    parts, _, _ = run("synthbuster", synthbuster, again, tmp_path/"parts")
    assert 36 - 20 < again.detector.seen <= 36 - 12
    pd.testing.assert_frame_equal(*(pd.read_parquet(f["predictions"]) for f in (whole, parts)))
    third = scorer_of("grey-level")
    run("synthbuster", synthbuster, third, tmp_path/"parts")
    assert third.detector.seen == 0 and not list(tmp_path.rglob("*.part"))


def test_damaged_parts_and_other_settings_are_scored_again(synthbuster, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 6)
    run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    first, second = sorted((tmp_path/"out/scores").rglob("*.parquet"))
    first.write_bytes(first.read_bytes()[:-40])
    again = scorer_of("grey-level")
    run("synthbuster", synthbuster, again, tmp_path/"out", protocols=NATIVE)
    assert again.detector.seen == 6
    Image.new("RGB", (32, 32), (99, 99, 9)).save(synthbuster/"synthbuster/dalle2/0.png") # another file under the same name
    changed = scorer_of("grey-level", threshold=3.) # a threshold changes no score
    run("synthbuster", synthbuster, changed, tmp_path/"out", protocols=NATIVE)
    assert changed.detector.seen == 1
    more = scorer_of("grey-level")
    run("synthbuster", synthbuster, more, tmp_path/"out", protocols=("native", "matched-size"))
    assert more.detector.seen == 12


def test_an_unreadable_image_is_a_row_with_an_error(synthbuster, tmp_path):
    path = synthbuster/"synthbuster/firefly/2.png"
    kept = path.read_bytes()
    path.write_bytes(kept[:40])
    files, t, _ = run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    p = pd.read_parquet(files["predictions"]).set_index("id")
    assert len(p) == 12 and np.isnan(p.logit["firefly/2.png"]) and p.error["firefly/2.png"] and (p.error.astype(str) == "").sum() == 11
    assert (at(t, "firefly").n_generated, at(t, "dalle2").n_generated) == (3, 4)
    assert "UNREADABLE: 1 images, such as firefly/2.png (" in files["page"].read_text()
    path.write_bytes(kept)
    again = scorer_of("grey-level")
    _, t, _ = run("synthbuster", synthbuster, again, tmp_path/"out", protocols=NATIVE)
    assert again.detector.seen == 1 and at(t, "firefly").n_generated == 4 and at(t, "firefly").auc == 10/16


def test_a_generator_without_readable_images_is_left_out(synthbuster, tmp_path):
    for path in (synthbuster/"synthbuster/firefly").iterdir(): path.write_bytes(b"not found")
    files, t, _ = run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    assert set(t[t.level == "generator"].name) == {"dalle2"} and "UNREADABLE: 4 images" in files["page"].read_text()
    for path in (synthbuster/"synthbuster/dalle2").iterdir(): path.write_bytes(b"")
    with pytest.raises(InputError, match="no generator has real and generated images"):
        run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"none", protocols=NATIVE)


def test_a_trial_says_so_everywhere_and_the_whole_continues_from_it(synthbuster, tmp_path):
    files, t, _ = run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE, limit=2)
    sets = set(pd.read_parquet(files["predictions"])["set"])
    assert sets == {"Synthbuster, at most 2 images of each generator and class"} and set(t["sample"]) == {2}
    assert "a sample" in files["page"].read_text().splitlines()[0] and "A SAMPLE of at most 2 images" in summary_text(tmp_path/"out")
    assert set(pd.read_csv(files["published"])["sample"]) == {2} and json.loads(files["run"].read_text())["settings"]["limit"] == 2
    assert at(t, "dalle2").n_generated == 2 and at(t, "mean", level="mean").n_real == 2
    rest = scorer_of("grey-level")
    _, t, _ = run("synthbuster", synthbuster, rest, tmp_path/"out", protocols=NATIVE)
    assert rest.detector.seen == 6 and t["sample"].isna().all()


def test_shared_real_images_are_scored_once(tmp_path):
    place = tmp_path/"UniversalFakeDetect"
    grey(place/"diffusion_datasets/laion/0_real", 10, 30)
    for g in ("dalle", "ldm_200"): grey(place/f"diffusion_datasets/{g}/1_fake", 20, 40)
    for c, v in (("0_real", 100), ("1_fake", 90)): grey(place/f"CNN_synth_testset/crn/{c}", v)
    scorer = scorer_of("grey-level")
    files, t, _ = run("UniversalFakeDetect", tmp_path, scorer, tmp_path/"out", protocols=NATIVE)
    assert scorer.detector.seen == 2 + 4 + 2 and len(pd.read_parquet(files["predictions"])) == 4 + 4 + 2
    assert at(t, "dalle").auc == at(t, "ldm_200").auc == .75 and at(t, "crn").auc == 0 and at(t, "dalle").n_real == 2
    mine = compare(t, "UniversalFakeDetect", "gapl", "gapl").iloc[0] # its eight sets, of which two are here
    assert mine.own and mine.over == "2 of 8" and mine.native == .5
    theirs = compare(t, "UniversalFakeDetect", "gensign", "gensign-progan20").iloc[0]
    assert (theirs.published, theirs.metric, theirs.over) == (.9937, "ap_real", "3 of 19")
    assert theirs.native == about(t[t.level == "generator"].ap_real.mean())


def encoded(level):
    Image.new("RGB", (32, 32), (level,)*3).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def test_parquet_rows_are_paired_by_model(tmp_path):
    rows = [("GALIP", 1, 50), ("GALIP", 0, 40), ("Dalle2", 1, 20), ("Dalle2", 0, 30), ("GALIP", 1, 60), ("Dalle2", 1, 35)]
    path = tmp_path/"CommunityForensics-Eval/data/CompEval-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    columns = dict(image_data=pa.array([encoded(v) for *_, v in rows], pa.binary()), label=[y for _, y, _ in rows],
                   model_name=[m for m, *_ in rows], real_source=["COCO"]*6)
    pq.write_table(pa.table(columns), path, row_group_size=4)
    files, t, _ = run("CompEval", tmp_path, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    assert at(t, "GALIP").auc == 1 and at(t, "Dalle2").auc == .5 and at(t, "mean", level="mean").auc == .75
    assert at(t, "GAN", level="family").auc == 1 and "mean over models" in files["page"].read_text()
    c = compare(t, "CommunityForensics-Eval", "commfor-384", "commfor-384")
    assert c.published[0] == .991 and c.metric[0] == "ap" and c.over[0] == "2; published: 22" and "HDiT" in c.note[0]
    assert compare(t, "CommunityForensics-Eval", "gapl", "gapl").over[0] == "2 of 21"
    again = scorer_of("grey-level")
    run("CompEval", tmp_path, again, tmp_path/"out", protocols=NATIVE)
    assert again.detector.seen == 0


@pytest.mark.parametrize("benchmark, detector, metric, value", [
    ("SPAI", "spai", "auc", .91), ("UniversalFakeDetect", "gapl", "ap", .998), ("UniversalFakeDetect", "commfor-224", "ap", .991),
    ("GenImage", "commfor-384", "accuracy_half", .957), ("GenImage", "gensign", "accuracy_half", .966), ("Synthbuster", "gapl", "ap", .972),
    ("CommunityForensics-Eval", "commfor-224", "accuracy_half", .895), ("ForenSynths", "gapl", "accuracy_half", .972),
    ("AIGCDetectBenchmark", "gensign", "ap_real", .9804), ("AIGIBench", "gensign", "ap_real", .8996), ("Chameleon", "gapl", "ap", .756)])
def test_published_means(benchmark, detector, metric, value):
    p = published()
    p = p[(p.benchmark == benchmark) & (p.detector == detector) & (p.metric == metric) & (p.level == "mean")]
    assert value in p.published.tolist() and p.paper.nunique() == 1


def test_tables_need_the_folder_only(synthbuster, tmp_path):
    files, t, _ = run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    kept = {n: files[n].read_bytes() for n in ("table", "published", "page")}
    for n in kept: files[n].unlink()
    again = derive(tmp_path/"out")
    assert {n: p.read_bytes() for n, p in again.items()} == kept
    data = bytearray(files["predictions"].read_bytes())
    data[100] ^= 255
    files["predictions"].write_bytes(data)
    with pytest.raises(InputError, match="predictions.parquet: missing or damaged; evaluate again"): derive(tmp_path/"out")
    with pytest.raises(InputError, match="no run.json"): derive(tmp_path)


def test_errors_are_one_line_that_helps(synthbuster, tmp_path):
    out, mine = tmp_path/"out", scorer_of("grey-level")
    run("synthbuster", synthbuster, mine, out, protocols=NATIVE)
    other = Scorer("grey-level", mine.detector, "toy.pt", "4567", Calibration())
    for call, said in ((lambda: run("synthbuster", synthbuster, other, out), "results of another weights"),
                       (lambda: run("chameleon", synthbuster, mine, out), "results of another benchmark"),
                       (lambda: run("imagenet", synthbuster, mine, tmp_path/"new"), "unknown benchmark"),
                       (lambda: run("synthbuster", synthbuster, mine, tmp_path/"new", protocols=["jpeg"]), "unknown protocol 'jpeg'; "),
                       (lambda: run("synthbuster", tmp_path/"absent", mine, tmp_path/"new"), "no such folder")):
        with pytest.raises(InputError) as e: call()
        assert said in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path/"new").exists()
    with pytest.raises(InputError, match="unknown protocol"): Matching(90, 224, "").change("")


def shard(path, *levels):
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(dict(image_data=pa.array([encoded(v) for v in levels], pa.binary()), label=[1, 0], model_name=["GALIP"]*2,
                                 real_source=["COCO"]*2)), path)


def test_scores_of_other_images_are_never_used(tmp_path):
    name = "CommunityForensics-Eval/data/CompEval-00000-of-00001.parquet"
    shard(tmp_path/"a"/name, 50, 40), shard(tmp_path/"b"/name, 90, 10)
    run("CompEval", tmp_path/"a", scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    with pytest.raises(InputError, match="images in another place; choose another folder, or remove .*started.json"):
        run("CompEval", tmp_path/"b", scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    (tmp_path/"a").rename(tmp_path/"c")
    (tmp_path/"out/started.json").unlink() # as the message says
    moved = scorer_of("grey-level")
    run("CompEval", tmp_path/"c", moved, tmp_path/"out", protocols=NATIVE)
    assert moved.detector.seen == 0
    (tmp_path/"out/started.json").unlink()
    files, _, _ = run("CompEval", tmp_path/"b", scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    assert set(pd.read_parquet(files["predictions"]).logit) == {90 - 127.5, 10 - 127.5}


def test_other_pixels_of_the_same_number_of_bytes_are_scored_again(tmp_path):
    place = tmp_path/"Chameleon"
    grey(place/"0_real", 10, 20, kind="bmp"), grey(place/"1_fake", 30, 40, kind="bmp")
    run("chameleon", place, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    (tmp_path/"out/run.json").unlink()
    path = place/"1_fake/0.bmp"
    before = path.stat()
    Image.new("RGB", (32, 32), (5, 5, 5)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    assert path.stat().st_size == before.st_size
    again = scorer_of("grey-level")
    _, t, _ = run("chameleon", place, again, tmp_path/"out", protocols=NATIVE)
    assert again.detector.seen == 1 and at(t, "Chameleon").auc == .5


def test_an_interrupted_run_stays_what_it_was(synthbuster, tmp_path):
    broken, out = scorer_of("grey-level"), tmp_path/"out"
    broken.detector.stop = 5
    with pytest.raises(KeyboardInterrupt): run("synthbuster", synthbuster, broken, out)
    assert not (out/"run.json").exists()
    grey(tmp_path/"Chameleon/0_real", 10), grey(tmp_path/"Chameleon/1_fake", 30)
    with pytest.raises(InputError, match="another benchmark .Synthbuster, not Chameleon."):
        run("chameleon", tmp_path, scorer_of("grey-level"), out)
    with pytest.raises(InputError, match="the evaluation of another benchmark"): compare_embedded([scorer_of("grey-level")], out)
    assert str(tmp_path) not in (out/"started.json").read_text()


def test_the_embedded_comparison_and_an_evaluation_keep_apart(synthbuster, tmp_path):
    files, _, _ = run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    kept = {p: p.read_bytes() for p in files.values()}
    (tmp_path/"out/started.json").unlink()
    with pytest.raises(InputError, match="the evaluation of another"): compare_embedded([scorer_of("grey-level")], tmp_path/"out")
    assert {p: p.read_bytes() for p in files.values()} == kept
    (tmp_path/"embedded").mkdir()
    (tmp_path/"embedded/run.json").write_text(json.dumps(dict(benchmark="embedded")))
    for call in (lambda: derive(tmp_path/"embedded"), lambda: summary_text(tmp_path/"embedded")):
        with pytest.raises(InputError, match="no evaluation of a public benchmark, but of embedded"): call()


def named_scorer(name, path, sha="4567"): return Scorer(name, None, str(path), sha, Calibration())


def test_a_number_belongs_to_a_checkpoint(tmp_path):
    "GenSign published three; the one on GenImage is measured with the one trained on Stable Diffusion 1.4."
    t = pd.DataFrame(dict(protocol="native", level=["generator", "mean"], name=["Midjourney", "mean"], accuracy_half=.9, ap=.9, ap_real=.9))
    for benchmark, own in (("GenImage", "gensign-sdv14"), ("UniversalFakeDetect", "gensign-progan20"), ("AIGIBench", "")):
        for loaded in ("gensign-sdv14", "gensign-progan20", "gensign-progan4", ""):
            c = compare(t, benchmark, "gensign", loaded).query("system == 'GenSign' and level == 'mean'").iloc[0]
            assert c.own == (loaded == own != ""), (benchmark, loaded)
            assert c.training == ("" if c.own else "another training" if own else "training not stated")
    assert checkpoint(named_scorer("gensign", tmp_path/"gensign-sdv14.pth")) == ("gensign-sdv14", "its name; no hash is known")
    assert checkpoint(named_scorer("gensign", tmp_path/"mine.pth")) == ("", "")
    assert checkpoint(named_scorer("spai", tmp_path/"spai.pth")) == ("", "") # its hash is known, and another one
    assert checkpoint(named_scorer("spai", tmp_path/"mine.pth", "24159f27d7c8c2cd")) == ("spai", "its hash")
    assert checkpoint(named_scorer("commfor-384", tmp_path/"commfor-model-384"))[0] == "commfor-384"
    assert checkpoint(named_scorer("commfor-384", tmp_path/"models--OwensLab--commfor-model-384/snapshots/1a2b"))[0] == "commfor-384"
    (tmp_path/"commfor-model-384").mkdir()
    (tmp_path/"commfor-model-384/config.json").write_text(json.dumps(dict(detector="commfor"))) # trained with this kit
    assert checkpoint(named_scorer("commfor-384", tmp_path/"commfor-model-384")) == ("", "")


def test_the_page_says_whose_training_a_number_is_of(tmp_path):
    grey(tmp_path/"GenImage/Midjourney/val/nature", 10, 20), grey(tmp_path/"GenImage/Midjourney/val/ai", 30, 15)
    pages = {}
    for weights in ("gensign-sdv14.pth", "gensign-progan20.pth", "mine.pth"):
        scorer = Scorer("gensign", create("grey-level"), str(tmp_path/weights), "4567", Calibration())
        files, _, _ = run("GenImage", tmp_path, scorer, tmp_path/f"out-{weights}", protocols=NATIVE)
        pages[weights] = files["page"].read_text()
        assert "train SDv1.4" in pages[weights] and summary_text(tmp_path/f"out-{weights}").startswith("# gensign on GenImage")
    own, other, mine = (p.split("## Published for this detector")[1] for p in pages.values())
    assert "| GenSign " in own.split("##")[0] and "another training" not in own
    assert "official checkpoint gensign-sdv14, recognised by its name" in pages["gensign-sdv14.pth"]
    for p in (other, mine):
        assert "| GenSign, another training" in p.split("## Published for others")[1] and "Nothing on" in p.split("##")[0]
    assert "recognised neither by" in mine and "recognised neither by" not in other


def test_what_a_published_mean_covers():
    t = pd.DataFrame([dict(protocol="native", level=k, name=n, ap=.9, accuracy_half=.9, ap_real=.9, auc=.9)
                      for k, n in (("generator", "progan"), ("generator", "crn"), ("generator", "dalle"), ("mean", "mean"))])
    def over(benchmark, system): return compare(t, benchmark, "").query("system == @system and level == 'mean'").iloc[0][["over", "note"]]
    assert over("ForenSynths", "Ours (ViT-S 224)")["over"] == "3; published: 11"
    assert over("ForenSynths", "GAPL (4.7K generators, 550k)")["over"] == "1 of 8"
    assert over("AIGIBench", "GenSign")["over"] == "3; published: 17" and "not stated" in over("AIGIBench", "GenSign")["note"]
    found = over("UniversalFakeDetect", "GenSign")
    assert found["over"] == "3 of 19" and "is the reverse" in found["note"]
    assert over("UniversalFakeDetect", "Ours (ViT-S 224)")["over"] == "1; published: 4"
    means = published().query("level == 'mean'")
    assert means.number.gt(0).all() # all that is in the papers' tables today; 0 would be shown as unknown
    assert "not stated" in published().query("item == 'tracker 7'").note.iloc[0]


def test_every_published_name_is_in_the_catalogue():
    from aigid_repro.gensign.world import letters
    p = published().query("level != 'mean'")
    for benchmark, names in p.groupby("benchmark").name:
        entry = find_benchmark(benchmark)
        known = {letters(n) for n in (*(g.name for g in entry.generators), *entry.lenders)}
        assert set(names.map(letters)) <= known, benchmark
    assert "issue" not in " ".join([*published().item, *published().source, *published().note])


def test_few_real_images_are_counted_too():
    entry = Entry("Toy", "class folders", "", "", "", "", (Generator("a", "GAN", 10, 10), Generator("b", "GAN", 10, 10)))
    rows = [("a", 1, 10), ("a", 0, 9), ("b", 1, 10), ("b", 0, 10)]
    records = pd.DataFrame([dict(generator=g, label=y, image=f"{g}{y}{i}", real_set="" if y else g) for g, y, n in rows for i in range(n)])
    a, b = counts(entry, records)
    assert (a["short"], a["real"], a["expected_real"], b["short"]) == (True, 9, 10, False)


def test_wrong_limits_and_repeated_protocols(synthbuster, tmp_path):
    with pytest.raises(InputError, match="limit -2: give a number of images"):
        run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"out", limit=-2)
    assert not (tmp_path/"out").exists()
    files, t, _ = run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"out", protocols=("native", "native"))
    assert len(pd.read_parquet(files["predictions"])) == 12 and json.loads(files["run"].read_text())["settings"]["protocols"] == ["native"]


def test_results_stay_where_no_table_can_be_made(synthbuster, tmp_path):
    files, _, _ = run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    kept = {n: files[n].read_bytes() for n in ("run", "predictions", "table", "page")}
    for path in (synthbuster/"synthbuster/RAISE-1k").iterdir(): path.write_bytes(b"")
    with pytest.raises(InputError, match="no generator has"):
        run("synthbuster", synthbuster, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    assert {n: files[n].read_bytes() for n in kept} == kept and not list(tmp_path.rglob("*.part"))


def test_images_are_not_turned(tmp_path):
    "The left half of the stored image is dark; turned by EXIF it would be the upper one."
    place, exif = tmp_path/"Chameleon", Image.Exif()
    exif[0x0112] = 6
    grey(place/"0_real", 10), (place/"1_fake").mkdir()
    Image.new("RGB", (64, 32), (200,)*3).save(place/"1_fake/0.jpg", exif=exif, quality=95)
    files, _, _ = run("chameleon", place, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    p = pd.read_parquet(files["predictions"]).query("label == 1").iloc[0]
    assert (p.width, p.height) == (64, 32) and json.loads(files["run"].read_text())["settings"]["upright"] is False


def test_messages_name_no_place_of_this_machine(tmp_path):
    lists = tmp_path/"spai"
    for key, label, n in (("sd3", 1, 2), ("glide", 1, 2), ("coco", 0, 2)):
        grey(lists/key, *range(10, 10 + n))
        (lists/f"{key}.csv").write_text("\n".join(["image,class,split", *(f"{key}/{i}.png,{label},test" for i in range(n))]) + "\n")
    for i in range(2): (lists/f"glide/{i}.png").unlink()
    (lists/"flux.csv").write_text("wrong\n")
    files, _, _ = run("SPAI", lists, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    assert not [p for p in (tmp_path/"out").rglob("*") if p.is_file() and str(tmp_path).encode() in p.read_bytes()]
    faults = json.loads(files["run"].read_text())["missing"]
    assert any(f.startswith("flux.csv: no column") for f in faults.values()) and any("GLIDE" in g.upper() for g in faults)
    place = tmp_path/"data/spai"
    for root, text in ((place, f"{place}/a.csv: below {place}, {place.parent}/x.png"),
                       (Path("data/spai"), "data/spai/a.csv: below data/spai, data/x.png")):
        assert module._relative(text, root) == "a.csv: below ., ../x.png"


def test_incomplete_evaluations_say_so(tmp_path):
    place = tmp_path/"Chameleon"
    grey(place/"0_real", 10, 20), grey(place/"1_fake", 30, 40)
    run("chameleon", place, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    assert incomplete(tmp_path/"out") is False
    (place/"1_fake/1.png").write_bytes(b"cut off")
    run("chameleon", place, scorer_of("grey-level"), tmp_path/"out", protocols=NATIVE)
    assert incomplete(tmp_path/"out") is True
    grey(tmp_path/"GenImage/Midjourney/val/nature", 10), grey(tmp_path/"GenImage/Midjourney/val/ai", 30)
    run("GenImage", tmp_path, scorer_of("grey-level"), tmp_path/"part", protocols=NATIVE)
    assert incomplete(tmp_path/"part") is True # seven generators are not there


def test_importing_is_light():
    code = "import sys, aigid_repro.score.evaluate; sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
