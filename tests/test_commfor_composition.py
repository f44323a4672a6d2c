"""Composition: every family has a type; counts of a hand-made manifest and of small public files; what is missing is named."""
import os

import pandas as pd
import pytest

from aigid_repro.commfor import composition
from aigid_repro.data.generators import registry
from aigid_repro.data.storage import InputError, root
from aigid_repro.review.claims import read_claims


def rows(split, *makers):
    "One photograph and what each maker made of it."
    real = [(f"{split}/crop", 0, "real", "real", split, "real")]
    made = [(f"{split}/crop/{m}", 1, m, registry()[m].family, split, "any") for m in makers]
    return pd.DataFrame(real + made, columns=["id", "label", "generator", "family", "split", "set"]).assign(source="204-china")


@pytest.fixture
def manifest():
    train = rows("train", "decoder/000", "decoder/001", "latent-flow/0", "pixel-flow/0", "super-resolution/0")
    return pd.concat([train, rows("test", "decoder/100", "noise-flow/0", "control/bicubic")], ignore_index=True)


def public(folder, name, rows, **changes):
    "A public file: rows of model, label, architecture, source, subset, split, and bytes that must never be read."
    columns = ["model_name", "label", "architecture", "real_source", "subset", "split"]
    path = folder/name
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows, columns=columns).assign(image_data=b"x"*1000)
    table.drop(columns=changes.get("without", [])).to_parquet(path)
    return path


@pytest.fixture
def copy(tmp_path, monkeypatch):
    "A whole public dataset in miniature."
    systematic = [(f"a/{i}", 1, None, "LAION", "Systematic", "train") for i in range(30) for _ in range(2)]
    manual = [("biggan", 1, None, "ImageNet", "Manual", "train")]*20
    evaluation = [("Midjourney", 1, "Commercial", "LAION", "Commercial", "test")]*3
    evaluation += [("HDiT", 1, "PixDiff", "FFHQ", "Manual", "test"), ("HDiT", 0, "real", "FFHQ", "Manual", "test")]
    public(tmp_path, "data/systematic/part-00000-of-00002.parquet", systematic[:25], without=["architecture"])
    public(tmp_path, "data/systematic/part-00001-of-00002.parquet", systematic[25:], without=["architecture"])
    public(tmp_path, "data/manual/part-00000-of-00001.parquet", manual, without=["architecture"])
    public(tmp_path, "data/publicEval/part-00000-of-00001.parquet", evaluation)
    public(tmp_path, "data/commercial/part-00000-of-00001.parquet", evaluation[:3]) # the same images again
    (tmp_path/"data/metadata").mkdir()
    (tmp_path/"data/metadata/manual_set_metadata.csv").write_text("Model,Architecture,License\nbiggan,GAN,MIT\n")
    monkeypatch.setenv("AIGID_DATA", str(tmp_path))
    return tmp_path


def test_every_family_of_the_registry_has_a_type():
    families = {g.family for g in registry().values() if g.role != "control"}
    assert families <= set(composition.TYPES)
    assert {composition.type_of(g.family) for g in registry().values() if g.role == "control"} == {"control"}


def test_unknown_family_is_an_error():
    with pytest.raises(InputError, match="TYPES"):
        composition.type_of("autoregressive")


def test_counts_of_a_manifest(manifest):
    tables = composition.tables(composition.from_corpus(manifest))
    types = tables["table_types"]
    assert types.models.to_dict() == {"LatDiff": 3, "GAN": 1, "PixDiff": 1, "Other": 0}
    assert types.paper_models.to_dict() == {"LatDiff": 4766, "GAN": 12, "PixDiff": 3, "Other": 1}
    ours = tables["table"].loc["embedded corpus"]
    assert (ours.models, ours["generated images"], ours["real images"]) == (7, 7, 2)
    assert tables["table_evaluation"].images.to_dict() == {"LatDiff": 1, "GAN": 0, "PixDiff": 1, "Other": 0, "Commercial": 0}


def test_an_evaluated_model_that_trains_is_counted(manifest):
    twice = pd.concat([manifest, rows("test", "decoder/000").iloc[1:]], ignore_index=True)
    def disjoint(t): return composition.effects(composition.from_corpus(t)).set_index("claim").value["commfor-fig12-disjoint"]
    assert disjoint(manifest) == 0 and disjoint(twice) == 1


def test_size_is_claimed_by_the_whole_public_dataset_only(copy, manifest):
    def ids(p): return {c for c in composition.effects(p).claim if "table1" in c}
    settings = composition.preset("paper")
    mine = set(read_claims().query("item == 'table1_composition'").id)
    assert set(composition.effects(composition.run_study(settings)).claim) == mine
    assert not ids(composition.from_corpus(manifest))
    (copy/"data/systematic/part-00001-of-00002.parquet").unlink()
    assert not ids(composition.run_study(settings))


def test_public_files(copy):
    p = composition.run_study(composition.preset("paper"), seed=3)
    assert p.id.is_unique and p.images.sum() == 60 + 20 + 5 and set(p.seed) == {3} # commercial images once
    tables = composition.tables(p)
    types = tables["table_types"]
    assert types.models.to_dict() == {"LatDiff": 30, "GAN": 1, "PixDiff": 0, "Other": 0} and types.images_percent["GAN"] == 25
    assert tables["table_evaluation"].images.to_dict()["Commercial"] == 3
    assert tables["table_licences"].models["MIT"] == 1
    assert set(composition.figures(p)) <= set(composition.captions)


def test_missing_folder_and_damaged_files_are_named(tmp_path, monkeypatch):
    settings = composition.preset("paper")
    monkeypatch.delenv("AIGID_DATA", raising=False)
    with pytest.raises(InputError, match="set AIGID_DATA to the folder"): composition.run_study(settings)
    monkeypatch.setenv("AIGID_DATA", str(tmp_path/"nowhere"))
    with pytest.raises(InputError, match="nowhere is not a folder"): composition.run_study(settings)
    monkeypatch.setenv("AIGID_DATA", str(tmp_path))
    with pytest.raises(InputError, match="no parquet file; download"): composition.run_study(settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIGID_DATA", tmp_path.name) # a relative one starts from the project, as everywhere
    with pytest.raises(InputError, match="is not a folder"): composition.run_study(settings)
    monkeypatch.setenv("AIGID_DATA", os.path.relpath(tmp_path, root()))
    with pytest.raises(InputError, match="no parquet file; download"): composition.run_study(settings)
    (tmp_path/"broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="broken.parquet: not a readable parquet file"): composition.run_study(settings)
    (tmp_path/"broken.parquet").unlink()
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path/"other.parquet")
    with pytest.raises(InputError, match="other.parquet: no column label, model_name"): composition.run_study(settings)


def test_unknown_profile():
    with pytest.raises(InputError, match="smoke, mini, gpu, paper"): composition.preset("maxi")
