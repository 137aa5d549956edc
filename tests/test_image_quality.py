"""Image quality: the statistics of BRISQUE against another implementation, and nothing measured twice."""
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

from rssqa.core import Incompatible
from rssqa.data.datasets import read_image, scan
from rssqa.data.synthetic import degrade, scene, write_scenes
from rssqa.tables.image_quality import (
    PROMPTS, _fit_asymmetric, _fit_symmetric, image_quality, normalised, prompt_shares, scene_statistics
)
from rssqa.tables.sqed import label_free_columns
from rssqa.tables.store import Store, extract, get_vectors
from trained import numbers


class CountingEncoder:
    "An encoder of eight numbers that counts its images, and whose text side knows lengths only."
    name = 'counting'
    dim = 8
    fingerprint = 'f' * 16
    def __init__(self): self.encoded = 0

    def encode_image(self, x):
        self.encoded += len(x)
        v = torch.nn.functional.adaptive_avg_pool2d(x.mean(1), (2, 4)).flatten(1) - 0.3
        return SimpleNamespace(pooled=torch.nn.functional.normalize(v, dim=-1))

    def encode_text(self, texts):
        vectors = [[len(text) % 7 - 3.0, len(text) % 3, *[0.1] * 6] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(vectors), dim=-1)


def mean_value(x): return x.mean((1, 2, 3))


@pytest.fixture(scope='module')
def tiles(tmp_path_factory):
    return scan(write_scenes(tmp_path_factory.mktemp('d')/'town', ('town', 'flood'), scenes=2, size=48))


@pytest.fixture
def store(tmp_path): return Store(tmp_path/'store')


# ---------------------------------------------------------------- statistics

