"Labels of a folder: one file goes back and forth, nothing in it is lost, and every mistake in it is named."
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rssqa.cli import main
from rssqa.core import DataNotFound, Incompatible, Problem, SchemaError, UnknownName
from rssqa.quality.next_labels import advise_folder, read_points

CLASSES = ['water', 'land', 'town']
SIDE = 48
IMAGES = ['a.png', 'east/b.png', 'east/c.png']


def place_of(home, name, image): return home/name/image


@pytest.fixture
def home(tmp_path):
    "Three images in two folders, their truth, and three methods that err more and more."
    rng = np.random.default_rng(0)
    for image in IMAGES:
        truth = np.kron(rng.integers(0, 3, (8, 8)), np.ones((6, 6), int)).astype(np.uint8)
        pictures = {'images': np.stack([40 * truth + 60] * 3, -1), 'truth': truth}
        for name, share in dict(good=0.1, fair=0.25, poor=0.5).items():
            wrong = rng.random(truth.shape) < share
            pictures[name] = np.where(wrong, (truth + 1) % 3, truth)
        for name, picture in pictures.items():
            path = place_of(tmp_path, name, image)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.astype(np.uint8)).save(path)
    return tmp_path


@pytest.fixture
def maps(home): return {name: home/name for name in ('poor', 'good', 'fair')}


def truth_at(home, row): return int(np.asarray(Image.open(place_of(home, 'truth', row.image)))[row.y, row.x])


def fill_in(home, path, names=True):
    rows = pd.read_csv(path, dtype={'class': str})
    for row in rows[rows['class'].isna()].itertuples():
        k = truth_at(home, row)
        rows.loc[row.Index, 'class'] = CLASSES[k] if names else str(k)
    rows.to_csv(path, index=False)


def labels_of(*rows): return pd.DataFrame(rows, columns=['image', 'x', 'y', 'class'])


def test_points_have_the_classes_of_the_maps(home, maps):
    found = read_points(home/'images', maps, CLASSES, labels_of(('east/b.png', 1, 0, 'town'), ('a.png', 5, 7, '')))
    assert found.names == list(maps) and sorted(found.places.image.unique()) == IMAGES
    for row, votes in list(zip(found.places.itertuples(), found.votes))[::17]:
        expected = [np.asarray(Image.open(place_of(home, name, row.image)))[row.y, row.x] for name in maps]
        assert votes.tolist() == expected
    np.testing.assert_allclose(found.q.sum(1), 1, atol=1e-5)
    label = found.places.loc[found.labelled]
    assert label.values.tolist() == [['east/b.png', 1, 0]] and found.classes.tolist() == [2]


def test_every_point_stands_once(home, maps):
    on_the_grid = read_points(home/'images', maps, CLASSES).places.iloc[5]
    again = labels_of((on_the_grid.image, on_the_grid.x, on_the_grid.y, 'land'))
    found = read_points(home/'images', maps, CLASSES, again)
    assert not found.places.duplicated().any() and len(found.labelled) == 1


def test_the_number_of_points_is_limited_but_labels_stay(home, maps):
    label = labels_of(('a.png', 47, 47, 'land'))
    few = read_points(home/'images', maps, CLASSES, label, most=12)
    assert len(few.places) == 3 * 4 + 1 and len(few.labelled) == 1


def test_the_best_method_is_found_and_the_file_keeps_what_a_person_wrote(home, maps):
    path = home/'labels.csv'
    kept = pd.DataFrame()
    for _ in range(40):
        advice, waiting = advise_folder(home/'images', maps, CLASSES, path, n=15)
        if advice.stop: break
        assert len(waiting) == 15
        rows = pd.read_csv(path, dtype={'class': str})
        if len(kept): pd.testing.assert_frame_equal(rows.iloc[:len(kept)], kept)
        assert not rows.duplicated(['image', 'x', 'y']).any()
        fill_in(home, path, names=len(kept) % 2 == 0)
        kept = pd.read_csv(path, dtype={'class': str})
    assert advice.stop and advice.leader == 'good'
    before = path.read_bytes()
    assert advise_folder(home/'images', maps, CLASSES, path)[0].stop and path.read_bytes() == before


