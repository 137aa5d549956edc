"""The consensus model: exact symmetries, no label leak, and files that give the same posterior."""
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone

from hostile import flip_bit
from rssqa.core import DataNotFound, Incompatible, MissingFeatures, read_json, write_json
from rssqa.quality import consensus as consensus_module
from rssqa.quality.baselines import ColumnBaseline, MeanBaseline
from rssqa.quality.consensus import (
    CONSENSUS_COLUMNS,
    ConsensusEnsemble,
    ConsensusModel,
    ConsensusNet,
    LevelPooledEnsemble,
    consensus_table,
    load_consensus,
    point_features,
    mix_differences,
    pool_image_level,
    posterior,
    sample_points,
    save_consensus,
    train_ensemble,
    train_member,
)
from rssqa.segment.metrics import srocc
from rssqa.tables.grid import PredictionGrid, limit_grid, pack_points
from rssqa.tables.store import Store

METHODS = ['a', 'b', 'c']
SMALL = dict(epochs=1, width=8)


def simulate_grids(n, side=10, classes=3, seed=0, dataset='town'):
    "True classes in blocks of 5 x 5 points, methods of known error rates."
    rng = np.random.default_rng(seed)
    shape = (side, side)
    grids = []
    for i in range(n):
        blocks = rng.integers(classes, size=(side // 5, side // 5))
        truth = blocks.repeat(5, 0).repeat(5, 1).astype(np.uint8)
        pred = []
        for rate in rng.uniform(0.05, 0.6, 3):
            pred.append(np.where(rng.random(shape) < rate, rng.integers(classes, size=shape), truth))
        pred = np.stack(pred).astype(np.uint8)
        p = [np.where(pred == c, 200, 55 // (classes - 1)) for c in range(classes)]
        p = np.stack(p, 1).astype(np.uint8)
        grids.append(PredictionGrid(f'{dataset}{seed}-{i}', dataset, list(METHODS), p, p, pred, truth))
    return grids


def select_methods(grid, at, names): # the methods at these positions, under new names
    return PredictionGrid(
        grid.image_id, grid.dataset, names, grid.p[at], grid.flip[at], grid.pred[at], grid.truth
    )


def without_b(grid): return select_methods(grid, [0, 2], ['a', 'c'])


def points_of(grid): # (n,K,2M+9)
    return point_features(grid, METHODS).flatten(2).permute(2, 1, 0)


def put_grids(folder, grids, scenes=6):
    "Put prediction grids into a store; return their SQED table."
    rows = []
    points = []
    for n, grid in enumerate(grids):
        keys = dict(image_id=grid.image_id, dataset=grid.dataset, scene=f's{n % scenes}', split='train')
        for i, method in enumerate(grid.methods):
            network = f'{method}@{grid.dataset}'
            packed = pack_points(np.stack([grid.p[i], grid.flip[i]]))
            points.append(packed | dict(pred=grid.pred[i].tobytes(), key=f'{grid.image_id}|{network}'))
            oa = float((grid.pred[i] == grid.truth).mean())
            columns = dict(conf=0.7 + 0.01 * (n % 3), edge=float(n % 2))
            rows.append(keys | dict(method=method, method_fp=network, fold=0, n_valid=100, oa=oa) | columns)
    store = Store(folder)
    store.put('grid', pd.DataFrame(points))
    store.put('truth', pd.DataFrame([pack_points(grid.truth) | dict(key=grid.image_id) for grid in grids]))
    return pd.DataFrame(rows)


def train_net(grids, **options):
    return train_member(sample_points(grids, METHODS, 60), 3, **dict(epochs=4, width=8) | options)


def ensemble_of(net): return ConsensusEnsemble(METHODS, {'': [net]})


def weights(net): return torch.cat([v.flatten() for v in net.state_dict().values()])


@pytest.fixture(scope='module')
def trained(): return ensemble_of(train_net(simulate_grids(40), epochs=20))


@pytest.fixture(scope='module')
def two_datasets(): # samples of two class tables
    return sample_points(
        [*simulate_grids(6), *simulate_grids(6, classes=2, dataset='field')], METHODS, 30
    )


# ---------------------------------------------------------------- the network

def test_an_absent_method_is_the_mean_of_the_others():
    grid = simulate_grids(1)[0]
    x = point_features(without_b(grid), METHODS)
    assert x.shape == (15, 3, 10, 10)
    assert torch.allclose(x[1], (x[0] + x[2]) / 2) and torch.allclose(x[4], (x[3] + x[5]) / 2)
    assert torch.allclose(x[0], point_features(grid, METHODS)[0])
    assert torch.allclose(x[6], torch.as_tensor(grid.p[[0, 2]]).float().mean(0) / 255)


def test_an_image_without_a_known_method_is_refused():
    with pytest.raises(MissingFeatures, match='expected some of zebra'):
        point_features(simulate_grids(1)[0], ['zebra'])


def test_the_order_of_methods_does_not_matter():
    grid = simulate_grids(1)[0]
    reordered = select_methods(grid, [2, 0, 1], ['c', 'a', 'b'])
    assert torch.allclose(point_features(grid, METHODS), point_features(reordered, METHODS), atol=1e-6)


def test_the_order_of_classes_does_not_matter(trained):
    grid = simulate_grids(1, seed=3, dataset='new')[0]
    order = [2, 0, 1]
    pred = np.argsort(order)[grid.pred].astype(np.uint8)
    reordered = PredictionGrid(
        grid.image_id, 'new', METHODS, grid.p[:, order], grid.flip[:, order], pred, grid.truth
    )
    assert torch.allclose(posterior(trained, reordered), posterior(trained, grid)[order], atol=1e-5)


@pytest.mark.parametrize('classes', [1, 2, 3, 7])
@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (10, 10)])
def test_any_class_table_and_any_size(trained, classes, shape):
    rng = np.random.default_rng(0)
    pred = rng.integers(classes, size=(3, *shape)).astype(np.uint8)
    p = rng.integers(256, size=(3, classes, *shape)).astype(np.uint8)
    grid = PredictionGrid('x', 'elsewhere', METHODS, p, p, pred, np.full(shape, 255, np.uint8))
    q = posterior(trained, grid)
    table = consensus_table(trained, [grid])
    assert q.shape == (classes, *shape) and torch.allclose(q.sum(0), torch.ones(shape), atol=1e-5)
    assert list(table.method) == METHODS
    assert table[list(CONSENSUS_COLUMNS)].notna().all(axis=None)
    assert table.consensus_oa.between(0, 1 + 1e-6).all()


def test_an_untrained_network_gives_the_mean():
    x = points_of(simulate_grids(1)[0])
    assert torch.equal(ConsensusNet(3, {})(x, 'any').argmax(1), x[..., 6].argmax(1))


# ---------------------------------------------------------------- training

def test_same_seed_same_network():
    first, second, third = (train_net(simulate_grids(6), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(weights(first), weights(second))
    pairs = zip(first.state_dict().values(), third.state_dict().values())
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_points_are_labelled_ones():
    grids = simulate_grids(4)
    for grid in grids: grid.truth[:5] = 255
    x, y = sample_points(grids, METHODS, 1000)['town']
    assert len(y) == 4 * 50 and x.shape == (200, 3, 15) and y.max() < 3
    grids[0].truth[:] = 255
    assert len(sample_points(grids, METHODS, 7)['town'][1]) == 21


def test_two_class_tables_and_missing_methods_in_one_training():
    incomplete = [without_b(grid) for grid in simulate_grids(5, seed=1)]
    net = train_net([*simulate_grids(5), *simulate_grids(5, classes=2, dataset='field'), *incomplete])
    assert set(net.class_bias) == {'town', 'field'} and len(net.class_bias['field']) == 2
    grids = [*incomplete, *simulate_grids(2, classes=5, dataset='sea')]
    assert len(consensus_table(ensemble_of(net), grids)) == 2 * 5 + 3 * 2


def test_a_method_outside_training_is_measured_by_the_others(trained):
    grid = simulate_grids(1, seed=5)[0]
    more = select_methods(grid, [0, 1, 2, 0], [*METHODS, 'zzz'])
    expected = consensus_table(trained, [more]).set_index('method').consensus_oa
    assert expected['zzz'] == pytest.approx(expected['a'])
    assert consensus_table(trained, [grid]).consensus_oa[0] == pytest.approx(expected['a'])


def test_expected_accuracy_follows_true_accuracy(trained):
    grids = simulate_grids(20, seed=9)
    oa = np.concatenate([(grid.pred == grid.truth).mean((1, 2)) for grid in grids])
    assert srocc(oa, consensus_table(trained, grids).consensus_oa) > 0.8


def test_columns_of_the_consensus_by_hand(trained):
    grid = simulate_grids(1, seed=11)[0]
    q = posterior(trained, grid).numpy()
    probability = np.take_along_axis(q, grid.pred, 0)
    table = consensus_table(trained, [grid])
    assert np.allclose(table.consensus_oa, probability.mean((1, 2)), atol=1e-6)
    assert np.allclose(table.consensus_agreement, (grid.pred == q.argmax(0)).mean((1, 2)), atol=1e-6)
    assert np.allclose(table.consensus_low, (probability < 0.3).mean((1, 2)), atol=1e-6)
    assert np.allclose(table.consensus_confidence, q.max(0).mean(), atol=1e-6)
    entropy = -(q * np.log(q + 1e-6)).sum(0).mean() / np.log(3)
    assert np.allclose(table.consensus_entropy, entropy, atol=1e-5)


def test_without_class_bias_no_class_table_is_known():
    grids = [*simulate_grids(5), *simulate_grids(5, classes=2, dataset='field')]
    net = train_net(grids, class_bias=False)
    x = points_of(simulate_grids(1)[0])
    assert not net.class_bias and torch.equal(net(x, 'town'), net(x, 'anything'))


def test_method_dropout_replaces_a_method_by_the_mean_of_all_and_only_in_training():
    torch.manual_seed(0)
    net = ConsensusNet(3, {}, method_dropout=0.5)
    x = points_of(simulate_grids(1)[0])
    result = net._drop_methods(x)
    before = x[..., :6].unflatten(-1, (2, 3))                              # (n,K,2,M)
    after = result[..., :6].unflatten(-1, (2, 3))
    mean = before.mean(-1, keepdim=True).expand_as(before)
    dropped = (after != before).any(1).any(1)                              # (n,M)
    # at all classes of the point, in both features of the method
    at = dropped[:, None, None].expand_as(before)
    assert torch.equal(after[at], mean[at]) and torch.equal(result[..., 6:], x[..., 6:])
    assert 0.2 < dropped.float().mean() < 0.6
    assert torch.equal(net.eval()(x, 'town'), ConsensusNet(3, {}).eval()(x, 'town'))


# ---------------------------------------------------------------- the ensemble

def test_members_of_a_dataset_and_of_an_unknown_one(two_datasets):
    ensemble = train_ensemble(two_datasets, METHODS, **SMALL)
    town = ensemble.members_of('town')
    field = ensemble.members_of('field')
    counts = {dataset: len(nets) for dataset, nets in ensemble.members.items()}
    assert counts == {'': 2, 'town': 4, 'field': 4}
    assert ensemble.members_of('sea') == ensemble.members_of('')
    assert town[:2] == field[:2] and not set(town[2:]) & set(field[2:])
    grid = simulate_grids(1)[0]
    mean = sum(posterior(ensemble_of(net), grid) for net in town) / 4
    assert torch.allclose(posterior(ensemble, grid), mean, atol=1e-6)


def test_one_dataset_needs_no_members_per_dataset(two_datasets):
    ensemble = train_ensemble({'town': two_datasets['town']}, METHODS, **SMALL)
    assert set(ensemble.members) == {''}


@pytest.mark.parametrize('options, counts', [
    (dict(per_dataset=False), {'': 2}),
    (dict(with_class_bias=(True,)), {'': 1, 'town': 2, 'field': 2}),
])
def test_kinds_of_members_may_be_left_out(options, counts, two_datasets):
    ensemble = train_ensemble(two_datasets, METHODS, epochs=1, width=4, **options)
    assert {dataset: len(nets) for dataset, nets in ensemble.members.items()} == counts


def test_an_ensemble_may_have_no_class_bias(two_datasets):
    options = dict(with_class_bias=(False,), per_dataset=False)
    ensemble = train_ensemble(two_datasets, METHODS, epochs=1, width=4, **options)
    assert not ensemble.members_of('town')[0].class_bias


# ---------------------------------------------------------------- files

def test_a_saved_ensemble_gives_the_same_posterior(tmp_path):
    grids = [*simulate_grids(4), *simulate_grids(4, classes=2, dataset='field')]
    ensemble = train_ensemble(sample_points(grids, METHODS, 30), METHODS, **SMALL)
    loaded = load_consensus(save_consensus(ensemble, tmp_path/'consensus'))
    for grid in [*grids, *simulate_grids(1, classes=4, dataset='sea')]:
        assert torch.equal(posterior(ensemble, grid), posterior(loaded, grid))
    # members that datasets share are written once
    assert loaded.members_of('town')[0] is loaded.members_of('field')[0]
    with pytest.raises(DataNotFound, match='no consensus.json'): load_consensus(tmp_path)


@pytest.mark.parametrize('at', [3, 200, -1])
def test_one_flipped_bit_of_the_weights_is_refused(at, tmp_path):
    grids = simulate_grids(3)
    folder = save_consensus(train_ensemble(sample_points(grids, METHODS, 20), METHODS, **SMALL), tmp_path)
    assert load_consensus(folder)
    flip_bit(folder/'consensus.safetensors', at)
    with pytest.raises(Incompatible, match='not the ones that were saved') as caught: load_consensus(folder)
    assert 'digest' in caught.value.found and caught.value.todo
    config = read_json(folder/'consensus.json')
    write_json(folder/'consensus.json', config | dict(width=7, digests=None))
    with pytest.raises(Incompatible): load_consensus(folder)
    write_json(folder/'consensus.json', {})
    with pytest.raises(Incompatible): load_consensus(folder)


@pytest.mark.parametrize('name', ['potsdam.v2', 'training', 'keys', 'forward', 'a b'])
def test_any_name_of_a_dataset_will_do(name, tmp_path):
    grids = [*simulate_grids(3, dataset=name), *simulate_grids(3, classes=2)]
    ensemble = train_ensemble(sample_points(grids, METHODS, 20), METHODS, **SMALL)
    loaded = load_consensus(save_consensus(ensemble, tmp_path/'consensus'))
    assert len(ensemble.members_of(name)) == 4
    for grid in grids: assert torch.equal(posterior(ensemble, grid), posterior(loaded, grid))


# ---------------------------------------------------------------- the estimator

def test_without_true_classes_nothing_is_learned(tmp_path):
    grids = simulate_grids(6)
    for grid in grids: grid.truth[:] = 255
    table = put_grids(tmp_path, grids).assign(oa=0.5)
    with pytest.raises(MissingFeatures, match='(?i)found none for 6 images'):
        ConsensusModel(str(tmp_path), epochs=1).fit(table)


def test_without_a_store_fit_is_refused():
    with pytest.raises(MissingFeatures, match='prediction grids'):
        ConsensusModel().fit(pd.DataFrame(dict(image_id=['x'])))


def test_model_is_an_estimator_and_never_reads_the_labels_of_new_rows(tmp_path):
    table = put_grids(tmp_path, simulate_grids(18))
    new = table[36:]
    model = clone(ConsensusModel(str(tmp_path), epochs=2, width=8)).fit(table[:36])
    predicted = model.predict(new.drop(columns=['oa', 'n_valid']))
    assert np.array_equal(predicted, model.predict(new.assign(oa=0.0)))
    assert np.isfinite(predicted).all() and predicted.min() >= 0 and predicted.max() <= 1
    assert np.array_equal(model.predict(new[::-1]), predicted[::-1])


def test_true_classes_of_test_images_do_not_matter(tmp_path):
    grids = simulate_grids(18)
    labelled = put_grids(tmp_path/'labelled', grids)
    for grid in grids[12:]: grid.truth[:] = 255
    unlabelled = put_grids(tmp_path/'unlabelled', grids).assign(oa=labelled.oa)
    predicted = []
    for name, table in dict(labelled=labelled, unlabelled=unlabelled).items():
        model = ConsensusModel(str(tmp_path/name), **SMALL).fit(table[:36])
        predicted.append(model.predict(table[36:]))
    assert np.array_equal(*predicted)


def test_seed_of_the_model_reaches_training(tmp_path, monkeypatch):
    "The same sample of points and two seeds give different networks; equal seeds give equal ones."
    def sample_with_seed_0(grids, methods, points, seed): return sample_points(grids, methods, points, 0)
    monkeypatch.setattr(consensus_module, 'sample_points', sample_with_seed_0)
    table = put_grids(tmp_path, simulate_grids(6))
    predicted = []
    for seed in (0, 0, 1):
        model = ConsensusModel(str(tmp_path), seed=seed, epochs=2, width=8).fit(table)
        predicted.append(model.predict(table))
    assert np.array_equal(predicted[0], predicted[1])
    assert not np.allclose(predicted[0], predicted[2], atol=1e-6)


def test_seed_of_the_model_reaches_the_sample_of_points(tmp_path, monkeypatch):
    seeds = []
    def record_seed(grids, methods, points, seed):
        seeds.append(seed)
        return sample_points(grids, methods, points, seed)
    monkeypatch.setattr(consensus_module, 'sample_points', record_seed)
    table = put_grids(tmp_path, simulate_grids(2))
    ConsensusModel(str(tmp_path), seed=7, **SMALL).fit(table)
    assert seeds == [7]


def test_new_grids_need_no_store(tmp_path):
    grids = simulate_grids(12)
    table = put_grids(tmp_path, grids)
    model = ConsensusModel(str(tmp_path), **SMALL).fit(table[:24])
    assert np.array_equal(model.predict(table[24:], grids[8:]), model.predict(table[24:]))


@pytest.mark.parametrize('side, expected', [(10, 10), (40, 40), (41, 20), (64, 32), (72, 36), (128, 32)])
def test_grids_are_limited_to_40_points_a_side(side, expected):
    p = np.zeros((3, 2, side, side), np.uint8)
    grid = PredictionGrid('x', 'd', METHODS, p, p, p[:, 0], p[0, 0])
    limited = limit_grid(grid)
    assert limited.truth.shape == (expected, expected) and limited.p.shape == (3, 2, expected, expected)
    assert (limited is grid) == (side <= 40)


# ---------------------------------------------------------------- the level-pooled ensemble

@pytest.mark.parametrize('n_others', [0, 1, 3])
def test_levels_are_pooled_and_differences_stay(n_others):
    rng = np.random.default_rng(n_others)
    consensus = rng.uniform(0.4, 0.6, 24)
    others = list(rng.uniform(0.4, 0.6, (n_others, 24)))
    image = np.arange(24) % 5
    pooled = pool_image_level(consensus, others, image)
    def image_means(values): return pd.Series(values).groupby(image).transform('mean')
    def log_odds(p): return np.log(p / (1 - p))
    levels = [log_odds(image_means(values)) for values in (consensus, *others)]
    assert np.allclose(log_odds(image_means(pooled)), np.mean(levels, 0))
    assert np.allclose(pooled - image_means(pooled), consensus - image_means(consensus))


def test_differences_are_averaged_and_the_level_stays():
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0.2, 0.8, (2, 24))
    image = rng.permutation(np.arange(24) % 5)
    mixed = mix_differences(first, second, image)
    def image_means(values): return pd.Series(values).groupby(image).transform('mean').to_numpy()
    assert np.allclose(image_means(mixed), image_means(first))
    differences = [values - image_means(values) for values in (first, second, mixed)]
    assert np.allclose(differences[2], (differences[0] + differences[1]) / 2)
    assert np.allclose(mix_differences(first, first, image), first)


def test_agreement_has_a_say_on_new_datasets_alone(tmp_path):
    table = put_grids(tmp_path, simulate_grids(18))
    train, new = table[:36], table[36:].drop(columns='oa')
    consensus = ConsensusModel(str(tmp_path), **SMALL)
    alone = clone(LevelPooledEnsemble(consensus)).fit(train)
    mixed = clone(LevelPooledEnsemble(consensus, agreement=ColumnBaseline('conf'))).fit(train)
    assert np.array_equal(mixed.predict(new), alone.predict(new))
    elsewhere = new.assign(dataset='elsewhere')
    says = ColumnBaseline('conf').fit(train).predict(elsewhere)
    expected = mix_differences(mixed.consensus_.predict(elsewhere), says, elsewhere.image_id)
    assert np.allclose(mixed.predict(elsewhere), expected.clip(0, 1))
    assert not np.allclose(mixed.predict(elsewhere), alone.predict(elsewhere))


def test_a_level_pooled_ensemble_is_its_consensus_pooled_with_its_members(tmp_path):
    table = put_grids(tmp_path, simulate_grids(18))
    train = table[:36]
    new = table[36:].drop(columns='oa')
    consensus = ConsensusModel(str(tmp_path), **SMALL)
    members = (MeanBaseline(), ColumnBaseline('conf'))
    ensemble = clone(LevelPooledEnsemble(consensus, members)).fit(train)
    others = [member.fit(train).predict(new) for member in members]
    expected = pool_image_level(clone(consensus).fit(train).predict(new), others, new.image_id)
    assert np.allclose(ensemble.predict(new), expected)
