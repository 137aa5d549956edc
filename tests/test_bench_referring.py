"""Measures of referring segmentation by hand, exchange of expressions, words, folds, and the bench in miniature."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from rssqa.bench import referring
from rssqa.bench.referring import (
    EARLY, MIRRORED, NOUNS, PLACES, PLAIN_WORDING, TARGETS, WHOLE, bench_referring, draw_masks, exchange, mask_iou,
    masks_by_words, measure_masks, mirror_text, predict_quality, read_data, train_seed,
)
from rssqa.clip.encoders import load_encoder
from rssqa.core import Incompatible
from rssqa.data.synthetic import write_scenes
from rssqa.referring.samples import decode_rle, make_expressions
from rssqa.referring.segmenter import missing_words


def box(rows, columns, shape=(10, 10)):
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    return mask


# ---------------------------------------------------------------- measures

NOTHING = box(slice(0, 0), slice(0, 0))
HALF = box(slice(0, 5), slice(0, 10))                                    # 50 pixels


def test_measures_by_hand():
    small = box(slice(0, 2), slice(0, 5))                                # 10 pixels
    truths = [HALF, small, HALF]
    masks = [HALF, box(slice(0, 1), slice(0, 5)), ~HALF]                 # IoU 1, 5/10, 0
    measured = measure_masks(truths, masks)
    assert measured['giou'] == pytest.approx((1 + 0.5 + 0) / 3)
    assert measured['ciou'] == pytest.approx((50 + 5 + 0) / (50 + 10 + 100))
    assert (measured['samples'], measured['empty']) == (3, 0)
    assert measured['pr50'] == pytest.approx(1 / 3)                      # exactly .5 is not above .5
    assert measured['pr90'] == pytest.approx(1 / 3)


@pytest.mark.parametrize('overlap, passed', [(5, 0), (6, 1), (7, 2), (8, 3), (9, 4), (10, 5)])
def test_precision_at_levels(overlap, passed):
    truth = box(slice(0, 1), slice(0, 10))
    measured = measure_masks([truth], [box(slice(0, 1), slice(0, overlap))])
    assert sum(measured[f'pr{level}'] for level in (50, 60, 70, 80, 90)) == passed


def test_empty_targets_and_masks():
    assert mask_iou(NOTHING, NOTHING) == 1 and mask_iou(NOTHING, HALF) == 0 and mask_iou(HALF, NOTHING) == 0
    measured = measure_masks([NOTHING, NOTHING, HALF, HALF], [NOTHING, HALF, NOTHING, HALF])
    assert measured['giou'] == pytest.approx(0.5) and measured['empty'] == 2
    assert measured['ciou'] == pytest.approx(50 / 150)
    assert measure_masks([NOTHING], [NOTHING])['ciou'] == 1
    assert not np.isnan(list(measured.values())).any()


@pytest.mark.parametrize('truths, masks', [([], []), ([HALF], []), ([HALF], [HALF, HALF])])
def test_unequal_numbers_are_refused(truths, masks):
    with pytest.raises(Incompatible, match=f'Found {len(truths)} targets and {len(masks)} masks'):
        measure_masks(truths, masks)


# ---------------------------------------------------------------- exchange

def rows_of(tiles, class_ids): # numbered otherwise than by their place
    return pd.DataFrame(dict(tile=tiles, class_id=class_ids), index=np.arange(len(tiles)) + 7)


def test_exchange_of_perfect_and_of_deaf_masks():
    truths = [HALF, ~HALF]
    rows = rows_of([3, 3], [0, 1])
    assert exchange(rows, truths, truths) == (1, 1)
    assert exchange(rows, truths, truths[::-1]) == (-1, 1)
    everything = [np.ones_like(HALF)] * 2
    assert exchange(rows, truths, everything) == (0, 1)                  # .5 - .5
    assert exchange(rows, truths, [HALF, HALF]) == (0, 1)                # +1 for one, -1 for the other
    assert exchange(rows, truths, [NOTHING, NOTHING]) == (0, 1)


def test_exchange_counts_disjoint_targets_of_one_image_only():
    truths = [HALF, ~HALF, box(slice(0, 1), slice(0, 1)), HALF]
    rows = rows_of([0, 0, 0, 1], [0, 1, 0, 1]) # the third overlaps the first; the last is alone
    value, images = exchange(rows, truths, truths)
    assert (value, images) == (1, 1)
    value, images = exchange(rows, truths, truths, same_class=True)
    assert np.isnan(value) and images == 0


def test_exchange_of_one_class():
    truths = [box(slice(row, row + 2), slice(0, 2)) for row in (0, 4, 8)]
    rows = rows_of([0, 0, 0], [4, 4, 5])
    whole_class = [truths[0] | truths[1], truths[0] | truths[1], truths[2]]
    assert exchange(rows, truths, whole_class, same_class=True) == (0, 1) # the class alone does not tell them apart
    # six ordered pairs: two of one class give 0, two ask for the third (1 - 0), two for the class (.5 - 0)
    assert exchange(rows, truths, whole_class)[0] == pytest.approx((2 * 0 + 2 * 1 + 2 * 0.5) / 6)


def test_images_count_alike_however_many_expressions_they_have():
    truths = [box(slice(i, i + 1), slice(0, 10)) for i in range(4)] + [HALF, ~HALF]
    masks = truths[:4] + [NOTHING, NOTHING]
    assert exchange(rows_of([0] * 4 + [1] * 2, range(6)), truths, masks) == (0.5, 2)


# ---------------------------------------------------------------- words

@pytest.fixture(scope='module')
def encoder(): return load_encoder('clip-rs-mini', device='cpu')


def all_texts():
    texts = set()
    for of_classes in NOUNS.values():
        for one, every in of_classes.values():
            texts |= {f'the {one}', f'all {every}', f'the large {one}', f'the small {one}'}
            texts |= {f'the {one} {where}' for where in PLACES}
    return texts


def test_every_word_of_the_bench_has_a_vector(encoder):
    texts = all_texts()
    assert missing_words(encoder, sorted(texts)) == []
    assert {mirror_text(t, way) for t in texts for way in range(2)} == texts


def test_mirrored_words_are_those_of_the_mirrored_mask():
    rng = np.random.default_rng(0)
    nouns = {0: ('road', 'roads')}
    made = 0
    for _ in range(30):
        mask = np.full((30, 30), 255)
        for _ in range(3):
            top, left, side = rng.integers(0, 24), rng.integers(0, 24), rng.integers(2, 6)
            mask[top:top + side, left:left + side] = 0
        for way, axis in enumerate((1, 0)):
            of_mask = {mirror_text(e.text, way): e.mask for e in make_expressions(mask, nouns, PLACES, PLAIN_WORDING)}
            of_mirror = {e.text: e.mask for e in make_expressions(np.flip(mask, axis), nouns, PLACES, PLAIN_WORDING)}
            assert set(of_mask) == set(of_mirror)
            assert all((np.flip(of_mask[t], axis) == of_mirror[t]).all() for t in of_mask)
            made += len(of_mask)
    assert made > 100 and len(MIRRORED) == 2


# ---------------------------------------------------------------- quality

def test_quality_is_predicted_by_models_of_other_scenes():
    rng = np.random.default_rng(0)
    scene = np.repeat(np.arange(30), 8)
    iou = rng.random(240)
    features = np.column_stack([iou + rng.normal(0, 0.05, 240), rng.normal(size=240)])
    predicted, constant = predict_quality(features, iou, scene)
    assert np.abs(iou - predicted).mean() < 0.5 * np.abs(iou - constant).mean()
    memory = np.column_stack([scene + 0.0])                              # knows the scene and nothing else
    of_scene = rng.random(30)[scene]
    predicted, constant = predict_quality(memory, of_scene, rng.permutation(30)[scene])
    assert np.abs(of_scene - predicted).mean() > 0.8 * np.abs(of_scene - constant).mean()


# ---------------------------------------------------------------- in miniature

WORDS = dict(drawn=dict(building=('building', 'buildings'), water=('water', 'water'), ground=('land', 'land')))
FEW = dict(train=6, val=3, test=3)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('referring')
    write_scenes(home/'drawn', 'town', 10, 64)
    return home


@pytest.fixture(scope='module')
def data(home, encoder): return read_data(home, encoder, home, WORDS, FEW)


def test_scenes_are_kept_apart_and_features_are_those_of_the_tile(data, home, encoder):
    samples = data.samples
    scenes = samples.groupby('split').scene.unique()
    assert {len(set(a) & set(b)) for i, a in enumerate(scenes) for b in scenes[i + 1:]} == {0}
    assert len(data.images) == sum(FEW.values()) and len(data.targets) == len(samples)
    assert samples.tile.max() < len(data.images)
    for row, target in zip(samples.itertuples(), data.targets):
        mask = decode_rle(row.rle)
        assert abs(target.float().mean() / 255 - mask.mean()) < 0.01
        assert (decode_rle(row.class_rle) >= mask).all() and data.sentences[row.text_id] == row.text
    again = read_data(home, encoder, home, WORDS, FEW)                   # from the file
    assert torch.equal(again.images.tokens, data.images.tokens)


def test_nouns_without_a_vector_are_refused(home, encoder):
    words = dict(drawn=dict(building=('skyscraper', 'skyscrapers')))
    with pytest.raises(Incompatible, match='no vector for .*skyscraper'): read_data(home, encoder, home, words, FEW)


def test_a_finished_seed_is_reused(data, encoder, tmp_path, monkeypatch):
    sizes = dict(width=16, prompt=16, layers=1)
    model, history = train_seed(data, encoder, 0, tmp_path/'m.safetensors', steps=2, batch=2, sizes=sizes)
    monkeypatch.setattr(referring, 'train_referring', lambda *a, **k: pytest.fail('trained again'))
    again, same = train_seed(data, encoder, 0, tmp_path/'m.safetensors', steps=2, batch=2, sizes=sizes)
    assert history.equals(same) and len(history) == 2
    rows = data.samples[data.samples.split == 'test']
    for a, b in zip(draw_masks(model, data, rows)[0], draw_masks(again, data, rows)[0]): assert (a == b).all()


def test_words_find_the_class_whose_vector_the_tokens_have(data):
    vectors = {'drawn': torch.eye(6, 256)}
    tokens = torch.zeros_like(data.images.tokens)
    tokens[:, 1, :, :9] = 1 # class 1 in the left half, class 4 in the right
    tokens[:, 4, :, 9:] = 1
    made = replace(data, images=replace(data.images, tokens=tokens))
    rows = data.samples[data.samples.class_id.isin([1, 4])]
    assert len(rows)
    for row, mask in zip(rows.itertuples(), masks_by_words(made, rows, vectors)):
        half = mask[:, :32] if row.class_id == 1 else mask[:, 32:]
        assert half.mean() > 0.95 and mask.mean() < 0.55


def test_tables_have_every_variant_part_and_check(home, encoder):
    small = dict(steps=2, batch=2, sizes=dict(width=16, prompt=16, layers=1))
    measured, checks = bench_referring(home, (0, 1), home, WORDS, FEW, encoder, **small)
    whole = measured[measured.part == WHOLE]
    parts = measured[measured.variant == 'segmenter'].groupby(['seed', 'part']).samples.first()[0]
    assert parts[WHOLE] == parts['drawn'] == parts[parts.index.str.startswith('kind ')].sum()
    assert set(whole.variant) == {'segmenter', 'without_dense', 'without_sparse', 'all_pixels', 'words', 'true_class'}
    assert sorted(whole.groupby('variant').size().unique()) == [2] and measured.giou.between(0, 1).all()
    pixels = whole[whole.variant == 'all_pixels']
    assert (pixels.exchange.abs() < 1).all()
    assert whole[whole.variant == 'true_class'].exchange_same_class.dropna().le(0.5).all()
    assert list(checks[checks.seed == 0].check) == [
        'exchange', 'gIoU without dense', 'gIoU without sparse', 'MAE of predicted IoU', 'SROCC of predicted IoU',
        'squared cosine at step 100', 'BCE at step 100']
    row = checks.set_index(['seed', 'check']).loc[0, 'exchange']
    assert row.beside == TARGETS['exchange'] == 0.4 and row.passed == (row.value > 0.4) and EARLY == 100


def test_the_command_exists():
    from rssqa.cli import app
    done = CliRunner().invoke(app, ['bench', 'referring', '--help'])
    assert done.exit_code == 0 and '--seeds' in done.output
