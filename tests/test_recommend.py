"""Scoring and ranking new images: a float for a map, a reason for every refusal."""
import json

import numpy as np
import pytest
from PIL import Image

from rssqa.core import BadImage, DataNotFound, Incompatible, read_json, write_json
from rssqa.data.datasets import read_image
from rssqa.quality.consensus import ConsensusEnsemble, ConsensusNet, save_consensus
from rssqa.quality.recommend import (
    SUFFIXES,
    Pack,
    default_pack,
    rank,
    recommend,
    score,
    bundled_pack,
    write_pack,
)
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


def with_config(tmp_path, **change): # a pack elsewhere, whose networks and model are those of the world
    home = trained_setup().home
    config = read_json(trained_setup().home/'pack.json')
    networks = {d: {m: str(home/f) for m, f in nets.items()} for d, nets in config['networks'].items()}
    write_json(tmp_path/'pack.json', dict(networks=networks, model=str(home/'model'), encoder='') | change)
    return Pack(tmp_path)


# ---------------------------------------------------------------- packs

def test_pack_lists_what_it_holds(pack):
    assert (
        pack.datasets == ['synth_town']
        and pack.methods('synth_town') == pack.methods(None) == METHODS
        and '2 methods' in repr(pack)
    )
    assert pack.segmenter('pspnet') is pack.segmenter('pspnet', 'synth_town')
    assert pack.encoder is None and pack.segmenter('pspnet').config['fold'] == 0


def test_no_pack(tmp_path, monkeypatch, image):
    with pytest.raises(DataNotFound, match='no pack in.*pack.json.*rssqa demo'): Pack(tmp_path)
    monkeypatch.setenv('RSSQA_PACK', str(tmp_path/'gone'))
    with pytest.raises(DataNotFound, match='gone'): score(image, 'pspnet')
    with pytest.raises(DataNotFound, match='gone'): recommend(tmp_path)


def test_default_pack(monkeypatch, tmp_path, image):
    monkeypatch.delenv('RSSQA_PACK', raising=False)
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    assert default_pack() == bundled_pack()
    (tmp_path/'demo').mkdir(exist_ok=True)
    write_json(tmp_path/'demo'/'latest.json', dict(pack=str(trained_setup().home)))
    assert default_pack() == trained_setup().home and 0 < score(image, 'pspnet') < 1
    write_json(tmp_path/'demo'/'latest.json', dict(pack=str(tmp_path/'deleted since')))
    assert default_pack() == bundled_pack()
    monkeypatch.setenv('RSSQA_PACK', 'elsewhere')
    assert str(default_pack()) == 'elsewhere'


# ---------------------------------------------------------------- the pack that ships

def test_the_shipped_pack_scores_any_photo(image):
    pack = Pack(bundled_pack())
    assert 'czech_ortho' not in pack.datasets and 'dronedeploy' not in pack.datasets
    for dataset in pack.datasets:
        told = rank(image, pack, dataset)
        assert (
            sorted(told.method) == pack.methods(dataset)
            and told.predicted.between(0, 1).all()
            and told.predicted.nunique() > 1
        )
    assert np.array_equal(rank(image, pack).predicted, rank(image, pack, pack.config['default']).predicted)
    assert sum(f.stat().st_size for f in pack.folder.rglob('*') if f.is_file()) < 25e6
    card = read_json(pack.folder/'card.json')
    assert {'data', 'licence', 'metrics', 'made_by'} <= set(card) and set(card['data']) == set(pack.datasets)


def test_a_jury_sits_only_among_its_witnesses(tmp_path, image):
    rng = np.random.default_rng(0)
    w = trained_setup()
    places = [*METHODS, 'unet']
    consensus = ConsensusEnsemble(places, {'': [ConsensusNet(3, {})]})
    save_consensus(consensus, tmp_path/'consensus')
    seated = with_config(tmp_path, consensus=str(tmp_path/'consensus'))
    alone = rank(image, seated, chosen=['pspnet'])
    both = rank(image, seated)
    plain = rank(image, Pack(w.home))
    # one of three witnesses: no consensus
    assert alone.predicted[0] == rank(image, Pack(w.home), chosen=['pspnet']).predicted[0]
    assert not np.allclose(both.predicted, plain.predicted)
    assert sorted(both.method) == sorted(plain.method)


@pytest.mark.parametrize('method, dataset, said', [('pspnett', None, 'mean pspnet'), ('unet', None, 'no method for synth_town'), ('pspnet', 'synth_twon', 'mean synth_town')])
def test_unknown_names_are_suggested(method, dataset, said, pack, image):
    with pytest.raises(KeyError, match=said): score(image, method, dataset, pack)


def test_ambiguous_dataset_names_the_choice(tmp_path, image, folder):
    nets = {m: f for m, f in with_config(tmp_path).config['networks']['synth_town'].items()}
    two = with_config(tmp_path, networks=dict(here=nets, there=nets))
    with pytest.raises(Incompatible, match='here, there.*dataset='): score(image, 'pspnet', pack=two)
    with pytest.raises(Incompatible, match='here, there'): recommend(folder, two)
    assert score(image, 'pspnet', 'here', two) > 0


