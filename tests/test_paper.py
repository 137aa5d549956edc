"""The evidence: every committed number follows from committed predictions, and these from committed tables."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rssqa.bench.protocol import KEYS, RS_SQA, load_predictions
from rssqa.quality.baselines import MeanBaseline
from rssqa.core import DataNotFound, MissingFeatures
from rssqa.bench.paper import (
    CONSENSUS,
    MEASURED,
    MEMBERS,
    MODELS,
    ENSEMBLE,
    PROTOCOL,
    FewScenes,
    compute,
    all_predictors,
    measured,
    open_evidence,
    prediction_file,
    verify,
    add_pooled_ensemble,
)

HERE = Path(__file__).resolve().parents[1]
TABLES = HERE/'data'/'tables'
RESULTS = HERE/'data'/'results'
COMMITTED = [x for x in PROTOCOL if prediction_file(x, TABLES).exists()]


# ---------------------------------------------------------------- what is committed

def test_the_main_experiment_is_committed(): assert 'main' in COMMITTED


@pytest.mark.parametrize('experiment', [x for x in COMMITTED if x != 'main'])
def test_every_committed_row_follows_from_the_predictions(experiment):
    told = verify(experiment, TABLES, RESULTS)
    assert len(told) and (told.numbers > 0).all() and (told.largest_difference < 5e-4).all()


def test_the_main_board_follows_from_the_predictions():
    from rssqa.bench.protocol import leaderboard
    told = load_predictions(prediction_file('main', TABLES))
    table = pd.read_parquet(TABLES/'open.parquet')
    some = [ENSEMBLE, CONSENSUS, RS_SQA, 'trees: everything', 'mean of dataset and method']
    board = leaderboard(table, told[told.seed < 9][[*KEYS, *some]])
    old = pd.read_csv(RESULTS/'paper_main.csv', index_col='predictor')
    assert np.allclose(
        board.astype(float), old.loc[some, list(board)].astype(float), atol=5e-4, equal_nan=True
    )


def test_predictions_cover_the_table_and_the_panel_follows_from_its_members():
    told = load_predictions(prediction_file('main', TABLES))
    table = pd.read_parquet(TABLES/'open.parquet')
    assert (
        (told.groupby('seed').size() == len(table)).all()
        and told.drop(columns=KEYS).notna().all(axis=None)
        and {*MODELS, *MEMBERS} <= set(told)
    )
    again = add_pooled_ensemble(told.drop(columns=ENSEMBLE))
    assert np.abs(again[ENSEMBLE] - told[ENSEMBLE]).max() < 2e-4
    # no scene on both sides
    assert (
        told.merge(table[['image_id', 'dataset', 'scene']].drop_duplicates(), on='image_id')
        .groupby(['seed', 'dataset', 'scene'])
        .fold.nunique()
        .max()
        == 1
    )


def test_claims_name_the_strongest_baseline_of_each_measure():
    told = pd.read_csv(RESULTS/'paper_best_baseline_comparison.csv')
    board = pd.read_csv(RESULTS/'paper_main.csv', index_col='predictor')
    rest = board[~board.index.isin(MODELS)]
    for r in told.itertuples():
        if r.measure in rest:
            assert (
                rest[r.measure].min() - 1e-4 <= r.theirs <= rest[r.measure].max() + 1e-4
                and abs(board[r.measure][r.predictor] - r.value) < 2e-3
            )
    assert (told.delta_low <= told.delta + 1e-6).all() and (told.delta <= told.delta_high + 1e-6).all()


# ---------------------------------------------------------------- making it again

def test_fitting_again_gives_the_committed_predictions(tmp_path):
    names = ('mean of dataset and method', 'max-softmax, temperature-scaled', 'DoC')
    new = compute('main', TABLES, None, (0,), 1, tmp_path, names)
    old = load_predictions(prediction_file('main', TABLES))
    both = new.merge(old[old.seed == 0], on=KEYS[:2], suffixes=('', ' then'))
    assert len(both) == len(new) and all(np.abs(both[n] - both[f'{n} then']).mean() < 1e-3 for n in names)


def test_without_masks_no_jury_sits():
    e = open_evidence(TABLES, prediction_grids=False)
    assert CONSENSUS not in all_predictors(e) and RS_SQA in all_predictors(e) and not e.truth
    with pytest.raises(KeyError, match='no predictor'): all_predictors(e, only=('nobody',))


def test_no_tables_and_no_experiment(tmp_path):
    with pytest.raises(DataNotFound, match='no tables open'): open_evidence(tmp_path)
    with pytest.raises(KeyError, match='main'): compute('mian', TABLES)
    with pytest.raises(DataNotFound, match='predictions'): measured('main', tmp_path)


def test_an_edited_result_is_noticed(tmp_path):
    name = 'dataset'
    for path in RESULTS.glob('paper_*.csv'): (tmp_path/path.name).write_bytes(path.read_bytes())
    path = next(tmp_path/f'paper_{n}.csv' for n in measured(name, TABLES, 10))
    rows = pd.read_csv(path)
    rows.loc[0, 'mae'] += 0.01
    rows.to_csv(path, index=False)
    assert verify(name, TABLES, tmp_path).largest_difference.max() > 0.009


@pytest.mark.parametrize('spoil', [lambda t: t.assign(mae=np.nan), lambda t: t.assign(predictor=t.predictor[::-1].to_numpy()), lambda t: t.assign(srocc_image=t.srocc_image.fillna(0.5).where(t.index > 0, np.nan))])
def test_lost_numbers_and_names_are_noticed(spoil, tmp_path):
    for path in RESULTS.glob('paper_dataset*.csv'): (tmp_path/path.name).write_bytes(path.read_bytes())
    assert (verify('dataset', TABLES, tmp_path).largest_difference <= MEASURED).all()
    spoil(pd.read_csv(tmp_path/'paper_dataset.csv')).to_csv(tmp_path/'paper_dataset.csv', index=False)
    assert not (verify('dataset', TABLES, tmp_path).largest_difference <= MEASURED).all()
    pd.read_csv(tmp_path / 'paper_dataset.csv').drop(columns='mae').to_csv(
        tmp_path / 'paper_dataset.csv', index=False
    )
    with pytest.raises(MissingFeatures, match='no column mae'): verify('dataset', TABLES, tmp_path)


@pytest.mark.parametrize('share, scenes', [(0.01, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_few_scenes_learn_from_that_share(share, scenes):
    table = pd.DataFrame(
        [
            dict(image_id=f'{d}{s}{i}', dataset=d, scene=f's{s}', method='m', oa=0.5)
            for d in 'ab'
            for s in range(8)
            for i in range(3)
        ]
    )
    seen = []
    model = FewScenes(MeanBaseline(), share)
    model.model.fit = lambda X: seen.append(X)
    model.fit(table)
    assert (
        seen[0].groupby('dataset').scene.nunique().tolist() == [scenes, scenes] and len(seen[0]) == 6 * scenes
    )
    assert model.get_params() != FewScenes(MeanBaseline(), 0.77).get_params()


def test_a_comparison_without_masks_overwrites_nothing(tmp_path, capsys):
    from rssqa.cli import main
    with pytest.raises(SystemExit) as e: main(['bench', 'paper', '--only', 'main', '--tables', str(tmp_path)])
    assert e.value.code == 2 and '--fast' in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as e:
        main(['bench', 'paper', '--fast', '--only', 'method', '--tables', str(tmp_path)])
    assert e.value.code == 2 and 'nothing to check' in capsys.readouterr().err
