"""Projections repeat, carry points that they never saw, and separation cannot be bought with dataset identity or scene overlap."""
import os
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from rssqa.viz import projection
from rssqa.core import Incompatible, SchemaError, UnknownName
from rssqa.viz.projection import (
    Projection,
    branch_maps,
    centred,
    neighbour_graph,
    preservation,
    project,
    quality_probe,
    sample_rows,
    separation,
    separation_text,
    stages,
)
from rssqa.viz.figures import plot_embedding


# projection

@pytest.mark.parametrize('method', ['pca', 'tsne'])
def test_projection_repeats(method):
    x = np.random.default_rng(0).normal(size=(60, 8))
    one = project(x, method)
    two = project(x.copy(), method)
    assert np.array_equal(one, two) and one.attrs == two.attrs and one.attrs['n'] == 60
    if method == 'tsne': assert not np.array_equal(one, project(x, method, perplexity=5))


UMAP = """
import numpy as np
from rssqa.viz.projection import Projection, neighbour_graph, preservation, project, stages
part = np.arange(45) % 3
x = np.random.default_rng(0).normal(size=(45, 8)) + 12 * np.eye(8)[part]
one, two = project(x, n_epochs=30), project(x.copy(), n_epochs=30)
assert np.array_equal(one, two) and one.attrs['method'] == 'umap' and one.attrs['n_epochs'] == 30
centre = one.groupby(part).mean().to_numpy()
assert (((one.to_numpy()[:, None] - centre)**2).sum(-1).argmin(1) == part).all()
few = project(x[:6])
assert few.attrs['n_neighbors'] == 5 and np.isfinite(few).all(axis=None)
assert not np.array_equal(few, project(x[:6], seed=1))
graph = neighbour_graph(x, 12)
assert np.array_equal(one, project(x, n_epochs=30, graph=graph)) and not np.array_equal(one, project(x, n_epochs=30, graph=graph, min_dist=.5))
fitted = Projection(n_epochs=30, max_points=36, rest='place').fit(x)
assert np.array_equal(fitted.transform(x[fitted.rows_]), fitted.uv_) and len(fitted.frame) == 45 and fitted.frame.attrs['placed'] == 9
near = fitted.transform(x[fitted.rows_] + np.random.default_rng(1).normal(0, .05, (36, 8)))
assert np.median(np.linalg.norm(near - fitted.uv_, axis=1)) < .1 * np.ptp(fitted.uv_)
centre = fitted.frame.groupby(part).mean().to_numpy()
assert (((fitted.frame.to_numpy()[:, None] - centre)**2).sum(-1).argmin(1) == part).all()
assert np.array_equal(fitted.transform(x[[3]])[0], fitted.transform(x)[3])
first, second = stages(x, n_epochs=30)
assert first.attrs['method'] == 'pca' and np.array_equal(second, one) and first.index.equals(second.index)
print('fine')
"""


@pytest.mark.parametrize('jit', ['off', pytest.param('on', marks=pytest.mark.slow)])   # compiling takes longer than everything else in this file
def test_umap_repeats_and_keeps_clusters(jit):
    run = subprocess.run(
        [sys.executable, '-c', UMAP],
        env=os.environ | {'NUMBA_DISABLE_JIT': str(int(jit == 'off'))},
        capture_output=True,
        text=True,
    )
    assert run.stdout == 'fine\n', run.stderr[-2000:]


@pytest.mark.parametrize('x, method', [(np.ones((1, 4)), 'pca'), (np.arange(8.).reshape(2, 4), 'pca'), (np.ones((30, 4)), 'pca'), (np.random.default_rng(0).normal(size=(4, 1)), 'pca')])
def test_projection_of_little_says_so(x, method):
    for asked in ('umap', 'tsne', 'pca'):
        emb = project(x, asked)
        assert emb.shape == (len(x), 2) and np.isfinite(emb).all(axis=None) and emb.attrs['method'] == method
        assert ('note' in emb.attrs) == (asked != 'pca')


def test_pca_is_the_textbook_one():
    x = np.random.default_rng(1).normal(size=(50, 6)) * [5, 3, 1, 1, 1, 1]
    uv = project(x, 'pca').to_numpy()
    values = np.linalg.eigvalsh(np.cov(x.T))[::-1][:2]
    assert np.allclose(uv.var(0, ddof=1), values, rtol=1e-4) and abs(np.corrcoef(uv.T)[0, 1]) < 1e-5


