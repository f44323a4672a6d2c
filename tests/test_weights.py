"""Official weights: found, fetched whole or not at all, and checked; against a hub that runs here.

No real checkpoint is here: files have the released form and mini networks, or weights of the rule in `fill` whose outputs
under the official code are in `tests/parity`.
"""
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from parity_weights import fill
from safetensors.torch import save_file

from aigid_repro.commfor.checkpoints import save_hub
from aigid_repro.commfor.model import CommForViT
from aigid_repro.data.storage import InputError
from aigid_repro.gapl import checkpoints as gapl
from aigid_repro.gensign import checkpoints as gensign
from aigid_repro.gensign.dair import DAIR
from aigid_repro.gensign.signature import Extractor
from aigid_repro.public import weights as ow
from aigid_repro.spai import checkpoints as spai
from aigid_repro.spai.pretraining import Encoder, MaskedFrequencyModel

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT/"tests"/"parity"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    "Caches and folders of this test alone."
    monkeypatch.setenv("AIGID_CACHE", str(tmp_path/"cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path/"torch"))
    monkeypatch.delenv("AIGID_DATA", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path/"hub"))


@pytest.fixture
def shelf(tmp_path): return tmp_path/"shelf"


def refused(words): return pytest.raises(InputError, match=words)


def sha256(data): return hashlib.sha256(data).hexdigest()


def states(found): return {r.what: r.state for r in found}


def change(monkeypatch, name, **changes):
    "Other facts about an official file."
    new = [dataclasses.replace(w, **changes) if w.name == name else w for w in ow.CATALOGUE]
    monkeypatch.setattr(ow, "CATALOGUE", new)
    return ow.named(name)[0]


# the list


def test_places_are_those_of_the_readme():
    promised = {m.rstrip("/") for m in re.findall(r"`weights/([\w.-]+)`", (ROOT/"README.md").read_text(encoding="utf8"))}
    assert promised == {"commfor-model-224", "spai.pth", "mfm_pretrain_vit_base.pth", "gapl-checkpoint.pt", "gapl-stage1.pt",
                        "gapl-pca_3type_num64.pt"} # and commfor-model-384, which the text calls -384
    assert promised | {"commfor-model-384"} <= {w.place for w in ow.CATALOGUE}


def test_the_list_needs_no_torch_and_no_network():
    code = ("import sys; from aigid_repro.public import weights as w; text = w.list_text(); "
            "assert all(x.name in text and x.licence in text for x in w.CATALOGUE); print(*sys.modules)")
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "pandas", "timm", "transformers", "httpx", "requests"} & set(loaded)


def test_table_and_text_agree(shelf):
    shelf.mkdir()
    (shelf/"spai.pth").write_bytes(b"x")
    table = ow.weights_list(shelf).set_index("name")
    assert table.present[["spai", "gapl"]].tolist() == [True, False] and table.place["spai"] == str(shelf/"spai.pth")
    assert re.search(rf"spai +present .*\n.*--detector spai\n.*spai.pth\n.*934,865,338 bytes\n(.*\n)+? +at +{shelf/'spai.pth'}\n",
                     ow.list_text(shelf))
    assert "00000274.png 0.9988" in table.expected["commfor-384"] and "sha256     not known here" in ow.list_text(shelf)


def test_both_folders_are_searched(tmp_path, monkeypatch):
    assert ow.weights_folder() == tmp_path/"cache"/"weights" and ow.find("spai") is None
    (ow.weights_folder()/"spai.pth").write_bytes(b"in the cache")
    monkeypatch.setenv("AIGID_DATA", str(tmp_path/"data"))
    assert ow.find("spai") == tmp_path/"cache"/"weights"/"spai.pth" and ow.place("spai") == tmp_path/"data"/"weights"/"spai.pth"
    ow.place("spai").parent.mkdir(parents=True)
    ow.place("spai").write_bytes(b"among the data")
    assert ow.find("spai") == ow.place("spai") and ow.find("spai", tmp_path/"elsewhere") is None


def test_a_detector_stands_for_its_checkpoints(shelf):
    shelf.mkdir()
    (shelf/"gensign-progan4.pth").write_bytes(b"x")
    assert ow.find("gensign", shelf).name == "gensign-progan4.pth" and ow.find("gensign-sdv14", shelf) is None
    with refused("no official weights are called 'spia'; known: commfor-224, .*spai"): ow.find("spia", shelf)


