"""The embedded corpus: built twice the same, offline, paired, disjoint; damaged caches and wrong names are errors."""
import socket

import pandas as pd
import pytest

from aigid_repro.data import corpus, generators, records
from aigid_repro.data.storage import InputError, cache_dir


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIGID_CACHE", str(tmp_path_factory.mktemp("cache")))

        def refuse(*_):
            raise OSError("no network in this test")
        patch.setattr(socket.socket, "connect", refuse)
        settings = corpus.preset("smoke")
        yield settings, corpus.build_corpus(settings, jobs=1)


def test_every_generated_image_has_its_real_partner(smoke):
    _, table = smoke
    for _, part in table.groupby("split"):
        assert set(part.crop[part.label == 1]) <= set(part.crop[part.label == 0])


def test_no_photo_or_look_alike_in_two_splits(smoke):
    assert records.check_leakage(smoke[1]).empty


def test_unseen_families_are_in_no_training_or_validation_row(smoke):
    _, table = smoke
    unseen = set(table.family[table.set == "unseen"])
    assert len(unseen) == 5 - 1 and not unseen & set(table.family[table.split != "test"])


def test_one_format_and_size(smoke):
    images = [records.open_image(b) for b in smoke[1].image[::7]]
    assert {i.size for i in images} == {(128, 128)} and all(b.startswith(b"\x89PNG") for b in smoke[1].image)


def test_built_again_it_is_the_same(smoke):
    settings, table = smoke
    path, = cache_dir("corpus").glob("*.parquet")
    path.unlink()
    again = corpus.build_corpus(settings, jobs=1)
    pd.testing.assert_frame_equal(corpus.manifest(table), corpus.manifest(again))


def test_damaged_cache_is_named_and_kept(smoke):
    settings, _ = smoke
    path, = cache_dir("corpus").glob("*.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole)//2])
    with pytest.raises(InputError, match=path.name):
        corpus.build_corpus(settings)
    path.write_bytes(whole)
    assert len(corpus.build_corpus(settings))


@pytest.mark.parametrize("call, words", [(lambda: generators.find("realesrgan/x5"), "realesrgan/x4plus"),
                                         (lambda: generators.choose(["latent decoders"]), "latent decoder"),
                                         (lambda: corpus.preset("tiny"), "smoke"),
                                         (lambda: corpus.preset("mini", trains=3), "trains"),
                                         (lambda: corpus.draw([], "train", 4), "at least one"),
                                         (lambda: corpus.split_crops("validation", 800), "add photos")])
def test_wrong_names_and_numbers_are_errors(call, words):
    with pytest.raises(InputError, match=words):
        call()
