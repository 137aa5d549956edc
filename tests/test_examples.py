"""Example images follow stated rules; maps and errors have exactly the colours that their legend names."""
import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rssqa.core import BadImage
from rssqa.segment.metrics import IGNORE, single_best
from rssqa.viz import examples
from rssqa.viz.figures import IGNORED, WRONG, follow
from trained import numbers


def table(oa, predicted): # lists of rows: an image a row, a method a column
    images, methods = np.shape(oa)
    return pd.DataFrame(dict(
        image_id=np.repeat([f'i{k}' for k in range(images)], methods),
        dataset='d',
        method=[f'm{k}' for k in range(methods)] * images,
        oa=np.ravel(oa),
        predicted=np.ravel(predicted),
    ))


def scored():
    t = numbers()
    return t.assign(predicted=t.conf)


@pytest.mark.parametrize('single', [None, 'm1', 'train'])
def test_choices_are_those_of_follow(single):
    t = scored()
    always = single_best(t.sample(60, random_state=0)) if single == 'train' else single
    choices = examples.image_choices(t.sample(frac=1, random_state=1), always)
    total = follow(t, always=always).loc['all']
    assert len(choices) == total.n_images
    for name in ('picked_oa', 'always_oa', 'oracle_oa', 'regret'):
        assert choices[name].mean() == pytest.approx(total[name])
    recommended = t.set_index(['image_id', 'method']).oa.loc[list(choices.recommended.items())]
    assert np.allclose(recommended, choices.picked_oa)


def test_a_tie_of_predictions_goes_to_the_first_name():
    choices = examples.image_choices(table([[.5, .9]], [[.7, .7]]), 'm1')
    assert choices.recommended.item() == 'm0' and choices.regret.item() == pytest.approx(.4)


def test_an_image_without_every_method_is_left_out():
    t = table([[.5, .9], [.5, .9]], [[.7, .6], [.7, .6]])
    assert list(examples.image_choices(t.iloc[:3], 'm1').index) == ['i0']


def test_the_three_rules():
    # regrets 0, .1, .4, .2, .1: the median is .1; gains over m1: .3, -.1, -.4, -.2, -.1
    oa = [[.9, .6], [.5, .6], [.4, .8], [.4, .6], [.6, .7]]
    choices = examples.image_choices(table(oa, [[.9, .1]] * 5), 'm1')
    chosen = examples.example_images(choices)
    assert chosen == dict(typical='i1', gain='i0', wrong='i2') and list(chosen) == ['typical', 'gain', 'wrong']
    assert examples.example_images(choices.sample(frac=1, random_state=0).sort_index()) == chosen


def test_a_rule_that_no_image_meets_shows_none():
    right = examples.image_choices(table([[.9, .6]] * 3, [[.9, .1]] * 3), 'm0')
    assert examples.example_images(right) == dict(typical='i0')        # all are equal: the first
    # the image that gains most is also the most wrong one: shown once
    both = examples.image_choices(table([[.5, .1, .9], [.8, .8, .8]], [[.9, .1, .1]] * 2), 'm1')
    assert examples.example_images(both) == dict(typical='i1', gain='i0')
    assert examples.example_images(both.head(1)) == dict(gain='i0')


def test_the_typical_image_is_typical_in_accuracy_too():
    # no recommendation is wrong; mean OA .15, .55, .85
    t = table([[.2, .1], [.6, .5], [.9, .8]], [[.9, .1]] * 3)
    assert examples.example_images(examples.image_choices(t, 'm0')) == dict(typical='i1')


def test_shrinking_mixes_no_classes():
    rng = np.random.default_rng(0)
    mask = rng.choice([0, 7, IGNORE], (90, 60)).astype(np.uint8)
    rgb, masks = examples.shrink(rng.random((3, 90, 60)), dict(truth=mask, nothing=None), 30)
    assert rgb.shape == (30, 20, 3) and masks['truth'].shape == (30, 20) and 'nothing' not in masks
    assert set(np.unique(masks['truth'])) == {0, 7, IGNORE}
    same = examples.shrink(np.zeros((3, 90, 60)), dict(truth=mask), 200)[1]['truth']
    assert np.array_equal(same, mask)
    with pytest.raises(BadImage, match='cannot paint the unet'):
        examples.shrink(np.zeros((3, 90, 60)), dict(unet=mask[:5]), 30)


def test_no_class_has_the_colour_of_errors():
    assert examples.free_colour(examples.WRONG_COLOURS, []) == WRONG
    used = [WRONG, (0, 200, 0)]
    chosen = examples.free_colour(examples.WRONG_COLOURS, used)
    assert np.linalg.norm(np.subtract(used, chosen), axis=1).min() >= examples.APART
    # all are taken: the one that is farthest from its neighbour
    crowded = [*examples.WRONG_COLOURS[:3], (9, 0, 0)]
    assert examples.free_colour(examples.WRONG_COLOURS, crowded) == (0, 0, 0)


def test_wrong_pixels_are_coloured_and_no_others():
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, IGNORE], (40, 50)).astype(np.uint8)
    mask = rng.integers(0, 3, truth.shape).astype(np.uint8)
    photos = [rng.integers(0, 256, (40, 50, 3)), np.full((40, 50, 3), WRONG), np.full((40, 50, 3), IGNORED)]
    for rgb in photos:
        picture = examples.error_picture(rgb.astype(np.uint8), truth, mask, WRONG, IGNORED)
        assert np.array_equal((picture == WRONG).all(-1), (truth != mask) & (truth != IGNORE))
        assert np.array_equal((picture == IGNORED).all(-1), truth == IGNORE)
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) <= 18


@pytest.mark.parametrize('n', [1, 40, 256])
def test_a_painted_picture_is_read_back_exactly(n):
    rng = np.random.default_rng(n)
    codes = rng.choice(1 << 24, n, replace=False)
    colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1).astype(np.uint8)
    rgb = colours[rng.integers(0, n, (50, 70))]
    reread = Image.open(io.BytesIO(examples.exact_png(rgb)))
    assert reread.mode == 'P' and np.array_equal(np.asarray(reread.convert('RGB')), rgb)


def test_a_photograph_is_no_painted_picture():
    rgb = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    with pytest.raises(BadImage, match='at most 256'): examples.exact_png(rgb)


def test_the_legend_lists_what_occurs():
    palette = [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    masks = [np.array([[0, 0]]), np.array([[2, IGNORE]])]
    legend = examples.class_legend(masks, palette, ('sea', 'land', 'ice'))
    assert legend == [('sea', (1, 1, 1)), ('ice', (3, 3, 3))]
    assert examples.class_legend(masks[:1], palette) == [('class 0', (1, 1, 1))]
