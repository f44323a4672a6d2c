"Evaluation on public benchmarks: numbers that can be checked by hand, shortcuts that matching removes, interruptions, published numbers."

import io
import json
import subprocess
import sys

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
from aigid_repro.score import evaluate as module
from aigid_repro.score.calibration import Calibration
from aigid_repro.score.evaluate import derive, evaluate, summary_text
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
    assert notes["found"][0] == dict(name="dalle2", kind="generator", generated=4, real=0, expected=1000, short=True)
    assert notes["found"][-1] == dict(name="RAISE-1k", kind="real set", generated=0, real=4, expected=1000, short=True)
    page = files["page"].read_text()
    for words in ("NOT SCORED: dalle3: no folder", "dalle2 (4 of 1,000), firefly (4 of 1,000), RAISE-1k (4 of 1,000)",
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
    c = compare(t, "SPAI", "spai").query("own and level == 'mean'").set_index("item")
    assert c.published["table1"] == .91 and c.over["table1"] == "2 of 13" and c.difference["table1"] == about((sd3 + 1)/2 - .91)
    one = compare(t, "SPAI", "spai").query("own and name == 'SD3' and item == 'table1'").iloc[0]
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
    mine = compare(t, "UniversalFakeDetect", "gapl").iloc[0] # its eight sets, of which two are here
    assert mine.own and mine.over == "2 of 8" and mine.native == .5
    theirs = compare(t, "UniversalFakeDetect", "gensign").iloc[0]
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
    c = compare(t, "CommunityForensics-Eval", "commfor-384")
    assert c.published[0] == .991 and c.metric[0] == "ap" and c.over[0] == "2 of 21"
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


def test_importing_is_light():
    code = "import sys, aigid_repro.score.evaluate; sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
