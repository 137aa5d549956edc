"""Networks and the assessor in other domains: no style of a target, equal crops, drops and purities by hand."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from rssqa.bench.domains import (
    ASSESSORS, CONSTANT, PLANS, VARIANTS, Domains, Plan, balanced, bench_features, bench_generalisation,
    build_variant, draw, fit, foreign_styles, knn_purity, known_and_new, measure_drop, measure_maps, predict_maps,
    pure_cells, restyle, rows_file, run_variant,
)
from rssqa.core import Incompatible, few_threads
from rssqa.data.datasets import IGNORE, read_image
from rssqa.data.synthetic import CLASSES, write_scenes
from rssqa.domains.pairs import COMMON, COUNTERPARTS, common_list
from rssqa.domains.style import StyleInjection, style_of
from rssqa.segment.methods.training import Recipe
from rssqa.viz.committed import tables_folder

SHORT = Recipe('nano', steps=2, batch=2, crop=64)
PLAN = Plan('town', 'water_land', ('flood',), ('rural',))


@pytest.fixture(scope='module', autouse=True)
def listed():
    drawn = dict.fromkeys(CLASSES, 'land') | dict(water='water')
    COUNTERPARTS['water_land'] |= dict(town=drawn, flood=drawn)
    with few_threads(): yield
    for kind in ('town', 'flood'): del COUNTERPARTS['water_land'][kind]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn')
    for kind in ('town', 'flood', 'rural'): write_scenes(folder/kind, kind, 5, 64)
    return folder


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory): # rows of one seed, their folder
    home = tmp_path_factory.mktemp('run')
    return bench_generalisation(data, (0,), home, (PLAN,), SHORT, each=4), home


# ---------------------------------------------------------------- plans

@pytest.mark.parametrize('plan', PLANS, ids=lambda plan: plan.source)
def test_targets_have_the_common_classes_and_lend_no_style(plan):
    assert all(common_list(plan.source, target) == plan.common or plan.common in COMMON for target in plan.targets)
    assert all({plan.source, *plan.targets} <= set(COUNTERPARTS[plan.common]) for _ in plan.targets)
    assert not {plan.source, *plan.targets} & set(plan.styles) and len(plan.targets) == 2


@pytest.mark.parametrize('styles', [('flood',), ('rural', 'flood'), ('town',)])
def test_a_style_of_the_target_or_the_source_is_refused(styles):
    with pytest.raises(Incompatible, match=f'cannot learn from town. Found {styles[-1]} among'):
        Plan('town', 'water_land', ('flood',), styles)


def test_styles_are_those_of_the_listed_sources_only(data, tmp_path):
    domains = Domains(data, tmp_path)
    found = {style.mean for style in foreign_styles(PLAN, domains).styles}
    rural = {style_of(read_image(row)).mean for row in domains.tiles('rural').itertuples()}
    flood = {style_of(read_image(row)).mean for row in domains.tiles('flood').itertuples()}
    assert found <= rural and found and not found & flood


# ---------------------------------------------------------------- one training

def test_rows_say_who_learned_what_and_are_read_again(data, finished):
    rows, home = finished
    assert list(rows.variant.unique()) == [CONSTANT, *VARIANTS] and set(rows.target) == {'town', 'flood'}
    assert len(rows) == 2 * 5 and rows.oa.between(0, 1).all() and (rows.steps == 2).all()
    file = rows_file(PLAN, 'LoRAReins', home, SHORT, 4)
    changed = file.read_text().replace('"oa": ', '"oa": 0.5, "was": ')
    file.write_text(changed)
    again = bench_generalisation(data, (0,), home, (PLAN,), SHORT, each=4)
    assert (again[again.variant == 'LoRAReins'].oa == 0.5).all(), 'a finished training was run again'
    assert rows_file(PLAN, 'LoRAReins', home, replace(SHORT, seed=1), 4) != file
    assert rows_file(PLAN, 'head only', home, SHORT, 4) != file


def test_what_is_kept_is_what_was_trained(finished):
    from safetensors.torch import load_file
    _, home = finished
    parts = {}
    for variant in VARIANTS:
        names = load_file(rows_file(PLAN, variant, home, SHORT, 4).with_suffix('.safetensors'))
        parts[variant] = {name.split('.')[0] for name in names}
    assert parts['head only'] == {'decoder', 'classifier'}
    assert parts['LoRAReins'] == parts['LoRAReins + styles'] == {'decoder', 'classifier', 'reins'}
    assert parts['full fine-tuning'] == {'decoder', 'classifier', 'encoder'}


def test_one_class_everywhere_by_hand(data, tmp_path):
    domains = Domains(data, tmp_path)
    rows = {row['target']: row for row in run_variant(PLAN, CONSTANT, domains, SHORT, 100)}
    masks = [mask for _, mask in domains.pixels('flood', 'water_land')]
    pixels = np.concatenate([mask.ravel() for mask in masks])
    assert rows['flood']['oa'] == pytest.approx((pixels[pixels != IGNORE] == 1).mean())
    assert rows['flood']['miou'] == pytest.approx(rows['flood']['oa'] / (2 if (pixels == 0).any() else 1))


def test_seeds_give_equal_starts_and_styles_change_the_crops_only(data, tmp_path):
    first, second = (build_variant('LoRAReins + styles', 2, SHORT).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    x = torch.rand(3, 3, 64, 64) * 0.5
    styles = foreign_styles(PLAN, Domains(data, tmp_path))
    always = StyleInjection([np.random.default_rng(0).random((3, 8, 8))], chance=1.0)
    assert torch.equal(restyle(x, styles, 3), restyle(x, styles, 3))
    assert not torch.equal(restyle(x, always, 3), restyle(x, always, 4))
    assert (restyle(x, always, 3) == x).float().mean() > 0.4      # half of the cells


def test_training_lowers_the_loss_of_every_variant(data, tmp_path):
    pixels = Domains(data, tmp_path).pixels('town', 'water_land')
    masks = [mask for _, mask in pixels]
    for variant in VARIANTS:
        net = build_variant(variant, 2, SHORT)
        fit(net, pixels, replace(SHORT, steps=15, lr=5e-3))
        assert not net.training
        measured = measure_maps(predict_maps(net, [image for image, _ in pixels]), masks, 2)
        known = np.concatenate([mask.ravel() for mask in masks])
        assert measured['oa'] > max((known == 0).mean(), (known == 1).mean()) - 0.1, variant


def test_maps_are_measured_over_all_pixels_together():
    masks = [np.array([[0, 0, 1, IGNORE]], np.uint8), np.array([[1, 1]], np.uint8)]
    maps = [np.array([[0, 1, 1, 0]], np.uint8), np.array([[1, 1]], np.uint8)]
    assert measure_maps(maps, masks, 2) == dict(oa=0.8, miou=pytest.approx((1 / 2 + 3 / 4) / 2), tiles=2)


def test_drawn_tiles_do_not_depend_on_more_than_the_seed():
    tiles = pd.DataFrame(dict(i=range(20)))
    assert draw(tiles, 5).equals(draw(tiles, 5)) and len(draw(tiles, 50)) == 20
    assert not draw(tiles, 5, 1).equals(draw(tiles, 5, 2)) and draw(tiles, 5).i.is_monotonic_increasing


# ---------------------------------------------------------------- the assessor

def made_rows(noise, seed=0):
    rng = np.random.default_rng(seed)
    oa = rng.uniform(0.2, 1, 300)
    return pd.DataFrame(dict(
        dataset='a', predictor='p', scene=np.repeat([f's{i}' for i in range(30)], 10), oa=oa,
        known=oa + rng.normal(0, 0.02, 300), new=oa + rng.normal(0, noise, 300),
        known_covered=1.0, new_covered=np.tile([1.0, 0.0], 150)))


def test_a_worse_prediction_drops_and_an_equal_one_does_not():
    dropped = measure_drop(made_rows(0.3), draws=100).set_index('measure')
    table = dropped['drop']
    assert table.srocc < -0.2 and table.plcc < -0.2 and table.rmse > 0.2 and table.mae > 0.15 and table.coverage == -0.5
    assert (dropped.low <= dropped['drop']).all() and (dropped['drop'] <= dropped.high).all()
    assert dropped.high.srocc < 0 < dropped.low.rmse
    rows = made_rows(0.3)
    same = measure_drop(rows.assign(new=rows.known, new_covered=rows.known_covered), draws=50)
    assert (same[['drop', 'low', 'high']] == 0).all(axis=None)


def test_draws_are_the_same_for_the_same_seed():
    first, second, other = (measure_drop(made_rows(0.1), draws=20, seed=seed) for seed in (0, 0, 1))
    assert first.equals(second) and not first.equals(other)


def test_known_and_new_are_the_committed_predictions():
    rows = known_and_new(tables_folder(), predictors=ASSESSORS[:1])
    predictions = pd.read_parquet(tables_folder()/'predictions_dataset.parquet')
    expected = predictions[predictions.seed == 0].set_index(['image_id', 'method'])[ASSESSORS[0]]
    for row in rows.sample(20, random_state=0).itertuples():
        assert row.new == pytest.approx(expected[row.image_id, row.method])
    covered = rows.groupby('dataset')[['known_covered', 'new_covered']].mean()
    assert covered.known_covered.between(0.5, 1).all() and rows.known_covered.isin([0, 1]).all()
    assert not np.allclose(rows.known, rows.new)


# ---------------------------------------------------------------- features

def test_cells_of_one_class():
    mask = np.zeros((32, 48), np.uint8)
    mask[:16, 16:32] = 1
    mask[:16, 16:18] = 0                               # an eighth of another class
    mask[16:, :16] = IGNORE
    mask[16:, 16] = 2                                  # a sixteenth of another class
    assert pure_cells(mask).tolist() == [[0, IGNORE, 0], [IGNORE, 0, 0]]


def test_rows_are_balanced():
    labels = np.array([0] * 9 + [1] * 3 + [2])
    chosen = balanced(labels, 3)
    assert np.bincount(labels[chosen]).tolist() == [3, 3, 1] and np.unique(chosen).size == 7
    assert np.array_equal(chosen, balanced(labels, 3)) and not np.array_equal(chosen, balanced(labels, 3, 1))


def test_purity_of_random_rows_is_chance():
    rng = np.random.default_rng(0)
    own, apart = rng.integers(4, size=600), rng.integers(3, size=600)
    value, chance = knn_purity(rng.normal(size=(600, 8)), own, apart)
    assert value == pytest.approx(chance, abs=0.03) and chance == pytest.approx(0.25, abs=0.01)


def test_purity_looks_only_at_other_domains():
    domain = np.repeat([0, 1], 50)
    classes = np.tile(np.repeat([0, 1], 25), 2)
    place = 10.0 * domain + classes + np.linspace(0, 0.1, 100)
    within = np.stack([place, place], 1)
    assert knn_purity(within, classes)[0] == 1.0 and knn_purity(within, domain)[0] == 1.0
    crossed, chance = knn_purity(within, classes, domain)
    assert crossed == chance == 0.5                    # of all: the near edge of the other domain
    constant = np.hstack([within, np.ones((100, 1))])
    assert knn_purity(constant, classes, domain) == (crossed, chance)


def test_too_few_rows_of_other_domains_are_refused():
    with pytest.raises(Incompatible, match='Found a row with 3 others, expected 10'):
        knn_purity(np.zeros((23, 2)), np.zeros(23), np.array([0] * 20 + [1] * 3))


def test_both_encoders_are_measured_and_placed(data, finished):
    _, home = finished
    domains = Domains(data, home)
    file = rows_file(PLAN, 'LoRAReins', home, SHORT, 4)
    purities, points = bench_features(domains, file, PLAN, SHORT, ('town', 'flood'), 'pca')
    assert list(purities.encoder) == ['frozen', 'frozen', 'adapted', 'adapted']
    assert (purities.value.between(0, 1) & purities.chance.between(0, 1)).all()
    assert set(points) == {'class', 'domain', 'x', 'y', 'encoder'} and points[['x', 'y']].notna().all(axis=None)
    frozen, adapted = (points[points.encoder == name].reset_index(drop=True) for name in ('frozen', 'adapted'))
    assert frozen[['class', 'domain']].equals(adapted[['class', 'domain']]), 'other cells'
    assert len(frozen) == purities.cells.iloc[0]
