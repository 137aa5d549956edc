"""Training that can be killed, and networks that never label what they learned from."""
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from hostile import flip_bit
from rssqa.core import (
    DataNotFound, Incompatible, LeakError, Problem, bundled, read_json, weight_digests, write_json,
)
from rssqa.data.datasets import folder_spec, scan
from rssqa.segment.methods import training
from rssqa.data.splits import calibration_rows
from rssqa.segment.methods.blocks import full_weights, small_weights
from rssqa.segment.methods.training import (
    Recipe, _batch, _build, _loss, _Pixels, cross_fit, encoder_file, fit_network, load_segmenter, model_folder,
    small_copies, train, train_joint,
)
from rssqa.data.synthetic import write_scenes
from trained import METHODS, RECIPE, trained_setup

SHORT = Recipe('nano', steps=5, batch=2, crop=64, lr=5e-3)


def weights(folder): return load_file(folder/'model.safetensors')
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='module')
def tiles():
    tiles = trained_setup().tiles
    return tiles[tiles.fold == 0]


@pytest.fixture(scope='module')
def whole(tiles, tmp_path_factory):
    return train('pspnet', tiles, trained_setup().spec, tmp_path_factory.mktemp('whole'), SHORT)


@pytest.mark.parametrize('kills', [(1,), (4,), (2, 3), (1, 2, 3, 4)])
def test_killed_and_resumed_gives_the_same_weights(kills, whole, tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'CHECKPOINT_SECONDS', -1)
    for n in kills:
        finished = []
        def tick(steps):
            finished.append(steps)
            if sum(finished) >= n: raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            train('pspnet', tiles, trained_setup().spec, tmp_path, SHORT, tick=tick)
        assert not list(tmp_path.rglob('config.json'))
    finished = []
    folder = train('pspnet', tiles, trained_setup().spec, tmp_path, SHORT, tick=finished.append)
    assert finished[0] == max(kills) - 1 and sum(finished) == SHORT.steps   # counts what was done before
    assert folder.name == whole.name and equal(weights(folder), weights(whole))
    assert read_json(folder / 'config.json') == read_json(whole / 'config.json')
    assert not (folder / 'checkpoint.pt').exists()


def test_crops_may_be_changed_and_no_checkpoint_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, 'CHECKPOINT_SECONDS', -1)
    rng = np.random.default_rng(0)
    pixels = [(rng.integers(0, 255, (3, 80, 80), np.uint8), rng.integers(0, 3, (80, 80)).astype(np.uint8))]
    given, nets = [], []
    def darker(x, step):
        given.append((step, tuple(x.shape)))
        return x / 2
    for change in (None, lambda x, step: x, darker):
        net = _build('pspnet', 3, SHORT)
        fit_network(net, [pixels], [slice(0, 3)], SHORT, change=change)
        nets.append(net.state_dict())
    assert equal(nets[0], nets[1]) and not equal(nets[0], nets[2])
    assert given == [(step, (2, 3, 64, 64)) for step in range(SHORT.steps)]
    assert not list(tmp_path.iterdir())


def test_divergence_without_a_folder_is_named():
    pixels = [(np.zeros((3, 80, 80), np.uint8), np.zeros((80, 80), np.uint8))]
    with pytest.raises(Incompatible, match='(?i)^training diverged.*loss nan at step 0.*lower lr'):
        fit_network(_build('pspnet', 3, SHORT), [pixels], [slice(0, 3)], SHORT, change=lambda x, step: x * np.nan)


@pytest.mark.parametrize('content', [b'', b'<html>', pickle.dumps(print), pickle.dumps(dict(step=1))])
def test_a_checkpoint_that_is_none_is_named_and_never_run(content, tmp_path):
    (tmp_path/'checkpoint.pt').write_bytes(content)
    with pytest.raises(Incompatible, match='checkpoint.pt') as caught:
        training._load_checkpoint(tmp_path, torch.nn.Linear(1, 1), None, None)
    assert 'weights_only' not in str(caught.value) and 'delete it' in caught.value.todo