def test_projection_samples_and_joins():
    table = pd.DataFrame(dict(oa=np.linspace(0, 1, 50), u='old'), index=range(100, 150))
    emb = project(np.random.default_rng(0).normal(size=(50, 3)), 'pca', max_points=20, table=table)
    assert len(emb) == 20 and emb.attrs['of'] == 50 and emb.u.dtype.kind == 'f'
    assert np.allclose(emb.oa, np.linspace(0, 1, 50)[emb.index])
    assert '20 of 50' in plot_embedding(emb).ax_.texts[0].get_text()


def test_projection_refuses():
    x = np.random.default_rng(0).normal(size=(9, 3))
    with pytest.raises(UnknownName, match='umap'): project(x, 'umpa')
    with pytest.raises(Incompatible, match='9 feature rows and 8'):
        project(x, 'pca', table=pd.DataFrame({'oa': range(8)}))
    with pytest.raises(SchemaError, match='at least one row'): project(np.zeros((0, 3)))
    with pytest.raises(SchemaError, match='Found shape'): project(np.zeros(5))
    x[4, 1] = np.nan
    with pytest.raises(SchemaError, match='1 of 9 rows.*row 4'): project(x)


# separation

def planted(n=240, seed=0):
    rng = np.random.default_rng(seed)
    dataset = np.arange(n) % 3
    quality = rng.normal(size=n)
    oa = np.array([.5, .7, .9])[dataset] + .03 * quality
    return rng, dataset, quality, oa, np.c_[quality * 3, 20 * np.eye(3)[dataset], rng.normal(0, .3, (n, 5))]


def test_separation_sees_a_planted_signal_and_nothing_else():
    rng, dataset, quality, oa, x = planted()
    good = separation(x, oa, dataset)
    assert (
        good['skill'] > 0.6
        and good['tertile_accuracy'] > 0.8
        and good['silhouette'] > 0.1
        and good['n'] == 240
        and good['datasets'] == 3
    )
    mixed = oa.copy()
    for d in range(3): mixed[dataset == d] = rng.permutation(oa[dataset == d])
    for features, y in ((x, mixed), (np.c_[20 * np.eye(3)[dataset], rng.normal(0, .3, (240, 5))], oa)):   # shuffled; dataset identity only
        none = separation(features, y, dataset)
        assert none['skill'] < .06 and abs(none['tertile_accuracy'] - 1/3) < .12 and none['silhouette'] < .05
    # uncontrolled, identity looks clever
    assert (
        separation(np.c_[20 * np.eye(3)[dataset], rng.normal(0, 0.3, (240, 5))], oa, np.zeros(240))['skill']
        > 0.5
    )


def test_separation_is_not_fooled_by_scenes():
    rng = np.random.default_rng(0)
    scene = np.arange(240) // 8
    # each scene has its own look and its own OA
    x = rng.normal(size=(30, 6))[scene] * 5 + rng.normal(0, .1, (240, 6))
    oa = .7 + .05 * rng.normal(size=30)[scene]
    assert separation(x, oa, ['d'] * 240, k=5)['skill'] > .9
    assert separation(x, oa, ['d'] * 240, scene, k=5)['skill'] < .1


def test_separation_agrees_with_sklearn_and_by_hand():
    from sklearn.manifold import trustworthiness
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    oa = rng.random(60)
    got = separation(x, oa, np.zeros(60), uv=x[:, :2], k=7)
    near = NearestNeighbors(n_neighbors=7).fit(x).kneighbors(return_distance=False)
    third = pd.qcut(oa, 3, labels=False)
    assert np.isclose(got['knn_mae'], np.abs(oa - oa[near].mean(1)).mean())
    assert np.isclose(got['mean_mae'], np.abs(oa - (oa.sum() - oa) / 59).mean())
    assert np.isclose(got['silhouette'], silhouette_score(x, third), atol=1e-6)
    assert np.isclose(got['trustworthiness'], trustworthiness(x, x[:, :2], n_neighbors=7))


def test_separation_with_all_neighbours_has_no_skill():
    _, dataset, _, oa, x = planted(60)
    assert separation(x, oa, dataset, k=10_000)['skill'] == 0


@pytest.mark.parametrize('n, scene', [(1, None), (4, None), (30, ['one'] * 30)])
def test_unmeasurable_separation_is_said(n, scene):
    x = np.random.default_rng(0).normal(size=(n, 3))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        got = separation(x, np.linspace(.5, .6, n), ['d'] * n, scene)
    assert got['n'] == 0 and np.isnan(got['skill']) and 'cannot be measured' in separation_text(got)


