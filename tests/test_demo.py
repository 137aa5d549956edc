"`rssqa demo`: drawn scenes, maps, predictions, truth, report; with the assessor that everybody uses."
import numpy as np
import pandas as pd
import pytest

import rssqa.demo as module
from rssqa.cli import main
from rssqa.core import bundled, read_json
from rssqa.data.datasets import read_image, read_mask, folder_spec
from rssqa.demo import ASSESSOR, RIVALS, demo_summary, draw_tiles, run_demo
from rssqa.quality.pack import Pack, bundled_pack, default_pack
from rssqa.quality.recommend import calibrate_pack
from rssqa.viz.explorer import open_run


@pytest.fixture(scope='module')
def demo(tmp_path_factory): return run_demo(tmp_path_factory.mktemp('demo')/'out')


def test_the_pack_is_small_and_has_eight_methods():
    files = [p for p in bundled('demo').rglob('*') if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 6e6
    pack = Pack(bundled('demo'))
    assert len(pack.methods()) == 8 and 'assessor' not in read_json(bundled('demo')/'pack.json')
    assert pack.assessor.sources == Pack(bundled_pack()).assessor.sources
    assert pack.assessor.name == 'rssqa demo pack, assessor of the rssqa open pack'


def test_scenes_are_whole_and_damaged_and_unknown_to_the_networks(tmp_path):
    tiles = draw_tiles(tmp_path, seed=3, side=64)
    pairs = tiles.groupby('path')
    assert (pairs.size() == 2).all() and tiles.path.nunique() == 8
    assert (tiles[tiles.condition == 'damaged']['level'] > 0).all()
    for _, pair in pairs:
        whole, damaged = pair.itertuples()
        spec = folder_spec(tmp_path/'whole')
        np.testing.assert_array_equal(read_mask(whole, spec), read_mask(damaged, spec))
        assert np.abs(read_image(whole) - read_image(damaged)).max() > 0.01
    known = set()
    for method in Pack(bundled('demo')).config['networks']['synthetic'].values():
        known |= set(read_json(bundled('demo')/method/'config.json')['scenes'])
    assert known and not known & set(tiles.scene)


def test_predictions_are_those_of_the_assessor(demo):
    table = demo.table
    assert len(table) == 16 * 8 and (table.groupby('image_id').recommended.sum() == 1).all()
    tile = demo.tiles.iloc[5]
    pack = Pack(bundled('demo'))
    answer = pack.assess_networks(read_image(tile), pack.networks(), 'synthetic', pack.usual()).table.set_index('name')
    rows = table[table.image_id == tile.image_id].set_index('method')
    for column in ('predicted', 'lower', 'upper'):
        np.testing.assert_allclose(rows[column], answer[column][rows.index], atol=1e-6)


def test_true_accuracy_is_that_of_the_drawn_masks(demo):
    tile = demo.tiles.iloc[2]
    answer = demo.answers[tile.image_id]
    truth = read_mask(tile, folder_spec(demo.out/'scenes'/'whole'))
    rows = demo.table[demo.table.image_id == tile.image_id].set_index('method')
    for m in answer.maps: assert rows.oa[m.name] == pytest.approx((m.ids == truth).mean(), abs=0.05)


def test_the_run_opens_in_the_explorer(demo):
    state = open_run(demo.out)
    assert len(state) == len(demo.table) and {'condition', 'lower', 'upper'} <= set(state.table)


def test_the_report_leads_with_pictures(demo):
    html = (demo.out/'report.html').read_text()
    assert 0 < html.index('class="map first"') < html.index('<table') and 'rssqa demo pack' in html
    saved = pd.read_csv(demo.out/'results.csv')
    assert set(saved.predictor) == {ASSESSOR, *RIVALS} and {'protocol', 'commit', 'command'} <= set(saved)


def test_advice_comes_first_and_the_evidence_is_that_of_the_card(demo):
    lines = demo_summary(demo).splitlines()
    assert lines[1].strip().startswith(('Use ', 'Stay with ', 'Change from '))
    measured = read_json(bundled_pack()/'card.json')['assessor']['measures']['many, known methods']
    assert any(f'{measured["srocc_image"]:.2f}' in line and f'{measured["mae"]:.2f}' in line for line in lines)
    assert any('16 tiles, 128 maps' in line for line in lines) and 'rssqa demo --build' in lines[-1]
    assert max(map(len, lines)) < 160


def test_the_command_leaves_the_default_pack(monkeypatch, capsys, demo):
    monkeypatch.setattr(module, 'run_demo', lambda out, seed: demo)
    with pytest.raises(SystemExit) as e: main(['demo'])
    assert e.value.code == 0 and 'Report:' in capsys.readouterr().out
    assert default_pack() == bundled_pack()


def test_a_pack_without_an_assessor_of_its_own_can_be_calibrated(demo, tmp_path):
    tile = demo.tiles.iloc[0]
    truth = read_mask(tile, folder_spec(demo.out/'scenes'/'whole'))
    y, x = np.random.default_rng(0).integers(0, len(truth), (2, 10))
    points = pd.DataFrame({'image': 'tile.png', 'x': x, 'y': y, 'class': truth[y, x]})
    (tmp_path/'tile.png').write_bytes((demo.out/'scenes'/'whole'/tile.path).read_bytes())
    own = Pack(calibrate_pack(points, tmp_path/'own', tmp_path, pack=bundled('demo')))
    assert own.config['calibrated']['points'] == 10 and own.assessor.name == 'own'
    assert own.assessor.shift.spread < 1
