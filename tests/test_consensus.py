"""A consensus that hears witnesses: exact symmetries, no leak, and consensus_table that survive the store."""
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone

from rssqa.core import DataNotFound, MissingFeatures
from rssqa.quality.consensus import (
    CONSENSUS_COLUMNS,
    ConsensusEnsemble,
    ConsensusModel,
    ConsensusNet,
    LevelPooledEnsemble,
    point_features,
    train_ensemble,
    pool_image_level,
    load_consensus,
    posterior,
    sample_points,
    save_consensus,
    train_member,
    consensus_table,
)
from rssqa.segment.metrics import srocc
from rssqa.tables.sqed import PredictionGrid, limit_grid, pack_points
from rssqa.tables.store import Store

NAMES = ['a', 'b', 'c']


def prediction_grids(n, side=10, classes=3, seed=0, dataset='town'):
    "Truth in blocks, witnesses of known reliability."
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        truth = rng.integers(classes, size=(side // 5, side // 5)).repeat(5, 0).repeat(5, 1).astype(np.uint8)
        pred = np.stack(
            [
                np.where(rng.random((side, side)) < e, rng.integers(classes, size=(side, side)), truth)
                for e in rng.uniform(0.05, 0.6, 3)
            ]
        ).astype(np.uint8)
        p = np.stack([np.where(pred == c, 200, 55 // (classes - 1)) for c in range(classes)], 1).astype(
            np.uint8
        )
        out.append(PredictionGrid(f'{dataset}{seed}-{i}', dataset, list(NAMES), p, p, pred, truth))
    return out


def stored(folder, seen, scenes=6):
    "Put prediction_grids into a store; return their table."
    store = Store(folder)
    store.put(
        'grid',
        pd.DataFrame(
            [
                pack_points(np.stack([s.p[i], s.flip[i]]))
                | dict(pred=s.pred[i].tobytes(), key=f'{s.image_id}|{m}@{s.dataset}')
                for s in seen
                for i, m in enumerate(s.methods)
            ]
        ),
    )
    store.put('truth', pd.DataFrame([pack_points(s.truth) | dict(key=s.image_id) for s in seen]))
    return pd.DataFrame(
        [
            dict(
                image_id=s.image_id,
                dataset=s.dataset,
                scene=f's{n % scenes}',
                split='train',
                method=m,
                method_fp=f'{m}@{s.dataset}',
                fold=0,
                n_valid=100,
                oa=float((s.pred[i] == s.truth).mean()),
                conf=0.7 + 0.01 * (n % 3),
                edge=float(n % 2),
            )
            for n, s in enumerate(seen)
            for i, m in enumerate(s.methods)
        ]
    )


def learn(seen, **kw): return train_member(sample_points(seen, NAMES, 60), 3, **dict(epochs=4, width=8) | kw)


def alone(net): return ConsensusEnsemble(NAMES, {'': [net]})


@pytest.fixture(scope='module')
def trained(): return alone(learn(prediction_grids(40), epochs=20))


# ---------------------------------------------------------------- the network

def test_an_absent_method_is_the_mean_of_the_others():
    s = prediction_grids(1)[0]
    less = PredictionGrid(
        s.image_id, s.dataset, ['a', 'c'], s.p[[0, 2]], s.flip[[0, 2]], s.pred[[0, 2]], s.truth
    )
    x = point_features(less, NAMES)
    assert (
        x.shape == (15, 3, 10, 10)
        and torch.allclose(x[1], (x[0] + x[2]) / 2)
        and torch.allclose(x[4], (x[3] + x[5]) / 2)
    )
    assert torch.allclose(x[0], point_features(s, NAMES)[0]) and torch.allclose(
        x[6], torch.as_tensor(s.p[[0, 2]]).float().mean(0) / 255
    )


def test_no_known_witness():
    with pytest.raises(MissingFeatures, match='expected some of zebra'):
        point_features(prediction_grids(1)[0], ['zebra'])


def test_the_order_of_methods_does_not_matter():
    s = prediction_grids(1)[0]
    turned = PredictionGrid(
        s.image_id, s.dataset, ['c', 'a', 'b'], s.p[[2, 0, 1]], s.flip[[2, 0, 1]], s.pred[[2, 0, 1]], s.truth
    )
    assert torch.allclose(point_features(s, NAMES), point_features(turned, NAMES), atol=1e-6)


def test_classes_may_be_renamed(trained):
    s = prediction_grids(1, seed=3)[0]
    order = [2, 0, 1]
    back = np.argsort(order)
    new = PredictionGrid(s.image_id, 'new', s.methods, s.p, s.flip, s.pred, s.truth)
    renamed = PredictionGrid(
        s.image_id, 'new', s.methods, s.p[:, order], s.flip[:, order], back[s.pred].astype(np.uint8), s.truth
    )
    assert torch.allclose(posterior(trained, renamed), posterior(trained, new)[order], atol=1e-5)


@pytest.mark.parametrize('classes', [1, 2, 3, 7])
@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (10, 10)])
def test_any_class_table_and_any_size(trained, classes, shape):
    rng = np.random.default_rng(0)
    pred = rng.integers(classes, size=(3, *shape)).astype(np.uint8)
    p = rng.integers(256, size=(3, classes, *shape)).astype(np.uint8)
    s = PredictionGrid('x', 'elsewhere', NAMES, p, p, pred, np.full(shape, 255, np.uint8))
    q = posterior(trained, s)
    told = consensus_table(trained, [s])
    assert q.shape == (classes, *shape) and torch.allclose(q.sum(0), torch.ones(shape), atol=1e-5)
    assert (
        list(told.method) == NAMES
        and told[list(CONSENSUS_COLUMNS)].notna().all(axis=None)
        and told.consensus_oa.between(0, 1 + 1e-6).all()
    )


def test_untrained_jury_is_the_mean():
    s = prediction_grids(1)[0]
    x = point_features(s, NAMES).flatten(2).permute(2, 1, 0)
    assert torch.equal(ConsensusNet(3, {})(x, 'any').argmax(1), x[..., 6].argmax(1))


# ---------------------------------------------------------------- learning

def test_same_seed_same_jury():
    one, two, three = (learn(prediction_grids(6), seed=s) for s in (0, 0, 1))
    pairs = [
        [torch.equal(a, b) for a, b in zip(one.state_dict().values(), net.state_dict().values())]
        for net in (two, three)
    ]
    assert all(pairs[0]) and not all(pairs[1])


def test_points_are_labelled_ones():
    seen = prediction_grids(4)
    for s in seen: s.truth[:5] = 255
    x, y = sample_points(seen, NAMES, 1000)['town']
    assert len(y) == 4 * 50 and x.shape == (200, 3, 15) and y.max() < 3
    seen[0].truth[:] = 255
    assert len(sample_points(seen, NAMES, 7)['town'][1]) == 21


def test_two_class_tables_and_missing_methods_in_one_training():
    some = [
        PredictionGrid(
            s.image_id, s.dataset, ['a', 'c'], s.p[[0, 2]], s.flip[[0, 2]], s.pred[[0, 2]], s.truth
        )
        for s in prediction_grids(5, seed=1)
    ]
    net = learn([*prediction_grids(5), *prediction_grids(5, classes=2, dataset='field'), *some])
    assert set(net.class_bias) == {'town', 'field'} and len(net.class_bias['field']) == 2
    assert (
        len(consensus_table(alone(net), [*some, *prediction_grids(2, classes=5, dataset='sea')]))
        == 2 * 5 + 3 * 2
    )


def test_a_method_without_a_place_is_judged_by_the_others(trained):
    s = prediction_grids(1, seed=5)[0]
    more = PredictionGrid(
        s.image_id,
        s.dataset,
        [*NAMES, 'zzz'],
        np.concatenate([s.p, s.p[:1]]),
        np.concatenate([s.flip, s.flip[:1]]),
        np.concatenate([s.pred, s.pred[:1]]),
        s.truth,
    )
    told = consensus_table(trained, [more]).set_index('method')
    assert told.consensus_oa['zzz'] == pytest.approx(told.consensus_oa['a']) and consensus_table(
        trained, [s]
    ).consensus_oa[0] == pytest.approx(told.consensus_oa['a'])


def test_verdicts_follow_the_truth(trained):
    fresh = prediction_grids(20, seed=9)
    told = consensus_table(trained, fresh)
    assert srocc([(y == s.truth).mean() for s in fresh for y in s.pred], told.consensus_oa) > 0.8


def test_without_habits_no_class_table_is_known():
    net = learn([*prediction_grids(5), *prediction_grids(5, classes=2, dataset='field')], class_bias=False)
    x = point_features(prediction_grids(1)[0], NAMES).flatten(2).permute(2, 1, 0)
    assert not net.class_bias and torch.equal(net(x, 'town'), net(x, 'anything'))


def test_silence_replaces_a_witness_by_the_mean_of_all_and_only_while_learning():
    torch.manual_seed(0)
    net = ConsensusNet(3, {}, method_dropout=0.5)
    x = point_features(prediction_grids(1)[0], NAMES).flatten(2).permute(2, 1, 0)
    quiet = net._silenced(x)
    own = x[..., :6].unflatten(-1, (2, 3))
    told = quiet[..., :6].unflatten(-1, (2, 3))
    mean = own.mean(-1, keepdim=True).expand_as(own)
    # (n,3): at all classes, in both class_bias_of of clue
    silent = (told != own).any(1).any(1)
    at = silent[:, None, None].expand_as(own)
    assert (
        torch.equal(told[at], mean[at])
        and torch.equal(quiet[..., 6:], x[..., 6:])
        and 0.2 < silent.float().mean() < 0.6
    )
    assert torch.equal(net.eval()(x, 'town'), ConsensusNet(3, {}).eval()(x, 'town'))


# ---------------------------------------------------------------- members

def test_jurors_of_a_dataset_and_of_none():
    both = sample_points([*prediction_grids(6), *prediction_grids(6, classes=2, dataset='field')], NAMES, 30)
    consensus = train_ensemble(both, NAMES, epochs=1, width=8)
    assert {d: len(n) for d, n in consensus.members.items()} == {
        '': 2,
        'town': 4,
        'field': 4,
    } and consensus.of('sea') == consensus.of('')
    assert consensus.of('town')[:2] == consensus.of('field')[:2] and not set(consensus.of('town')[2:]) & set(
        consensus.of('field')[2:]
    )
    # two would be the same
    assert set(train_ensemble({'town': both['town']}, NAMES, epochs=1, width=8).members) == {''}
    s = prediction_grids(1)[0]
    assert torch.allclose(
        posterior(consensus, s), sum(posterior(alone(n), s) for n in consensus.of('town')) / 4, atol=1e-6
    )


def test_a_jury_survives_its_folder(tmp_path):
    seen = [*prediction_grids(4), *prediction_grids(4, classes=2, dataset='field')]
    consensus = train_ensemble(sample_points(seen, NAMES, 30), NAMES, epochs=1, width=8)
    again = load_consensus(save_consensus(consensus, tmp_path/'consensus'))
    assert all(
        torch.equal(posterior(consensus, s), posterior(again, s))
        for s in [*seen, *prediction_grids(1, classes=4, dataset='sea')]
    )
    # shared members stay shared
    assert again.of('town')[0] is again.of('field')[0]
    with pytest.raises(DataNotFound, match='no consensus.json'): load_consensus(tmp_path)


@pytest.mark.parametrize('name', ['potsdam.v2', 'training', 'keys', 'forward', 'a b'])
def test_any_name_of_a_dataset_will_do(name, tmp_path):
    seen = [*prediction_grids(3, dataset=name), *prediction_grids(3, classes=2)]
    consensus = train_ensemble(sample_points(seen, NAMES, 20), NAMES, epochs=1, width=8)
    again = load_consensus(save_consensus(consensus, tmp_path/'consensus'))
    assert len(consensus.of(name)) == 4 and all(
        torch.equal(posterior(consensus, s), posterior(again, s)) for s in seen
    )


# ---------------------------------------------------------------- the model and the panel

def test_without_truth_nothing_is_learned(tmp_path):
    seen = prediction_grids(6)
    for s in seen: s.truth[:] = 255
    with pytest.raises(MissingFeatures, match='(?i)found none for 6 images'):
        ConsensusModel(str(tmp_path), epochs=1).fit(stored(tmp_path, seen).assign(oa=0.5))


def test_model_is_an_estimator_and_never_reads_the_labels_of_new_rows(tmp_path):
    table = stored(tmp_path, prediction_grids(18))
    model = clone(ConsensusModel(str(tmp_path), epochs=2, width=8)).fit(table[:36])
    guess = model.predict(table[36:].drop(columns=['oa', 'n_valid']))
    assert (
        np.array_equal(guess, model.predict(table[36:].assign(oa=0.0)))
        and np.isfinite(guess).all()
        and guess.min() >= 0
        and guess.max() <= 1
    )
    assert np.array_equal(model.predict(table[36:][::-1]), guess[::-1])


def test_truth_of_test_images_does_not_matter(tmp_path):
    seen = prediction_grids(18)
    a = stored(tmp_path/'a', seen)
    for s in seen[12:]: s.truth[:] = 255
    b = stored(tmp_path/'b', seen).assign(oa=a.oa)
    one, two = (
        ConsensusModel(str(tmp_path / x), epochs=1, width=8).fit(t[:36]).predict(t[36:])
        for x, t in (('a', a), ('b', b))
    )
    assert np.array_equal(one, two)


def test_fresh_lattices_need_no_store(tmp_path):
    seen = prediction_grids(12)
    table = stored(tmp_path, seen)
    model = ConsensusModel(str(tmp_path), epochs=1, width=8).fit(table[:24])
    assert np.array_equal(model.predict(table[24:], seen[8:]), model.predict(table[24:]))


@pytest.mark.parametrize('others', [0, 1, 3])
def test_levels_are_shared_and_differences_stay(others):
    rng = np.random.default_rng(others)
    consensus = rng.uniform(0.4, 0.6, 24)
    rest = list(rng.uniform(0.4, 0.6, (others, 24)))
    image = np.arange(24) % 5
    told = pd.DataFrame(
        dict(image=image, told=pool_image_level(consensus, rest, image), consensus=consensus)
        | {f'other {i}': v for i, v in enumerate(rest)}
    )
    mean = told.groupby('image').transform('mean')
    odds = np.log(mean / (1 - mean))
    assert np.allclose(odds.told, odds.drop(columns='told').mean(axis=1)) and np.allclose(
        told.told - mean.told, told.consensus - mean.consensus
    )


def test_a_panel_is_its_jury_levelled_by_its_members(tmp_path):
    from rssqa.quality.baselines import ColumnBaseline, MeanBaseline
    table = stored(tmp_path, prediction_grids(18))
    consensus = ConsensusModel(str(tmp_path), epochs=1, width=8)
    members = (MeanBaseline(), ColumnBaseline('conf'))
    new = table[36:].drop(columns='oa')
    panel = clone(LevelPooledEnsemble(consensus, members)).fit(table[:36])
    assert np.allclose(
        panel.predict(new),
        pool_image_level(
            clone(consensus).fit(table[:36]).predict(new),
            [m.fit(table[:36]).predict(new) for m in members],
            new.image_id,
        ),
    )


def test_without_a_store_it_says_so():
    with pytest.raises(MissingFeatures, match='prediction_grids'):
        ConsensusModel().fit(pd.DataFrame(dict(image_id=['x'])))


def test_coarse_keeps_small_lattices_and_bounds_large_ones():
    for side, want in ((10, 10), (40, 40), (41, 20), (64, 32), (72, 36), (128, 32)):
        s = prediction_grids(1, side=10)[0]
        big = PredictionGrid(
            'x',
            'd',
            NAMES,
            *(np.zeros((3, *k, side, side), np.uint8) for k in ((2,), (2,), ())),
            np.zeros((side, side), np.uint8),
        )
        assert (
            limit_grid(big).truth.shape == (want, want)
            and limit_grid(big).p.shape == (3, 2, want, want)
            and limit_grid(s) is s
        )


def test_seats_may_stay_empty():
    both = sample_points([*prediction_grids(4), *prediction_grids(4, classes=2, dataset='field')], NAMES, 20)
    count = lambda **kw: {
        d: len(n) for d, n in train_ensemble(both, NAMES, epochs=1, width=4, **kw).members.items()
    }
    assert count(own=False) == {'': 2} and count(class_bias_of=(True,)) == {'': 1, 'town': 2, 'field': 2}
    assert (
        not train_ensemble(both, NAMES, epochs=1, width=4, class_bias_of=(False,), own=False)
        .of('town')[0]
        .class_bias
    )
