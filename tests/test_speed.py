"""Speed is printed, never tested. Tested is that the fast and the plain way agree, and that the ratios add up."""
import numpy as np
import pandas as pd
import pytest

from rssqa.bench.speed import enlarged, in_turns, largest_gap, measurement, plain_sqed, run_speed
from rssqa.cli import main
from rssqa.core import UnknownName
from rssqa.segment.methods.training import load_segmenter
from rssqa.segment.openvino import is_installed
from rssqa.tables.sqed import label_free_columns, stored_features
from rssqa.tables.store import Store, get_vectors
from trained import numbers, trained_setup, with_features


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    "One run in miniature through the command line: (what was printed, what was written)."
    from contextlib import redirect_stdout
    from io import StringIO
    out = tmp_path_factory.mktemp('speed')/'speed.csv'
    printed = StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main(['bench', 'speed', '--quick', '--out', str(out)])
    assert stop.value.code == 0
    return printed.getvalue(), pd.read_csv(out)


@pytest.mark.parametrize('words', [
    'SQED table', 'consensus model fit', 'score of one map', 'score with cross-method features',
    'quality model fit', 'the same, ', 'peak memory', 'vectors of', 'training on', 'assess, 7 networks, CPU',
    'rssqa score, cold, CPU', 'rssqa score of a missing file, CPU',
])
def test_every_measurement_is_printed_and_written(quick, words):
    printed, table = quick
    rows = table[table.what.str.startswith(words)]
    engines = table.what.str.contains('on OpenVINO')
    assert engines.sum() == is_installed() and len(table) == 13 + engines.sum()
    assert len(rows) == (2 if words == 'score of one map' else 1)
    assert all(what in printed for what in rows.what) and 'target' in printed


def test_ratios_add_up(quick):
    table = quick[1]
    numbers = table[['value', 'baseline', 'ratio']]
    assert np.isfinite(numbers).all(axis=None) and (numbers > 0).all(axis=None)
    is_rate = table.unit.str.endswith('/s')
    better = np.where(is_rate, table.value / table.baseline, table.baseline / table.value)
    np.testing.assert_allclose(table.ratio, better, rtol=1e-2, atol=1e-4)         # written with five digits
    assert (table.met.isna() == table.target.isna()).all()
    assert ((table.met == 'yes') == (table.ratio >= table.target)).all()


def test_results_carry_their_provenance(quick):
    columns = {'protocol', 'data', 'seed', 'rssqa', 'commit', 'command', 'machine', 'cores', 'torch'}
    assert columns <= set(quick[1])


def test_the_plain_loop_gives_the_same_columns():
    setup = trained_setup()
    fold = setup.networks.fold[0]
    networks = {}
    for network in setup.networks[setup.networks.fold == fold].itertuples():
        networks[network.method] = load_segmenter(network.folder)
    tiles = setup.tiles[setup.tiles.fold == fold].head(3)
    gaps = largest_gap(setup.sqed, plain_sqed(tiles, networks, setup.spec))
    assert set(gaps.index) == {*label_free_columns(setup.sqed), 'oa'} and gaps.max() < 1e-3


@pytest.mark.parametrize('unit, value, baseline, ratio', [
    ('rows/s', 10., 2., 5.), ('ms', 10., 2., 0.2), ('MB', 2., 10., 5.),
])
def test_a_ratio_above_one_is_better(unit, value, baseline, ratio):
    row = measurement('x', value, unit, 'y', baseline, 5)
    assert row['ratio'] == pytest.approx(ratio) and row['met'] == ('yes' if ratio >= 5 else 'no')
    assert measurement('x', value, unit, 'y', baseline)['met'] == ''


def test_turns_alternate():
    order = []
    seconds = in_turns(dict(a=lambda: order.append('a'), b=lambda: order.append('b')), 3)
    assert list(seconds) == ['a', 'b'] and ''.join(order) == 'ababab'


def original_ids(image_ids): return [image_id.rsplit('+', 1)[0] for image_id in image_ids]


def images_per_scene(table): return table.groupby(['dataset', 'scene']).image_id.nunique()


@pytest.mark.parametrize('rows', [30, 108, 250])
def test_an_enlarged_table_brings_its_features(rows, tmp_path):
    table = numbers()                                                                # 108 rows, 3 methods
    store = Store(with_features(tmp_path/'store', table))
    folder = enlarged(table, store, 'sem/toy@1', rows, tmp_path/'many')
    many = pd.read_parquet(folder/'table.parquet')
    new = Store(folder/'store')
    assert len(many) == rows // 3 * 3 and many.groupby('image_id').size().eq(3).all()
    assert not many.duplicated(['image_id', 'method']).any()
    assert images_per_scene(many).max() <= images_per_scene(table).max()
    assert set(original_ids(many.image_id)) <= set(table.image_id)

    images = many.image_id.unique()
    vectors = get_vectors(new, 'sem/toy@1', images)
    assert np.array_equal(vectors, get_vectors(store, 'sem/toy@1', original_ids(images)))
    features = stored_features(store, table)
    for method, repeated in stored_features(new, many).items():
        keys = pd.Index(table.image_id[table.method == method])
        at = keys.get_indexer(original_ids(many.image_id[many.method == method]))
        assert np.array_equal(repeated, features[method][at])


def test_steps_are_chosen_by_name():
    with pytest.raises(UnknownName, match='(?i)reading vectors back'): run_speed(True, only=('reading vectors',))