# a hub, as far as it is asked


class Hub:
    "Serves repositories of files; can break off, go down and send something else."
    def __init__(self):
        self.files, self.asked, self.cut, self.down, self.damage = {}, [], 0, False, False
        hub = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): pass
            def do_HEAD(self): self.do_GET()
            def do_GET(self): hub.answer(self)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(.01,), daemon=True).start()
    def add(self, repository, name, data, large=True): self.files[repository, name] = data, large
    def checksum(self, data, large): return sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    def listing(self, repository):
        def lfs(data): return dict(lfs=dict(sha256=sha256(data), size=len(data), pointerSize=130))
        found = [dict(rfilename=n, size=len(d), blobId=self.checksum(d, False)) | (lfs(d) if large else {})
                 for (r, n), (d, large) in self.files.items() if r == repository]
        return dict(id=repository, sha=COMMIT, siblings=found)
    def answer(self, request):
        path, wanted = request.path.split("?")[0].strip("/"), request.headers.get("Range")
        self.asked.append((request.command, path, wanted))
        if self.down: return request.send_error(503)
        if path.startswith("api/models/"): return self.send(request, json.dumps(self.listing(path[11:])).encode())
        repository, _, rest = path.partition("/resolve/")
        if (repository, name := rest.partition("/")[2]) not in self.files: return request.send_error(404)
        data, large = self.files[repository, name]
        head = {"ETag": f'"{self.checksum(data, large)}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data))}
        start = int(wanted[6:].rstrip("-")) if wanted else 0
        if wanted: head["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.damage and large: data = data[:-1] + b"?"
        cut = self.cut if large and request.command == "GET" else 0
        if cut: self.cut, self.down = 0, True # and stays away
        self.send(request, data[start:], head, cut, 206 if wanted else 200)
    def send(self, request, body, head=(), cut=0, code=200):
        request.send_response(code)
        for k, v in dict(head).items(): request.send_header(k, v)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET": request.wfile.write(body[:cut or None])
        if cut: request.close_connection = True


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda s: None) # between attempts
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000) # what is written at a time, else 10 MB
    found = Hub()
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    "The files of a hub folder of a mini network."
    torch.manual_seed(0)
    save_hub(CommForViT("mini", 64, 8), folder := tmp_path_factory.mktemp("mini"))
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def published(hub, mini):
    "Our mini network in the place of the released one."
    for name, data in mini.items(): hub.add("OwensLab/commfor-model-384", name, data, name != "config.json")
    return hub


def test_a_folder_is_fetched_and_checked(published, shelf, mini):
    path = ow.get("commfor-384", shelf)
    assert path == shelf/"commfor-model-384" == ow.find("commfor-384", shelf)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == mini
    assert sorted(p.name for p in shelf.iterdir()) == ["commfor-model-384", "commfor-model-384.origin.json"]
    note = json.loads((shelf/"commfor-model-384.origin.json").read_text())
    assert note["revision"] == COMMIT and note["files"]["model.safetensors"]["checksum"] == sha256(mini["model.safetensors"])
    asked = len(published.asked)
    assert ow.get("commfor-384", shelf) == path and len(published.asked) == asked # is here, nobody is asked
    found = ow.check("commfor-384", shelf)
    assert {k: states(found)[k] for k in ("size", "sha256", "opens", "numbers")} == dict(size="fine", sha256="fine", opens="fine",
                                                                                         numbers="fault") # a mini network
    assert "as announced by the hub" in found[1].detail


def test_an_interrupted_download_continues(published, shelf, mini):
    data, published.cut = mini["model.safetensors"], 600_000
    with refused(r"model.safetensors: the download broke off \(.*503.*\); 600,000 bytes are kept"): ow.get("commfor-384", shelf)
    part = shelf/"commfor-model-384"/f".model.safetensors.{sha256(data)[:12]}.part"
    assert part.read_bytes() == data[:600_000] and ow.find("commfor-384", shelf) is None
    with refused("can't be reached .*503"): ow.get("commfor-384", shelf)
    published.down, published.asked = False, []
    assert (ow.get("commfor-384", shelf)/"model.safetensors").read_bytes() == data and not part.exists()
    assert [(p.split("/")[-1], r) for _, p, r in published.asked[1:]] == [("model.safetensors", "bytes=600000-")]


