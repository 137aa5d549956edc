"Class names as an input: they help where they describe the image, and their controls are controls."
from dataclasses import replace

import numpy as np
import pytest
import torch

from rssqa.bench import assessor as bench_module
from rssqa.bench.assessor import IMAGENET, bench_semantics
from rssqa.clip.encoders import load_encoder
from rssqa.data.synthetic import CLASSES, scene
from rssqa.quality.assessor import Assessor, TrainingImage
from rssqa.quality.maps import Map
from rssqa.quality.posterior import (
    build_posteriors, draw_samples, fit_names, map_posterior, point_maps, posterior_weights, train_posterior,
)
from rssqa.tables.grid import PredictionGrid, subsample

SIDE = 64
K = len(CLASSES)


def noisy_maps(seed, described=True):
    "Three maps that are wrong at half of their points, and cosines that show the truth or nothing; truth at points."
    s = scene('town', seed=seed, size=SIDE)
    rng = np.random.default_rng(seed)
    maps = []
    for name in 'abc':
        wrong = rng.random(s.mask.shape) < 0.5
        maps.append(Map(name, np.where(wrong, rng.integers(0, K, s.mask.shape), s.mask).astype(np.uint8)))
    truth = subsample(s.mask)
    cosines = rng.normal(0, 1, (K, *truth.shape)) + 3 * described * (truth == np.arange(K)[:, None, None])
    return point_maps(maps, s.image, K, similarity=cosines), truth


def mean_true_probability(net, seeds):
    p = []
    for seed in seeds:
        maps, truth = noisy_maps(seed)
        q = map_posterior(net, maps).numpy()
        p.append(np.take_along_axis(q, truth[None].astype(int), 0).mean())
    return np.mean(p)


@pytest.fixture(scope='module')
def nets():
    "Networks trained with names and without, on the same samples."
    samples = []
    for seed in range(5):
        maps, truth = noisy_maps(seed)
        samples += draw_samples(maps, truth, 'town', (), points=100, seed=seed)
    return {reads: train_posterior(samples, (), 10, seed=0, reads_names=reads) for reads in (True, False)}


def test_names_that_describe_the_image_help(nets):
    with_names, without = (mean_true_probability(nets[reads], (50, 51, 52)) for reads in (True, False))
    assert with_names > without + 0.03


def test_a_network_without_names_ignores_them(nets):
    maps, _ = noisy_maps(60)
    blank = replace(maps, name_fit=None)
    assert torch.equal(map_posterior(nets[False], maps), map_posterior(nets[False], blank))
    assert not torch.equal(map_posterior(nets[True], maps), map_posterior(nets[True], blank))


def test_the_order_of_classes_does_not_matter(nets):
    maps, _ = noisy_maps(61)
    order = np.random.default_rng(0).permutation(K)
    number = np.argsort(order).astype(np.uint8)
    other = replace(maps, pred=number[maps.pred], p=maps.p[:, order], name_fit=maps.name_fit[order])
    np.testing.assert_allclose(map_posterior(nets[True], other), map_posterior(nets[True], maps)[order], atol=1e-5)


def test_saved_networks_know_whether_they_read_names(nets):
    for reads, net in nets.items():
        settings, weights = posterior_weights([net])
        back = build_posteriors(settings, weights)[0]
        assert back.reads_names == reads and torch.equal(back.decide[0].weight, net.decide[0].weight)
    settings, weights = posterior_weights([nets[False]])
    del settings['reads_names']                                                # as older files have it
    assert not build_posteriors(settings, weights)[0].reads_names


def test_cosines_that_are_equal_say_nothing():
    fit = fit_names(np.full((3, 4, 4), 0.3), (8, 8))
    assert np.isfinite(fit).all() and np.abs(fit).max() < 1e-2


