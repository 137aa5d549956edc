"""Series of two sources: what counts as false alarm, detection and delay, and the committed table."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rssqa.bench.monitor import DRAWS, measure_pairs, run_series
from rssqa.quality.monitor import Reference, watch

ROOT = Path(__file__).resolve().parents[1]


def source(name, scenes, shift=0.0, images=3, seed=0):
    rng = np.random.default_rng([seed, len(name), scenes])
    rows = []
    for s in range(scenes):
        centre = rng.normal(size=5) * 0.3 + shift
        for i in range(images):
            look, meaning = (centre + rng.normal(size=5) for _ in range(2))
            rows.append(dict(dataset=name, scene=f'{name}/{s}', path=f'{name}/{s}-{i}', look=look, meaning=meaning))
    return pd.DataFrame(rows).assign(widening=1.0, refused=False)


IMAGES = pd.concat([source('here', 40), source('alike', 12, seed=1), source('far', 30, 3)], ignore_index=True)


@pytest.mark.parametrize('seed', range(3))
def test_a_far_source_is_noticed_and_one_alike_is_not(seed):
    far, alike = (run_series(IMAGES, 'here', name, seed) for name in ('far', 'alike'))
    assert far['detected'] and 1 <= far['delay'] <= 20 and not far['false_alarm']
    assert not alike['detected'] and np.isnan(alike['delay'])


def test_a_series_does_not_depend_on_the_order_of_rows():
    shuffled = IMAGES.sample(frac=1, random_state=3, ignore_index=True)
    place = {path: i for i, path in enumerate(IMAGES.path)}
    order = shuffled.sort_values('path', key=lambda paths: paths.map(place), ignore_index=True)
    assert run_series(order, 'here', 'far', 1) == run_series(IMAGES, 'here', 'far', 1)


def test_an_alarm_before_the_change_is_false():
    changed = source('here', 40)
    half = changed.scene.isin([f'here/{s}' for s in np.random.default_rng(0).permutation([*range(40)])[20:]])
    for column in ('look', 'meaning'):
        changed[column] = [x + 4 * late for x, late in zip(changed[column], half)]
    images = pd.concat([changed, source('far', 12, 3)], ignore_index=True)
    names = pd.Series(changed.scene.unique())
    assert (names == [f'here/{s}' for s in range(40)]).all()
    assert run_series(images, 'here', 'far', 0)['false_alarm']


def test_the_delay_counts_scenes_until_the_evidence_is_there():
    found = run_series(IMAGES, 'here', 'far', 2)
    rng = np.random.default_rng(2)
    scenes = rng.permutation(IMAGES[IMAGES.dataset == 'here'].scene.unique())
    known = Reference(IMAGES[IMAGES.scene.isin(scenes[:20])].reset_index(drop=True))
    place = {scene: i for i, scene in enumerate(scenes[20:])}
    rest = IMAGES[IMAGES.scene.isin(place)]
    rest = rest.iloc[np.argsort(rest.scene.map(place), kind='stable')]
    far = IMAGES[IMAGES.dataset == 'far']
    order = {scene: i for i, scene in enumerate(rng.permutation(far.scene.unique()))}
    far = far.iloc[np.argsort(far.scene.map(order), kind='stable')]
    evidence = watch([('same', rest), ('other', far)], known).scenes.evidence.to_numpy()[20:]
    assert found['delay'] == np.flatnonzero(evidence >= 100)[0] + 1


def test_small_sources_are_no_reference():
    pairs = measure_pairs(pd.concat([IMAGES, source('tiny', 4)], ignore_index=True), draws=1)
    assert set(pairs.reference) == {'here', 'alike', 'far'} and len(pairs) == 9
    assert (pairs.then != pairs.reference).all() and 'tiny' in set(pairs.then)


def test_the_committed_pairs():
    table = pd.read_csv(ROOT/'data/results/monitor.csv')
    assert len(table) == len(table.drop_duplicates(['reference', 'then'])) >= 12
    assert (table.protocol.str.startswith(f'{DRAWS} draws')).all()
    assert table.false_alarms.mean() <= 0.1 and table.detected.between(0, 1).all()
    assert (table.delay.dropna() <= table.scenes_then[table.delay.notna()]).all()