def test_broken_packs(tmp_path):
    (tmp_path/'pack.json').write_text('{')
    with pytest.raises(ValueError, match='pack.json'): Pack(tmp_path)
    lost = with_config(tmp_path, networks=dict(synth_town=dict(pspnet='nowhere')))
    with pytest.raises(DataNotFound, match='nowhere'): lost.segmenter('pspnet')
    with pytest.raises(DataNotFound, match='no-model'): with_config(tmp_path, model='no-model').model


def test_pack_keeps_relative_names_and_one_fold():
    w = trained_setup()
    nets = json.loads((w.home/'pack.json').read_text())['networks']['synth_town']
    assert sorted(nets) == METHODS and all('fold0' in f and not f.startswith('/') for f in nets.values())
    with pytest.raises(ValueError):  # networks must lie below the pack
        write_pack(w.home/'elsewhere', w.networks)


# ---------------------------------------------------------------- scores

def test_rank_is_sorted_and_label_free(pack, image):
    told = rank(image, pack, keep_masks=True)
    assert (
        sorted(told.method) == METHODS
        and told.predicted.is_monotonic_decreasing
        and told.predicted.between(0, 1).all()
    )
    assert (
        told['mask'].iloc[0].shape == (64, 64)
        and not {'oa', 'n_valid', 'confusion'} & set(told)
        and {'conf', 'agree_mean'} <= set(told)
    )
    assert 'mask' not in rank(image, pack) and rank(image, pack, chosen=['pspnet']).method.tolist() == [
        'pspnet'
    ]


def test_score_is_the_prediction_of_the_ranking(pack, image, tmp_path):
    helped = score(image, 'pspnet', pack=pack)
    alone = score(image, 'pspnet', pack=pack, other_methods=False)
    assert isinstance(helped, float) and 0 < helped < 1 and 0 < alone < 1
    assert (
        helped == rank(image, pack).set_index('method').predicted['pspnet']
        and alone == rank(image, pack, chosen=['pspnet']).predicted[0]
    )
    Image.fromarray((image.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(tmp_path/'x.png')
    for same in (tmp_path/'x.png', str(tmp_path/'x.png'), Image.open(tmp_path/'x.png'), image.transpose(1, 2, 0)):
        assert score(same, 'pspnet', pack=trained_setup().home) == helped


@pytest.mark.parametrize('size', [(64, 64), (16, 16), (37, 50), (90, 33)])
def test_any_size_is_scored(size, pack):
    assert 0 < score(np.random.default_rng(0).random((*size, 3)), 'segformer', pack=pack) < 1


@pytest.mark.parametrize('value', [0, 255])
def test_flat_images_are_scored(value, pack):
    assert rank(np.full((64, 64, 3), value, np.uint8), pack).predicted.between(0, 1).all()


def test_too_small_image_is_named(pack, tmp_path):
    Image.new('RGB', (40, 8)).save(tmp_path/'subsample.png')
    with pytest.raises(BadImage, match='subsample.png.*40x8 pixels, expected at least 16'):
        score(tmp_path/'subsample.png', 'pspnet', pack=pack)
    with pytest.raises(BadImage, match='this image'): rank(np.zeros((8, 40, 3), np.uint8), pack)


def test_no_such_image(pack, tmp_path):
    with pytest.raises(DataNotFound, match='gone.png'): score(tmp_path/'gone.png', 'pspnet', pack=pack)


# ---------------------------------------------------------------- folders

def test_folder_is_ranked_image_by_image(pack, folder):
    rows, skipped = recommend(folder, pack)
    assert (
        list(rows) == ['path', 'method', 'predicted', 'recommended']
        and list(skipped) == ['path', 'reason']
        and skipped.empty
    )
    assert rows.path.unique().tolist() == ['a.jpg', 'b.png', 'deep/c.TIF'] and len(rows) == 6
    assert (
        rows.groupby('path').recommended.sum().eq(1).all()
        and (rows[rows.recommended].predicted.to_numpy() == rows.groupby('path').predicted.max()).all()
    )


def test_unusable_files_are_skipped_with_a_reason(pack, folder):
    (folder/'torn.png').write_bytes((folder/'b.png').read_bytes()[:300])
    (folder/'empty.jpg').write_bytes(b'')
    (folder/'page.tif').write_bytes(b'<html>')
    Image.new('RGB', (8, 8)).save(folder/'tiny.png')
    Image.fromarray(np.full((64, 64), 60000, np.uint16)).save(folder/'deep16.png')
    rows, skipped = recommend(folder, pack)
    assert (
        set(skipped.path) == {'torn.png', 'empty.jpg', 'page.tif', 'tiny.png', 'deep16.png'}
        and rows.path.nunique() == 3
    )
    assert all(path in reason for path, reason in zip(skipped.path, skipped.reason))


def test_nothing_usable(pack, tmp_path):
    with pytest.raises(DataNotFound, match='no folder'): recommend(tmp_path/'gone', pack)
    with pytest.raises(DataNotFound, match='no image.*png'): recommend(tmp_path, pack)
    for name in ('a.png', 'b.jpg'): (tmp_path/name).write_bytes(b'x')
    with pytest.raises(BadImage, match='(?i)all 2 failed'): recommend(tmp_path, pack)
    assert '.png' in SUFFIXES


def test_no_labelling_network_sees_the_truth(pack, image):
    "A ranking of an image and of its copy under another name is the same."
    assert rank(image, pack).equals(rank(image.copy(), pack))