def test_constant_oa_has_no_skill():
    assert (
        separation(np.random.default_rng(0).normal(size=(30, 3)), np.full(30, 0.8), np.zeros(30))['skill']
        == 0
    )


def test_separation_refuses():
    x = np.zeros((8, 2))
    with pytest.raises(Incompatible, match="'oa': 7"): separation(x, np.zeros(7), ['d'] * 8)
    with pytest.raises(SchemaError, match='1 of 8 rows'): separation(x, [np.nan] + [.5] * 7, ['d'] * 8)


# the graph

@pytest.mark.parametrize('metric', ['euclidean', 'cosine', 'manhattan'])
def test_graph_agrees_with_sklearn(metric):
    from sklearn.neighbors import NearestNeighbors
    x = np.random.default_rng(0).normal(size=(1203, 6)).astype(np.float32) + 50 * (metric == 'euclidean')
    graph = neighbour_graph(x, 7, metric)
    d, near = (
        NearestNeighbors(n_neighbors=7, metric=metric, algorithm='brute')
        .fit(x.astype(np.float64))
        .kneighbors()
    )
    assert np.allclose(graph.distance, d, atol=1e-4) and (graph.near == near).mean() > .999
    assert (np.diff(graph.distance) >= 0).all() and (graph.near != np.arange(1203)[:, None]).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(2, 40), k=st.integers(1, 50), copies=st.booleans())
def test_graph_of_anything(seed, n, k, copies):
    x = np.random.default_rng(seed).integers(0, 2 if copies else 1000, (n, 3))
    graph = neighbour_graph(x, k)
    assert graph.near.shape == (n, min(k, n - 1)) and all(
        len(set(r)) == len(r) and i not in r for i, r in enumerate(graph.near)
    )
    exact = np.sort(np.linalg.norm(x[:, None] - x[None], axis=2) + np.diag([np.inf] * n), axis=1)[
        :, : min(k, n - 1)
    ]
    assert np.allclose(graph.distance, exact, atol=1e-3)
    order = np.random.default_rng(seed).permutation(n)
    assert np.allclose(neighbour_graph(x[order], k).distance, graph.distance[order], atol=1e-4)


def test_graph_of_other_rows_is_refused():
    x = np.random.default_rng(0).normal(size=(40, 3))
    graph = neighbour_graph(x, 6)
    for bad, words in ((dict(features=x + 1, graph=graph), 'other rows'), (dict(features=x, graph=graph, metric='cosine'), 'another metric'), (dict(features=x, graph=graph, n_neighbors=12), 'needed are 11')):
        with pytest.raises(Incompatible, match=words): project(**bad)
    with pytest.raises(SchemaError, match='found one row|Found one row'): neighbour_graph(x[:1])
    assert 'Graph of 40 rows' in repr(graph)


# fitting once, placing later

def test_pca_places_by_its_directions():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 6)) * [6, 4, 1, 1, 1, 1]
    new = rng.normal(size=(30, 6))
    fitted = Projection('pca').fit(x)
    assert np.allclose(fitted.transform(x), fitted.uv_, atol=1e-5) and np.allclose(
        fitted.transform(new[::-1]), fitted.transform(new)[::-1]
    )
    order = rng.permutation(80)
    assert np.allclose(project(x[order], 'pca'), project(x, 'pca').to_numpy()[order], atol=1e-4)
    wide = rng.normal(size=(12, 40))                                        # more columns than rows
    assert np.allclose(Projection('pca').fit(wide).transform(wide), project(wide, 'pca'), atol=1e-4)
    u, s, _ = np.linalg.svd(wide - wide.mean(0))
    assert np.allclose(np.abs(project(wide, 'pca')), np.abs(u[:, :2] * s[:2]), atol=1e-3)


def test_maps_without_a_rule_refuse_new_points():
    x = np.random.default_rng(0).normal(size=(30, 4))
    fitted = Projection('tsne').fit(x)
    with pytest.raises(Incompatible, match='umap or pca'): fitted.transform(x)
    with pytest.raises(Incompatible, match='tsne'): Projection('tsne', max_points=20, rest='place').fit(x)
    with pytest.raises(Incompatible, match='found 3 columns|Found 3 columns'):
        Projection('pca').fit(x).transform(x[:, :3])
    with pytest.raises(UnknownName, match='place'): project(x, 'pca', rest='plaec')
    with pytest.raises(UnknownName, match='n_neighbors'): project(x, 'pca', n_neighbours=3)
    assert "method='tsne'" in repr(fitted)


