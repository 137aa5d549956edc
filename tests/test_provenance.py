"""Result rows carry protocol, data, seed, version, commit and command, and files of results are whole."""
import subprocess, sys

import numpy as np
import pandas as pd
import pytest

from rssqa import __version__, provenance
from rssqa.core import DataNotFound
from rssqa.provenance import commit, hardware, machine, read_results, save_results, stamp, write_results


@pytest.fixture
def measures():
    return pd.DataFrame(dict(predictor=['a', 'b'], mae=[0.123456789, 0.5], top1=[1, 0])).set_index('predictor')


def test_columns_come_in_a_fixed_order(measures):
    rows = stamp(measures, 'rssqa bench', '5 folds', 'numbers', 7, experiment='e1')
    added = ['protocol', 'data', 'seed', 'experiment', 'rssqa', 'commit', 'command']
    assert list(rows) == ['mae', 'top1', *added]
    assert rows.experiment.eq('e1').all() and rows.rssqa.eq(__version__).all() and rows.command.eq('rssqa bench').all()
    assert list(measures) == ['mae', 'top1']


def test_what_is_not_given_is_no_column(measures):
    assert list(stamp(measures, 'x')) == ['mae', 'top1', 'rssqa', 'commit', 'command']
    assert list(stamp(measures, 'x', seed=0))[2] == 'seed'


def test_columns_of_the_rows_stay(measures):
    rows = stamp(measures.assign(seed=[1, 2], data='own'), 'x', 'p', 'd', 0, predictor='other')
    assert list(rows.seed) == [1, 2] and rows.data.eq('own').all() and 'predictor' not in rows


SEEDS = [(0, 0), ('', ''), ((0, 1, 2), '0 1 2'), (np.arange(2), '0 1'), (np.int64(3), 3)]


@pytest.mark.parametrize('seed, text', SEEDS)
def test_several_seeds_are_one_text(measures, seed, text): assert stamp(measures, 'x', seed=seed).seed.eq(text).all()


def test_numbers_are_rounded_when_saved_and_words_are_not(measures, tmp_path):
    path = save_results(measures.assign(note='0.123456789'), tmp_path/'r.csv', '5 folds', 'numbers', 7, 'rssqa bench')
    first = path.read_text().splitlines()[1].split(',')
    assert first[:4] == ['a', '0.12346', '1.0', '0.123456789']
    assert read_results(path).seed.eq(7).all()
    assert [p.name for p in tmp_path.iterdir()] == ['r.csv']


def test_stamped_rows_are_written_as_they_are(measures, tmp_path):
    rows = stamp(measures.reset_index(), 'x', seed=(0, 1))
    path = write_results(rows, tmp_path/'new'/'r.csv')
    assert path.read_text().splitlines()[0] == 'predictor,mae,top1,seed,rssqa,commit,command'
    back = read_results(path).reset_index()
    assert np.array_equal(back.mae, rows.mae) and back.top1.dtype == int and back.seed.eq('0 1').all()


def test_rows_without_predictors_can_be_read(tmp_path):
    path = write_results(stamp(pd.DataFrame(dict(what=['a'], value=[1])), 'x'), tmp_path/'r.csv')
    assert list(read_results(path))[:2] == ['what', 'value']


def test_an_interrupted_write_leaves_the_old_file(measures, tmp_path, monkeypatch):
    path = save_results(measures, tmp_path/'r.csv', 'p', 'd', 0, 'x')
    before = path.read_text()
    def write_half(self, target, index):
        target.write_text('predictor,ma')
        raise OSError('disk full')
    monkeypatch.setattr(pd.DataFrame, 'to_csv', write_half)
    with pytest.raises(OSError, match='disk full'): save_results(measures * 2, path, 'p', 'd', 0, 'x')
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ['r.csv']


def test_missing_results_are_named(tmp_path):
    with pytest.raises(DataNotFound, match='no results .*q.csv'): read_results(tmp_path/'q.csv')


def test_commit_is_marked_where_files_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, 'PACKAGE_FILE', str(tmp_path/'__init__.py'))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert commit() == ''
    def git(*args): subprocess.run(['git', '-C', str(tmp_path), *args], check=True, capture_output=True)
    (tmp_path/'__init__.py').write_text('')
    git('init')
    git('add', '.')
    git('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-m', 'first')
    clean = commit()
    assert len(clean) == 12 and int(clean, 16)
    (tmp_path/'new.py').write_text('')
    assert commit() == clean                            # a file git does not know is no change
    (tmp_path/'__init__.py').write_text('x = 1')
    assert commit() == clean + '+'


def test_machine_is_named():
    assert machine().startswith('processor with ') and machine().endswith(' cores')
    assert hardware()['machine'] == machine() and list(hardware()) == ['machine', 'cores', 'torch']


def test_import_loads_no_torch():
    code = 'import sys, rssqa.provenance; print(sorted({"torch", "matplotlib", "sklearn", "lance"} & set(sys.modules)))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
