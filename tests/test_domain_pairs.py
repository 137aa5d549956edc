"""Pairs of domains: the list of the paper, common classes of open sources, masks in common classes."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rssqa.core import BadImage, Incompatible, SchemaError, UnknownName
from rssqa.data.catalog import loveda, potsdam
from rssqa.data.datasets import IGNORE, folder_spec, make_spec, read_mask, scan
from rssqa.data.synthetic import write_scenes
from rssqa.domains.pairs import (
    COMMON, COUNTERPARTS, FROM_ONE, PAPER_PAIRS, DomainPair, common_ids, common_list, common_spec, find_pair,
    label_decoder, open_pairs, to_common,
)

CLASSES = json.loads((Path(__file__).parents[1]/'data/tables/classes.json').read_text())
LISTED = [(common, source) for common, sources in COUNTERPARTS.items() for source in sources]


# ---------------------------------------------------------------- the paper

@pytest.mark.parametrize('name', ['P(i)2V', 'P(r)2V', 'V2P(i)', 'V2P(r)', 'P(i)2P(r)', 'P(r)2P(i)'])
def test_isprs_pairs_read_labels_from_one(name):
    pair = find_pair(name)
    decode = label_decoder(pair)
    assert pair.count == len(pair.classes) == 6 and pair.labels == FROM_ONE
    assert decode(np.arange(7)[None]).tolist() == [[IGNORE, 0, 1, 2, 3, 4, 5]]
    with pytest.raises(BadImage, match='undescribed class id: 7'): decode(np.array([[7]]))


def test_loveda_pairs_read_as_the_catalog_does():
    for name in ('Urban2Rural', 'Rural2Urban'):
        stored = np.arange(8)[None]
        assert np.array_equal(label_decoder(find_pair(name))(stored), loveda.decode(stored))
    assert [c.split()[0] for c in find_pair('Urban2Rural').classes] == [c.split('_')[0] for c in loveda.classes]
    assert len(find_pair('P(i)2V').classes) == len(potsdam.classes)


def test_climates_are_four_by_four_and_four_stay_at_home():
    casid = [pair for pair in PAPER_PAIRS if pair.source.startswith('CASID')]
    assert len(casid) == 16 and sum(not pair.is_new for pair in casid) == 4
    assert all(pair.count == 5 for pair in casid) and {pair.count for pair in PAPER_PAIRS} == {0, 5, 6, 7}


@pytest.mark.parametrize('name', ['A2S', 'S2A', 'D2M', 'P(i)2Res', 'Sub2Trf'])
def test_labels_that_we_do_not_know_are_refused(name):
    with pytest.raises(Incompatible, match=r'(?s)cannot read the masks of .*not known'): label_decoder(find_pair(name))


def test_a_pair_that_nobody_knows_is_refused():
    with pytest.raises(UnknownName, match='Urban2Rural'): find_pair('Urban2Rurall')


# ---------------------------------------------------------------- open sources

@pytest.mark.parametrize('common, source', LISTED)
def test_every_class_of_a_source_has_an_entry(common, source):
    classes = CLASSES[source]['classes']
    ids = common_ids(source, classes, common)
    assert set(COUNTERPARTS[common][source]) == set(classes) and len(ids) == len(classes)
    assert {i for i in ids if i != IGNORE} == set(range(len(COMMON[common]))), 'a common class without pixels'


def test_names_decide_and_not_their_order():
    classes = CLASSES['mumbai_pleiades']['classes']
    shuffled = tuple(reversed(classes))
    mask = np.arange(6)[None]
    turned = to_common(5 - mask, 'mumbai_pleiades', shuffled, 'land_cover')
    assert np.array_equal(turned, to_common(mask, 'mumbai_pleiades', classes, 'land_cover'))


@pytest.mark.parametrize('common, source, expected', [
    ('land_cover', 'dubai_mbrsc', [0, 3, 1, 2, 4]),
    ('land_cover', 'mumbai_pleiades', [0, 0, 1, 2, 3, 4]),
    ('land_cover', 'czech_ortho', [2, IGNORE, 1, 0, 4, 3]),
    ('water_land', 'coast_usgs', [0, IGNORE, 1]),
    ('water_land', 'dubai_mbrsc', [1, 1, 1, 1, 0]),
    ('water_land', 'mumbai_pleiades', [1, 1, 1, 1, 1, 0]),
    ('water_land', 'czech_ortho', [1, 1, 1, 1, 0, 1]),
    ('water_land', 'dronedeploy', [1, 1, 1, 0, 1, 1]),
])
def test_counterparts_by_hand(common, source, expected):
    classes = CLASSES[source]['classes']
    found = to_common(np.array([[*range(len(classes)), IGNORE]]), source, classes, common)
    assert found.tolist() == [[*expected, IGNORE]] and found.dtype == np.uint8


def test_pairs_go_both_ways_and_have_the_longest_list():
    found = {(pair.source, pair.target): pair for pair in open_pairs()}
    assert all((b, a) in found and found[b, a].classes == pair.classes for (a, b), pair in found.items())
    assert found['dubai_mbrsc', 'mumbai_pleiades'].classes == COMMON['land_cover']
    assert found['coast_usgs', 'dubai_mbrsc'].classes == COMMON['water_land']
    assert all(pair.is_new and pair.count > 1 for pair in found.values())
    assert find_pair('dronedeploy2coast_usgs').classes == ('water', 'land')


@pytest.mark.parametrize('target', ['coast_usgs', 'dubai_mbrsc'])
def test_no_common_class_is_an_error(target):
    with pytest.raises(Incompatible, match=r'(?s)amazon_forest.*no common class list'):
        common_list('amazon_forest', target)


@pytest.mark.parametrize('bad', [6, 77, 254])
def test_an_unknown_id_in_a_mask_is_an_error(bad):
    mask = np.zeros((4, 4), int)
    mask[1, 2] = bad
    with pytest.raises(BadImage, match=f'undescribed class id: {bad} on 1 px'):
        to_common(mask, 'mumbai_pleiades', CLASSES['mumbai_pleiades']['classes'], 'land_cover')


def test_another_class_table_a_source_or_a_list_without_entry_is_refused():
    with pytest.raises(SchemaError, match='Found classes sea, land, expected'):
        common_ids('coast_usgs', ('sea', 'land'), 'water_land')
    with pytest.raises(UnknownName, match='dronedeploy'): common_ids('dronedeploy', ('ground',), 'land_cover')
    with pytest.raises(UnknownName, match='water_land'): common_ids('coast_usgs', ('water',), 'water_lan')


def test_a_folder_is_read_in_common_classes(tmp_path, monkeypatch):
    root = write_scenes(tmp_path/'drawn', 'town', 2, 32)
    spec = folder_spec(root)
    table = dict.fromkeys(spec.classes, 'land') | {spec.classes[0]: 'water', spec.classes[1]: None}
    monkeypatch.setitem(COUNTERPARTS['water_land'], 'drawn', table)
    shared = common_spec(spec, 'water_land', 'drawn')
    row = next(scan(root).itertuples())
    own, common = read_mask(row, spec), read_mask(row, shared)
    expected = np.where(own == 0, 0, np.where((own == 1) | (own == IGNORE), IGNORE, 1))
    assert shared.classes == COMMON['water_land'] and len(shared.palette) == 2
    assert np.array_equal(common, expected) and set(np.unique(common)) - {IGNORE}


def test_coloured_masks_are_still_read_as_colours(tmp_path):
    palette = ((0, 0, 255), (255, 255, 255), (200, 160, 40))
    spec = make_spec('coast_usgs', ('water', 'surf_and_shallow', 'land'), palette=palette)
    shared = common_spec(spec, 'water_land')
    (tmp_path/'images').mkdir()
    (tmp_path/'masks').mkdir()
    colours = np.array(palette, np.uint8)[np.array([[0, 1, 2]] * 20)]
    for kind in ('images', 'masks'): Image.fromarray(colours).save(tmp_path/kind/'a.png')
    row = next(scan(tmp_path, spec).itertuples())
    assert read_mask(row, shared)[0].tolist() == [0, IGNORE, 1]


def test_the_error_of_a_pair_lists_what_is_known():
    assert isinstance(find_pair('coast_usgs2czech_ortho'), DomainPair)
    with pytest.raises(UnknownName, match='domain pair'): find_pair('amazon_forest2coast_usgs')