def test_killed_without_a_checkpoint_starts_again(whole, tiles, tmp_path):
    def stop(n):
        if n: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train('pspnet', tiles, trained_setup().spec, tmp_path, SHORT, tick=stop)
    assert equal(weights(train('pspnet', tiles, trained_setup().spec, tmp_path, SHORT)), weights(whole))


def test_finished_network_is_not_trained_again(whole, tiles):
    before = (whole/'model.safetensors').stat().st_mtime_ns
    finished = []
    again = train('pspnet', tiles, trained_setup().spec, whole.parents[1], SHORT, tick=finished.append)
    assert again == whole and finished == [SHORT.steps]
    assert (whole/'model.safetensors').stat().st_mtime_ns == before


CHANGES = dict(
    steps=6, lr=1e-3, seed=1, crop=32, holdout=0.3, preset='tiny', weight_decay=0.0, batch=3, encoder_lr=0.1,
)


@pytest.mark.parametrize('setting', CHANGES)
def test_another_recipe_gets_another_folder(setting, tiles):
    changed = replace(SHORT, **{setting: CHANGES[setting]})
    folders = [model_folder('out', 'pspnet', 'd', 0, recipe, tiles) for recipe in (SHORT, changed)]
    assert folders[0] != folders[1]


def test_folder_depends_on_tiles_and_not_on_their_order(tiles):
    def name(tiles, fold=0): return model_folder('out', 'pspnet', 'd', fold, SHORT, tiles)
    assert name(tiles) == name(tiles[::-1])
    assert name(tiles) != name(tiles[1:])
    assert name(tiles) != name(tiles, fold=1)


def test_weights_of_the_encoder_are_part_of_the_name(tiles, tmp_path):
    from rssqa.segment.protocol import methods
    name = methods['pspnet'].presets['nano'].get('encoder')
    recipe = Recipe('nano', encoder_weights=str(tmp_path))
    names = []
    for i in range(2):
        save_file(dict(a=torch.full((1,), float(i))), tmp_path/f'{name}.safetensors')
        names.append(model_folder('out', 'pspnet', 'd', 0, recipe, tiles))
    assert names[0] != names[1] and encoder_file('pspnet', recipe) == str(tmp_path/f'{name}.safetensors')
    (tmp_path/f'{name}.safetensors').unlink()
    # another method's file is not taken
    assert encoder_file('pspnet', recipe) is None


DISTILLED = [('upernet-swin', 'swin48'), ('ft-unetformer', 'swin48'), ('segformer', 'mit32')] # method, encoder


@pytest.mark.parametrize('method, file', DISTILLED)
def test_transformers_start_from_distilled_encoders(method, file):
    path = encoder_file(method, Recipe('tiny'))
    assert Path(path).name == f'{file}.safetensors'
    assert encoder_file(method, Recipe('tiny', encoder_weights='timm')) == path
    assert encoder_file(method, Recipe('tiny', encoder_weights='random')) is None
    assert encoder_file(method, Recipe('nano')) is None
    stored = full_weights(load_file(path))
    net = _build(method, 3, Recipe('tiny'))
    again = _build(method, 3, Recipe('tiny', encoder_weights='random'))
    state = dict(net.encoder.named_parameters())
    other = dict(again.encoder.named_parameters())
    drawn = [k for k, v in other.items() if v.ndim > 1 and torch.equal(v, state[k])]
    assert not drawn and not net.pretrained                        # all matrices are loaded, and learn at full rate
    known = {k.replace('layers.', 'layers_'): v for k, v in stored.items()}
    matched = sum(any(torch.equal(v, w) for w in known.values() if w.shape == v.shape) for v in state.values())
    assert matched == len(state)


def test_the_card_of_the_encoders_names_their_digests():
    folder = bundled('encoders')
    card = read_json(folder/'card.json')
    assert set(card['digests']) == set(card['files']) == {path.name for path in folder.glob('*.safetensors')}
    assert card['digests'] == weight_digests(folder, *card['files'])