def test_a_part_that_is_whole_or_too_long(published, shelf, mini):
    data = mini["model.safetensors"]
    part = shelf/"commfor-model-384"/f".model.safetensors.{sha256(data)[:12]}.part"
    part.parent.mkdir(parents=True)
    for content, again in ((data, []), (data + b"more", [None])):
        part.write_bytes(content)
        published.asked = []
        assert (ow.get("commfor-384", shelf)/"model.safetensors").read_bytes() == data
        assert [r for _, p, r in published.asked if p.endswith("safetensors")] == again
        (shelf/"commfor-model-384"/"model.safetensors").unlink()


def test_another_checksum_leaves_nothing(published, shelf):
    published.damage = True
    with refused("model.safetensors: what came has another checksum than announced; nothing was kept"): ow.get("commfor-384", shelf)
    assert ow.find("commfor-384", shelf) is None and [p.name for p in (shelf/"commfor-model-384").iterdir()] == ["config.json"]


def test_another_file_than_the_known_one_is_not_fetched(hub, shelf):
    hub.add("AbyssLumine/GAPL", "pretrained/checkpoint.pt", b"a newer release")
    with refused(f"gapl: .* another checkpoint.pt .SHA-256 {sha256(b'a newer release')}. than the one known here .ffbcb5eb"):
        ow.get("gapl", shelf)
    assert len(hub.asked) == 1 and ow.find("gapl", shelf) is None


def test_a_file_in_a_folder_of_the_repository(hub, shelf, monkeypatch):
    change(monkeypatch, "gapl", bytes=4, sha256=sha256(b"good"))
    hub.add("AbyssLumine/GAPL", "pretrained/checkpoint.pt", b"good")
    hub.add("AbyssLumine/GAPL", "other_checkpoint.pt", b"no")
    assert ow.get("gapl", shelf) == shelf/"gapl-checkpoint.pt" and ow.find("gapl", shelf).read_bytes() == b"good"


def test_a_file_that_has_gone(hub, shelf):
    hub.add("AbyssLumine/GAPL", "README.md", b"moved", False)
    with refused("gapl: AbyssLumine/GAPL has no checkpoint.pt any more; see https"): ow.get("gapl", shelf)


def test_one_at_a_time(published, shelf, mini):
    part = shelf/"commfor-model-384"/f".model.safetensors.{sha256(mini['model.safetensors'])[:12]}.part"
    part.parent.mkdir(parents=True)
    with open(part, "ab") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with refused("another process is fetching this file"): ow.get("commfor-384", shelf)
    assert ow.get("commfor-384", shelf)


def test_no_space_is_known_before(published, shelf, monkeypatch):
    monkeypatch.setattr(ow.shutil, "disk_usage", lambda p: type("Usage", (), dict(free=10)))
    with refused("10 bytes are free, [0-9,]+ are needed"): ow.get("commfor-384", shelf)
    assert ow.find("commfor-384", shelf) is None


def test_a_place_that_cannot_be_written(published, tmp_path):
    (tmp_path/"file").write_bytes(b"")
    with refused("cannot write .*a file stands where a folder is needed"): ow.get("commfor-384", tmp_path/"file")


@pytest.mark.parametrize("name, words", [
    ("commfor-224", "fetch config.json and model.safetensors by hand .https://huggingface.co/OwensLab/commfor-model-224., put them at "
                    r"\S*/commfor-model-224/; then run: aigid weights check \S*/shelf/commfor-model-224"),
    ("gapl", r"fetch checkpoint.pt by hand .*AbyssLumine/GAPL., put it at \S*/gapl-checkpoint.pt; "
             r"then run: aigid weights check \S*/gapl-checkpoint.pt"),
    ("clip-l14", r"run the same on a machine with network and copy models--openai--clip-vit-large-patch14 from its hub cache to \S*hub "),
    ("vgg16", r"without network: fetch vgg16-397923af.pth by hand .*, put it at \S*/torch/hub/checkpoints/vgg16-397923af.pth")])
