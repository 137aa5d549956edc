"""Shares of a folder: they cover it once, join to the table of one call, and a set that does not fit is refused."""
import json
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rssqa.cli import main
from rssqa.core import DataNotFound, Incompatible, MissingFeatures
from rssqa.data.synthetic import CLASSES
from rssqa.quality.folders import Shard, process_folder, process_image
from rssqa.quality.ray_engine import on_ray
from rssqa.quality.shards import manifest_path, merge_shards, parse_shard, shard_path, write_manifest
from test_assess_folder import METHODS, NAMES, write_case


def describe(path): # two rows an image, with digits, names and gaps that a CSV file may spoil
    level = np.asarray(Image.open(path)).mean() / 255
    return [
        dict(name='NA', predicted=level / 3, as_good=bool(level > .5), reason='=1+1'),
        dict(name='007', predicted=None if level > .9 else 1 / (7 + level), as_good=None, reason=''),
    ]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('survey')/'images'
    for i in range(23):
        path = folder/f'flight {i % 3}'/f'ü{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (4, 4), 11 * i).save(path)
    (folder/'flight 0'/'torn.png').write_bytes(b'torn')
    return folder


def run_shard(images, out, shard, task='task'):
    result = process_folder(images, describe, shard_path(out, shard), workers=1, shard=shard)
    write_manifest(out, shard, task, result)
    return result


@pytest.mark.parametrize('total', [1, 2, 5, 40])
@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_shares_join_to_the_table_of_one_call(images, tmp_path, total, suffix):
    whole = process_folder(images, describe, tmp_path/f'whole{suffix}', workers=1)
    out = tmp_path/f'answers{suffix}'
    parts = [run_shard(images, out, Shard(i, total)) for i in reversed(range(total))]
    assert sum(part.rows.path.nunique() for part in parts) == 23
    joined = merge_shards(out)
    pd.testing.assert_frame_equal(joined.skipped, whole.skipped)
    assert joined.others == whole.others
    if suffix == '.csv': assert out.read_bytes() == (tmp_path/'whole.csv').read_bytes()
    else: pd.testing.assert_frame_equal(pd.read_parquet(out), pd.read_parquet(tmp_path/'whole.parquet'))


def test_an_added_image_moves_no_other(images):
    paths = [f'{i}.png' for i in range(300)]
    before = {path: next(i for i in range(7) if Shard(i, 7).has(path)) for path in paths}
    assert set(before.values()) == set(range(7))
    assert max(pd.Series(before).value_counts()) < 2 * 300 / 7
    for path in paths: assert sum(Shard(i, 7).has(path) for i in range(7)) == 1


def test_a_missing_share_is_named(images, tmp_path):
    out = tmp_path/'answers.csv'
    with pytest.raises(DataNotFound, match='(?i)no shard of .*answers-0of4.csv.json'): merge_shards(out)
    for i in (0, 2, 3): run_shard(images, out, Shard(i, 4))
    with pytest.raises(DataNotFound, match=r'(?i)found 3 of 4 shards; 1/4 is missing.*--shard 1/4'): merge_shards(out)
    assert not out.exists()
    # a share that was stopped before its manifest is no finished share
    process_folder(images, describe, shard_path(out, Shard(1, 4)), workers=1, shard=Shard(1, 4))
    with pytest.raises(DataNotFound, match='1/4 is missing'): merge_shards(out)
    run_shard(images, out, Shard(1, 4))
    assert merge_shards(out).rows.path.nunique() == 23


def test_sets_that_do_not_fit_are_refused(images, tmp_path):
    out = tmp_path/'answers.csv'
    run_shard(images, out, Shard(0, 2))
    run_shard(images, out, Shard(1, 2), 'other maps')
    with pytest.raises(Incompatible, match='other maps, classes, packs'): merge_shards(out)
    run_shard(images, out, Shard(1, 2))
    table = shard_path(out, Shard(1, 2))
    kept = table.read_bytes()
    table.write_bytes(kept.replace(b'007', b'008'))
    with pytest.raises(Incompatible, match='changed after its shard'): merge_shards(out)
    table.unlink()
    with pytest.raises(DataNotFound, match='(?i)run the shard again'): merge_shards(out)
    table.write_bytes(kept)
    merge_shards(out)
    run_shard(images, out, Shard(0, 3))
    with pytest.raises(Incompatible, match='shards of 2 and of 3'): merge_shards(out)
    with pytest.raises(Incompatible, match='.parquet or .csv'): merge_shards(tmp_path/'answers.xls')