def test_convolutional_encoders_have_no_distilled_weights():
    assert encoder_file('unet', Recipe('tiny')) is None
    assert encoder_file('unet', Recipe('tiny', encoder_weights='timm')) == 'timm'


def test_networks_can_be_trained_for_some_folds_only(tmp_path):
    setup = trained_setup()
    quick = Recipe('nano', steps=1, batch=2, crop=32)
    networks = cross_fit(setup.tiles, setup.specs, tmp_path, ['pspnet'], quick, workers=1, left_out=[1])
    assert networks.fold.tolist() == [1]


def test_missing_folder_of_encoder_weights_is_a_clear_error(tiles, tmp_path):
    recipe = Recipe('nano', encoder_weights=str(tmp_path/'nowhere'))
    with pytest.raises(DataNotFound) as e: train('pspnet', tiles, trained_setup().spec, tmp_path, recipe)
    assert 'nowhere' in e.value.what and e.value.found and 'safetensors' in e.value.todo


TYPOS = [('pspnett', SHORT, 'pspnet'), ('pspnet', Recipe('nanno'), 'nano')]


@pytest.mark.parametrize('method, recipe, near', TYPOS)
def test_typos_get_suggestions(method, recipe, near, tiles, tmp_path):
    with pytest.raises(KeyError, match=f'mean {near}'):
        train(method, tiles, trained_setup().spec, tmp_path, recipe)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- model files

def copy(folder, to):
    to.mkdir()
    for f in folder.iterdir(): (to/f.name).write_bytes(f.read_bytes())
    return to


def test_round_trip_keeps_numbers(whole):
    segmenter = load_segmenter(whole)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert segmenter.fingerprint == segmenter.config['fingerprint'] and segmenter.temperature > 0
    assert segmenter.reference.shape == (2, 2 * sum(segmenter.channels))
    assert torch.equal(segmenter(x).logits, load_segmenter(whole)(x).logits)


def test_tampered_weights_are_refused(whole, tmp_path):
    bad = copy(whole, tmp_path/'bad')
    state = weights(bad)
    key = next(k for k in state if state[k].is_floating_point())
    state[key].view(-1)[0] += 1e-3
    save_file(state, bad/'model.safetensors')
    with pytest.raises(Incompatible, match='not the ones that were saved'): load_segmenter(bad)
    without = read_json(bad/'config.json')
    del without['digests']
    write_json(bad/'config.json', without)
    with pytest.raises(Incompatible, match='not the ones that were trained'): load_segmenter(bad)


@pytest.mark.parametrize('name', ['model.safetensors', 'reference.safetensors'])
@pytest.mark.parametrize('share', [0.0, 0.4, 0.99])
def test_one_flipped_bit_of_any_weight_file_is_refused(name, share, whole, tmp_path):
    bad = copy(whole, tmp_path/'bad')
    flip_bit(bad/name, int(share * (bad/name).stat().st_size))
    with pytest.raises(Incompatible, match=f'{name} are not the ones') as caught: load_segmenter(bad)
    assert 'digest' in caught.value.found and 'copy' in caught.value.todo


@pytest.mark.parametrize('name', ['model.safetensors', 'reference.safetensors'])
def test_networks_of_the_time_before_digests_are_read_and_torn_files_named(name, whole, tmp_path):
    old = copy(whole, tmp_path/'old')
    config = read_json(old/'config.json')
    del config['digests']
    write_json(old/'config.json', config)
    assert torch.equal(load_segmenter(old).reference, load_segmenter(whole).reference)
    (old/name).write_bytes((old/name).read_bytes()[:100])
    with pytest.raises(Incompatible, match='(?i)not a safetensors file'): load_segmenter(old)
    (old/name).unlink()
    with pytest.raises(DataNotFound, match=name): load_segmenter(old)


