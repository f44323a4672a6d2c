"What tests of running and reviewing share: a miniature project of one item."

import shutil

import pytest
import toy

from aigid_repro.data import storage
from aigid_repro.review.reproduce import reproduce


@pytest.fixture(scope="session", autouse=True)
def no_surroundings():
    "What the user of this machine has set counts for no test; the session's own fixtures run items, too."
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AIGID_PHOTOS", "AIGID_GENERATORS", "AIGID_DATA"): patch.delenv(name, raising=False)
        yield


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A miniature project that has not been run; its own cache."
    monkeypatch.setenv("AIGID_CACHE", str(tmp_path / "cache"))
    return toy.make(tmp_path / "project")


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory):
    root = toy.make(tmp_path_factory.mktemp("finished"))
    reproduce(root=root)
    return root


@pytest.fixture
def finished(finished_once, project):
    "A miniature project with results."
    shutil.copytree(finished_once, project, dirs_exist_ok=True)
    return project


@pytest.fixture
def at_home(monkeypatch):
    "Make a project the one that the command line works on."
    return lambda root: monkeypatch.setattr(storage, "root", lambda: root)
