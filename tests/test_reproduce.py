"The runner, tried on a miniature item: what is kept, what is repeated, what is refused."

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy

from aigid_repro.data.storage import InputError, file_hash
from aigid_repro.detect.results import read_run
from aigid_repro.review import reproduce as runner
from aigid_repro.review.reproduce import lock, reproduce


def folder(root):
    return root / "results/mini/toy/coin"


def content(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != ".made-here"}


def left_over(root):
    return [p.name for p in (root / "results").rglob(".*") if p.name != ".made-here"]


def fail_with(root, code):
    "Make the notebook end with this code instead of saving; results that are there become outdated."
    toy.notebook(root / "nbs/toy/coin.ipynb", toy.BODY, code)


def test_results_are_whole(finished):
    files = {"notebook.ipynb", "predictions.parquet", "table.csv", "figure.png", "effects.csv", "run.json"}
    assert set(content(folder(finished))) == files and not left_over(finished)
    run = read_run(folder(finished))
    assert run["predictions_sha256"] == file_hash(folder(finished) / "predictions.parquet")
    assert run["seconds"] > 0 and run["peak_memory_mb"] > 10
    assert run["rows"] == 200 and run["settings"] == {"flips": 200}
    assert {"stamp", "command", "commit", "dirty", "versions", "machine", "data", "deviations"} <= set(run)


def test_executed_notebook_is_clean(finished_once):
    text = (folder(finished_once) / "notebook.ipynb").read_text()
    nb = json.loads(text)
    assert str(finished_once) not in text and "papermill" not in text.replace("papermill-", "")
    assert all(set(c["metadata"]) <= {"tags"} for c in nb["cells"])
    assert not any(o.get("name") == "stderr" for c in nb["cells"] for o in c.get("outputs", []))
    assert "flipping 200 coins into results/mini/toy/coin" in text


def test_second_run_does_nothing(finished, capsys):
    before = content(folder(finished))
    row, = reproduce(root=finished)
    assert row["status"] == "up to date" and capsys.readouterr().out == "toy/coin: up to date\n"
    assert content(folder(finished)) == before


def test_running_again_gives_the_same_files(finished):
    before = content(folder(finished))
    (folder(finished) / "run.json").unlink()
    assert reproduce(root=finished)[0]["status"] == "done"
    after = content(folder(finished))
    assert {n for n in after if after[n] != before[n]} == {"run.json"}


def test_prose_costs_no_run(finished):
    path = finished / "nbs/toy/coin.ipynb"
    path.write_text(path.read_text().replace("Is the coin fair?", "Is it fair?"))
    assert reproduce(root=finished)[0]["status"] == "up to date"
    assert "Is it fair?" in (folder(finished) / "notebook.ipynb").read_text()


@pytest.mark.parametrize("damage", ["predictions.parquet", "table.csv", "run.json"])
def test_damaged_results_are_made_again(finished, damage):
    path = folder(finished) / damage
    path.unlink() if damage == "table.csv" else path.write_bytes(b"PAR1 half")
    assert reproduce(root=finished)[0]["status"] == "done"
    assert read_run(folder(finished))["predictions_sha256"] == file_hash(folder(finished) / "predictions.parquet")


def test_given_parameters(project):
    assert reproduce(root=project, parameters=dict(flips=50, seed=3))[0]["status"] == "done"
    run = read_run(folder(project))
    assert run["rows"] == 50 and run["seed"] == 3 and "-p flips=50" in run["command"]
    assert runner.outdated(runner.find_items(root=project)[0], "mini", dict(profile="mini", seed=0))


@pytest.mark.parametrize("wrong, words", [
    (dict(profile="tiny"), "unknown profile 'tiny'; known: smoke, mini"),
    (dict(paper="dice"), "unknown paper 'dice'; known: toy"),
    (dict(item="die"), "unknown item 'die'; known: toy/coin"),
    (dict(parameters=dict(epochs=3)), "no parameter 'epochs'; it has flips, out, profile, seed"),
    (dict(parameters=dict(out="here")), "not for -p"),
    (dict(jobs=0), "must be 1 or more")])
def test_wrong_words_run_nothing(project, wrong, words):
    with pytest.raises(InputError, match=words): reproduce(root=project, **wrong)
    assert not (project / "results").exists()


@pytest.mark.parametrize("tags, words", [("", "0 cells are tagged"), ("both", "2 cells are tagged")])
def test_parameters_cell(project, tags, words):
    path = project / "nbs/toy/coin.ipynb"
    toy.notebook(path, toy.BODY, tag="" if not tags else "parameters")
    if tags:
        nb = json.loads(path.read_text())
        nb["cells"][-1]["metadata"]["tags"] = ["parameters"]
        path.write_text(json.dumps(nb))
    with pytest.raises(InputError, match=words): reproduce(root=project)


