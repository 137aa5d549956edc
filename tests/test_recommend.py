"""Scoring and ranking new images: a number for each method, a reason for every refusal."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rssqa.core import BadImage, DataNotFound, Incompatible, SchemaError, read_json, write_json
from rssqa.data.datasets import read_image
from rssqa.quality.folders import SUFFIXES
from rssqa.quality.pack import Pack, bundled_pack, default_pack, open_pack, use_pack, write_pack
from rssqa.quality.recommend import rank, recommend, score
from rssqa.segment.protocol import TorchSegmenter
from trained import METHODS, trained_setup


@pytest.fixture(scope='module')
def pack(): return Pack(trained_setup().home)


@pytest.fixture(scope='module')
def image(): return read_image(trained_setup().tiles.iloc[0])


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ('b.png', 'a.jpg', 'deep/c.TIF'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path/name)
    (tmp_path/'notes.txt').write_text('no image')
    return tmp_path


def pack_with(tmp_path, **change):
    "A pack in another folder, with the networks of trained_setup and a changed configuration."
    home = trained_setup().home
    for path in home.iterdir():
        if path.is_dir() and not (tmp_path/path.name).exists(): (tmp_path/path.name).symlink_to(path)
    config = dict(networks=read_json(home/'pack.json')['networks'])
    write_json(tmp_path/'pack.json', config | change)
    return Pack(tmp_path)


# ---------------------------------------------------------------- packs

def test_pack_lists_what_it_holds(pack):
    assert pack.datasets == ['synth_town'] and '2 methods' in repr(pack)
    assert pack.methods('synth_town') == pack.methods(None) == METHODS
    assert pack.segmenter('pspnet') is pack.segmenter('pspnet', 'synth_town')
    assert pack.classes() == pack.segmenter('pspnet').classes
    assert pack.segmenter('pspnet').config['fold'] == 0


def test_missing_packs_are_named(tmp_path, monkeypatch, image):
    with pytest.raises(DataNotFound, match='no pack in.*pack.json.*rssqa fit'): Pack(tmp_path)
    monkeypatch.setenv('RSSQA_PACK', str(tmp_path/'gone'))
    with pytest.raises(DataNotFound, match='gone'): score(image, 'pspnet')
    with pytest.raises(DataNotFound, match='gone'): recommend(tmp_path)


def test_a_pack_is_used_only_where_it_is_chosen(monkeypatch, tmp_path, image):
    monkeypatch.delenv('RSSQA_PACK', raising=False)
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    assert default_pack() == bundled_pack()
    assert use_pack(trained_setup().home) == default_pack() == trained_setup().home
    assert 0 < score(image, 'pspnet') < 1
    with pytest.raises(DataNotFound, match='no pack in'): use_pack(tmp_path/'none')
    assert default_pack() == trained_setup().home
    monkeypatch.setenv('RSSQA_PACK', 'elsewhere')
    assert str(default_pack()) == 'elsewhere'
    monkeypatch.delenv('RSSQA_PACK')
    assert use_pack() == default_pack() == bundled_pack()


@pytest.mark.parametrize('change', [
    dict(networks=None), dict(networks={}), dict(networks=[]), dict(networks={'town': {}}), dict(networks={'town': 3}),
    dict(networks={'town': {'unet': '/etc'}}), dict(networks={'town': {'unet': '../outside'}}),
    dict(networks={'town': {'unet': 'a/../../outside'}}), dict(networks={'town': {'unet': 7}}),
    dict(assessor='/etc'), dict(assessor='../x'), dict(assessor=3),
])
def test_a_pack_of_wrong_shape_or_that_leaves_its_folder(tmp_path, change):
    config = dict(networks={'town': {'unet': 'networks/unet'}}, assessor='assessor')
    write_json(tmp_path/'pack.json', config)
    Pack(tmp_path)
    write_json(tmp_path/'pack.json', config | change)
    with pytest.raises(SchemaError, match='cannot use the pack in') as e: Pack(tmp_path)
    assert e.value.found and e.value.todo


@pytest.mark.parametrize('content', ['[]', '3', '"x"', 'null'])
def test_a_pack_that_is_no_table(tmp_path, content):
    (tmp_path/'pack.json').write_text(content)
    with pytest.raises(SchemaError, match='cannot use the pack in'): Pack(tmp_path)


def test_open_pack_takes_a_folder_a_pack_or_nothing(pack, monkeypatch):
    monkeypatch.setenv('RSSQA_PACK', str(pack.folder))
    assert open_pack(pack) is pack
    assert open_pack(pack.folder).folder == open_pack().folder == pack.folder


def test_bundled_pack_scores_any_photo(image):
    pack = Pack(bundled_pack())
    assert 'czech_ortho' not in pack.datasets and 'dronedeploy' not in pack.datasets
    for dataset in pack.datasets:
        ranked = rank(image, pack, dataset)
        assert sorted(ranked.method) == pack.methods(dataset)
        assert ranked.predicted.between(0, 1).all() and ranked.predicted.nunique() > 1
    default = rank(image, pack, pack.config['default'])
    assert np.array_equal(rank(image, pack).predicted, default.predicted)
    assert sum(f.stat().st_size for f in pack.folder.rglob('*') if f.is_file()) < 25e6
    card = read_json(pack.folder/'card.json')
    assert {'data', 'licence', 'metrics', 'made_by'} <= set(card) and set(card['data']) == set(pack.datasets)


@pytest.mark.parametrize('method, dataset, message', [
    ('pspnett', None, 'mean pspnet'),
    ('unet', None, 'no method for synth_town'),
    ('pspnet', 'synth_twon', 'mean synth_town'),
])
def test_unknown_names_are_suggested(method, dataset, message, pack, image):
    with pytest.raises(KeyError, match=message): score(image, method, dataset, pack)


def test_ambiguous_dataset_names_the_choice(tmp_path, image, folder):
    networks = pack_with(tmp_path).config['networks']['synth_town']
    pack = pack_with(tmp_path, networks=dict(here=networks, there=networks))
    with pytest.raises(Incompatible, match='here, there.*dataset='): score(image, 'pspnet', pack=pack)
    with pytest.raises(Incompatible, match='here, there'): recommend(folder, pack)
    assert score(image, 'pspnet', 'here', pack) > 0


def test_broken_packs_are_refused(tmp_path):
    (tmp_path/'pack.json').write_text('{')
    with pytest.raises(ValueError, match='pack.json'): Pack(tmp_path)
    without_network = pack_with(tmp_path, networks=dict(synth_town=dict(pspnet='nowhere')))
    with pytest.raises(DataNotFound, match='nowhere'): without_network.segmenter('pspnet')
    with pytest.raises(DataNotFound, match='no-assessor'): pack_with(tmp_path, assessor='no-assessor').assessor


def test_pack_has_relative_paths_and_one_fold():
    setup = trained_setup()
    networks = json.loads((setup.home/'pack.json').read_text())['networks']['synth_town']
    assert sorted(networks) == METHODS
    assert all('fold0' in path and not path.startswith('/') for path in networks.values())
    with pytest.raises(ValueError):  # networks must lie below the pack
        write_pack(setup.home/'elsewhere', setup.networks)


# ---------------------------------------------------------------- a segmenter of one's own

class OwnNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.encoder = nn.Conv2d(3, 12, 4, 4)
        self.decoder = nn.Conv2d(12, 6, 1)
        self.head = nn.Conv2d(6, classes, 1)

    def forward(self, x): return self.head(self.decoder(self.encoder(x)))


def own_segmenter(classes): # a network without a folder and without statistics of training images
    torch.manual_seed(0)
    return TorchSegmenter(OwnNet(len(classes)), classes, name='own', stride=4)


@pytest.fixture
def extended(): # a fresh Pack with one added segmenter
    pack = Pack(trained_setup().home)
    return pack.add('own', own_segmenter(pack.classes()))


def test_added_segmenter_is_ranked_beside_the_others(extended, image, folder):
    assert extended.methods() == sorted([*METHODS, 'own']) and '3 methods' in repr(extended)
    ranked = rank(image, extended, keep_masks=True).set_index('method')
    assert set(ranked.index) == {*METHODS, 'own'} and ranked.predicted.between(0, 1).all()
    expected = extended.segmenter('own')(torch.as_tensor(image)[None]).mask[0].numpy()
    assert np.array_equal(ranked['mask']['own'], expected)
    rows, _ = recommend(folder, extended)
    assert rows.groupby('path').method.nunique().eq(3).all()


def test_added_segmenter_is_scored_alone(extended, image):
    alone = score(image, 'own', pack=extended, other_methods=False)
    assert 0 < alone < 1 and alone == rank(image, extended, methods=['own']).predicted[0]


def test_added_segmenter_stays_in_its_pack_object(extended, image):
    assert Pack(extended.folder).methods() == METHODS
    others = rank(image, extended, methods=METHODS)
    assert others.equals(rank(image, Pack(extended.folder)))


def test_another_class_table_is_refused(pack):
    classes = pack.classes()
    for wrong in (classes[:-1], classes[::-1], (*classes, 'more')):
        with pytest.raises(Incompatible) as e: pack.add('own', own_segmenter(wrong))
        assert "cannot add 'own' to synth_town" in e.value.what
        assert ', '.join(wrong) in e.value.found and ', '.join(classes) in e.value.found
        assert 'in this order' in e.value.todo
    assert pack.methods() == METHODS


def test_a_second_segmenter_of_a_name_needs_replace(extended):
    other = own_segmenter(extended.classes())
    for name in ('own', 'pspnet'):
        with pytest.raises(Incompatible, match=f'{name}.*replace=True'): extended.add(name, other)
        extended.add(name, other, replace=True)
        assert extended.segmenter(name) is other
    assert extended.methods() == sorted([*METHODS, 'own'])


def test_added_segmenter_belongs_to_one_dataset(tmp_path):
    networks = pack_with(tmp_path).config['networks']['synth_town']
    pack = pack_with(tmp_path, networks=dict(here=networks, there=networks))
    own = own_segmenter(pack.classes('here'))
    with pytest.raises(Incompatible, match='here, there'): pack.add('own', own)
    with pytest.raises(KeyError, match='mean here'): pack.add('own', own, 'hree')
    pack.add('own', own, 'here')
    assert 'own' in pack.methods('here') and 'own' not in pack.methods('there')
    with pytest.raises(KeyError, match='no method for there'): pack.segmenter('own', 'there')


# ---------------------------------------------------------------- scores

def test_rank_is_sorted_and_label_free(pack, image):
    ranked = rank(image, pack, keep_masks=True)
    assert sorted(ranked.method) == METHODS
    assert ranked.predicted.is_monotonic_decreasing and ranked.predicted.between(0, 1).all()
    assert ranked['mask'].iloc[0].shape == (64, 64)
    assert {'lower', 'upper', 'agreement', 'confidence', 'state', 'reason'} <= set(ranked) and 'oa' not in ranked
    assert (ranked.lower <= ranked.predicted).all() and (ranked.predicted <= ranked.upper).all()
    assert 'mask' not in rank(image, pack)
    assert rank(image, pack, methods=['pspnet']).method.tolist() == ['pspnet']


def test_score_is_the_prediction_of_the_ranking(pack, image, tmp_path):
    compared = score(image, 'pspnet', pack=pack)
    alone = score(image, 'pspnet', pack=pack, other_methods=False)
    assert isinstance(compared, float) and 0 < compared < 1 and 0 < alone < 1
    assert compared == rank(image, pack).set_index('method').predicted['pspnet']
    assert alone == rank(image, pack, methods=['pspnet']).predicted[0]
    path = tmp_path/'x.png'
    pixels = image.transpose(1, 2, 0)
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)
    for same in (path, str(path), Image.open(path), pixels):
        assert score(same, 'pspnet', pack=trained_setup().home) == compared


@pytest.mark.parametrize('size', [(64, 64), (16, 16), (37, 50), (90, 33)])
def test_any_size_is_scored(size, pack):
    assert 0 < score(np.random.default_rng(0).random((*size, 3)), 'segformer', pack=pack) < 1


@pytest.mark.parametrize('value', [0, 255])
def test_flat_images_are_refused(value, pack):
    with pytest.raises(BadImage, match='no prediction.*no data|no prediction.*same value'):
        rank(np.full((64, 64, 3), value, np.uint8), pack)


def test_too_small_image_is_named(pack, tmp_path):
    Image.new('RGB', (40, 8)).save(tmp_path/'small.png')
    with pytest.raises(BadImage, match='small.png.*40x8 pixels, expected at least 16'):
        score(tmp_path/'small.png', 'pspnet', pack=pack)
    with pytest.raises(BadImage, match='this image'): rank(np.zeros((8, 40, 3), np.uint8), pack)


def test_a_large_image_is_refused_before_it_is_decoded(pack, tmp_path, monkeypatch):
    Image.new('L', (8192, 4096)).save(tmp_path/'large.png')
    monkeypatch.setattr('rssqa.quality.assessor.as_image', None)
    with pytest.raises(BadImage, match='large.png.*8192x4096 pixels.*4096x4096.*(?i:cut it into tiles)'):
        score(tmp_path/'large.png', 'pspnet', pack=pack)


def test_no_such_image(pack, tmp_path):
    with pytest.raises(DataNotFound, match='gone.png'): score(tmp_path/'gone.png', 'pspnet', pack=pack)


# ---------------------------------------------------------------- folders

def test_folder_is_ranked_image_by_image(pack, folder):
    rows, skipped = recommend(folder, pack)
    assert list(rows) == ['path', 'method', 'predicted', 'recommended']
    assert list(skipped) == ['path', 'reason'] and skipped.empty
    assert rows.path.unique().tolist() == ['a.jpg', 'b.png', 'deep/c.TIF'] and len(rows) == 6
    assert rows.groupby('path').recommended.sum().eq(1).all()
    best = rows.groupby('path').predicted.max()
    assert (rows[rows.recommended].predicted.to_numpy() == best).all()


def test_unusable_files_are_skipped_with_a_reason(pack, folder):
    (folder/'torn.png').write_bytes((folder/'b.png').read_bytes()[:300])
    (folder/'empty.jpg').write_bytes(b'')
    (folder/'page.tif').write_bytes(b'<html>')
    Image.new('RGB', (8, 8)).save(folder/'tiny.png')
    Image.fromarray(np.full((64, 64), 60000, np.uint16)).save(folder/'deep16.png')
    rows, skipped = recommend(folder, pack)
    assert set(skipped.path) == {'torn.png', 'empty.jpg', 'page.tif', 'tiny.png', 'deep16.png'}
    assert rows.path.nunique() == 3
    assert all(path in reason for path, reason in zip(skipped.path, skipped.reason))


def test_nothing_usable(pack, tmp_path):
    with pytest.raises(DataNotFound, match='no folder'): recommend(tmp_path/'gone', pack)
    with pytest.raises(DataNotFound, match='no image.*png'): recommend(tmp_path, pack)
    for name in ('a.png', 'b.jpg'): (tmp_path/name).write_bytes(b'x')
    with pytest.raises(BadImage, match='(?i)all 2 failed'): recommend(tmp_path, pack)
    assert '.png' in SUFFIXES


def test_a_mask_beside_the_image_does_not_matter(pack, tmp_path):
    "A tile of a dataset folder, whose mask lies beside it, ranks like a copy elsewhere and like its pixels."
    setup = trained_setup()
    tile = setup.tiles.iloc[0]
    path = setup.home/'town'/tile.path
    copy = tmp_path/'copy.png'
    copy.write_bytes(path.read_bytes())
    expected = rank(read_image(tile), pack)
    assert rank(path, pack).equals(expected) and rank(copy, pack).equals(expected)