@pytest.mark.parametrize('text', ['', '4/4', '1', 'a/b', '1/0', '-1/2', '1/2/3', '1.5/3'])
def test_a_share_that_cannot_be(text):
    with pytest.raises(Incompatible, match='such as 2/4'): parse_shard(text)


def test_on_the_command_line(tmp_path, capsys):
    for i, name in enumerate(NAMES): write_case(tmp_path, name, i)
    (tmp_path/'classes.json').write_text(json.dumps(list(CLASSES)))
    maps = [part for m in METHODS for part in ('--map', f'{m}={tmp_path/m}')]
    common = ['assess', str(tmp_path/'images'), *maps, '--classes', str(tmp_path/'classes.json'), '--workers', '1']
    whole, out = tmp_path/'whole.csv', tmp_path/'answers.csv'
    def call(*args):
        try: code = main([str(arg) for arg in args])
        except SystemExit as e: code = e.code
        return code or 0, ''.join(capsys.readouterr())
    assert call(*common, '--out', whole)[0] == 0
    for i in range(2): assert call(*common, '--out', out, '--shard', f'{i}/2')[0] == 0
    code, text = call('merge', out)
    assert code == 0 and '3 images, 9 maps' in text and out.read_bytes() == whole.read_bytes()
    assert manifest_path(shard_path(out, Shard(0, 2))).exists()
    code, text = call(*common, '--shard', '0/2')
    assert code and '--out' in text
    code, text = call('assess', tmp_path/'images'/'a.png', *maps, '--shard', '0/2')
    assert code and 'folder of images' in text


# ---------------------------------------------------------------- a Ray cluster

@pytest.fixture(scope='module')
def cluster():
    ray = pytest.importorskip('ray', reason='Ray is an extra')
    ray.init(num_cpus=2, include_dashboard=False, logging_level='error', log_to_driver=False)
    yield ray
    ray.shutdown()


def test_a_cluster_gives_the_rows_of_one_process(images, tmp_path, cluster):
    cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])        # workers do not import tests
    whole = process_folder(images, describe, tmp_path/'whole.csv', workers=1)
    there = process_folder(images, describe, tmp_path/'there.csv', engine=on_ray(workers=2))
    pd.testing.assert_frame_equal(there.rows, whole.rows)
    assert (tmp_path/'there.csv').read_bytes() == (tmp_path/'whole.csv').read_bytes()
    assert there.skipped.path.tolist() == whole.skipped.path.tolist() == ['flight 0/torn.png']
    assert cluster.is_initialized(), 'a cluster that was there stays'


def test_a_stopped_cluster_goes_on(images, tmp_path):
    def stops(function, paths): # an engine that is interrupted after seven images
        for path in paths[:7]: yield path, *process_image(function, path)
        raise KeyboardInterrupt
    counted = []
    def counts(function, paths):
        for path in paths:
            counted.append(path)
            yield path, *process_image(function, path)
    with pytest.raises(KeyboardInterrupt): process_folder(images, describe, tmp_path/'t.csv', engine=stops)
    whole = process_folder(images, describe, tmp_path/'whole.csv', workers=1)
    again = process_folder(images, describe, tmp_path/'t.csv', engine=counts)
    pd.testing.assert_frame_equal(again.rows, whole.rows)
    assert len(counted) == 24 - 6, 'one of the seven is torn and is tried again'


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr('rssqa.quality.ray_engine.find_spec', lambda name: None)
    with pytest.raises(MissingFeatures, match=r'rssqa\[ray\]'): on_ray()
