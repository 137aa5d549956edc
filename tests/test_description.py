"""Descriptions of predicted segmentations: with and without labels, and of the mirrored image."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rssqa.data.datasets import read_image, read_mask
from rssqa.data.synthetic import scene
from rssqa.segment.confidence import pool_features
from rssqa.segment.methods.training import load_segmenter
from rssqa.segment.protocol import SegOutput
from rssqa.tables.description import MAX_DEVIATION, describe_prediction
from rssqa.tables.grid import grid_probabilities, subsample
from rssqa.tables.sqed import label_free_columns
from trained import trained_setup


class Pointwise:
    "A network that looks at one pixel at a time: the channels are the classes."
    classes = ('red', 'green', 'blue')
    temperature = 0.5
    def __call__(self, x): return SegOutput(x * 6, (x, x[..., ::2, ::2]))


class Positional(Pointwise):
    "A network whose logits of the first class grow from left to right: mirroring changes its map."
    def __call__(self, x):
        logits = x * 6
        logits[:, 0] += torch.linspace(-3, 3, x.shape[-1])
        return SegOutput(logits, (x,))


@pytest.fixture(scope='module')
def images(): return np.stack([scene('town', seed, 64).image for seed in range(2)])


@pytest.fixture(scope='module')
def trained():
    setup = trained_setup()
    tiles = setup.tiles[setup.tiles.fold == setup.networks.fold[0]][:2]
    return SimpleNamespace(
        segmenter=load_segmenter(setup.networks.folder[0]),
        images=np.stack([read_image(tile) for tile in tiles.itertuples()]),
        truths=[read_mask(tile, setup.spec) for tile in tiles.itertuples()],
    )


def test_mirroring_changes_nothing_for_a_pointwise_network(images):
    rows, masks, _, grids = describe_prediction(Pointwise(), images)
    assert (rows.tta == 1).all() and rows.tta_gap.max() < 1e-6
    assert np.array_equal(grids[:, 0], grids[:, 1])
    assert np.array_equal(masks, images.argmax(1))


def test_predictions_of_the_mirrored_image_are_mirrored_back(images):
    segmenter = Positional()
    rows, _, _, grids = describe_prediction(segmenter, images)
    mirrored = segmenter(torch.as_tensor(images[..., ::-1].copy())).logits.flip(-1)
    agreement = mirrored.argmax(1) == segmenter(torch.as_tensor(images)).logits.argmax(1)
    assert np.array_equal(grids[:, 1], grid_probabilities(mirrored, segmenter.temperature))
    assert np.allclose(rows.tta, agreement.float().mean((1, 2)), atol=1e-6)
    assert rows.tta.max() < 0.9


def test_without_mirrored_images_both_grids_are_the_same(images):
    description = describe_prediction(Positional(), images, tta=False)
    assert 'tta' not in description.rows and 'tta_gap' not in description.rows
    assert np.array_equal(description.grids[:, 0], description.grids[:, 1])


def test_grids_use_the_temperature_of_the_segmenter(images):
    grids = describe_prediction(Pointwise(), images).grids
    exact = (torch.as_tensor(subsample(images)) * 6 / Pointwise.temperature).softmax(1).numpy()
    assert np.abs(grids[:, 0] / 255 - exact).max() <= 0.5 / 255 + 1e-6


def test_without_labels_the_label_free_columns_stay_the_same(trained):
    labelled = describe_prediction(trained.segmenter, trained.images, trained.truths)
    unlabelled = describe_prediction(trained.segmenter, trained.images)
    columns = label_free_columns(labelled.rows)
    assert len(columns) > 10 and labelled.rows[columns].equals(unlabelled.rows[columns])
    assert np.array_equal(labelled.masks, unlabelled.masks)
    assert np.array_equal(labelled.features, unlabelled.features)
    assert unlabelled.rows.n_valid.eq(0).all() and unlabelled.rows.oa.isna().all()
    assert labelled.rows.oa.notna().all()


def test_one_image_of_a_batch_may_lack_a_label(trained):
    whole = describe_prediction(trained.segmenter, trained.images, trained.truths).rows
    mixed = describe_prediction(trained.segmenter, trained.images, [trained.truths[0], None]).rows
    assert mixed.n_valid.tolist() == [trained.truths[0].size, 0]
    assert mixed.oa[0] == whole.oa[0]


def test_features_are_deviations_from_the_training_images(images):
    segmenter = Pointwise()
    pooled = pool_features(segmenter(torch.as_tensor(images)).features)
    assert np.array_equal(describe_prediction(segmenter, images).features, pooled.numpy())
    mean = torch.linspace(0, 1, pooled.shape[1])
    deviation = torch.full_like(mean, 0.5)
    deviation[0] = 0                                    # a channel that never varied in training
    segmenter.reference = torch.stack([mean, deviation])
    features = describe_prediction(segmenter, images).features
    assert np.allclose(features[:, 1:], (pooled - mean)[:, 1:] / 0.5, atol=1e-6)
    assert (features[:, 0] == MAX_DEVIATION).all()
