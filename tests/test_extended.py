"Photos of a user and generators of the hub as a world: tiny models with random weights, and nothing from a network."
import json
import re
import shutil
import warnings
from dataclasses import replace

import diffusers
import numpy as np
import pytest
from PIL import Image

from aigid_repro.data.corpus import build_corpus
from aigid_repro.data.generators import CONTROL, SHARPENING, bicubic_round_trip, sharpen
from aigid_repro.data.photos import open_photo, pool
from aigid_repro.data.records import check_leakage, open_image, validate
from aigid_repro.data.storage import InputError
from aigid_repro.detect import extended_world, hub_generators
from aigid_repro.detect.extended_world import Extended, extended, stamp
from aigid_repro.detect.scoring import IMAGE_COLUMNS
from aigid_repro.detect.studies import Training, as_run, embedded, parts, run_trainings

SIZES = dict(size=64, train=14, validation=6, test=8, per_family=4, members=1)
QUICK = dict(detector="high-pass-cnn", steps=2, batch=4, crop=32)
VAE = dict(block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"]*2, up_block_types=["UpDecoderBlock2D"]*2,
           layers_per_block=1, norm_num_groups=4)


def refused(*parts):
    "Expect one line which contains all parts."
    return pytest.raises(InputError, match="(?s)^" + "".join(f"(?=.*{re.escape(p)})" for p in parts) + r"[^\n]*$")