def test_placing_is_a_robust_mean_of_neighbours():
    uv = np.r_[np.zeros((8, 2)), [[100, 100]]].astype(np.float32)
    place = projection._placed(np.arange(9)[None], np.linspace(1, 1.2, 9)[None], uv)
    # one stray on another island does not pull
    assert np.abs(place).max() < 0.1
    assert np.array_equal(projection._placed(np.array([[8, 0]]), np.array([[0., 1.]]), uv), uv[8:])


def test_membership_sums_to_log2():
    d = np.sort(np.random.default_rng(0).random((50, 15)), axis=1)
    w = projection._membership(d)
    assert np.allclose(w.sum(1), np.log2(15), atol=1e-3) and (w[:, 0] == 1).all() and (np.diff(w) <= 0).all()
    assert np.isfinite(projection._membership(np.zeros((3, 4)))).all()


def test_points_beyond_the_limit():
    n = 20_001
    x = np.random.default_rng(0).normal(size=(n, 3))
    table = pd.DataFrame(dict(i=np.arange(n)))
    left = project(x, 'pca', table=table)
    placed = project(x, 'pca', table=table, rest='place')
    assert len(left) == 20_000 and left.attrs['of'] == n and 'placed' not in left.attrs
    assert (
        len(placed) == n
        and placed.attrs['placed'] == 1
        and (placed.i == np.arange(n)).all()
        and np.allclose(placed.loc[left.index], left, atol=1e-4)
    )
    assert set(sample_rows(n, 100)) < set(sample_rows(n, 200)) and len(sample_rows(5)) == 5
    assert '20,000 of 20,001' in plot_embedding(left, 'i').ax_.texts[0].get_text()


def test_stages_end_with_what_was_asked():
    x = np.random.default_rng(0).normal(size=(40, 3))
    table = pd.DataFrame(dict(oa=np.linspace(0, 1, 40)))
    first, second = stages(x, 'tsne', table=table, max_points=30)
    assert (
        (first.attrs['method'], second.attrs['method']) == ('pca', 'tsne')
        and first.index.equals(second.index)
        and len(first) == 30
    )
    assert (
        np.array_equal(second, project(x, 'tsne', table=table, max_points=30))
        and len(list(stages(x, 'pca'))) == 1
    )
    with pytest.raises(UnknownName): next(stages(x, 'umpa'))


PACMAP = """
import numpy as np
from rssqa.viz.projection import project
part = np.arange(45) % 3
x = np.random.default_rng(0).normal(size=(45, 8)) + 12 * np.eye(8)[part]
one, two = project(x, 'pacmap'), project(x.copy(), 'pacmap')
assert np.array_equal(one, two) and one.attrs['method'] == 'pacmap' and np.isfinite(project(x[:6], 'pacmap')).all(axis=None)
centre = one.groupby(part).mean().to_numpy()
assert (((one.to_numpy()[:, None] - centre)**2).sum(-1).argmin(1) == part).all()
print('fine')
"""


@pytest.mark.slow
def test_pacmap_repeats_and_keeps_clusters():
    pytest.importorskip('pacmap')
    run = subprocess.run([sys.executable, '-c', PACMAP], capture_output=True, text=True)
    assert run.stdout == 'fine\n', run.stderr[-2000:]


def test_pacmap_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pacmap', None)
    with pytest.raises(Incompatible, match=r'rssqa\[pacmap\]'):
        project(np.random.default_rng(0).normal(size=(20, 3)), 'pacmap')
    with pytest.raises(UnknownName, match='euclidean'):
        project(np.random.default_rng(0).normal(size=(20, 3)), 'pacmap', metric='chebyshev')


# faithfulness of a picture

def test_preservation_by_hand():
    x = np.array([[0.], [1], [3], [7]])
    assert preservation(x, np.c_[x, x], k=1) == 1 and preservation(x, np.c_[x, x], 99) == 1
    # row 3 moves beside row 0: rows 1 and 2 keep their neighbour
    assert preservation(x, np.array([[0, 0], [1, 0], [3, 0], [-0.5, 0]]), k=1) == 0.5
    far = np.random.default_rng(0).normal(size=(400, 2))
    assert abs(preservation(np.random.default_rng(1).normal(size=(400, 5)), far, 20) - 20 / 399) < .03
    graph = neighbour_graph(far, 20)
    assert preservation(graph, far, 20) == 1


# the probe

