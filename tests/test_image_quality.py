"""Image quality: the statistics of BRISQUE against another implementation, and nothing measured twice."""
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

from rssqa.core import Incompatible
from rssqa.data.datasets import scan
from rssqa.tables.image_quality import (
    PROMPTS,
    _asymmetric,
    _symmetric,
    image_quality,
    normalised,
    prompt_shares,
    scene_statistics,
)
from rssqa.tables.sqed import label_free_columns
from rssqa.tables.store import Store, extract, get_vectors
from rssqa.data.synthetic import degrade, scene, write_scenes
from trained import numbers


class Eye:
    "An encoder of eight numbers whose text side knows lengths only."
    name = 'eye'
    dim = 8
    fingerprint = 'f' * 16
    seen = 0

    def encode_image(self, x):
        self.seen += len(x)
        v = torch.nn.functional.adaptive_avg_pool2d(x.mean(1), (2, 4)).flatten(1) - 0.3
        return SimpleNamespace(pooled=torch.nn.functional.normalize(v, dim=-1))

    def encode_text(self, texts):
        return torch.nn.functional.normalize(
            torch.tensor([[len(t) % 7 - 3.0, len(t) % 3, *[0.1] * 6] for t in texts]), dim=-1
        )


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
    image = scene('town', 1, size).image if kind is None else degrade(scene('town', 1, size).image, kind, 0.7)
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
    assert _symmetric(x)[0] == pytest.approx(exponent, rel=0.03) and _asymmetric(x)[0] == pytest.approx(
        exponent, rel=0.03
    )
    left, right = _asymmetric(np.where(x > 0, 2 * x, x))[2:]
    assert (
        right / left == pytest.approx(4, rel=0.02)
        and abs(_asymmetric(x)[1]) < 0.02 < _asymmetric(np.where(x > 0, 2 * x, x))[1]
    )


def test_normalised_values_ignore_brightness_and_grow_with_contrast():
    grey = 255 * scene('rural', 3, 64).image.mean(0)
    inside = np.s_[6:-6, 6:-6]
    assert np.allclose(normalised(grey)[inside], normalised(grey + 30)[inside], atol=1e-3)
    assert (
        normalised(2 * grey)[inside].std() > normalised(grey)[inside].std()
        and normalised(grey).shape == grey.shape
    )


def test_blur_and_noise_pull_in_opposite_directions():
    image = scene('town', 2, 96).image
    variance = [
        scene_statistics(degrade(image, kind, level))[1]
        for kind, level in [('blur', 1.0), ('blur', 0.3), ('noise', 0.3), ('noise', 1.0)]
    ]
    assert (np.diff(variance) > 0).all()


@pytest.mark.parametrize('image', [np.zeros((3, 32, 32)), np.full((3, 32, 32), 0.5), np.ones((3, 8, 40)), np.random.default_rng(0).random((3, 7, 9))])
def test_flat_and_small_pictures_give_no_error(image):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        out = scene_statistics(image.astype(np.float32))
    assert out.shape == (36,) and out.dtype == np.float32 and not np.isinf(out).any()


# ---------------------------------------------------------------- prompts

def test_the_nearer_sentence_wins():
    eye = Eye()
    text = eye.encode_text([s for pair in PROMPTS.values() for s in pair]).numpy()
    shares = prompt_shares(np.stack([text[0], text[1], np.zeros(8)]), eye)
    assert (
        shares.shape == (3, len(PROMPTS))
        and shares.dtype == np.float32
        and shares[0, 0] > 0.5 > shares[1, 0]
        and np.allclose(shares[2], 0.5)
    )
    assert np.allclose(
        shares[0], softmax(100 * np.stack([text[0] @ text[::2].T, text[0] @ text[1::2].T]), 0)[0], atol=1e-5
    )


def test_an_encoder_without_text_is_named():
    with pytest.raises(Incompatible, match="no encode_text in encoder 'blind'"):
        prompt_shares(np.zeros((1, 8)), SimpleNamespace(name='blind'))


# ---------------------------------------------------------------- the store

def test_columns_are_float32_and_belong_to_no_block(tiles, store):
    found = image_quality(tiles, store, Eye(), dict(mean=lambda x: x.mean((1, 2, 3))))
    assert (
        found.index.name == 'image_id'
        and list(found.index) == list(tiles.image_id)
        and len(list(found)) == 36 + len(PROMPTS) + 1
    )
    assert (found.dtypes == np.float32).all() and found.notna().all().all()
    table = numbers(1, 2, 2, 2)
    table['image_id'] = table.image_id.map(dict(zip(table.image_id.unique(), tiles.image_id)))
    merged = table.merge(found, on='image_id')
    assert len(merged) == len(table) and label_free_columns(merged) == label_free_columns(table)
    assert list(image_quality(tiles, store)) == list(found)[:36]


def test_statistics_survive_the_store(tiles, store):
    from rssqa.data.datasets import read_image
    found = image_quality(tiles, store)
    for row in tiles[:3].itertuples():
        assert np.allclose(found.loc[row.image_id], scene_statistics(read_image(row)), rtol=1e-3, atol=1e-5)


def test_nothing_is_measured_twice(tiles, store, monkeypatch):
    calls = []
    eye = Eye()
    monkeypatch.setattr(
        'rssqa.tables.image_quality.scene_statistics',
        lambda image: calls.append(1) or scene_statistics(image),
    )
    first = image_quality(tiles[:3], store, eye, chunk=2)
    assert len(calls) == 3 == eye.seen
    both = image_quality(pd.concat([tiles, tiles]), store, eye, chunk=2)
    assert len(calls) == len(tiles) == eye.seen == len(both) and both.iloc[:3].equals(first)
    assert np.allclose(image_quality(tiles.iloc[::-1], store, eye), both.iloc[::-1], atol=1e-6) and len(
        calls
    ) == len(tiles)


def test_prompts_reuse_the_pooled_vectors(tiles, store):
    eye = Eye()
    name = extract(tiles, eye, store)
    seen = eye.seen
    found = image_quality(tiles, store, eye)
    assert eye.seen == seen and np.allclose(
        found.iloc[:, 36:], prompt_shares(get_vectors(store, name, tiles.image_id), eye)
    )


def test_an_interrupted_run_keeps_its_commits(tiles, store):
    def mortal(x):
        if len(seen) == 5: raise KeyboardInterrupt
        seen.append(1)
        return x.mean((1, 2, 3))
    seen = []
    with pytest.raises(KeyboardInterrupt): image_quality(tiles, store, scores=dict(mean=mortal), chunk=2)
    assert len(store.keys('iqa/score-mean')) == 4
    seen = [None] * 6
    assert (
        image_quality(tiles, store, scores=dict(mean=mortal)).iqa_score_mean.notna().all()
        and len(seen) == 6 + len(tiles) - 4
    )


def test_a_metric_of_piq_is_a_score(tiles, store):
    piq = pytest.importorskip('piq')
    found = image_quality(tiles, store, scores=dict(tv=lambda x: piq.total_variation(x, reduction='none')))
    assert found.iqa_score_tv.gt(0).all()
