"""Accuracy and areas from labelled points: formulas, coverage, sampling of large maps, files that people change."""
import json

import numpy as np
import pandas as pd
import pytest
import rasterio
from rasterio.transform import from_origin

from rssqa.cli import main
from rssqa.core import BadImage, DataNotFound, Incompatible, SchemaError
from rssqa.quality.totals import (
    allocate_points, morton_order, olofsson_table, share_interval, spread_sample, stratified_mean, systematic_ranks,
    tuning_factor,
)
from rssqa.scene.outputs import NO_VALUE, REDUCTION, SCALE, read_points, write_points
from rssqa.scene.raster import grid_of
from rssqa.scene.sampling import MapSource, count_blocks, estimate_totals, find_points, plan_points

NAMES = ['forest', 'field', 'lake']


# ---------------------------------------------------------------- estimates

@pytest.mark.parametrize('right, n', [(0, 10), (1, 10), (5, 10), (95, 100), (100, 100)])
def test_the_interval_is_that_of_wilson(right, n):
    from scipy.stats import binomtest
    p = right / n
    expected = binomtest(right, n).proportion_ci(0.9, 'wilson')
    low, high = share_interval(p, np.sqrt(p * (1 - p) / n), n, 0.9)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_one_stratum_without_prediction_is_the_plain_mean():
    y = np.array([1, 0, 1, 1, 0, 1])
    found = stratified_mean(y, np.zeros(6, int), [1.0])
    assert found.value == pytest.approx(y.mean()) and found.se == pytest.approx(y.std(ddof=1) / np.sqrt(6))


def test_the_corrected_mean_is_that_of_prediction_powered_inference():
    "PPI++ for a mean (Angelopoulos et al. 2023, section 6): prediction everywhere plus mean error at the labels."
    rng = np.random.default_rng(0)
    f_all = rng.random(5000)
    at = rng.choice(5000, 200, replace=False)
    y, f = (rng.random(200) < f_all[at]).astype(float), f_all[at]
    factor = np.cov(y, f)[0, 1] / np.var(f, ddof=1)
    expected = factor * f_all.mean() + (y - factor * f).mean()
    found = stratified_mean(y, np.zeros(200, int), [1.0], f, [f_all.mean()])
    assert found.value == pytest.approx(expected)
    assert found.se == pytest.approx((y - factor * f).std(ddof=1) / np.sqrt(200))


def test_a_perfect_prediction_leaves_nothing_to_estimate():
    y = np.array([1, 0, 1, 1, 0, 1.0])
    found = stratified_mean(y, np.zeros(6, int), [1.0], y, [0.61])
    assert found.value == pytest.approx(0.61) and found.se == pytest.approx(0)


@pytest.mark.parametrize('seed', range(5))
def test_a_worthless_prediction_does_no_harm(seed):
    rng = np.random.default_rng(seed)
    y, f = rng.random(400) < 0.8, rng.random(400)
    stratum = rng.integers(3, size=400)
    plain = stratified_mean(y, stratum, [0.5, 0.3, 0.2])
    helped = stratified_mean(y, stratum, [0.5, 0.3, 0.2], f, [0.5, 0.5, 0.5])
    assert helped.se <= plain.se + 1e-12 and abs(helped.value - plain.value) < 0.02
    assert 0 <= tuning_factor(y.astype(float), f, stratum, np.array([0.5, 0.3, 0.2])) <= 1
    assert tuning_factor(y.astype(float), 1.0 - y, stratum, np.array([0.5, 0.3, 0.2])) == 0