def test_probe_finds_what_is_planted_and_nothing_else():
    rng, dataset, quality, oa, x = planted()
    scene = np.arange(240) // 6
    assert quality_probe(x, oa, dataset, scene)['accuracy'] > .75
    mixed = oa.copy()
    for d in range(3): mixed[dataset == d] = rng.permutation(oa[dataset == d])
    only = np.c_[20 * np.eye(3)[dataset], rng.normal(0, .3, (240, 5))]
    for features, y in ((x, mixed), (only, oa)):
        told = quality_probe(features, y, dataset, scene)
        assert abs(told['accuracy'] - 1/3) < .12 and told['n'] == 240 and abs(told['chance'] - 1/3) < .01
    # uncontrolled, identity looks clever
    assert quality_probe(only, oa, np.zeros(240), scene)['accuracy'] > 0.6


def test_probe_is_not_fooled_by_scenes():
    rng = np.random.default_rng(0)
    scene = np.arange(240) // 8
    x = rng.normal(size=(30, 12))[scene] * 5 + rng.normal(0, .1, (240, 12))
    oa = .7 + .05 * rng.normal(size=30)[scene]
    assert (
        quality_probe(x, oa, ['d'] * 240)['accuracy']
        > quality_probe(x, oa, ['d'] * 240, scene)['accuracy'] + 0.2
    )


@pytest.mark.parametrize('n, scene', [(1, None), (4, None), (30, ['one'] * 30)])
def test_probe_without_scenes_is_silent(n, scene):
    told = quality_probe(
        np.random.default_rng(0).normal(size=(n, 3)), np.linspace(0.5, 0.6, n), ['d'] * n, scene
    )
    assert told['n'] == 0 and np.isnan(told['accuracy'])


def test_probe_of_the_unusual():
    x = np.random.default_rng(0).normal(size=(12, 3))
    # constant features
    assert 0 <= quality_probe(np.ones((12, 3)), np.linspace(0, 1, 12), ['d'] * 12)['accuracy'] <= 1
    # a training side with few thirds
    assert 0 <= quality_probe(x, np.linspace(0, 1, 12), ['d'] * 12, [0] * 4 + [1] * 8)['accuracy'] <= 1
    wide = np.random.default_rng(0).normal(size=(30, 90))
    assert quality_probe(np.c_[wide, 30 * np.arange(30)], np.linspace(0, 1, 30), ['d'] * 30)['accuracy'] > .6


# several feature spaces

def test_branch_maps_share_rows():
    rng, dataset, quality, oa, x = planted()
    table = pd.DataFrame(dict(oa=oa, dataset=dataset, scene=np.arange(240) // 6), index=np.arange(240) + 7)
    maps = branch_maps({'all': x, 'noise': rng.normal(size=(240, 4))}, table, 'pca', max_points=200)
    (a, one), (b, two) = maps.values()
    assert (
        a.index.equals(b.index) and len(a) == 200 and a.attrs['of'] == 240 and np.allclose(a.oa, oa[a.index])
    )
    assert one['skill'] > .5 and two['skill'] < .08 and one['n'] == 200 and 0 < one['preservation'] <= 1
    assert np.abs(a.groupby('dataset')[['u', 'v']].mean().to_numpy()).max() < 1e-3
    loose = branch_maps({'all': x}, table, 'pca', control=False)['all'][0]
    assert np.abs(loose.groupby('dataset')[['u', 'v']].mean().to_numpy()).max() > 5
    with pytest.raises(SchemaError, match='no column dataset'):
        branch_maps({'x': x}, table.drop(columns='dataset'))
    with pytest.raises(SchemaError, match='no features|Found no features'): branch_maps({}, table)


def test_centred_groups_have_mean_zero():
    x = np.random.default_rng(0).normal(size=(50, 3)) + 9
    g = np.arange(50) % 4
    out = centred(x, g)
    assert all(np.abs(out[g == i].mean(0)).max() < 1e-5 for i in range(4)) and np.allclose(
        np.diff(out[g == 1], axis=0), np.diff(x[g == 1], axis=0), atol=1e-5
    )
    with pytest.raises(SchemaError, match='have no group'): centred(x, [None, *g[1:]])
    with pytest.raises(Incompatible, match='49 groups'): centred(x, g[1:])


def test_text_says_what_was_measured():
    rng, dataset, quality, oa, x = planted(60)
    told = separation(x, oa, dataset, uv=x[:, :2])
    text = separation_text(told)
    assert (
        f'probe {told["probe_accuracy"]:.0%}' in text
        and f'trustworthy to {told["trustworthiness"]:.2f}' in text
    )
    # numbers of an older table
    assert 'probe' not in separation_text({k: v for k, v in told.items() if k != 'probe_accuracy'})
