"""The degradation explorer answers with measured numbers, leaves no trace, and refuses what makes no sense."""
import asyncio
import io
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from PIL import Image

from rssqa.core import Incompatible, SchemaError, UnknownName, bundled, read_json, write_json
from rssqa.data.synthetic import CLASSES, scene
from rssqa.segment.metrics import accuracy, confusion
from rssqa.viz.degradation import (
    DEGRADATIONS, FEW_METHODS, SWEEP, TELLING, DegradationExplorer, apply_degradations, as_png, bench_degradation,
    interval_rows,
)
import rssqa.viz.degradation as module
from trained import trained_setup


def small_pack() -> Path: # the demo pack with two of its networks, made once a run
    home = Path(os.environ['RSSQA_TEST_RUN'])/'two-networks'
    with FileLock(f'{home}.lock'):
        if home.exists(): return home
        shutil.copytree(bundled('demo'), home.with_suffix('.part'))
        config = read_json(bundled('demo')/'pack.json')
        networks = config['networks']['synthetic']
        chosen = {method: networks[method] for method in ('pspnet', 'segformer')}
        write_json(home.with_suffix('.part')/'pack.json', config | dict(networks={'synthetic': chosen}))
        return home.with_suffix('.part').rename(home)


@pytest.fixture(scope='module')
def explorer(): return DegradationExplorer(small_pack(), size=64)


def test_degradations_are_applied_in_the_order_of_the_light():
    x = scene('rural', 1, 48).image
    one = apply_degradations(x, dict(noise=.5, haze=.5))
    assert np.array_equal(one, apply_degradations(x, dict(haze=.5, noise=.5)))
    for name in DEGRADATIONS: assert not np.array_equal(apply_degradations(x, {name: .6}), x)
    with pytest.raises(UnknownName, match='blur'): apply_degradations(x, dict(blurr=.1))
    with pytest.raises(SchemaError, match='expected 0..1'): apply_degradations(x, dict(blur=1.2))


def test_true_oa_is_measured_against_the_truth(explorer):
    r = explorer.set('flood', 4, blur=.4)
    for method, oa in zip(r.table.method, r.table.oa):
        assert oa == pytest.approx(accuracy(confusion(r.truth, r.masks[method], len(CLASSES)))['oa'])
    assert np.array_equal(r.truth, scene('flood', 5004, 64).mask)
    assert list(r.table.predicted) == sorted(r.table.predicted, reverse=True)
    assert (r.table.lower <= r.table.predicted).all() and (r.table.predicted <= r.table.upper).all()
    assert r.seconds > 0


def test_a_wrong_setting_changes_nothing(explorer):
    before = explorer.set('town', 1, blur=.2)
    with pytest.raises(SchemaError): explorer.set(haze=-1)
    with pytest.raises(UnknownName): explorer.set('city')
    # a wrong level together with another scene
    with pytest.raises(SchemaError): explorer.set('flood', 3, haze=-1)
    after = explorer.set()
    assert after.scene_type == 'town' and after.levels == before.levels
    assert np.array_equal(after.image, before.image) and np.array_equal(after.truth, before.truth)
    explorer.reset()


def test_a_sweep_restores_the_level(explorer):
    explorer.set(noise=.1)
    table = explorer.sweep('noise', (0, 1))
    assert explorer.levels['noise'] == .1
    assert len(table) == 4 and set(table.level) == {0, 1} and set(table.degradation) == {'noise'}
    explorer.reset()


def test_other_packs(explorer):
    with pytest.raises(Incompatible, match='(?i)leave the pack out'): DegradationExplorer(trained_setup().home)
    with pytest.raises(UnknownName, match='pspnet'): DegradationExplorer(explorer.pack, methods=['pspnett'])
    assert DegradationExplorer(size=64).methods == list(FEW_METHODS)


def test_the_view_follows_and_explains(explorer, monkeypatch):
    view = explorer.view()
    before = view.pictures['image'].value
    view.sliders['haze'].value = .8
    view.scene_type.value = 'oblique'
    assert explorer.levels['haze'] == .8 and explorer.scene_type == 'oblique'
    assert view.pictures['image'].value != before
    oa = explorer.result.table.set_index('method').oa['pspnet']
    assert f'OA {oa:.3f}' in view.captions['pspnet'].value and view.numbers.value.count('<circle') == 2
    calls = []
    real = explorer.set
    monkeypatch.setattr(explorer, 'set', lambda *a, **k: calls.append(1) or real(*a, **k))
    view.reset.click()
    # five sliders, one update
    assert len(calls) == 1 and not any(explorer.levels.values())
    # a pack whose networks are gone
    monkeypatch.setattr(explorer.pack, '_open', {})
    monkeypatch.setitem(explorer.pack.config, 'networks', {'synthetic': {}})
    view.sliders['blur'].value = .5
    assert 'has no networks' in view.message.value and view.message.value.startswith('<p style="color')
    monkeypatch.undo()
    explorer.reset()


def test_the_scene_is_there_at_once_and_only_the_last_place_of_a_slider_is_computed(monkeypatch):
    settings = []
    real = module.rank

    def slow(*args, **options): # a second for the first answer
        settings.append(1)
        time.sleep(1 if len(settings) == 1 else .05)
        return real(*args, **options)

    monkeypatch.setattr(module, 'rank', slow)
    monkeypatch.setattr(module, 'PAUSE', .05)

    async def live():
        explorer = DegradationExplorer(small_pack(), size=64, levels=TELLING)
        assert not settings                                                  # no network has run
        view = explorer.view()
        shown = np.asarray(Image.open(io.BytesIO(view.pictures['image'].value)).convert('RGB'), float)
        assert shown.std() > 10 and view.numbers.value == '' and view.sliders['season'].value == TELLING['season']
        await asyncio.sleep(.3)
        assert 'segmenting' in view.status.value
        for level in (.1, .2, .3, .4, .5): view.sliders['blur'].value = level
        await view.task
        return explorer, view

    explorer, view = asyncio.run(live())
    assert explorer.result.levels == dict(season=.8, haze=0, blur=.5, resolution=0, noise=0)
    assert len(settings) == 2 + len(SWEEP)                                   # first, last, curves
    assert view.status.value == '' and view.curves.value.count('<svg') == 2 and 'blur 0 to 1' in view.curves.value
    # the curves are those of a sweep, and stand at the level of the slider
    table = explorer.sweep('blur')
    at = table[(table.method == 'pspnet') & (table.level == .4)].iloc[0]
    assert '%.1f,%.1f' % module._curve_point(.4, at.oa) in view.curves.value
    assert f'x1="{module._curve_point(.5, 0)[0]}"' in view.curves.value


def test_drawings():
    t = pd.DataFrame(dict(method=['a<b', 'c'], predicted=[0.5, np.nan], lower=[0.4, np.nan], upper=[0.6, np.nan],
                          oa=[0.55, 0.2]))
    drawing = interval_rows(t)
    assert 'a&lt;b' in drawing and 'no prediction' in drawing
    assert drawing.count('<rect') == 1 and drawing.count('<circle') == 2
    assert interval_rows(t.drop(columns='oa')).count('<circle') == 0
    assert as_png(np.zeros((3, 5, 9), np.float32), 18)[:4] == b'\x89PNG'


def test_bench(explorer):
    explorer.set(blur=.5)
    t = bench_degradation(explorer, 3)
    assert t.target_ms[0] == 300 and t.met[0] == ('yes' if t.p95_ms[0] < 300 else 'no')
    assert not any(explorer.levels.values())