def test_offline_says_where_to_put_it(name, words, shelf, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if hasattr(huggingface_hub.utils, "_http"): monkeypatch.setattr(huggingface_hub.utils._http, "_GLOBAL_CLIENT", None, raising=False)
    with refused(words): ow.get(name, shelf)


@pytest.mark.parametrize("name, words", [
    ("spai", r"spai: no program can fetch this; fetch spai.pth by hand .linked from github.com/mever-team/spai., put it at \S*/spai.pth;"),
    ("gensign", r"gensign-progan20: .* fetch the file by hand .file host.*, put it at \S*/gensign-progan20.pth"),
    ("gapl-stage1", "commit ea32aeb, folder pretrained"), ("commfor-384-archive", "model_weights.tar on Dropbox .unpack it.")])
def test_by_hand_says_where_from(name, words, shelf):
    with refused(words): ow.get(name, shelf)
    with refused(f"then run: aigid weights check {ow.named(name)[0].name}$"): ow.get(name) # in the usual folder


def test_what_is_here_and_wrong_is_not_handed_out(shelf):
    shelf.mkdir()
    (shelf/"spai.pth").write_bytes(b"cut off")
    with refused("spai.pth: size 7 bytes, not 934,865,338 as published; .* move it away and run the same again"): ow.get("spai", shelf)


def test_backbones_go_to_the_cache_of_their_library(hub, shelf, tmp_path, monkeypatch):
    import timm
    state = timm.create_model("test_vit").state_dict()
    save_file(state, tmp_path/"x.safetensors")
    hub.add("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "model.safetensors", data := (tmp_path/"x.safetensors").read_bytes())
    path = ow.get("vit-small-224", shelf)
    assert path == ow.find("vit-small-224") and tmp_path/"hub" in path.parents and path.read_bytes() == data and not shelf.exists()
    found = ow.check("vit-small-224")
    assert states(found) == dict(file="fine", size="unknown", sha256="fine", opens="fault") # it is no ViT-S
    change(monkeypatch, "vit-small-224", loader="timm/test_vit")
    assert states(ow.check("vit-small-224"))["opens"] == "fine"


def test_a_file_that_is_on_no_hub(hub, monkeypatch, tmp_path):
    hub.add("models", "vgg", data := b"weights"*1000)
    w = change(monkeypatch, "vgg16", url=lambda: f"{hub.url}/models/resolve/main/vgg", sha256=sha256(data)[:8])
    hub.cut = 3000
    with refused("3,000 bytes are kept"): ow.get("vgg16")
    hub.down = False
    assert ow.get("vgg16") == tmp_path/"torch"/"hub"/"checkpoints"/w.place and ow.find("vgg16").read_bytes() == data
    assert hub.asked[-1][2] == "bytes=3000-"


# files


class Harmful:
    "An object that runs code when it is unpickled."
    def __reduce__(self): return os.mkdir, ("harm",)


@pytest.mark.parametrize("content, words", [
    ("pickle", "holds a Python object .*mkdir"), ("cut", "damaged|cannot read|no weights of torch"),
    ("page", "no weights of torch, or damaged"),
    ("pointer", "Git LFS pointer"), ("archive", "an archive; unpack it"), ("nan", "finite numbers"), ("list", "neither a state dict"),
    ("empty", "damaged"), ("other", "weights of none of commfor, spai")])
def test_bad_files_are_faults_and_run_nothing(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, path = CommForViT("mini", 64, 8).state_dict(), tmp_path/"x.pt"
    torch.save(state | {"pickle": {"vit.more": Harmful()}, "nan": {"vit.norm.bias": torch.full((96,), torch.nan)}}.get(content, {}), path)
    if content == "cut": path.write_bytes(path.read_bytes()[:5000])
    if content == "page": path.write_text("<!doctype html>quota exceeded")
    if content == "pointer": path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    if content == "empty": path.write_bytes(b"")
    if content == "list": torch.save([1, 2], path)
    if content == "other": torch.save({"layer.weight": torch.ones(2)}, path)
    if content == "archive":
        (tmp_path/"y").write_bytes(b"x")
        with tarfile.open(path, "w") as t: t.add(tmp_path/"y")
    text, code = ow.check_text(path)
    assert code == 1 and re.search(f"fault   opens .*(?:{words})", text) and not Path("harm").exists()


def test_every_official_form_is_recognised(tmp_path):
    torch.manual_seed(0)
    extractor, dair = Extractor(16, 2), DAIR(8)
    encoder = Encoder(32, 8, 64, 2, 1)
    gapl.save_prototypes(torch.randn(16, 128), tmp_path/"prototypes.pt")
    gapl.save_stage1(torch.randn(128, 1024), tmp_path/"stage1.pt")
    gensign.save_extractor(extractor, tmp_path/"extractor.pth", step=5)
    gensign.save_dair(dair, tmp_path/"dair.pth", step=7)
    spai.save_mfm(MaskedFrequencyModel(encoder, 4), tmp_path/"mfm.pth")
    save_hub(CommForViT("mini", 64, 8), tmp_path/"commfor")
    torch.save({"module." + k: v for k, v in CommForViT("mini", 64, 8).state_dict().items()}, tmp_path/"bare.pt")
    kinds = {"prototypes.pt": "gapl-prototypes", "stage1.pt": "gapl-stage1", "extractor.pth": "gensign-extractor",
             "dair.pth": "gensign-dair", "mfm.pth": "mfm", "commfor": "commfor", "bare.pt": "commfor"}
    for name, kind in kinds.items():
        assert ow.kind_of(tmp_path/name) == kind
        text, code = ow.check_text(tmp_path/name)
        assert code == 0 and "no official name or hash" in text and "can't be told from the official one" in text, text


def test_another_network_under_an_official_name(shelf, mini):
    "A small network at the place of a large one, and a matrix of other values at the place of a published one."
    (shelf/"commfor-model-224").mkdir(parents=True)
    for name, data in mini.items(): (shelf/"commfor-model-224"/name).write_bytes(data)
    found = ow.check("commfor-224", shelf)
    assert states(found)["numbers"] == "fault" and "another network" in found[-1].detail
    gapl.save_prototypes(torch.randn(64, 128), shelf/"gapl-pca_3type_num64.pt")
    text, code = ow.check_text("gapl-prototypes", shelf)
    assert code == 1 and "fault   values            not those of the published matrix" in text
    torch.save({"weight": torch.ones(1, 1024), "bias": torch.ones(1)}, shelf/"gapl-stage1.pt")
    assert "a linear probe (weight and bias), as first published" in ow.check_text("gapl-stage1", shelf)[0]


@pytest.mark.parametrize("name, file, part", [("gapl-prototypes", "prototypes", "pca_3type_num64"),
                                              ("gapl-stage1", "stage1", "foren_proj.weight")])
def test_published_matrices_are_known_by_their_values(name, file, part, shelf):
    with np.load(PARITY/"gapl"/f"official_{file}.npz") as stored: matrix = torch.from_numpy(stored[part])
    (gapl.save_prototypes if "proto" in name else gapl.save_stage1)(matrix, shelf/ow.named(name)[0].place)
    text, code = ow.check_text(name, shelf)
    assert code == 0 and "those of the published matrix" in text and text.endswith("no fault")
    assert ow.check_text(shelf/ow.named(name)[0].place)[0].endswith("no fault") # a path that has the official name


def test_a_matrix_of_another_shape(tmp_path, shelf):
    "A bare matrix has no names: only its shape tells what it is."
    for shape in ((2, 7), (128, 64), (1024, 128)):
        gapl.save_stage1(torch.randn(*shape), tmp_path/"x.pt")
        found = ow.check(tmp_path/"x.pt")
        if shape[1] == 128: assert found[-1].detail.startswith("gapl-prototypes")
        else:
            assert found[-1].state == "fault"
            assert f"a matrix of {shape[0]} x {shape[1]}; known are gapl-stage1 128 x 1024" in found[-1].detail
    shelf.mkdir()
    for name, shape in (("gapl-stage1", (1024, 128)), ("gapl-prototypes", (128, 64))): # as many numbers as there should be
        gapl.save_stage1(torch.randn(*shape), shelf/ow.named(name)[0].place)
        last = ow.check(name, shelf)[-1]
        assert (last.what, last.state) == ("opens", "fault") and f"a matrix of {shape[0]} x {shape[1]}, not" in last.detail


@pytest.mark.parametrize("note", ["[]", "null", '{"files": []}', '{"files": {"x.pt": []}}', '{"files": {"x.pt": {"bytes": [], "c": 1}}}',
                                  '{"files": {"x.pt": {"bytes": 5, "c": null}}}', "no json"])
def test_a_note_that_says_nothing(note, tmp_path):
    gapl.save_prototypes(torch.randn(4, 128), tmp_path/"x.pt")
    (tmp_path/"x.pt.origin.json").write_text(note)
    assert states(ow.check(tmp_path/"x.pt"))["sha256"] == "unknown"


def test_a_relative_folder_starts_from_the_project(tmp_path, monkeypatch):
    from aigid_repro.detect.studies import public_folder
    monkeypatch.chdir(tmp_path)
    for given in ("some data", str(tmp_path/"absolute")):
        monkeypatch.setenv("AIGID_DATA", given)
        assert ow.weights_folder() == public_folder()/"weights" == ow.place("spai").parent


def test_missing_and_unknown(shelf, tmp_path):
    text, code = ow.check_text("mfm", shelf)
    assert code == 1 and "not here; aigid weights get mfm, or fetch mfm_pretrain_vit_base.pth by hand" in text
    with refused("neither a file nor a name; known: commfor-224"): ow.check(tmp_path/"absent.pth")
    (tmp_path/"folder").mkdir()
    assert ow.check(tmp_path/"folder")[0] == ow.Result("file", "fault", f"{tmp_path/'folder'}: no model.safetensors in it")


def test_a_path_is_known_by_its_hash(tmp_path, monkeypatch):
    gapl.save_prototypes(torch.randn(64, 128), tmp_path/"x.pt")
    assert states(ow.check(tmp_path/"x.pt"))["sha256"] == "unknown"
    change(monkeypatch, "gapl-prototypes", sha256=sha256((tmp_path/"x.pt").read_bytes()), values="")
    found = ow.check(tmp_path/"x.pt")
    assert states(found)["sha256"] == "fine" and "(gapl-prototypes)" in found[0].detail


# outputs


def test_check_gives_the_official_score_of_community_forensics(shelf, monkeypatch):
    "Hub folder at full size: official weights are not here, those of the rule are, and what the official code makes of them."
    detector = CommForViT("small", 384)
    detector.load_state_dict(fill({k: v.shape for k, v in detector.state_dict().items()}))
    save_hub(detector, shelf/"commfor-model-384")
    with np.load(PARITY/"commfor"/"checkpoints.npz") as stored: logit = float(stored["small_384_testimages_logit"][0, 0])
    found = ow.check("commfor-384", shelf)
    ours = next(r for r in found if r.what == "00000845.png")
    assert states(found)["numbers"] == "fine" and ours.state == "fault" and "published 0.9569: further than 0.001" in ours.detail
    assert states(found)["00000274.png"] == "unknown" # not shipped
    monkeypatch.setattr(ow, "TOLERANCE", 1e-5)
    e = ow.named("commfor-384")[0].expected[2]
    change(monkeypatch, "commfor-384", expected=(e._replace(score=1/(1 + math.exp(-logit))),))
    text, code = ow.check_text("commfor-384", shelf)
    assert code == 0 and "fine    00000845.png" in text and text.endswith("no fault")
    (shelf/"images").mkdir()
    (shelf/"images"/"00000845.png").write_bytes((PARITY/"commfor"/"image_a.png").read_bytes())
    assert ow.check("commfor-384", shelf)[-1] == ow.Result("00000845.png", "unknown", "another file of that name")


def test_check_gives_the_official_score_of_spai(shelf, monkeypatch):
    "A reduced detector in the released form, on an image of 150 x 200 px; scores of the official code."
    with np.load(PARITY/"spai"/"golden_tiny.npz") as stored: golden = dict(stored)
    state = fill(json.loads((PARITY/"spai"/"spec_tiny.json").read_text()))
    state[spai.MASK] = torch.from_numpy(golden["mask"]).long()
    spai.save_official(spai.from_state(state, heads=4)[0], shelf/"spai.pth", epoch=3)
    e = ow.Expected("image_150x200.png", float(golden["grid150x200.prob"][0, 0]), size=(200, 150))
    change(monkeypatch, "spai", expected=(e, e._replace(image="image_70x90.png", score=float(golden["five70x90.prob"][0, 0]), size=())),
           bytes=0, sha256="", numbers=0)
    monkeypatch.setattr(ow, "TOLERANCE", 1e-5)
    found = ow.check("spai", shelf, images=PARITY/"spai")
    assert {k: v for k, v in states(found).items() if "image" in k} == {"image_150x200.png": "fine", "image_70x90.png": "fine"}
    change(monkeypatch, "spai", expected=(e._replace(size=(1232, 928)),))
    assert ow.check("spai", shelf, images=PARITY/"spai")[-1].detail == "an image of (200, 150), not (1232, 928)"