def save_pipeline(folder):
    "Stable Diffusion with four words."
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast
    torch.manual_seed(2)
    words = Tokenizer(WordLevel({"a": 0, "photograph": 1, "of": 2, "<end>": 3}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<end>", eos_token="<end>", unk_token="<end>", model_max_length=8)
    text = CLIPTextConfig(vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          max_position_embeddings=8, bos_token_id=0, eos_token_id=3, pad_token_id=3)
    unet = diffusers.UNet2DConditionModel(sample_size=48, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=16,
                                          norm_num_groups=4, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                          up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    diffusers.StableDiffusionPipeline(diffusers.AutoencoderKL(**VAE), CLIPTextModel(text), tokenizer, unet, scheduler,
                                      None, None, requires_safety_checker=False).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Photos and models."
    import torch
    place = tmp_path_factory.mktemp("extended")
    (place/"photos"/"lake").mkdir(parents=True)
    table = pool()
    for i, photo in enumerate(table.photo[table.split == "test"][:14]):
        image = open_photo(photo)
        image.resize((image.width//4, image.height//4)).save(place/"photos"/("lake" if i % 2 else "")/f"Photo No {i}.jpg", quality=95)
    (place/"photos"/"Photo No 0.txt").write_text("a photograph\nof a")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**VAE).save_pretrained(place/"first-kl")
    diffusers.AutoencoderKL(**VAE).save_pretrained(place/"second-kl")
    diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                              num_decoder_blocks=(1, 1)).save_pretrained(place/"small")
    save_pipeline(place/"painter")
    return place


@pytest.fixture(autouse=True)
def surroundings(place, monkeypatch):
    monkeypatch.setenv("AIGID_CACHE", str(place/"cache"))
    monkeypatch.setenv("AIGID_PHOTOS", str(place/"photos"))
    monkeypatch.delenv("AIGID_GENERATORS", raising=False)
    # half of the kit's generators run for seconds here; those that are left cover every way to run one
    few = {"systematic": ["decoder/000", "decoder/001"], "manual": ["vqvae/6", "waifu2x/cunet-2x-denoise1"]}
    few["both"] = sum(few.values(), [])
    monkeypatch.setattr(extended_world, "pools", lambda: few)
    monkeypatch.setattr(extended_world, "evaluation_generators", lambda settings: ["decoder/006", CONTROL, SHARPENING])


@pytest.fixture(scope="module")
def world(place):
    names = [f"train:{place/'first-kl'}", f"held-out:{place/'second-kl'}", str(place/"small"), str(place/"painter")]
    return Extended(**SIZES, generators=names, slow=True)


def records(world):
    return build_corpus(world.settings())


def test_records(world):
    t = records(world)
    validate(t, check_images=True)
    assert {"crop", "set", "prompt"} <= set(t) and not set(t) & set(extended_world.RECIPE)
    assert t.groupby("split").label.agg(lambda v: (v == 0).sum()).to_dict() == dict(train=14, validation=6, test=8)
    assert {open_image(r).size for r in t[["id", "image"]].to_dict("records")} == {(64, 64)}
    kinds = t[t.label == 1].groupby("generator").agg(family=("family", "first"), set=("set", "first"), n=("id", "size"))
    assert kinds.loc["first-kl", ["family", "set"]].tolist() == kinds.loc["second-kl", ["family", "set"]].tolist() == [
        "other autoencoder", "manual"]
    assert kinds.loc["painter"].tolist() == ["text to image", "unseen", 4]
    assert kinds.loc["small"].tolist() == ["other autoencoder", "manual", 2]
    assert set(t[(t.generator == "first-kl")].split) == {"train", "validation"} and set(t[t.generator == "second-kl"].split) == {"test"}
    train = t[(t.split == "train") & (t.label == 1)]
    assert train.groupby("set").size().to_dict() == {"systematic": 14, "manual": 14} # two draws, as in the embedded corpus
    assert train.groupby(["set", "crop"]).size().eq(1).all()


def test_pairs_by_crop(world, place):
    t = records(world)
    real = t[t.label == 0].set_index("crop")
    pairs = t[t.label == 1].join(real[["source", "split", "image"]].add_suffix("_real"), on="crop")
    assert pairs.image_real.notna().all() and (pairs.source == pairs.source_real).all() and (pairs.split == pairs.split_real).all()
    own = hub_generators.find(str(place/"second-kl"))
    edits = {"second-kl": lambda x: hub_generators.reconstruct(own, x), CONTROL: bicubic_round_trip, SHARPENING: sharpen}
    for name, edit in edits.items():
        rows = pairs[pairs.generator == name]
        x, y = (np.stack([np.asarray(open_image(v)) for v in rows[c]]) for c in ("image_real", "image"))
        assert len(rows) >= 2 and np.abs(edit(x).astype(int) - y).max() <= 1
    assert t[t.family == "bicubic control"].set.eq("bicubic control").all()


def test_pictures_from_words(world, place):
    t = records(world)
    drawn = t[t.generator == "painter"]
    prompts = world.reals("test").set_index("crop").prompt
    assert drawn.prompt.tolist() == prompts[drawn.crop].tolist() and t[t.generator != "painter"].prompt.eq("").all()
    first = world.table().set_index("file").photo["Photo No 0.jpg"]
    told = [world.reals(s) for s in ("train", "validation", "test")]
    assert {p for r in told for p in r.prompt[r.source == first]} <= {"a photograph of a"}
    painter = hub_generators.find(str(place/"painter"))
    painter = replace(painter, call=(("num_inference_steps", 2),))
    both = hub_generators.draw(painter, ["a photograph", "of a"], [3, 4], slow=True)
    alone = hub_generators.draw(painter, ["of a"], [4], slow=True)
    assert both[0].shape == (96, 96, 3) and np.abs(both[1].astype(int) - alone[0]).max() <= 1 and not np.array_equal(*both)
    with refused("painter", "needs a GPU"): hub_generators.draw(painter, ["a"], [0], device="cpu")
    with refused("painter", "its vae"): hub_generators.reconstruct(painter, np.zeros((1, 8, 8, 3), np.uint8))
    if not extended_world._gpu():
        with refused("painter", "needs a GPU"): replace(world, slow=False).check()


def test_photos_stay_in_one_split(world, place, tmp_path):
    t = records(world)
    assert not len(check_leakage(t, pictures=False)) and t.groupby("source").split.nunique().eq(1).all()
    photos = shutil.copytree(place/"photos", tmp_path/"photos")
    for i in range(0, 14, 2):
        with Image.open(photos/f"Photo No {i}.jpg") as f: f.resize((f.width*9//10, f.height*9//10)).save(photos/f"again {i}.png")
    found = replace(world, photos=str(photos), generators=()).table().set_index("file")
    for i in range(0, 14, 2): assert found.group[f"Photo No {i}.jpg"] == found.group[f"again {i}.png"]
    assert found.groupby("group").split.nunique().eq(1).all() and set(found.split) == {"train", "validation", "test"}


def test_photos_that_are_left_out(world, place, tmp_path):
    photos = shutil.copytree(place/"photos", tmp_path/"photos")
    (photos/"torn.jpg").write_bytes((photos/"Photo No 2.jpg").read_bytes()[:2000])
    (photos/"copy.jpg").write_bytes((photos/"Photo No 4.jpg").read_bytes())
    (photos/"phone.HEIC").write_bytes(b"any")
    (photos/".trash").mkdir()
    (photos/".trash"/"old.jpg").write_bytes(b"any")
    Image.new("RGB", (300, 20)).save(photos/"banner.png")
    own = pool()[lambda p: p.split == "generator"].iloc[0]
    (photos/"known.webp").write_bytes(_kit_photo(own.file))
    w = replace(world, photos=str(photos), generators=())
    left = w.skipped().set_index("file").fault
    assert set(left.index) == {"torn.jpg", "copy.jpg", "phone.HEIC", "banner.png", "known.webp"}
    assert "cannot be read" in left["torn.jpg"] and left["copy.jpg"] == "a copy of Photo No 4.jpg" and "convert" in left["phone.HEIC"]
    assert left["banner.png"] == "300x20 px, smaller than 53 px" and "trained on it" in left["known.webp"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        w.prepare(1)
    assert any("5 of 19 files are left out" in str(v.message) and "banner.png" in str(v.message) for v in said)


def test_what_the_kit_has_learned_from_is_refused(world, place, tmp_path):
    "Also saved again, and reduced: encoders have seen the split train, generators the split generator."
    photos, splits = shutil.copytree(place/"photos", tmp_path/"photos"), pool().groupby("split").photo.first()
    for split, photo in splits.items():
        image = open_photo(photo)
        image.resize((image.width//2, image.height//2)).save(photos/f"{split} again.jpg", quality=80)
    (photos/"as it is.webp").write_bytes(_kit_photo(pool().file[pool().split == "train"].iloc[0]))
    left = replace(world, photos=str(photos), generators=()).skipped().set_index("file").fault
    assert set(left.index) == {"train again.jpg", "generator again.jpg", "as it is.webp"}
    files = pool().set_index("photo").file
    for split in ("train", "generator"): assert f"nearly the same as {files[splits[split]]}" in left[f"{split} again.jpg"]


def test_a_model_carried_over_by_hand_stays_what_it_is(world, place, tmp_path):
    for name, inner in (("flux/vae", "vae"), ("sd/vae-mse", "")):
        known = hub_generators.CATALOGUE[name]
        shutil.copytree(place/"first-kl", tmp_path/name/inner)
        for given in {tmp_path/name, tmp_path/name/inner}:
            g = hub_generators.find(f"{name}={given}")
            assert replace(g, source=known.source, subfolder=known.subfolder) == known and g.local()
            assert hub_generators.resolved(g).family == known.family and hub_generators.place(g) == tmp_path/name/inner
        assert hub_generators.find(f"train:{name}={tmp_path/name}").role == "train"
    own = hub_generators.find(f"someone/model={place/'small'}")
    assert (own.name, own.role, own.source) == ("someone/model", "evaluation", str(place/"small"))
    same = [replace(world, generators=(f"flux/vae={tmp_path/'flux/vae'/v}",)).key() for v in ("", "vae")]
    assert same[0] == same[1] != replace(world, generators=(f"sdxl/vae={tmp_path/'flux/vae/vae'}",)).key()
    painter = hub_generators.find(f"drawn/sd-turbo={place/'painter'}")
    assert painter.call == hub_generators.CATALOGUE["drawn/sd-turbo"].call and painter.kind == "pipeline"


def _kit_photo(file):
    from aigid_repro.data.photos import photo_dir
    return (photo_dir()/file).read_bytes()


def test_same_again_elsewhere(world, place, tmp_path, monkeypatch):
    "Another folder, another cache: the same images under the same key; other photos, weights or sizes: another key."
    first, key = records(world), world.key()
    shutil.copytree(place/"photos", tmp_path/"photos")
    shutil.copytree(place/"first-kl", tmp_path/"models"/"first-kl")
    monkeypatch.setenv("AIGID_CACHE", str(tmp_path/"cache"))
    names = (f"train:{tmp_path/'models'/'first-kl'}", *world.generators[1:])
    moved = replace(world, photos=str(tmp_path/"photos"), generators=names)
    assert moved.key() == key
    second = records(moved)
    assert second.drop(columns="image").equals(first.drop(columns="image"))
    assert all(np.array_equal(open_image(a), open_image(b)) for a, b in zip(first.image, second.image))
    config = tmp_path/"models"/"first-kl"/"config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": .5}))
    assert moved.key() != key and replace(world, test=7).key() != key and replace(world, generators=names[1:]).key() != key
    (tmp_path/"photos"/"Photo No 2.jpg").unlink()
    assert replace(moved, generators=world.generators).key() != key
    own, *rest = parts(as_run(Training({}), world))
    assert rest == [world] and own == Training({})


def test_interruption(world, tmp_path, monkeypatch):
    "What was made before an interruption is not made again."
    monkeypatch.setenv("AIGID_CACHE", str(tmp_path))
    w, runs, original = replace(world, generators=world.generators[:1]), [], extended_world.kit.generate
    def generate(name, *rest):
        runs.append(name)
        if len(runs) == 6: raise KeyboardInterrupt
        return original(name, *rest)
    monkeypatch.setattr(extended_world.kit, "generate", generate)
    with pytest.raises(KeyboardInterrupt): w.prepare(1)
    assert not list((tmp_path/"corpus").glob("*.parquet")) and len(runs) == 6
    w.prepare(1)
    again = runs[6:]
    plain = tmp_path/"plain"
    monkeypatch.setenv("AIGID_CACHE", str(plain))
    del runs[:]
    runs += [""]*9 # no more interruptions
    w.prepare(1)
    assert len(again) == len(runs) - 9 - 5


def test_trainings(world, place):
    "Studies train and score in this world as in any other."
    plan = [(dict(run="all", detector="a"), Training(QUICK)),
            (dict(run="two", detector="b"), Training(QUICK, 1, generators=("first-kl", "vqvae/6"), images=6))]
    t = run_trainings(plan, world, ("commfor.model",), jobs=1)
    assert {*IMAGE_COLUMNS, "logit", "run", "seed"} <= set(t) and np.isfinite(t.logit).all()
    about = records(world)[lambda r: r.split != "train"]
    assert t[t.run == "two"].id.tolist() == about.id.tolist()
    rows = world.data(plan[1][1])
    assert len(rows) == 12 and rows.groupby("generator").size().to_dict() == {"first-kl": 3, "real": 6, "vqvae/6": 3}
    assert set(rows.crop[rows.label == 1]) == set(rows.crop[rows.label == 0])
    halves = world.sources()
    mine = world.data(Training({}, pool="systematic", reals=("photos 1",), sources=("photos 2",)))
    assert sum(halves.values()) == 14 and not set(mine.source[mine.label == 0]) & set(mine.source[mine.label == 1])
    single = replace(world, alone=True)
    assert single.data(Training(QUICK, 5)).generator.nunique() == 2 # real, and one of the large family
    assert single.data(Training({}, 5)).generator.nunique() == world.data(Training(QUICK, 5)).generator.nunique() > 2
    about, images = world.images("test", 4)
    assert set(about.generator) >= {"real", "painter", "second-kl"} and images[0].shape == (64, 64, 3)
    assert len(world.images("train", 5)[1]) == 10
    with refused("'style/10' may not train"): world.data(Training({}, generators=("style/10",)))


def test_which_world(place, monkeypatch):
    monkeypatch.setenv("AIGID_GENERATORS", f"train:{place/'first-kl'}, {place/'small'}")
    w = extended("gpu", size=256, alone=True)
    assert w.kind == "extended" and w.size == 256 and w.photos == "" and [*w.named()] == ["first-kl", "small"]
    assert extended("smoke") == embedded("smoke") and stamp("smoke") == "" != stamp("gpu")
    monkeypatch.setenv("AIGID_GENERATORS", f"{place/'small'}")
    assert stamp("gpu") != stamp("smoke")
    monkeypatch.delenv("AIGID_PHOTOS")
    assert extended("gpu", alone=True) == embedded("gpu") and stamp("gpu") == ""


def test_bad_folders_and_names(world, place, tmp_path, monkeypatch):
    with refused("no folder", "AIGID_PHOTOS"): replace(world, photos=str(tmp_path/"nowhere")).check()
    with refused(str(tmp_path), "no photos", ".jpg"): replace(world, photos=str(tmp_path)).check()
    Image.new("RGB", (9, 9)).save(tmp_path/"dot.png")
    with refused("no photo for split train", "1 files can't be used"): replace(world, photos=str(tmp_path), generators=()).prepare(1)
    with refused("crops of 64 px, 900 are needed"): replace(world, train=900, generators=()).prepare(1)
    with refused("no folder, no hub id", "near"): replace(world, generators=("tiny sd",)).check()
    with refused("two generators are called first-kl"): replace(world, generators=world.generators[:1]*2).check()
    monkeypatch.delenv("AIGID_PHOTOS")
    with refused("set AIGID_PHOTOS"): world.check()


def test_pickles_are_refused(world, place, tmp_path):
    pickled = shutil.copytree(place/"first-kl", tmp_path/"pickled")
    (pickled/"diffusion_pytorch_model.safetensors").rename(pickled/"diffusion_pytorch_model.bin")
    with refused(str(pickled), "pickled weights (diffusion_pytorch_model.bin)", "safetensors"):
        replace(world, generators=(str(pickled),)).check()
    painter = shutil.copytree(place/"painter", tmp_path/"painter")
    (painter/"unet"/"diffusion_pytorch_model.safetensors").rename(painter/"unet"/"diffusion_pytorch_model.bin")
    with refused("unet: only pickled weights"): replace(world, generators=(str(painter),)).check()
    index = json.loads((place/"painter"/"model_index.json").read_text())
    (painter/"model_index.json").write_text(json.dumps(index | {"unet": ["my_unet", "Net"]}))
    with refused("unet needs code"): replace(world, generators=(str(painter),)).check()
    other = tmp_path/"other"
    other.mkdir()
    (other/"config.json").write_text('{"_class_name": "VQModel"}')
    with refused("class VQModel", "AutoencoderKL"): replace(world, generators=(str(other),)).check()
    torn = shutil.copytree(place/"small", tmp_path/"torn")
    weights = torn/"diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with refused(str(torn), "can't be loaded"): hub_generators.reconstruct(hub_generators.find(str(torn)), np.zeros((1, 8, 8, 3), np.uint8))


def test_offline(world, tmp_path, monkeypatch):
    "What would be fetched is named with its size and its place."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", _nothing)
    g = hub_generators.find("flux/vae")
    said = ("flux/vae", "black-forest-labs/FLUX.1-schnell/vae", "about 168 MB", "Apache-2.0", str(tmp_path), "no way out",
            "hf download black-forest-labs/FLUX.1-schnell vae/config.json", "name flux/vae=FOLDER/vae")
    with refused(*said): hub_generators.fetch(g)
    with refused("correct the path behind ="): hub_generators.find(f"flux/vae={tmp_path/'nowhere'}")
    with refused(*said): replace(world, generators=("flux/vae",)).prepare(1)
    plan = hub_generators.fetch_plan(["sd/vae-mse", "someone/model"])
    assert plan.megabytes.isna().tolist() == [False, True] and not plan.here.any() and plan.place[0].startswith(str(tmp_path))


def _nothing(repo, **how):
    raise FileNotFoundError("no way out")


def test_from_the_hub(place, tmp_path, monkeypatch):
    "A model that the hub's client has fetched: its subfolder, asked for by patterns that no pickle fits."
    from fnmatch import fnmatch
    shutil.copytree(place/"first-kl", tmp_path/"vae")
    asked = []
    def snapshot(repo, allow_patterns, local_files_only):
        asked.append((repo, local_files_only))
        assert not any(fnmatch("vae/diffusion_pytorch_model.bin", p) for p in allow_patterns)
        assert any(fnmatch("vae/diffusion_pytorch_model.safetensors", p) for p in allow_patterns)
        if local_files_only: raise FileNotFoundError
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    g = hub_generators.resolved(hub_generators.find("flux/vae"))
    assert asked == [("black-forest-labs/FLUX.1-schnell", True), ("black-forest-labs/FLUX.1-schnell", False)]
    assert (g.kind, g.family, g.role) == ("decoder", "FLUX autoencoder", "evaluation")
    assert hub_generators.resolved(hub_generators.find("train:me/own/vae")).family == "other autoencoder"


def test_without_diffusers(world, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with refused("pip install -e '.[extended]'"): world.check()
    assert replace(world, generators=()).check()