@pytest.mark.parametrize('key', ['method', 'recipe', 'temperature', 'classes', 'digests'])
def test_a_json_file_that_lost_a_key_is_named(key, whole, tmp_path):
    bad = copy(whole, tmp_path/'bad')
    config = read_json(bad/'config.json')
    config[key] = None
    write_json(bad/'config.json', config | ({} if key != 'digests' else dict(digests={})))
    with pytest.raises(Problem, match='bad') as caught: load_segmenter(bad)
    assert caught.value.todo


def test_changed_temperature_is_refused(whole, tmp_path):
    bad = copy(whole, tmp_path/'bad')
    write_json(bad/'config.json', read_json(bad/'config.json') | dict(temperature=3.0))
    with pytest.raises(Incompatible): load_segmenter(bad)


@pytest.mark.parametrize('cut', [0, 5, 0.5])
def test_torn_weights_are_refused(cut, whole, tmp_path):
    bad = copy(whole, tmp_path/'bad')
    data = (bad/'model.safetensors').read_bytes()
    size = int(cut * len(data)) if cut < 1 else cut
    (bad/'model.safetensors').write_bytes(data[:size])
    with pytest.raises(Problem, match='bad'): load_segmenter(bad)


def test_weights_of_another_method_are_refused(whole, tmp_path):
    bad = copy(whole, tmp_path/'bad')
    write_json(bad/'config.json', read_json(bad/'config.json') | dict(method='segformer'))
    with pytest.raises(Incompatible, match='does not hold a segformer'): load_segmenter(bad)


def test_missing_model_names_the_folder(tmp_path):
    with pytest.raises(DataNotFound, match='nothing-here'): load_segmenter(tmp_path/'nothing-here')


# ---------------------------------------------------------------- who learned from what

def test_no_network_labels_a_scene_it_learned_from():
    w = trained_setup()
    assert len(w.networks) == 2 * len(METHODS)
    for net in w.networks.itertuples():
        left_out = w.tiles[w.tiles.fold == net.fold]
        assert len(left_out) and set(net.scenes) == set(w.tiles.scene) - set(left_out.scene)
    assert (w.networks.temperature > 0).all()
    assert w.networks.holdout_oa.between(0, 1).all()
    assert w.networks.fingerprint.is_unique


def tiles_of(counts):
    names = [f's{i}' for i in range(len(counts))]
    return pd.DataFrame(dict(scene=np.repeat(names, counts).astype(object)))


SCENE_SIZES = [
    ([4] * 30, 'scenes'), ([1, 2, 3, 4, 5, 6] * 4, 'scenes'), ([200, 200], 'tiles'), ([300], 'tiles'),
    ([500, 500, 500], 'tiles'),
]


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('counts, kind', SCENE_SIZES)
def test_holdout(counts, kind, seed):
    tiles = tiles_of(counts)
    held_out, found = calibration_rows(tiles, 0.12, seed)
    assert found == kind and 0.05 < held_out.mean() < 0.25 and held_out.index.equals(tiles.index)
    if kind == 'scenes': assert not set(tiles.scene[held_out]) & set(tiles.scene[~held_out])
    assert held_out.equals(calibration_rows(tiles, 0.12, seed)[0])


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('n', [1, 2, 3])
def test_holdout_never_takes_all_tiles(n, seed): assert not calibration_rows(tiles_of([n]), 0.5, seed)[0].all()


def test_networks_train_without_the_holdout(tiles, tmp_path, monkeypatch):
    images = []
    read = training._Pixels
    def record(part, spec):
        images.append(set(part.image_id))
        return read(part, spec)
    monkeypatch.setattr(training, '_Pixels', record)
    recipe = Recipe('nano', steps=1, batch=2, crop=64, holdout=0.3)
    folder = train('pspnet', tiles, trained_setup().spec, tmp_path, recipe)
    learned, held_out = images
    assert learned and held_out and not learned & held_out
    assert learned | held_out == set(tiles.image_id)
    # the temperature was fitted on held-out scenes: they count as learned from
    assert read_json(folder/'config.json')['scenes'] == sorted(set(tiles.scene))