def test_waiting_points_are_not_asked_twice(home, maps):
    path = home/'labels.csv'
    _, first = advise_folder(home/'images', maps, CLASSES, path, n=6)
    before = path.read_bytes()
    _, again = advise_folder(home/'images', maps, CLASSES, path, n=6)
    assert path.read_bytes() == before and again.values.tolist() == first.values.tolist()
    _, more = advise_folder(home/'images', maps, CLASSES, path, n=9)
    assert len(more) == 9 == len(pd.read_csv(path)) and more.values.tolist()[:6] == first.values.tolist()


def test_a_label_where_a_map_has_no_value_is_counted_out(home, maps, capsys, monkeypatch):
    monkeypatch.delenv('RSSQA_QUIET', raising=False)
    ids = np.asarray(Image.open(maps['fair']/'a.png')).copy()
    ids[:6] = 255
    Image.fromarray(ids).save(maps['fair']/'a.png')
    labels = labels_of(('a.png', 0, 0, 'land'), ('a.png', 0, 40, 'land'))
    found = read_points(home/'images', maps, CLASSES, labels)
    assert found.unusable == 1 and len(found.labelled) == 1 and (found.votes != 255).all()
    assert '1 labels are left out: a map has no value there' in capsys.readouterr().err


@pytest.mark.parametrize('labels, error, words', [
    (labels_of(('a.png', 48, 0, 'land')), SchemaError, 'lies outside a.png.*48, 0'),
    (labels_of(('a.png', 0, -1, 'land')), SchemaError, 'lies outside'),
    (labels_of(('a.png', 0, 0, 'lnad')), UnknownName, 'land'),
    (labels_of(('b.png', 0, 0, 'land')), DataNotFound, 'b.png, which is not among the 3 images'),
    (labels_of(('a.png', None, 0, 'land')), SchemaError, 'found 1 rows in which x or y is no number'),
    (labels_of(('a.png', 0, 0, 'land')).drop(columns='y'), SchemaError, 'expected image, x, y, class'),
])
def test_a_mistake_in_the_labels_is_named(home, maps, labels, error, words):
    with pytest.raises(error, match=f'(?i){words}'): read_points(home/'images', maps, CLASSES, labels)


def test_a_file_with_a_mistake_stays_as_it_is(home, maps):
    path = home/'labels.csv'
    labels_of(('a.png', 0, 0, 'lnad')).to_csv(path, index=False)
    before = path.read_bytes()
    with pytest.raises(Problem): advise_folder(home/'images', maps, CLASSES, path)
    assert path.read_bytes() == before


def test_maps_that_do_not_fit_are_refused(home, maps):
    with pytest.raises(Incompatible, match='(?i)two methods or more'):
        read_points(home/'images', dict(good=maps['good']), CLASSES)
    (maps['fair']/'east/c.png').unlink()
    with pytest.raises(DataNotFound, match='(?i)no map of east/c.png.*name maps like'):
        read_points(home/'images', maps, CLASSES)


def test_the_command_goes_round(home, maps, capsys):
    (home/'classes.json').write_text(json.dumps(CLASSES))
    options = [word for name, place in maps.items() for word in ('--map', f'{name}={place}')]
    command = ['advise', str(home/'images'), *options, '--classes', str(home/'classes.json')]

    def run(*more, code=0):
        with pytest.raises(SystemExit) as e: main([*command, *more])
        out = capsys.readouterr()
        assert e.value.code == code, out.err
        return out.out + out.err

    path = home/'labels.csv'
    assert '20 points wait for a class' in run('--labels', str(path), '-n', '20')
    for _ in range(30):
        fill_in(home, path)
        text = run('--labels', str(path), '-n', '20')
        if 'No more labels are needed' in text: break
    assert 'good is best or within 0.005 OA of the best' in text
    assert 'expected .csv' in run('--labels', str(home/'labels.parquet'), code=2)
    assert 'not writable' in run('--labels', str(home/'none'/'labels.csv'), code=2)


def test_a_point_that_cannot_be_named_is_left_out_and_not_asked_again(home, maps):
    path = home/'labels.csv'
    _, first = advise_folder(home/'images', maps, CLASSES, path, n=6)
    rows = pd.read_csv(path, dtype={'class': str})
    rows['class'] = '?'
    rows.to_csv(path, index=False)
    found, second = advise_folder(home/'images', maps, CLASSES, path, n=6)
    assert found.labels == 0 and len(second) == 6
    asked = pd.concat([first, second])
    assert not asked.duplicated(['image', 'x', 'y']).any()
    points = read_points(home/'images', maps, CLASSES, rows)
    assert not pd.concat([points.places, first]).duplicated().any() and points.unusable == 0
