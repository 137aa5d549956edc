"""The laboratory answers every turn of a knob with honest numbers, leaves no trace, and refuses what makes no sense."""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from rssqa.core import Incompatible, SchemaError, UnknownName
from rssqa.viz.degradation import (
    DEGRADATIONS,
    DegradationExplorer,
    Setup,
    as_png,
    bench_degradation,
    damage,
    interval_rows,
    make_setup,
    with_intervals,
)
from rssqa.segment.metrics import accuracy, confusion
from rssqa.quality.recommend import Pack
from rssqa.data.synthetic import CLASSES, SCENE_TYPES, scene
from trained import trained_setup

SMALL = Setup(('pspnet', 'segformer'), steps=4, learn=1, judge=1, calibrate=3, size=64, epochs=4)


def small_pack() -> Path: # made once a run
    home = Path(os.environ['RSSQA_TEST_RUN'])/'lab-world'
    with FileLock(f'{home}.lock'): return make_setup(home, SMALL)


@pytest.fixture(scope='module')
def lab(): return DegradationExplorer(small_pack(), size=64)


def test_knobs_damage_in_the_order_of_the_light():
    x = scene('rural', 1, 48).image
    assert np.array_equal(damage(x, dict(noise=.5, haze=.5)), damage(x, dict(haze=.5, noise=.5)))
    for k in DEGRADATIONS: assert not np.array_equal(damage(x, {k: .6}), x)
    with pytest.raises(UnknownName, match='blur'): damage(x, dict(blurr=.1))
    with pytest.raises(SchemaError, match='expected 0..1'): damage(x, dict(blur=1.2))


def test_true_oa_is_measured_against_the_truth(lab):
    r = lab.set('flood', 4, blur=.4)
    for m, oa in zip(r.table.method, r.table.oa):
        assert oa == pytest.approx(accuracy(confusion(r.truth, r.masks[m], len(CLASSES)))['oa'])
    assert np.array_equal(r.truth, scene('flood', 5004, 64).mask) and list(r.table.predicted) == sorted(
        r.table.predicted, reverse=True
    )
    assert (
        (r.table.low <= r.table.predicted) & (r.table.predicted <= r.table.high) | r.table.low.isna()
    ).all() and r.seconds > 0


def test_a_wrong_turn_changes_nothing(lab):
    before = lab.set('town', 1, blur=.2)
    with pytest.raises(SchemaError): lab.set(haze=-1)
    with pytest.raises(UnknownName): lab.set('city')
    after = lab.set()
    assert (
        after.scene_type == 'town'
        and after.levels == before.levels
        and np.array_equal(after.image, before.image)
    )
    lab.reset()


def test_a_sweep_puts_the_knob_back(lab):
    lab.set(noise=.1)
    t = lab.sweep('noise', (0, 1))
    assert lab.levels['noise'] == .1 and len(t) == 4 and set(t.level) == {0, 1}
    lab.reset()


def test_other_packs(lab):
    with pytest.raises(Incompatible, match='rssqa demo'): DegradationExplorer(trained_setup().home)
    with pytest.raises(UnknownName, match='pspnet'): DegradationExplorer(lab.pack, chosen=['pspnett'])
    bare = Pack(small_pack(), 'cpu')
    bare.config = {k: v for k, v in bare.config.items() if k != 'intervals'}
    r = DegradationExplorer(bare, size=64).reading
    assert (
        r.table.low.isna().all()
        and set(r.table.reason) == {'this pack has no intervals'}
        and 'no interval' in r.said()
    )


def test_the_view_follows_and_explains(lab):
    view = lab.view()
    before = view.pictures['image'].value
    view.sliders['haze'].value, view.scene_type.value = .8, 'oblique'
    assert lab.levels['haze'] == .8 and lab.scene_type == 'oblique' and view.pictures['image'].value != before
    assert (
        f'OA {lab.reading.table.set_index("method").oa["pspnet"]:.3f}' in view.captions['pspnet'].value
        and view.numbers.value.count('<circle') == 2
    )
    turns = []
    lab.set = lambda *a, **k: turns.append(1) or DegradationExplorer.set(lab, *a, **k)
    view.reset.click()
    del lab.set
    assert len(turns) == 1 and not any(lab.levels.values())               # five sliders, one update
    lab.pack._open, kept = {}, lab.pack._open
    lab.pack.config['networks'], networks = {'synthetic': {}}, lab.pack.config['networks']
    view.sliders['blur'].value = .5
    assert 'b3261e' in view.said.value
    lab.pack._open, lab.pack.config['networks'] = kept, networks
    lab.reset()


def test_drawings():
    t = pd.DataFrame(
        dict(
            method=['a<b', 'c'],
            predicted=[0.5, np.nan],
            low=[0.4, np.nan],
            high=[0.6, np.nan],
            oa=[0.55, 0.2],
        )
    )
    drawn = interval_rows(t)
    assert (
        'a&lt;b' in drawn
        and drawn.count('<rect') == 1
        and drawn.count('<circle') == 2
        and 'no prediction' in drawn
    )
    assert (
        interval_rows(t.drop(columns='oa')).count('<circle') == 0
        and as_png(np.zeros((3, 5, 9), np.float32), 18)[:4] == b'\x89PNG'
    )


def test_bench(lab):
    lab.set(blur=.5)
    t = bench_degradation(lab, 3)
    assert (
        t.target_ms[0] == 300
        and t.met[0] == ('yes' if t.p95_ms[0] < 300 else 'no')
        and not any(lab.levels.values())
    )
