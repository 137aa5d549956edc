"""Style injection: exact statistics, nothing outside the part, the same for the same seed, flat channels."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rssqa.core import BadImage, DataNotFound, SchemaError
from rssqa.domains.style import CELL, FLAT, Style, StyleInjection, inject_style, random_part, style_of

MILD = Style((0.45, 0.5, 0.55), (0.05, 0.04, 0.06))      # reached without leaving 0..1


def made_image(seed=0, side=40, low=0.3, high=0.7):
    return np.random.default_rng(seed).uniform(low, high, (3, side, side)).astype(np.float32)


@given(st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_statistics_move_by_the_strength(seed, strength):
    image = made_image(seed)
    old, new = style_of(image), style_of(inject_style(image, MILD, strength))
    share = np.float64(strength)
    assert np.allclose(new.mean, (1 - share) * np.array(old.mean) + share * np.array(MILD.mean), atol=1e-6)
    assert np.allclose(new.std, (1 - share) * np.array(old.std) + share * np.array(MILD.std), atol=1e-6)


def test_strength_0_is_the_same_image_bit_for_bit_and_1_the_statistics():
    image = made_image(1)
    assert np.array_equal(inject_style(image, MILD, 0.0), image)
    found = style_of(inject_style(image, MILD, 1.0))
    assert np.allclose(found.mean, MILD.mean, atol=1e-6) and np.allclose(found.std, MILD.std, atol=1e-6)


def test_by_hand():
    image = np.tile(np.array([0.2, 0.4], np.float32), (3, 1, 1)).reshape(3, 1, 2)  # mean .3, deviation .1
    style = Style((0.5, 0.5, 0.5), (0.2, 0.1, 0.05))
    assert np.allclose(inject_style(image, style)[:, 0], [[0.3, 0.7], [0.4, 0.6], [0.45, 0.55]])
    assert np.allclose(inject_style(image, style, 0.5)[0, 0], [0.25, 0.55])


def test_only_the_part_changes_and_its_statistics_are_its_own():
    image = made_image(2)
    image[:, :20] *= 0.5                                    # the other half is darker
    part = np.zeros((40, 40), bool)
    part[20:, 5:30] = True
    found = inject_style(image, MILD, 1.0, part)
    assert np.array_equal(found[:, ~part], image[:, ~part])
    assert (found[:, part] != image[:, part]).mean() > 0.95
    assert np.allclose(style_of(found, part).mean, MILD.mean, atol=1e-6)
    assert np.allclose(style_of(found, part).std, MILD.std, atol=1e-6)


def test_order_of_pixels_is_kept_and_the_argument_too():
    image = made_image(3)
    before = image.copy()
    found = inject_style(image, MILD)
    assert np.array_equal(image, before) and found.dtype == np.float32
    for a, b in zip(image, found): assert np.array_equal(np.argsort(a.ravel()), np.argsort(b.ravel()))


def test_values_are_cut_to_the_range():
    found = inject_style(made_image(4), Style((0.9, 0.5, 0.1), (0.4, 0.4, 0.4)))
    assert found.min() == 0 and found.max() == 1


@pytest.mark.parametrize('value', [0.0, 0.5, 1.0])
def test_a_flat_channel_receives_a_style_and_has_none_to_give(value):
    image = made_image(5)
    image[2] = value
    with pytest.raises(BadImage, match='(?i)found channel 2 with one value'): style_of(image)
    found = inject_style(image, MILD, 1.0)
    assert np.isfinite(found).all() and np.allclose(found[2], MILD.mean[2], atol=1e-6)
    assert np.allclose(found[0].std(), MILD.std[0], atol=1e-5)


def test_a_channel_that_is_flat_in_the_part_only():
    image = made_image(6)
    part = np.zeros((40, 40), bool)
    part[:10, :10] = True
    image[1, part] = 0.4
    with pytest.raises(BadImage, match='channel 1'): style_of(image, part)
    assert style_of(image).std[1] > FLAT


@pytest.mark.parametrize('bad, words', [
    (dict(image=np.zeros((40, 40, 3))), 'expected \\(3,H,W\\)'),
    (dict(part=np.zeros((40, 40), bool)), 'not empty'),
    (dict(part=np.ones((20, 20), bool)), '\\(20, 20\\)'),
    (dict(strength=1.5), 'strength 1.5'),
    (dict(strength=-0.1), 'strength -0.1'),
    (dict(strength=float('nan')), 'strength nan'),
])
def test_bad_input_is_refused(bad, words):
    with pytest.raises(SchemaError, match=words): inject_style(**(dict(image=made_image(), style=MILD) | bad))


@pytest.mark.parametrize('share, expected', [(0.0, 1), (0.1, 1), (0.5, 6), (1.0, 12)])
def test_parts_are_whole_cells(share, expected):
    part = random_part((4 * CELL, 3 * CELL), np.random.default_rng(0), share)
    cells = part.reshape(4, CELL, 3, CELL).transpose(0, 2, 1, 3).reshape(12, -1)
    assert (cells.all(1) == cells.any(1)).all() and cells.all(1).sum() == expected


def test_cells_at_the_border_may_be_cut():
    part = random_part((50, 70), np.random.default_rng(0), 1.0)
    assert part.shape == (50, 70) and part.all()


def test_different_seeds_give_different_images_and_the_same_seed_the_same():
    injection = StyleInjection([made_image(s, low=0.1 * s) for s in range(1, 4)], chance=1.0)
    image = made_image(9, 96)
    found = [injection(image, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


@pytest.mark.parametrize('chance', [0.0, 0.3, 1.0])
def test_chance_is_the_share_of_changed_images(chance):
    injection = StyleInjection([made_image(1, low=0.0)], chance=chance)
    image = made_image(2)
    rng = np.random.default_rng(0)
    changed = np.mean([not np.array_equal(injection(image, rng), image) for _ in range(200)])
    assert changed == pytest.approx(chance, abs=0.08)


def test_images_without_contrast_are_passed_over():
    flat = np.full((3, 8, 8), 0.5)
    injection = StyleInjection([flat, made_image(0), flat])
    assert len(injection.styles) == 1 and injection.passed_over == 2
    with pytest.raises(DataNotFound, match='(?i)found 2 images'): StyleInjection([flat, flat])
    with pytest.raises(DataNotFound, match='no style'): StyleInjection([])
