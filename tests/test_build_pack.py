"The bundled assessor: built from the tables, measured on sources left out, and read as it was built."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rssqa.core import Incompatible, read_json, write_json
from rssqa.data.synthetic import scene, write_scenes
from rssqa.quality.bounds import KNOWN_METHODS, KNOWN_SOURCE, measure_calibration
from rssqa.quality.build_pack import LEARN_FROM, best_on_average, build_networks
from rssqa.quality.pack import Pack, bundled_pack
from rssqa.quality.recommend import assess
from rssqa.quality.switching import fit_switch_rules
from rssqa.segment.methods.training import Recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def pack(): return Pack(bundled_pack())


@pytest.fixture(scope='module')
def measured(pack): return measure_calibration(pack.assessor.calibration)


def test_the_bundled_assessor_learned_from_sources_that_may_ship(pack):
    assert set(pack.assessor.sources) == set(LEARN_FROM)
    assert set(pack.datasets) <= set(LEARN_FROM)
    assert {'czech_ortho', 'dronedeploy'} <= set(pack.assessor.calibration.dataset)


def test_the_usual_method_is_one_of_the_pack(pack):
    for dataset in pack.datasets: assert pack.usual(dataset) in pack.methods(dataset)


def test_coverage_is_measured_on_sources_left_out():
    rng = np.random.default_rng(0)
    spread = np.repeat([0.02, 0.02, 0.2], 200)
    table = pd.DataFrame(dict(kind='few', dataset=np.repeat(['a', 'b', 'hard'], 200)))
    table = table.assign(scene=table.index // 10, image_id=table.index // 2, shortfall=0.1)
    table['predicted'] = rng.uniform(0.4, 0.8, 600)
    table['oa'] = (table.predicted + rng.normal(0, spread)).clip(0, 1)
    measured = measure_calibration(table).set_index('dataset')
    assert measured.coverage['hard'] < 0.5 < 0.95 < measured.coverage['a']
    assert measured.mae['hard'] > 3 * measured.mae['a']
    assert (measured.images == 100).all() and measured.bias.abs().max() < 0.06


def test_measures_of_the_bundled_assessor(measured):
    assert measured.input.str.endswith(KNOWN_SOURCE).any() and measured.input.str.endswith(KNOWN_METHODS).any()
    assert measured.mae.between(0, 0.3).all() and measured.srocc_dataset.gt(0).all()


def test_the_committed_measures_follow_from_the_calibration(measured):
    written = pd.read_csv(ROOT/'data'/'results'/'assessor.csv')
    key = ['input', 'dataset']
    both = measured.merge(written, on=key, suffixes=('', '_written'))
    assert len(both) == len(measured) == len(written)
    for name in ('srocc_image', 'srocc_dataset', 'mae', 'bias', 'coverage', 'width'):
        assert np.allclose(both[name], both[f'{name}_written'], atol=2e-5, equal_nan=True)


def test_the_card_says_what_was_measured(pack, measured):
    card = read_json(pack.folder/'card.json')['assessor']
    assert card['learned_from'] == sorted(LEARN_FROM) and card['encoder'] == pack.assessor.encoder
    many = measured[measured.input == 'many']
    assert card['measures']['many']['mae'] == pytest.approx(many.mae.mean(), abs=6e-4)
    assert card['measures']['many']['worst_coverage'] == pytest.approx(many.coverage.min(), abs=6e-4)


def test_best_on_average_by_hand():
    table = pd.DataFrame(dict(dataset=['t'] * 4, method=['a', 'b', 'a', 'b'], oa=[0.9, 0.5, 0.1, 0.6]))
    assert best_on_average(table, dict(t=['a', 'b'])) == dict(t='b')
    with pytest.raises(Incompatible, match='does not belong'): best_on_average(table, dict(x=['a']))


def test_networks_of_the_pack_are_assessed(pack):
    image = scene('town', seed=5, size=64).image
    answer = assess(image, pack=pack)
    assert sorted(answer.table.name) == pack.methods() and answer.pack == pack.name
    black = assess(np.zeros((64, 64, 3), np.uint8), pack=pack)
    assert black.domain.refused and black.table.predicted.isna().all()


def test_maps_need_a_class_table(pack):
    with pytest.raises(Incompatible, match='no class table'):
        assess(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), int), pack=pack)


def test_the_card_and_the_rules_of_change_are_those_that_were_measured(pack):
    metrics = read_json(pack.folder/'card.json')['metrics']
    written = pd.read_csv(ROOT/'data'/'results'/'pack.csv').set_index('group')
    for group in ('all tiles', 'scenes counted equally'):
        for name, value in metrics[group].items(): assert value == pytest.approx(written.loc[group, name], abs=6e-4)
    calibration = pack.assessor.calibration
    rules = fit_switch_rules(calibration[calibration.kind.str.endswith(KNOWN_SOURCE)])
    shipped, again = pd.json_normalize(pack.assessor.switch_rules), pd.json_normalize(rules)
    assert set(shipped) == set(again) and np.allclose(shipped[again.columns], again)


def test_networks_are_trained_put_into_a_pack_and_answer(tmp_path):
    names = ('town', 'flood')
    for name in names: write_scenes(tmp_path/'data'/name, name, 3, 32)
    (tmp_path/'pack').mkdir()
    write_json(tmp_path/'pack'/'pack.json', dict(name='of these', networks={}, default='synth_town'))
    write_json(tmp_path/'pack'/'card.json', dict(licence='free', metrics=dict(mae=0.1)))
    options = dict(methods=('unet', 'pspnet'), recipe=Recipe('nano', steps=2, batch=2, crop=32), sources=names)
    build_networks(tmp_path/'pack', tmp_path/'data', home=tmp_path/'home', workers=1, **options)
    built = Pack(tmp_path/'pack', 'cpu')
    assert built.datasets == ['synth_flood', 'synth_town']
    assert built.config['name'] == 'of these' and built.config['default'] == 'synth_town'    # what was there stays
    card = read_json(tmp_path/'pack'/'card.json')
    assert card['licence'] == 'free' and len(card['networks']) == 4
    assert 'metrics' not in card                               # they were those of other networks
    images = torch.as_tensor(scene('town', seed=5, size=32).image[None])
    for dataset in built.datasets:
        maps = {name: network(images).mask[0] for name, network in built.networks(dataset).items()}
        assert set(maps) == {'unet', 'pspnet'} and all(m.shape == (32, 32) for m in maps.values())