@pytest.mark.parametrize('accuracy', [0.6, 0.85, 0.97])
def test_intervals_hold_in_strata_with_and_without_prediction(accuracy):
    rng = np.random.default_rng(int(100 * accuracy))
    size = 60_000
    stratum = rng.choice(3, size, p=[0.6, 0.3, 0.1])
    chance = np.clip(accuracy + rng.normal(0, 0.1, size) - 0.15 * (stratum == 2), 0, 1)
    right = rng.random(size) < chance
    weights = np.bincount(stratum) / size
    means = np.bincount(stratum, chance) / np.bincount(stratum)
    counts = allocate_points(weights, means, 90)
    covered = np.zeros((400, 2))
    for i in range(400):
        at = np.concatenate([rng.choice(np.flatnonzero(stratum == h), n, replace=False) for h, n in enumerate(counts)])
        plain = stratified_mean(right[at], stratum[at], weights)
        helped = stratified_mean(right[at], stratum[at], weights, chance[at], means)
        covered[i] = [e.lower <= right.mean() <= e.upper for e in (plain, helped)]
    assert (covered.mean(0) >= 0.86).all()                     # .90 less three standard errors of 400 draws


def test_areas_add_up_and_a_right_map_keeps_its_areas():
    rng = np.random.default_rng(1)
    mapped = np.repeat([0, 1, 2], 40)
    reference = np.where(rng.random(120) < 0.8, mapped, rng.integers(3, size=120))
    table = olofsson_table(mapped, reference, [0.5, 0.3, 0.2])
    assert table.area.sum() == pytest.approx(1)
    perfect = olofsson_table(mapped, mapped, [0.5, 0.3, 0.2])
    assert perfect.area.tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert (perfect.users == 1).all() and (perfect.producers == 1).all()


def test_a_class_that_nobody_saw_has_no_producers_accuracy():
    table = olofsson_table(np.repeat([0, 1], 10), np.zeros(20, int), [0.9, 0.1])
    assert table.area.tolist() == [1, 0] and np.isnan(table.producers[1]) and table.users[1] == 0


def test_a_class_that_the_map_does_not_have_has_an_area_but_no_users_accuracy():
    table = olofsson_table(np.repeat([0, 1], 10), np.r_[np.zeros(8, int), 2, 2, np.ones(10, int)], [0.7, 0.3, 0.0])
    assert np.isnan(table.users[2]) and np.isnan(table.users_lower[2]) and table.producers[2] == 0
    assert table.area[2] == pytest.approx(0.7 * 0.2) and table.area.sum() == pytest.approx(1)


@pytest.mark.parametrize('stratum, weights', [([0, 0, 1], [0.5, 0.5]), ([0, 0, 3, 3], [0.5, 0.5]), ([0, 0], [0.5]),
                                              ([], [1.0])])
def test_points_that_do_not_fit_the_strata_are_refused(stratum, weights):
    with pytest.raises(Incompatible, match='(?i)strat'): stratified_mean(np.ones(len(stratum)), stratum, weights)


@pytest.mark.parametrize('n', [6, 20, 101, 1000])
def test_all_points_are_shared_out(n):
    counts = allocate_points([0.9, 0.09, 0.01, 0.0], [0.9, 0.6, 0.9, 0.5], n)
    assert counts.sum() == n and counts[3] == 0 and counts[:3].min() >= 2
    if n == 1000: assert counts[1] > 0.09 * n                          # uncertain, so more than its share


def test_too_few_points_for_the_strata_are_refused():
    with pytest.raises(Incompatible, match='(?i)few'): allocate_points([0.5, 0.3, 0.2], [0.5] * 3, 5)


@pytest.mark.parametrize('total, n', [(10, 10), (1000, 7), (5, 1)])
def test_every_rank_is_drawn_equally_often(total, n):
    rng = np.random.default_rng(0)
    drawn = np.concatenate([systematic_ranks(total, n, rng) for _ in range(3000)])
    assert len(np.unique(systematic_ranks(total, n, rng))) == n
    if total < 100: assert np.abs(np.bincount(drawn, minlength=total) / 3000 - n / total).max() < 0.05


