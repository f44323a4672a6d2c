"The command line: exit codes, one-line errors, nothing heavy where nothing is computed."

import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from toy import coin

from aigid_repro.cli import main


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def results(root):
    return root / "results/mini/toy/coin"


def test_help_is_light():
    heavy = {"torch", "pandas", "numpy", "matplotlib", "papermill", "nbconvert", "psutil"}
    loaded = python("import sys, aigid_repro.cli; aigid_repro.cli.parser().format_help(); print(' '.join(sys.modules))")
    assert not heavy & set(loaded.split())


def test_reviewing_is_light():
    modules = "import sys, aigid_repro.review.report, aigid_repro.review.reproduce; print(' '.join(sys.modules))"
    assert not {"torch", "matplotlib", "papermill", "nbconvert"} & set(python(modules).split())


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["reproduce", "--help"], ["tables", "--help"]])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as e: main(words)
    assert e.value.code == 0 and capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["reproduse"], ["reproduce", "-p", "seed"], ["reproduce", "--jobs", "many"]])
def test_wrong_words(words, capsys):
    with pytest.raises(SystemExit) as e: main(words)
    assert e.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["reproduce", "--profile", "tiny"], "unknown profile 'tiny'; known: smoke, mini"),
    (["report", "--profile", "tiny"], "unknown profile 'tiny'"),
    (["reproduce", "--paper", "dice"], "unknown paper 'dice'; known: toy"),
    (["tables", "--item", "toy/die"], "unknown item 'die'; known: toy/coin"),
    (["reproduce", "-p", "epochs=3"], "no parameter 'epochs'")])
def test_bad_input_is_one_line(project, at_home, words, said, capsys):
    at_home(project)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_interruption_is_one_line(project, at_home, monkeypatch, capsys):
    def stop(*_, **__): raise KeyboardInterrupt
    at_home(project)
    monkeypatch.setattr("aigid_repro.review.reproduce.reproduce", stop)
    assert main(["reproduce"]) == 130
    assert capsys.readouterr().err == "interrupted; run the same command to continue\n"


def test_reproduce_with_nothing_changed(finished, at_home, capsys):
    at_home(finished)
    main(["reproduce"])
    capsys.readouterr()
    start = time.monotonic()
    assert main(["reproduce"]) == 0 and time.monotonic() - start < 5
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["toy/coin: up to date", "claims: 1 supported, 1 contradicted, 1 not run"]
    assert out[2] == f"report: {finished / 'results/mini/report.html'}"


def test_a_failure_shows_in_the_exit_code(project, at_home, capsys):
    at_home(project)
    path = project / "nbs/toy/coin.ipynb"
    path.write_text(path.read_text().replace("predictions = coin.flips", "predictions = coin.flip"))
    assert main(["reproduce"]) == 2
    out, err = capsys.readouterr()
    assert "AttributeError" in err and "failed" in out and "claims: 3 not run" in out


def test_tables(finished, at_home, capsys):
    at_home(finished)
    assert main(["tables"]) == 0 and capsys.readouterr().out == "toy/coin: unchanged\n"
    table = results(finished) / "table.csv"
    right = table.read_text()
    table.write_text(right.replace("heads,100", "heads,101"))
    assert main(["tables"]) == 1
    assert capsys.readouterr().out == "toy/coin: changed: table.csv (column size, by up to 1)\n"
    assert table.read_text() == right and main(["tables"]) == 0


def test_tables_sees_changed_figures_and_missing_files(finished, at_home, capsys):
    at_home(finished)
    picture = np.asarray(Image.open(results(finished) / "figure.png").convert("RGB")).copy()
    picture[:40] = 0
    Image.fromarray(picture).save(results(finished) / "figure.png")
    (results(finished) / "effects.csv").unlink()
    (results(finished) / "table_old.csv").write_text("a\n1\n")
    assert main(["tables"]) == 1
    out = capsys.readouterr().out
    assert "% of the pixels)" in out and "effects.csv (was missing)" in out and "table_old.csv (is no longer" in out


def test_tables_sees_changed_code(finished, at_home, monkeypatch, capsys):
    at_home(finished)
    monkeypatch.setattr(coin, "effects", lambda p, old=coin.effects: old(p).assign(value=0.0))
    assert main(["tables"]) == 1 and "effects.csv (column value" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [b"PAR1 half a file", None])
def test_tables_with_damaged_predictions(finished, at_home, capsys, damage):
    at_home(finished)
    path = results(finished) / "predictions.parquet"
    path.write_bytes(damage) if damage else path.unlink()
    assert main(["tables"]) == 2
    err = capsys.readouterr().err
    assert str(path) in err and "make reproduce" in err and err.count("\n") == 1


def test_tables_without_results(project, at_home, capsys):
    at_home(project)
    assert main(["tables"]) == 0 and "no results under the profile mini" in capsys.readouterr().out