@pytest.mark.parametrize('size', [64, 96, 129])
@pytest.mark.parametrize('kind', [None, 'blur', 'noise'])
def test_statistics_equal_those_of_piq(kind, size):
    brisque = pytest.importorskip('piq.brisque')
    functional = pytest.importorskip('piq.functional')
    image = scene('town', 1, size).image
    if kind: image = degrade(image, kind, 0.7)
    grey = torch.round(functional.rgb2yiq(torch.as_tensor(image)[None] * 255)[:, :1])
    half = functional.imresize(grey, sizes=(size // 2, size // 2))
    theirs = torch.cat([brisque._natural_scene_statistics(x) for x in (grey, half)], -1)[0].numpy()
    ours = scene_statistics(image)
    assert np.allclose(ours[:18], theirs[:18], atol=1e-3)             # their exponents lie on a grid of 0.001
    assert np.allclose(ours[18:], theirs[18:], atol=0.04)             # two ways to halve an image


@pytest.mark.parametrize('exponent', [0.7, 1.0, 2.0, 4.0])
def test_exponents_are_recovered(exponent):
    rng = np.random.default_rng(0)
    x = rng.gamma(1 / exponent, 1, 400_000)**(1 / exponent) * rng.choice([-1, 1], 400_000)
    assert _fit_symmetric(x)[0] == pytest.approx(exponent, rel=0.03)
    assert _fit_asymmetric(x)[0] == pytest.approx(exponent, rel=0.03)
    _, mean, left, right = _fit_asymmetric(np.where(x > 0, 2 * x, x))
    assert right / left == pytest.approx(4, rel=0.02)
    assert abs(_fit_asymmetric(x)[1]) < 0.02 < mean


def test_normalised_values_ignore_brightness_and_grow_with_contrast():
    grey = 255 * scene('rural', 3, 64).image.mean(0)
    inside = np.s_[6:-6, 6:-6]
    assert np.allclose(normalised(grey)[inside], normalised(grey + 30)[inside], atol=1e-3)
    assert normalised(2 * grey)[inside].std() > normalised(grey)[inside].std()
    assert normalised(grey).shape == grey.shape


def test_blur_and_noise_move_the_variance_in_opposite_directions():
    image = scene('town', 2, 96).image
    from_blurred_to_noisy = [('blur', 1.0), ('blur', 0.3), ('noise', 0.3), ('noise', 1.0)]
    variance = [scene_statistics(degrade(image, *damage))[1] for damage in from_blurred_to_noisy]
    assert (np.diff(variance) > 0).all()


FLAT_OR_SMALL = [
    np.zeros((3, 32, 32)), np.full((3, 32, 32), 0.5), np.ones((3, 8, 40)),
    np.random.default_rng(0).random((3, 7, 9)),
]


@pytest.mark.parametrize('image', FLAT_OR_SMALL)
def test_flat_and_small_pictures_give_no_error(image):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        out = scene_statistics(image.astype(np.float32))
    assert out.shape == (36,) and out.dtype == np.float32 and not np.isinf(out).any()


# ---------------------------------------------------------------- prompts

def test_the_nearer_sentence_wins():
    encoder = CountingEncoder()
    text = encoder.encode_text([sentence for pair in PROMPTS.values() for sentence in pair]).numpy()
    shares = prompt_shares(np.stack([text[0], text[1], np.zeros(8)]), encoder)
    assert shares.shape == (3, len(PROMPTS)) and shares.dtype == np.float32
    assert shares[0, 0] > 0.5 > shares[1, 0] and np.allclose(shares[2], 0.5)
    cosines = np.stack([text[0] @ text[::2].T, text[0] @ text[1::2].T])
    assert np.allclose(shares[0], softmax(100 * cosines, 0)[0], atol=1e-5)


def test_an_encoder_without_text_is_named():
    with pytest.raises(Incompatible, match="no encode_text in encoder 'blind'"):
        prompt_shares(np.zeros((1, 8)), SimpleNamespace(name='blind'))


# ---------------------------------------------------------------- the store

def test_columns_are_float32_one_row_an_image(tiles, store):
    found = image_quality(tiles, store, CountingEncoder(), dict(mean=mean_value))
    assert found.index.name == 'image_id' and list(found.index) == list(tiles.image_id)
    assert len(list(found)) == 36 + len(PROMPTS) + 1
    assert (found.dtypes == np.float32).all() and found.notna().all().all()
    assert list(image_quality(tiles, store)) == list(found)[:36]


def test_quality_columns_are_no_label_free_columns(tiles, store):
    table = numbers(1, 2, 2, 2)
    table['image_id'] = table.image_id.map(dict(zip(table.image_id.unique(), tiles.image_id)))
    merged = table.merge(image_quality(tiles, store), on='image_id')
    assert len(merged) == len(table) and len(list(merged)) > len(list(table))
    assert label_free_columns(merged) == label_free_columns(table)


def test_statistics_survive_the_store(tiles, store):
    found = image_quality(tiles, store)
    for row in tiles[:3].itertuples():
        assert np.allclose(found.loc[row.image_id], scene_statistics(read_image(row)), rtol=1e-3, atol=1e-5)


def test_nothing_is_measured_twice(tiles, store, monkeypatch):
    calls = []
    encoder = CountingEncoder()
    def counted(image):
        calls.append(1)
        return scene_statistics(image)
    monkeypatch.setattr('rssqa.tables.image_quality.scene_statistics', counted)
    first = image_quality(tiles[:3], store, encoder, chunk=2)
    assert len(calls) == 3 == encoder.encoded
    both = image_quality(pd.concat([tiles, tiles]), store, encoder, chunk=2)
    assert len(calls) == len(tiles) == encoder.encoded == len(both) and both.iloc[:3].equals(first)
    assert np.allclose(image_quality(tiles.iloc[::-1], store, encoder), both.iloc[::-1], atol=1e-6)
    assert len(calls) == len(tiles)


def test_prompts_reuse_the_pooled_vectors(tiles, store):
    encoder = CountingEncoder()
    name = extract(tiles, encoder, store)
    before = encoder.encoded
    found = image_quality(tiles, store, encoder)
    assert encoder.encoded == before
    expected = prompt_shares(get_vectors(store, name, tiles.image_id), encoder)
    assert np.allclose(found.iloc[:, 36:], expected)


def test_an_interrupted_run_keeps_its_commits(tiles, store):
    calls = []
    def counted(x):
        calls.append(1)
        return mean_value(x)
    def interrupted(x):
        if len(calls) == 5: raise KeyboardInterrupt
        return counted(x)
    with pytest.raises(KeyboardInterrupt): image_quality(tiles, store, scores=dict(mean=interrupted), chunk=2)
    assert len(store.keys('iqa/score-mean')) == 4
    calls.clear()
    assert image_quality(tiles, store, scores=dict(mean=counted)).iqa_score_mean.notna().all()
    assert len(calls) == len(tiles) - 4


def test_a_metric_of_piq_is_a_score(tiles, store):
    piq = pytest.importorskip('piq')
    found = image_quality(tiles, store, scores=dict(tv=lambda x: piq.total_variation(x, reduction='none')))
    assert found.iqa_score_tv.gt(0).all()
