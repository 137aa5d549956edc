"""The published experiments: committed numbers follow from committed predictions, and these from committed tables."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rssqa.bench.evidence import ROW_KEY, open_evidence, prediction_file
from rssqa.bench.paper import (
    EXPERIMENTS, MEASURE_TOLERANCE, is_reproduced, measure_experiment, predict_experiment, refit_fold, verify,
)
from rssqa.bench.predictors import (
    CONSENSUS, ENSEMBLE, MEMBERS, MODELS, FewScenes, add_pooled_ensemble, all_predictors,
)
from rssqa.bench.protocol import DIRECTION, KEYS, RS_SQA, leaderboard, load_predictions, save_predictions
from rssqa.core import DataNotFound, MissingFeatures
from rssqa.quality.baselines import MeanBaseline

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT/'data'/'tables'
RESULTS = ROOT/'data'/'results'
COMMITTED = [name for name in EXPERIMENTS if prediction_file(name, TABLES).exists()]


# ---------------------------------------------------------------- what is committed

def test_the_main_experiment_is_committed(): assert 'main' in COMMITTED


@pytest.mark.parametrize('experiment', [name for name in COMMITTED if name != 'main'])
def test_every_committed_row_follows_from_the_predictions(experiment):
    files = verify(experiment, TABLES, RESULTS)
    assert len(files) and (files.numbers > 0).all()
    assert (files.largest_difference < 5e-4).all(), files.to_string()


def test_the_main_leaderboard_follows_from_the_predictions():
    predictions = load_predictions(prediction_file('main', TABLES))
    table = pd.read_parquet(TABLES/'open.parquet')
    some = [ENSEMBLE, CONSENSUS, RS_SQA, 'trees: everything', 'mean of dataset and method']
    board = leaderboard(table, predictions[predictions.seed < 9][[*KEYS, *some]]).astype(float)
    committed = pd.read_csv(RESULTS/'paper_main.csv', index_col='predictor')
    committed = committed.loc[some, list(board)].astype(float)
    assert np.allclose(board, committed, atol=5e-4, equal_nan=True)


def test_predictions_cover_the_table_and_keep_scenes_apart():
    predictions = load_predictions(prediction_file('main', TABLES))
    table = pd.read_parquet(TABLES/'open.parquet')
    assert (predictions.groupby('seed').size() == len(table)).all()
    assert predictions.drop(columns=KEYS).notna().all(axis=None)
    scene_of_image = table[['image_id', 'dataset', 'scene']].drop_duplicates()
    rows = predictions.merge(scene_of_image, on='image_id')
    assert rows.groupby(['seed', 'dataset', 'scene']).fold.nunique().max() == 1


def test_the_ensemble_follows_from_its_members():
    predictions = load_predictions(prediction_file('main', TABLES))
    assert {*MODELS, *MEMBERS} <= set(predictions)
    again = add_pooled_ensemble(predictions.drop(columns=ENSEMBLE))
    assert np.abs(again[ENSEMBLE] - predictions[ENSEMBLE]).max() < 2e-4


def test_comparisons_name_the_strongest_baseline_of_each_measure():
    comparison = pd.read_csv(RESULTS/'paper_best_baseline_comparison.csv')
    board = pd.read_csv(RESULTS/'paper_main.csv', index_col='predictor')
    baselines = board[~board.index.isin(MODELS)]
    for row in comparison.itertuples():
        if row.measure not in baselines: continue
        values = baselines[row.measure].dropna() * DIRECTION[row.measure]
        assert values[row.baseline] >= values.max() - 1e-4, (row.measure, row.baseline, values.idxmax())
        assert abs(baselines[row.measure][row.baseline] - row.baseline_value) < 2e-3
        assert abs(board[row.measure][row.predictor] - row.value) < 2e-3
    assert (comparison.delta_low <= comparison.delta + 1e-6).all()
    assert (comparison.delta <= comparison.delta_high + 1e-6).all()


# ---------------------------------------------------------------- making it again

def test_fitting_again_gives_the_committed_predictions(tmp_path):
    names = ('mean of dataset and method', 'max-softmax, temperature-scaled', 'DoC')
    fitted = predict_experiment('main', TABLES, None, (0,), 1, tmp_path, names)
    committed = load_predictions(prediction_file('main', TABLES))
    both = fitted.merge(committed[committed.seed == 0], on=ROW_KEY, suffixes=('', ' committed'))
    assert len(both) == len(fitted)
    for name in names: assert np.abs(both[name] - both[f'{name} committed']).mean() < 1e-3


def test_one_fold_is_fitted_again_and_another_prediction_is_noticed(tmp_path):
    names = ('mean of dataset and method', 'DoC')
    fitted = refit_fold(TABLES, only=names)
    assert list(fitted.index) == list(names) and is_reproduced(fitted).all()
    for path in (*TABLES.glob('open*'), TABLES/'renamed.json'): (tmp_path/path.name).symlink_to(path)
    spoiled = load_predictions(prediction_file('main', TABLES))
    spoiled['DoC'] = (spoiled.DoC + 0.01).clip(0, 1)
    save_predictions(spoiled, prediction_file('main', tmp_path))
    assert is_reproduced(refit_fold(tmp_path, only=names)).to_dict() == dict(zip(names, (True, False)))


def test_a_forest_may_differ_as_with_another_seed_but_not_in_its_error():
    rows = pd.DataFrame(dict(mean_difference=[0.012, 0.012, 0.012], mae_difference=[0.001, 0.001, 0.004]),
                        index=['trees: everything', RS_SQA, 'trees: dispersion and agreement'])
    assert is_reproduced(rows).tolist() == [True, False, False]


@pytest.mark.slow
def test_the_models_are_fitted_again_on_one_fold():
    fitted = refit_fold(TABLES, workers=2)
    assert RS_SQA in fitted.index and is_reproduced(fitted).all()


def test_without_masks_there_is_no_consensus_model():
    evidence = open_evidence(TABLES, prediction_grids=False)
    found = all_predictors(evidence)
    assert CONSENSUS not in found and RS_SQA in found and not evidence.has_truth
    with pytest.raises(KeyError, match='no predictor'): all_predictors(evidence, only=('nobody',))


def test_missing_tables_and_unknown_experiments_are_refused(tmp_path):
    with pytest.raises(DataNotFound, match='no tables open'): open_evidence(tmp_path)
    with pytest.raises(KeyError, match='main'): predict_experiment('mian', TABLES)
    with pytest.raises(DataNotFound, match='predictions'): measure_experiment('main', tmp_path)


def copy_results(pattern, target):
    for path in RESULTS.glob(pattern): (target/path.name).write_bytes(path.read_bytes())


def test_an_edited_result_is_noticed(tmp_path):
    copy_results('paper_*.csv', tmp_path)
    path = tmp_path/'paper_dataset.csv'
    rows = pd.read_csv(path)
    rows.loc[0, 'mae'] += 0.01
    rows.to_csv(path, index=False)
    assert verify('dataset', TABLES, tmp_path).largest_difference.max() > 0.009


def without_mae(rows): return rows.assign(mae=np.nan)


def with_reversed_names(rows): return rows.assign(predictor=rows.predictor[::-1].to_numpy())


def without_one_correlation(rows):
    filled = rows.srocc_image.fillna(0.5)
    return rows.assign(srocc_image=filled.where(rows.index > 0, np.nan))


SPOILS = [without_mae, with_reversed_names, without_one_correlation]


def test_missing_numbers_and_wrong_names_are_noticed(tmp_path):
    copy_results('paper_dataset*.csv', tmp_path)
    path = tmp_path/'paper_dataset.csv'
    committed = pd.read_csv(path)
    assert (verify('dataset', TABLES, tmp_path).largest_difference <= MEASURE_TOLERANCE).all()
    for spoil in SPOILS:
        spoil(committed.copy()).to_csv(path, index=False)
        assert not (verify('dataset', TABLES, tmp_path).largest_difference <= MEASURE_TOLERANCE).all(), spoil.__name__
    committed.drop(columns='mae').to_csv(path, index=False)
    with pytest.raises(MissingFeatures, match='no column mae'): verify('dataset', TABLES, tmp_path)


@pytest.mark.parametrize('share, scenes', [(0.01, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_few_scenes_learn_from_that_share(share, scenes):
    rows = []
    for dataset, scene, image in np.ndindex(2, 8, 3):
        names = dict(image_id=f'{dataset}{scene}{image}', dataset='ab'[dataset], scene=f's{scene}')
        rows.append(names | dict(method='m', oa=0.5))
    training_rows = []
    model = FewScenes(MeanBaseline(), share)
    model.model.fit = training_rows.append
    model.fit(pd.DataFrame(rows))
    used = training_rows[0]
    assert used.groupby('dataset').scene.nunique().tolist() == [scenes, scenes]
    assert len(used) == 6 * scenes
    assert model.get_params() != FewScenes(MeanBaseline(), 0.77).get_params()


def test_a_comparison_without_masks_overwrites_nothing(tmp_path, capsys):
    from rssqa.cli import main
    with pytest.raises(SystemExit) as stop:
        main(['bench', 'paper', '--only', 'main', '--tables', str(tmp_path)])
    assert stop.value.code == 2 and '--fast' in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(['bench', 'paper', '--fast', '--only', 'method', '--tables', str(tmp_path)])
    assert stop.value.code == 2 and 'nothing to check' in capsys.readouterr().err


def test_a_comparison_without_lightgbm_overwrites_nothing(tmp_path, capsys, monkeypatch):
    from rssqa.cli import main
    monkeypatch.setattr('rssqa.quality.ranking.has_lightgbm', lambda: False)
    monkeypatch.setattr('rssqa.cli._compute', None)
    with pytest.raises(SystemExit) as stop:
        main(['bench', 'paper', '--data', str(tmp_path), '--only', 'main', '--out', str(tmp_path)])
    assert stop.value.code == 2 and 'rssqa[rivals]' in capsys.readouterr().err and not list(tmp_path.iterdir())