def test_few_scenes_fall_back_to_tiles_and_say_so(tiles, tmp_path):
    two = tiles[tiles.scene.isin(tiles.scene.unique()[:2])]
    folder = train('pspnet', two, trained_setup().spec, tmp_path, Recipe('nano', steps=1, batch=2, crop=64))
    assert read_json(folder/'config.json')['holdout'] == 'tiles'


def test_cross_fit_needs_folds():
    w = trained_setup()
    with pytest.raises(LeakError, match='no column fold'):
        cross_fit(w.tiles.drop(columns='fold'), w.specs, 'out')


def test_one_fold_leaves_nothing_to_learn_from(tmp_path):
    w = trained_setup()
    with pytest.raises(LeakError, match='fold'):
        cross_fit(w.tiles.assign(fold=0), w.specs, tmp_path, METHODS, SHORT, workers=1)


def test_class_tables_without_tiles_are_named(tmp_path):
    w = trained_setup()
    with pytest.raises(DataNotFound, match='elsewhere'):
        cross_fit(w.tiles, {'elsewhere': w.spec}, tmp_path, METHODS, SHORT, workers=1)


# ---------------------------------------------------------------- batches and losses

def test_batches_depend_on_the_step_alone(tiles):
    pixels = [_Pixels(tiles, trained_setup().spec)]
    recipe = replace(SHORT, batch=2, crop=64)
    x, y, _ = _batch(pixels, 3, recipe)
    torch.rand(7)
    np.random.rand(3)
    again = _batch(pixels, 3, recipe)
    other = _batch(pixels, 4, recipe)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other[0])
    assert x.shape == (2, 3, 64, 64) and y.shape == (2, 64, 64)
    assert 0 <= x.min() and x.max() <= 1
    assert y.dtype == torch.int64
    assert set(y.unique().tolist()) <= {*range(len(trained_setup().spec.classes)), 255}


def test_image_and_mask_are_moved_together():
    mask = np.random.default_rng(0).integers(0, 2, (4, 4)).astype(np.uint8).repeat(32, 0).repeat(32, 1)
    x, y, _ = _batch([[(np.stack([mask * 255] * 3), mask)]], 0, Recipe(batch=24, crop=64))
    for image, truth in zip(x.mean(1), y):
        if 0.1 <= truth.float().mean() <= 0.9:              # both classes are in the crop
            assert np.corrcoef(image.ravel(), truth.ravel())[0, 1] > 0.9    # the edge is interpolated


@pytest.mark.parametrize('zoom', [0., 1.25, 1.5, 3.])
def test_zoom_bounds_the_size_of_the_region_shown(zoom):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))      # brightness is the number of the column
    recipe = Recipe(batch=1, crop=64, zoom=zoom)
    for seed in range(20):
        torch.manual_seed(seed)
        x, y = training._crop((np.stack([ramp] * 3), ramp), recipe)
        assert x.shape == (3, 64, 64) and y.shape == (64, 64)
        if zoom:  # columns or rows shown, aspect up to 1.25
            assert 64 / zoom * 0.7 < int(y.max()) - int(y.min()) + 1 < 64 * zoom * 1.3
    expected = ((64 / zoom / 256)**2, min(1, (64 * zoom / 256)**2)) if zoom else (0.35, 1.0)
    assert training._augment(64, zoom, 256.).transforms[0].scale == expected


def test_joint_batches_draw_from_all_datasets():
    def constant_tiles(v): return [(np.full((3, 64, 64), v, np.uint8), np.full((64, 64), v, np.uint8))]
    x, y, dataset = _batch([constant_tiles(0), constant_tiles(1) * 9], 5, Recipe(batch=64, crop=32))
    assert set(dataset.tolist()) == {0, 1}
    assert (y == dataset[:, None, None]).all()
    assert 0.5 < dataset.float().mean() < 0.95              # by the root of the sizes: 3/4


