"Verdicts, the claims table, and a report that needs no network."

import json
import re
from html.parser import HTMLParser

import pytest

from aigid_repro.data.storage import InputError
from aigid_repro.review.claims import claims_table, read_claims, verdict
from aigid_repro.review.report import report

EFFECTS = "results/mini/toy/coin/effects.csv"


@pytest.mark.parametrize("direction, value, low, high, expected", [
    ("> 0", 2, 1, 3, "supported"), ("> 0", -2, -3, -1, "contradicted"), ("> 0", 1, -1, 3, "inconclusive"),
    ("> 0", 1, 0, 2, "inconclusive"), ("> 0", -1, -2, 0, "contradicted"), ("> 5", 4, 3, 4.5, "contradicted"),
    ("< 0", -2, -3, -1, "supported"), ("< 0", 2, 1, 3, "contradicted"), ("< 0", 0, -1, 1, "inconclusive"),
    ("within 2", 0, -1, 1, "supported"), ("within 2", 5, 3, 7, "contradicted"),
    ("within 2", -5, -7, -3, "contradicted"), ("within 2", 1, 0, 3, "inconclusive"),
    ("> 0", float("nan"), 1, 2, "inconclusive")])
def test_verdicts(direction, value, low, high, expected):
    assert verdict(direction, value, low, high) == expected


def test_an_interval_without_its_value_is_a_bug():
    with pytest.raises(ValueError, match="does not hold"): verdict("> 0", 5, 0, 1)


def test_claims_of_the_kit_are_well_formed():
    claims = read_claims()
    assert len(claims) >= 10 and claims.statement.str.endswith(".").all() and claims.unit.notna().all()


def verdicts(root):
    table = claims_table("mini", root)
    return list(table.verdict), list(table.reason)


def test_not_run(project):
    assert verdicts(project) == (["not run"] * 3, ["no results yet"] * 3)


def test_judged(finished):
    states, reasons = verdicts(finished)
    assert states == ["supported", "contradicted", "not run"] and reasons[2] == "this profile does not measure it"
    row = claims_table("mini", finished).iloc[0]
    assert row.low < row.value < row.high and row.published == 2 and row.run_minutes > 0 and row.memory_mb > 0
    assert row.command == "make reproduce PROFILE=mini PAPER=toy ITEM=coin" and len(row.deviations) == 1


def test_stale_numbers_are_not_shown(finished):
    (finished / "data/coins.txt").write_text("euro")
    assert verdicts(finished) == (["not run"] * 3, ["code or data changed since it was run"] * 3)
    assert claims_table("mini", finished).value.isna().all()


@pytest.mark.parametrize("file, old, new, words", [
    ("data/claims.csv", "> 0", "up", "direction 'up'"),
    ("data/claims.csv", "toy,coin", "toy,die", "no item toy/die"),
    ("data/claims.csv", "toy-coin-tails", "toy-coin-heads", "toy-coin-heads stands there twice"),
    ("data/claims.csv", "direction", "sense", "the columns must be"),
    (EFFECTS, "toy-coin-heads", "toy-coin-head", "'toy-coin-head' is not in data/claims.csv"),
    (EFFECTS, "logit", "AP", "is in 'AP', data/claims.csv says 'logit'")])
def test_bad_tables(finished, file, old, new, words):
    path = finished / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=words): claims_table("mini", finished)


class Page(HTMLParser):
    "What a browser would load to show a page, and the links a reader may follow."

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.alts = [], [], []
        self.feed(path.read_text(encoding="utf8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        loading = {"src", "srcset", "poster", "data"} | ({"href"} if tag == "link" else set())
        self.loads += [v for k, v in attrs.items() if k in loading]
        if tag == "a": self.links.append(attrs["href"])
        if tag == "img": self.alts.append(attrs.get("alt"))
        assert tag != "script"


def test_report_is_offline_and_complete(finished):
    path = report("mini", finished)
    text, page = path.read_text(), Page(path)
    assert page.loads and all(x.startswith("data:") for x in page.loads) and not re.search(r"url\(|@import", text)
    assert all(page.alts)
    for link in page.links:
        if link.startswith("#"): assert f'id="{link[1:]}"' in text
        else: assert (path.parent / link).exists(), link
    for words in ("✓ supported", "✗ contradicted", "– not run", "A coin stands in for a detector.",
                  "Heads score higher", "make reproduce PROFILE=mini PAPER=toy ITEM=coin", "Published numbers"):
        assert words in text
    assert "meaningless" not in text
    notebook = Page(path.parent / "toy/coin/notebook.html")
    assert notebook.loads and all(x.startswith("data:") for x in notebook.loads)


def test_report_without_results(project):
    text = report("smoke", project).read_text()
    assert "the numbers are meaningless" in text and "Not run: no results yet" in text


def test_report_says_out_of_date(finished):
    (finished / "data/coins.txt").write_text("euro")
    assert "Out of date: code or data changed since it was run" in report("mini", finished).read_text()


def test_report_changes_only_with_results(finished):
    first = report("mini", finished).read_bytes()
    assert report("mini", finished).read_bytes() == first
    page = finished / "results/mini/toy/coin/notebook.html"
    made = page.stat().st_mtime_ns
    path = page.with_suffix(".ipynb")
    nb = json.loads(path.read_text())
    report("mini", finished)
    assert page.stat().st_mtime_ns == made
    nb["cells"][0]["source"] = "# Another title"
    path.write_text(json.dumps(nb))
    report("mini", finished)
    assert "Another title" in page.read_text()