def test_a_spread_sample_fills_the_area():
    y, x = (v.ravel() for v in np.mgrid[:90, :70])
    at = spread_sample(x, y, 63, np.random.default_rng(0))
    blocks = (y[at] // 30) * 2 + x[at] // 35
    assert np.bincount(blocks, minlength=6).min() >= 6 and len(set(morton_order(x, y))) == len(x)


# ---------------------------------------------------------------- maps

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "A map of 2,300 x 1,500 pixels in six blocks, its truth, and a prediction of where it is right."
    home = tmp_path_factory.mktemp('map')
    rng = np.random.default_rng(0)
    truth = np.kron(rng.choice(3, (30, 46), p=[0.6, 0.3, 0.1]), np.ones((50, 50), int))
    doubt = np.kron(rng.random((60, 92)) < 0.3, np.ones((25, 25), bool))
    wrong = doubt & (rng.random(truth.shape) < 0.6)
    mapped = np.where(wrong, (truth + 1) % 3, truth).astype(np.uint8)
    mapped[:40] = 255
    profile = dict(driver='GTiff', width=2300, height=1500, dtype='uint8', crs='EPSG:32633', nodata=255,
                   transform=from_origin(5e5, 5.5e6, 2, 2), tiled=True, blockxsize=256, blockysize=256)
    with rasterio.open(home/'map.tif', 'w', count=1, **profile) as f: f.write(mapped, 1)
    small = {**profile, 'width': -(-2300 // REDUCTION), 'height': -(-1500 // REDUCTION)}
    error = np.where(doubt, 0.6, 0.0)[REDUCTION // 2::REDUCTION, REDUCTION // 2::REDUCTION]
    bands = np.full((6, small['height'], small['width']), NO_VALUE, np.uint8)
    bands[4, :error.shape[0], :error.shape[1]] = np.round(SCALE * error)
    with rasterio.open(home/'quality.tif', 'w', count=6, **small) as f: f.write(bands)
    return dict(home=home, map=home/'map.tif', quality=home/'quality.tif', truth=truth, mapped=mapped)


def label(plan, drawn, share=1.0):
    path = plan.folder/'points.csv'
    points = pd.read_csv(path, dtype={'class': str})
    at = points.index[: int(share * len(points))]
    points.loc[at, 'class'] = np.array(NAMES)[drawn['truth'][points.y[at], points.x[at]]]
    points.to_csv(path, index=False)
    return points


def test_counts_are_those_of_the_whole_map(drawn):
    with MapSource(drawn['map'], NAMES, drawn['quality']) as source:
        counts, expected = count_blocks(source)
    known = drawn['mapped'] < 255
    assert counts.sum(0).tolist() == np.bincount(drawn['mapped'][known]).tolist()
    right = (drawn['mapped'] == drawn['truth'])[known]
    assert abs(expected @ counts.sum(0) / counts.sum() - right.mean()) < 0.02


def test_points_have_the_class_that_they_stand_for_and_no_pixel_comes_twice(drawn):
    with MapSource(drawn['map'], NAMES) as source:
        counts, _ = count_blocks(source)
        points = find_points(source, counts, np.array([300, 200, 100]))
    assert (drawn['mapped'][points.y, points.x] == points.stratum).all()
    assert not points.duplicated(['x', 'y']).any()
    assert points.stratum.value_counts().to_dict() == {0: 300, 1: 200, 2: 100}


def test_every_pixel_of_a_class_is_drawn_equally_often(tmp_path):
    mapped = np.random.default_rng(0).integers(3, size=(20, 30)).astype(np.uint8)
    profile = dict(driver='GTiff', width=30, height=20, count=1, dtype='uint8')
    with rasterio.open(tmp_path/'map.tif', 'w', **profile) as f: f.write(mapped, 1)
    hits = np.zeros(mapped.shape)
    with MapSource(tmp_path/'map.tif', NAMES) as source:
        counts, _ = count_blocks(source)
        for seed in range(600):
            points = find_points(source, counts, np.array([20, 20, 20]), seed)
            np.add.at(hits, (points.y, points.x), 1)
    for k in range(3):
        rate = hits[mapped == k] / 600
        assert rate.mean() == pytest.approx(20 / (mapped == k).sum()) and rate.std() < 0.02


def test_labels_give_accuracy_and_areas_within_their_intervals(drawn, tmp_path):
    plan = plan_points(drawn['map'], tmp_path/'plan', NAMES, 400, drawn['quality'])
    label(plan, drawn)
    totals = estimate_totals(tmp_path/'plan')
    known = drawn['mapped'] < 255
    right = (drawn['mapped'] == drawn['truth'])[known].mean()
    shares = np.bincount(drawn['truth'][known]) / known.sum()
    assert totals.oa.lower <= right <= totals.oa.upper and totals.oa.se < totals.oa_plain.se
    assert ((totals.classes.area_lower <= shares) & (shares <= totals.classes.area_upper)).sum() >= 2
    hectares = known.sum() * 4 / 1e4
    assert totals.classes.area_ha.sum() == pytest.approx(hectares)
    text = str(totals)
    assert 'OA 0.' in text and 'hectares' in text and 'times as many' in text
    assert (pd.read_csv(tmp_path/'plan'/'totals.csv')['class'] == NAMES).all()


def test_the_first_part_of_the_points_is_a_sample_too(drawn, tmp_path):
    plan = plan_points(drawn['map'], tmp_path/'plan', NAMES, 300)
    label(plan, drawn, 0.3)
    totals = estimate_totals(tmp_path/'plan', confidence=0.99)
    known = drawn['mapped'] < 255
    assert totals.oa.n == 90 and totals.oa.lower <= (drawn['mapped'] == drawn['truth'])[known].mean() <= totals.oa.upper


def test_classes_may_be_filled_in_a_geopackage(drawn, tmp_path):
    plan = plan_points(drawn['map'], tmp_path/'plan', NAMES, 60)
    points = label(plan, drawn)
    before = estimate_totals(tmp_path/'plan')
    with rasterio.open(drawn['map']) as f: write_points(points, grid_of(f), tmp_path/'changed.gpkg')
    after = estimate_totals(tmp_path/'plan', tmp_path/'changed.gpkg')
    assert after.oa == before.oa and len(read_points(tmp_path/'plan'/'points.gpkg')) == 60


def test_places_are_the_middle_of_pixels(drawn, tmp_path):
    plan = plan_points(drawn['map'], tmp_path/'plan', NAMES, 20)
    assert np.allclose(plan.points.east, 5e5 + 2 * (plan.points.x + 0.5))
    assert np.allclose(plan.points.north, 5.5e6 - 2 * (plan.points.y + 0.5))


def test_whoever_labels_does_not_see_what_the_map_says(drawn, tmp_path):
    plan = plan_points(drawn['map'], tmp_path/'plan', NAMES, 20)
    for points in (pd.read_csv(tmp_path/'plan'/'points.csv'), read_points(tmp_path/'plan'/'points.gpkg')):
        assert set(points) == {'id', 'x', 'y', 'east', 'north', 'class'}
    assert (np.array(NAMES)[drawn['mapped'][plan.points.y, plan.points.x]] == plan.design.map_class).all()


def test_the_same_seed_draws_the_same_points(drawn, tmp_path):
    first, second, other = (
        plan_points(drawn['map'], tmp_path/f'{i}', NAMES, 50, seed=seed).points for i, seed in enumerate((3, 3, 4))
    )
    assert first.equals(second) and not first.equals(other)


# ---------------------------------------------------------------- refusals

def test_a_class_without_labels_is_named(drawn, tmp_path):
    plan = plan_points(drawn['map'], tmp_path/'plan', NAMES, 60)
    points = label(plan, drawn)
    points.loc[plan.design.map_class == 'lake', 'class'] = '?'
    points.to_csv(tmp_path/'plan'/'points.csv', index=False)
    with pytest.raises(Incompatible, match=r'(?i)lake \(0\)'): estimate_totals(tmp_path/'plan')


def test_points_that_cannot_be_named_are_counted(drawn, tmp_path):
    plan = plan_points(drawn['map'], tmp_path/'plan', NAMES, 60)
    points = label(plan, drawn)
    points.loc[points.index[:3], 'class'] = '?'
    points.to_csv(tmp_path/'plan'/'points.csv', index=False)
    totals = estimate_totals(tmp_path/'plan')
    assert totals.left_out == 3 and totals.oa.n == 57 and '3 points could not be named' in str(totals)


@pytest.mark.parametrize('change, message', [
    (lambda points: points.drop(columns='id'), 'no column id'),
    (lambda points: pd.concat([points, points[:1]]), 'twice'),
    (lambda points: points.assign(id=points.id + 7), 'not of this plan'),
    (lambda points: points.assign(**{'class': 'moon'}), 'moon'),
])
def test_a_changed_file_of_points_is_refused(drawn, tmp_path, change, message):
    plan = plan_points(drawn['map'], tmp_path/'plan', NAMES, 30)
    change(label(plan, drawn)).to_csv(tmp_path/'plan'/'points.csv', index=False)
    with pytest.raises((SchemaError, KeyError), match=f'(?i){message}'): estimate_totals(tmp_path/'plan')


def test_a_class_of_one_pixel_is_left_out_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('RSSQA_QUIET', '0')
    mapped = np.zeros((64, 64), np.uint8)
    mapped[:, 40:] = 1
    mapped[5, 5] = 2
    profile = dict(driver='GTiff', width=64, height=64, count=1, dtype='uint8')
    with rasterio.open(tmp_path/'map.tif', 'w', **profile) as f: f.write(mapped, 1)
    plan = plan_points(tmp_path/'map.tif', tmp_path/'plan', NAMES, 30)
    assert 'lake is left out' in capsys.readouterr().err and plan.strata.points.tolist()[2] == 0
    points = pd.read_csv(tmp_path/'plan'/'points.csv')
    points['class'] = plan.design.map_class
    points.to_csv(tmp_path/'plan'/'points.csv', index=False)
    assert estimate_totals(tmp_path/'plan').oa.value == 1


def test_a_plan_is_not_overwritten(drawn, tmp_path):
    plan_points(drawn['map'], tmp_path/'plan', NAMES, 30)
    before = (tmp_path/'plan'/'points.csv').read_bytes()
    with pytest.raises(Incompatible, match='(?i)plan already'): plan_points(drawn['map'], tmp_path/'plan', NAMES, 40)
    assert (tmp_path/'plan'/'points.csv').read_bytes() == before


def test_quality_of_another_scene_unknown_classes_and_empty_maps_are_refused(drawn, tmp_path):
    with pytest.raises(Incompatible, match='does not belong'):
        plan_points(drawn['map'], tmp_path/'a', NAMES, 30, drawn['map'])
    with pytest.raises(BadImage): plan_points(drawn['map'], tmp_path/'b', NAMES[:2], 30)
    profile = dict(driver='GTiff', width=64, height=64, count=1, dtype='uint8', nodata=0)
    with rasterio.open(tmp_path/'empty.tif', 'w', **profile) as f: f.write(np.zeros((64, 64), np.uint8), 1)
    with pytest.raises(Incompatible, match='(?i)no pixel'): plan_points(tmp_path/'empty.tif', tmp_path/'c', NAMES, 30)
    colours = np.zeros((3, 64, 64), np.uint8)
    with rasterio.open(tmp_path/'rgb.tif', 'w', **{**profile, 'count': 3}) as f: f.write(colours)
    with pytest.raises(Incompatible, match='(?i)one of class numbers'):
        plan_points(tmp_path/'rgb.tif', tmp_path/'d', NAMES, 30)
    with pytest.raises(DataNotFound, match='rssqa plan'): estimate_totals(tmp_path/'nothing')


def test_the_two_commands_work_together(drawn, tmp_path, capsys):
    (tmp_path/'classes.json').write_text(json.dumps(NAMES))
    options = ['--classes', str(tmp_path/'classes.json'), '-n', '80', '--quality', str(drawn['quality'])]
    with pytest.raises(SystemExit) as stop: main(['plan', str(drawn['map']), '-o', str(tmp_path/'plan'), *options])
    assert stop.value.code == 0 and 'All 80 labels' in capsys.readouterr().out
    points = pd.read_csv(tmp_path/'plan'/'points.csv')
    points['class'] = np.array(NAMES)[drawn['truth'][points.y, points.x]]
    points.to_csv(tmp_path/'plan'/'points.csv', index=False)
    with pytest.raises(SystemExit) as stop: main(['totals', str(tmp_path/'plan')])
    assert stop.value.code == 0 and 'from 80 labels' in capsys.readouterr().out