def test_joint_loss_of_each_crop_uses_the_logits_of_its_dataset():
    slices = [slice(0, 2), slice(2, 5)]
    logits = torch.randn(4, 5, 8, 8, requires_grad=True)
    y = torch.randint(2, (4, 8, 8))
    dataset = torch.tensor([0, 1, 0, 1])
    training._joint_loss(logits, y, dataset, slices).backward()
    used = logits.grad.abs().sum((2, 3)) > 0
    assert used.tolist() == [[d == 0] * 2 + [d == 1] * 3 for d in dataset.tolist()]
    alone = training._joint_loss(logits[:1], y[:1], dataset[:1], slices)
    assert torch.allclose(alone, _loss(logits[:1, :2], y[:1]))


def two_sets():
    "Two datasets with different class tables."
    w = trained_setup()
    other = replace(
        w.spec, name='second', classes=(*w.spec.classes, 'extra'), palette=(*w.spec.palette, (1, 2, 3))
    )
    tiles = pd.concat(
        [w.tiles.assign(dataset=w.spec.name), w.tiles.assign(dataset='second')], ignore_index=True
    )
    return tiles, {w.spec.name: w.spec, 'second': other}


def test_joint_networks_stand_alone_and_are_cross_fitted(tmp_path):
    tiles, specs = two_sets()
    networks = cross_fit(
        tiles, specs, tmp_path, ['unet', 'logcan'], replace(SHORT, steps=2), workers=1, joint=True
    )
    assert len(networks) == 8 and networks.fingerprint.is_unique and set(networks.dataset) == set(specs)
    for net in networks.itertuples():
        seg = load_segmenter(net.folder)
        left_out = tiles[(tiles.dataset == net.dataset) & (tiles.fold == net.fold)]
        assert seg.classes == tuple(specs[net.dataset].classes)
        assert seg(torch.zeros(1, 3, 64, 64)).logits.shape[1] == len(seg.classes)
        assert seg.reference.shape == (2, 2 * sum(seg.channels)) and seg.config['learned_from'] == list(specs)
        assert not set(net.scenes) & set(left_out.scene.astype(str))
    again = cross_fit(
        tiles, specs, tmp_path, ['unet', 'logcan'], replace(SHORT, steps=2), workers=1, joint=True
    )
    assert again.equals(networks)


# ---------------------------------------------------------------- small copies

@pytest.mark.parametrize('shape', [(64, 32), (16, 8, 3, 3), (2048, 1)])
@pytest.mark.parametrize('size', [1e-8, 1.0, 1e4])
def test_rounding_costs_half_a_step_of_each_channel(shape, size):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    w[0] = 0                                                                                  # a dead channel
    stored = small_weights(dict(w=w))
    again = full_weights(stored)['w']
    step = w.abs().flatten(1).amax(1).view(-1, *[1] * (w.ndim - 1)) / 127
    assert stored['w'].dtype == torch.int8
    assert ((again - w).abs() <= step / 2 + 1e-5 * size).all() and not again[0].any()


def test_small_tensors_and_counters_stay_as_they_are(whole):
    state = load_file(whole/'model.safetensors')
    stored = small_weights(state)
    again = full_weights(stored)
    assert again.keys() == state.keys() and any(k.endswith(' scale') for k in stored)
    assert all(
        torch.equal(again[k], v)
        for k, v in state.items()
        if v.ndim < 2 or v.numel() < 1024 or not v.is_floating_point()
    )
    assert sum(v.nbytes for v in stored.values()) < 0.4 * sum(v.nbytes for v in state.values())


def test_copies_of_a_joint_network_share_their_weights_and_refuse_others(tmp_path):
    tiles, specs = two_sets()
    folders = train_joint('unet', tiles, specs, tmp_path/'nets', replace(SHORT, steps=2))
    copies = small_copies(folders, tmp_path/'pack')
    assert [p.name for p in (tmp_path / 'pack' / 'weights').iterdir()] == ['unet.safetensors']
    assert len(copies) == 2
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for folder, copied in zip(folders, copies):
        one = load_segmenter(folder)
        two = load_segmenter(copied)
        assert two.classes == one.classes
        assert torch.allclose(one(x).logits, two(x).logits, atol=0.2)
        assert torch.equal(one.reference, two.reference)
    stored = load_file(tmp_path/'pack'/'weights'/'unet.safetensors')
    name = next(k for k, v in stored.items() if v.dtype == torch.int8)
    stored[name].view(-1)[0] += 1
    save_file(stored, tmp_path/'pack'/'weights'/'unet.safetensors')
    with pytest.raises(Incompatible, match='not the ones'): load_segmenter(copies[0])


