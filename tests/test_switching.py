"""Choices under a switching rule: what may change, what may not, and that no label of a test fold is read."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rssqa.bench.protocol import ROW_KEYS
from rssqa.bench.switching import LIFT, apply_switch_rule

ROOT = Path(__file__).resolve().parents[1]


def known_and_predicted(seed=0, scenes=24, images=3, noise=0.02):
    rng = np.random.default_rng(seed)
    rows = [(d, f'{d}{s}', f'{d}{s}-{i}', m) for d in 'ab' for s in range(scenes) for i in range(images) for m in 'xyz']
    table = pd.DataFrame(rows, columns=['dataset', 'scene', 'image_id', 'method'])
    table['oa'] = 0.6 + 0.03 * (table.method == 'x') + rng.normal(0, 0.05, len(table))
    predictions = table[ROW_KEYS].assign(seed=0, fold=pd.factorize(table.scene)[0] % 4)
    return table, predictions.assign(model=table.oa + rng.normal(0, noise, len(table)))


def choices(predictions, column='model'): # image_id -> method
    top = predictions.loc[predictions.groupby('image_id')[column].idxmax()]
    return top.set_index('image_id').method.sort_index()


@pytest.mark.parametrize('noise', [0.01, 0.05, 0.3])
def test_an_image_keeps_its_prediction_or_gets_the_usual_method(noise):
    table, predictions = known_and_predicted(noise=noise)
    ruled = apply_switch_rule(table, predictions, 'model')
    before, after = choices(predictions), choices(ruled)
    assert ((after == before) | (after == 'x')).all()
    both = predictions.merge(ruled, on=[*ROW_KEYS, 'seed', 'fold'], suffixes=('', ' ruled'))
    changed = both[both.model != both['model ruled']]
    assert (changed.method == 'x').all() and changed.image_id.is_unique
    top = both.groupby('image_id').model.max()
    assert np.allclose(changed['model ruled'], changed.image_id.map(top) + LIFT)


def test_noise_is_not_followed_and_knowledge_is():
    for noise, follows in ((0.01, True), (0.5, False)):
        table, predictions = known_and_predicted(noise=noise)
        ruled = apply_switch_rule(table, predictions, 'model')
        if follows: assert (choices(ruled) == choices(predictions)).mean() > 0.7
        else: assert (choices(ruled) == 'x').all()


def test_labels_of_the_fold_itself_are_not_read():
    table, predictions = known_and_predicted()
    ruled = apply_switch_rule(table, predictions, 'model')
    here = predictions.fold == 2
    other = table.copy()
    other.loc[here.to_numpy(), 'oa'] = 1 - other.oa
    again = apply_switch_rule(other, predictions, 'model')
    part, same = ruled[ruled.fold == 2], again[again.fold == 2]
    assert np.array_equal(part.model, same.model)
    assert not np.array_equal(ruled.model, again.model)


def test_seeds_do_not_mix():
    table, predictions = known_and_predicted()
    noise = predictions.assign(seed=1, model=np.random.default_rng(9).random(len(predictions)))
    both = apply_switch_rule(table, pd.concat([predictions, noise], ignore_index=True), 'model')
    alone = apply_switch_rule(table, predictions, 'model')
    part = both[both.seed == 0].set_index(ROW_KEYS).model
    assert np.array_equal(part, alone.set_index(ROW_KEYS).model.reindex(part.index))
    assert (choices(both[both.seed == 1]) == 'x').all()


def test_committed_rows_agree_with_the_main_table():
    main = pd.read_csv(ROOT/'data/results/paper_main.csv', index_col='predictor')
    rows = pd.read_csv(ROOT/'data/results/paper_switching.csv')
    by_tiles = rows[(rows.counted == 'tiles') & (rows.group == 'all')]
    followed = by_tiles[by_tiles.rule == 'follow']
    for measure in ('top1', 'regret', 'gap_closed'):
        values = followed[followed.measure == measure].set_index('predictor').value
        assert np.allclose(values, main[measure].astype(float).reindex(values.index), atol=2e-3), measure
    gap = by_tiles[by_tiles.measure == 'gap_closed'].pivot(index='predictor', columns='rule', values='value')
    assert (gap['switching rule'] > -0.05).all() and set(rows.rule) == {'follow', 'switching rule'}
