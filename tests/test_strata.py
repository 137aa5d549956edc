"""Groups of images: names, bands, missing values; recall of each group among all candidates."""
import numpy as np
import pytest

from rssqa.clip.evaluate import LEAST, recall, stratified_retrieval
from rssqa.core import Incompatible, SchemaError
from rssqa.data.pairs import PairRecord, read_pairs
from rssqa.data.strata import LATITUDES, SEVERAL, UNKNOWN, latitude_band, one_name, strata_of
from rssqa.testing.fake_corpora import fake_corpus


@pytest.mark.parametrize('lat, band', [
    (0, 'tropics'), (23.5, 'tropics'), (-23.6, 'lower middle latitudes'), (45, 'lower middle latitudes'),
    (-66.5, 'upper middle latitudes'), (66.6, 'polar'), (-90, 'polar'), (None, UNKNOWN), (float('nan'), UNKNOWN),
])
def test_bands_of_latitude(lat, band): assert latitude_band(lat) == band


def test_latitudes_off_the_earth_are_refused():
    with pytest.raises(SchemaError, match='90.5'): latitude_band(-90.5)
    assert [limit for limit, _ in LATITUDES] == sorted(limit for limit, _ in LATITUDES)


@pytest.mark.parametrize('value, name', [
    ('Sentinel-2', 'sentinel-2'), ([' Landsat  8 ', 'LANDSAT 8'], 'landsat 8'), (['OLI', 'TIRS'], SEVERAL),
    ([], UNKNOWN), ('', UNKNOWN), (['none', 'MODIS'], 'modis'), ('N/A', UNKNOWN),
    (None, UNKNOWN), (['Unknown'], UNKNOWN), ((), UNKNOWN),
])
def test_one_name_a_field(value, name): assert one_name(value) == name


def record(key, **meta): return PairRecord(key, None, ('a',), source=meta.pop('source', ''), meta=meta)


def test_missing_fields_are_unknown_and_text_is_a_number():
    table = strata_of([
        record('a'), record('b', lat='-33.9', sensor=['MSI'], resolution='High', source='rs5m/pub11'),
        record('c', lat='somewhere', modalities=['optical', 'SAR'])])
    assert list(table.index) == ['a', 'b', 'c']
    assert set(table.loc['a']) == {UNKNOWN}
    assert table.loc['b'].tolist() == ['rs5m/pub11', 'lower middle latitudes', 'high', UNKNOWN, 'msi', UNKNOWN]
    assert table.latitude['c'] == UNKNOWN and table.modalities['c'] == SEVERAL


def test_no_record_gives_an_empty_table(): assert strata_of([]).shape == (0, 6)


@pytest.mark.parametrize('kind', ['gaia', 'rs5m-tar'])
def test_corpora_have_groups(tmp_path, kind):
    records = list(read_pairs(kind, fake_corpus(kind, tmp_path, n=6)))
    table = strata_of(records)
    assert len(table) == len(records) > 0 and table.notna().all().all()
    assert (table.source != UNKNOWN).all()
    if kind == 'gaia': assert set(table.latitude) == {'tropics'} and set(table.resolution) == {'high'}


def draw(n=80, d=8, seed=0):
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(2, n, d))
    text = text + image
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
    return *unit, np.eye(n, dtype=bool)


def test_groups_average_to_the_whole():
    image, text, belongs = draw()
    group = np.array(['a'] * 50 + ['b'] * 30)
    table = stratified_retrieval(image, text, belongs, group, k=3)
    scores = text @ image.T
    assert np.average(table.i2t, weights=table.images) == pytest.approx(recall(scores.T, belongs.T, 3))
    assert np.average(table.t2i, weights=table.texts) == pytest.approx(recall(scores, belongs, 3))


def test_candidates_are_those_of_all_groups():
    image, text, belongs = draw()
    group = np.array(['a'] * 50 + ['b'] * 30)
    [t2i] = stratified_retrieval(image, text, belongs, group, k=1).query('group == "b"').t2i
    alone = recall(text[50:] @ image[50:].T, belongs[50:, 50:], 1)
    among_all = recall(text[50:] @ image.T, belongs[50:], 1)
    assert t2i == pytest.approx(among_all) and among_all < alone


def test_small_groups_get_no_figure():
    image, text, belongs = draw()
    group = ['a'] * (80 - LEAST + 1) + ['b'] * (LEAST - 1)
    table = stratified_retrieval(image, text, belongs, group).set_index('group')
    assert table.i2t.notna().to_dict() == dict(a=True, b=False) and table.images['b'] == LEAST - 1
    exact = stratified_retrieval(image, text, belongs, group, least=LEAST - 1)
    assert exact.notna().all().all()


def test_a_text_of_several_images_has_all_their_groups():
    image, text, belongs = draw(4)
    belongs[0, 3] = True
    table = stratified_retrieval(image, text, belongs, ['a', 'a', 'b', 'b'], least=1).set_index('group')
    assert table.texts.to_dict() == dict(a=2, b=3)


def test_wrong_sizes_are_refused():
    image, text, belongs = draw(4)
    with pytest.raises(Incompatible, match='3 groups'): stratified_retrieval(image, text, belongs, ['a'] * 3)
    with pytest.raises(Incompatible, match='3 texts'): stratified_retrieval(image, text[:3], belongs, ['a'] * 4)