def test_loss_without_labels_is_zero_and_differentiable():
    logits = torch.randn(2, 4, 8, 8, requires_grad=True)
    loss = _loss(logits, torch.full((2, 8, 8), 255))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_loss_ignores_unlabelled_pixels():
    logits = torch.randn(1, 3, 8, 8)
    y = torch.randint(3, (1, 8, 8))
    y[:, :4] = 255
    other = logits.clone()
    other[:, :, :4] += torch.randn(1, 3, 4, 8) * 3
    assert _loss(logits, y) > 0.1
    assert torch.allclose(_loss(logits, y), _loss(other, y), atol=1e-5)


def test_loss_with_unlabelled_pixels_equals_that_of_the_labelled_half():
    logits = torch.randn(2, 3, 8, 8)
    y = torch.randint(3, (2, 8, 8))
    half_labelled = y.clone()
    half_labelled[:, :4] = 255
    loss = _loss(logits, half_labelled)
    assert loss > 0.1
    assert torch.allclose(loss, _loss(logits[:, :, 4:], y[:, 4:]), atol=1e-5)


def blank(tmp_path, is_blank):
    "A small dataset in which the masks of some tiles are all ignored."
    from PIL import Image
    root = write_scenes(tmp_path/'town', 'town', scenes=3, size=64)
    for path in sorted((root/'masks').iterdir()):
        if is_blank(path.name):
            im = Image.open(path)
            empty = Image.fromarray(np.full((im.height, im.width), 255, np.uint8))
            empty.putpalette(im.getpalette() + [0] * (768 - len(im.getpalette())))
            empty.save(path)
    return folder_spec(root), scan(root)


@pytest.mark.parametrize('which', ['some', 'all'])
def test_tiles_without_a_labelled_pixel_survive(which, tmp_path):
    spec, tiles = blank(tmp_path, lambda name: which == 'all' or name.endswith('0.png'))
    config = read_json(
        train('pspnet', tiles, spec, tmp_path / 'out', Recipe('nano', steps=2, batch=2, crop=64, holdout=0.4))
        / 'config.json'
    )
    assert config['temperature'] > 0 and (which == 'some') == np.isfinite(config['holdout_oa'])


def test_unlabelled_tiles_are_refused_by_name(tiles, tmp_path):
    with pytest.raises(DataNotFound, match='no mask'):
        train('pspnet', tiles.assign(mask_path=None), trained_setup().spec, tmp_path, SHORT)


def test_diverging_run_says_so(tiles, tmp_path):
    with pytest.raises(Incompatible, match='diverged'):
        train(
            'pspnet',
            tiles,
            trained_setup().spec,
            tmp_path,
            Recipe('nano', steps=30, batch=2, crop=64, lr=1e30),
        )
    assert not list(tmp_path.rglob('config.json'))


@pytest.mark.slow
def test_worker_processes_give_the_same_networks(tmp_path):
    w = trained_setup()
    networks = cross_fit(w.tiles, w.specs, tmp_path, ['pspnet'], RECIPE, workers=2)
    alone = w.networks[w.networks.method == 'pspnet']
    assert networks.fingerprint.tolist() == alone.fingerprint.tolist()
    assert networks.holdout_oa.tolist() == alone.holdout_oa.tolist()


@pytest.mark.slow
def test_a_failed_worker_ends_the_run_with_its_own_error(tmp_path):
    w = trained_setup()
    with pytest.raises(DataNotFound, match='no mask'):
        cross_fit(w.tiles.assign(mask_path=None), w.specs, tmp_path, ['pspnet'], RECIPE, workers=2)