def training_image(seed, dataset='town'):
    s = scene('town', seed=seed, size=SIDE)
    rng = np.random.default_rng(seed)
    truth = subsample(s.mask)
    pred = np.stack([np.where(rng.random(truth.shape) < x, 0, truth) for x in (0.1, 0.3, 0.6)]).astype(np.uint8)
    p = (190 * np.eye(K)[pred].transpose(0, 3, 1, 2) + 10).astype(np.uint8)
    grid = PredictionGrid(f'{dataset}{seed}', dataset, list('abc'), p, p, pred, truth)
    oa = {m: float((x == truth).mean()) for m, x in zip(grid.methods, pred)}
    return TrainingImage(s.image, grid, f's{seed}', oa, classes=tuple(CLASSES))


@pytest.fixture(scope='module')
def assessor():
    images = [training_image(i, d) for i in range(2) for d in ('a', 'b')]
    return Assessor('tiny-clip', members=1, epochs=1, class_names=True).fit(images)


def test_an_assessor_reads_the_names_of_the_class_table(assessor, tmp_path):
    new = training_image(9)
    maps = {name: np.kron(x, np.ones((4, 4), np.uint8)) for name, x in zip('abc', new.grid.pred)}
    answer = assessor.assess(new.image, maps, CLASSES).table
    back = Assessor.load(assessor.save(tmp_path/'saved'))
    assert back.class_names
    np.testing.assert_allclose(back.assess(new.image, maps, CLASSES).table.predicted, answer.predicted, atol=1e-6)
    strange = [f'{name} {i}' for i, name in enumerate(reversed(CLASSES))]
    assert not np.allclose(back.assess(new.image, maps, strange).table.predicted, answer.predicted)


def test_a_source_is_fitted_with_names_where_the_start_reads_them(assessor):
    images = [training_image(i, 'own') for i in range(10, 13)]
    fitted = Assessor('tiny-clip', members=1, epochs=1).fit_source(images, assessor, 'start')
    assert fitted.class_names and all(net.reads_names for net in fitted.nets)


def test_cosines_are_those_of_the_encoder(assessor):
    image = scene('town', seed=3, size=SIDE).image
    encoder = load_encoder('tiny-clip', dtype='float32')
    found = assessor.compare_names(image, ('water', 'bare_land'))
    vectors = encoder.encode_text(['an aerial image of bare land', 'a satellite photo of bare land',
                                   'bare land seen from above']).mean(0)
    dense = encoder.encode_dense(torch.as_tensor(image)[None])[0]
    expected = torch.einsum('d,dhw->hw', vectors / vectors.norm(), dense)
    np.testing.assert_allclose(found[1], expected, atol=1e-5)
    assert Assessor('tiny-clip').compare_names(image, ('water', 'land')) is None
    assert Assessor('', class_names=True).compare_names(image, ('water', 'land')) is None


def test_every_variant_of_the_benchmark_stands_beside_its_control(monkeypatch):
    images = [training_image(0, 'a'), training_image(0, 'b')]
    monkeypatch.setattr(bench_module, 'training_images', lambda *args: images)
    monkeypatch.setattr(bench_module, 'LEARN_FROM', ('a', 'b'))
    board = bench_semantics('nowhere', encoder='tiny-clip', seeds=(0, 1))
    names = ['no encoder', 'tiny-clip', 'tiny-clip, class names', 'tiny-clip, shuffled names']
    assert board.variant.unique().tolist() == names and IMAGENET not in names
    assert (board.groupby('variant').seed_of_networks.nunique() == 2).all()
    means = board.groupby('variant').mae.mean()
    assert means.nunique() == 4                                                # no variant repeats another


def test_shuffled_names_are_never_the_own_ones():
    image = Assessor('', class_names=True).prepare(training_image(0))
    for dataset in ('a', 'b', 'czech_ortho'):
        image.grid.dataset = dataset
        named = replace(image, dataset=dataset, name_fit=np.arange(K)[:, None, None] * np.ones((K, 2, 2)))
        order = bench_module._shuffle_names(named).name_fit[:, 0, 0]
        assert sorted(order) == list(range(K)) and (order != np.arange(K)).all()
        np.testing.assert_array_equal(bench_module._shuffle_names(named).name_fit[:, 0, 0], order)