def test_bad_input_in_a_notebook_is_one_line(finished, capsys):
    before = content(folder(finished))
    fail_with(finished, "raise InputError('photos.csv, row 3: no such file;\\nrun the builder')")
    row, = reproduce(root=finished)
    assert row["status"] == "failed"
    assert capsys.readouterr().err == "error: toy/coin: photos.csv, row 3: no such file; run the builder\n"
    assert content(folder(finished)) == before and not left_over(finished)


def test_a_bug_in_a_notebook_says_where_to_look(finished, capsys):
    before = content(folder(finished))
    fail_with(finished, "1/0")
    row, = reproduce(root=finished)
    assert "ZeroDivisionError: division by zero" in row["message"] and capsys.readouterr().err.count("\n") == 1
    kept = Path(row["message"].rsplit(" ", 1)[-1])
    assert "ZeroDivisionError" in kept.read_text() and finished.parent / "cache" in kept.parents
    assert content(folder(finished)) == before and not left_over(finished)


def test_a_notebook_that_saves_nothing(project):
    fail_with(project, "pass")
    assert "must call save" in reproduce(root=project)[0]["message"]
    assert not folder(project).exists() and not left_over(project)


def test_a_kernel_that_dies(project):
    fail_with(project, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert "the kernel died" in reproduce(root=project)[0]["message"]
    assert not folder(project).exists() and not left_over(project)


def test_the_others_go_on(project):
    with (project / "data/items.csv").open("a") as f: f.write("toy,die,nbs/toy/die.ipynb,toy.coin,Die\n")
    toy.notebook(project / "nbs/toy/die.ipynb", toy.BODY, toy.SAVE)
    fail_with(project, "1/0")
    assert [r["status"] for r in reproduce(root=project)] == ["failed", "done"]


def test_a_file_where_the_results_belong(project):
    (project / "results").write_text("")
    with pytest.raises(InputError, match="a file stands where a folder is needed"): reproduce(root=project)


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only")])
def test_results_cannot_be_put_into_place(finished, monkeypatch, capsys, code, words):
    before, rename = content(folder(finished)), os.replace
    (finished / "data/coins.txt").write_text("euro")

    def refuse(source, target):
        if Path(source).name == ".coin.partial": raise OSError(code, os.strerror(code))
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert words in reproduce(root=finished)[0]["message"] and capsys.readouterr().err.count("\n") == 1
    assert content(folder(finished)) == before and not left_over(finished)


def test_the_disk_is_full_while_the_notebook_saves(finished, capsys):
    before = content(folder(finished))
    code = "import os, errno\ndef full(*a): raise OSError(errno.ENOSPC, 'full')\nos.replace = full\n"
    fail_with(finished, code + toy.SAVE)
    assert "the disk is full" in reproduce(root=finished)[0]["message"] and capsys.readouterr().err.count("\n") == 1
    assert content(folder(finished)) == before and not left_over(finished)


def test_two_runs_at_once(project):
    busy = pytest.raises(InputError, match=f"process {os.getpid()} is working on this profile")
    with lock(project / "results/mini"), busy: reproduce(root=project)
    assert not folder(project).exists()


def start(root):
    "Run the miniature project in a process of its own, up to the middle of its notebook."
    fail_with(root, f"open({str(root / 'here')!r}, 'w').close()\nimport time\ntime.sleep(200)")
    code = ("import sys; from pathlib import Path; from aigid_repro import cli; from aigid_repro.data import storage; "
            f"storage.root = lambda: Path({str(root)!r}); sys.exit(cli.main(['reproduce']))")
    tests = str(Path(__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": tests}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(600):
        if (root / "here").exists(): return process
        time.sleep(0.1)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(finished, how):
    before, process = content(folder(finished)), start(finished)
    process.send_signal(how)
    _, err = process.communicate(timeout=120) # an interruption that is lost is repeated
    assert process.returncode == 130 and err.strip() == "interrupted; run the same command to continue"
    assert content(folder(finished)) == before and not left_over(finished)


def test_killed(project):
    process = start(project)
    process.kill()
    process.communicate()
    assert not folder(project).exists() and ".lock" in left_over(project)
    toy.make(project)
    assert reproduce(root=project)[0]["status"] == "done" and not left_over(project)


def test_killed_between_the_two_renames(finished):
    folder(finished).rename(folder(finished).with_name(".coin.old"))
    assert reproduce(root=finished)[0]["status"] == "up to date" and not left_over(finished)


def test_committed_results_are_made_again_in_a_fresh_clone(finished, capsys):
    before = content(folder(finished))
    (folder(finished) / ".made-here").unlink()
    assert reproduce(root=finished)[0]["status"] == "done"
    assert "predictions identical to the earlier ones" in capsys.readouterr().out
    assert content(folder(finished))["table.csv"] == before["table.csv"]
