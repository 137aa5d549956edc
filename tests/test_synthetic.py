"""Synthetic scenes: reproducible, true to their masks, degraded by a known amount, readable as a dataset."""
import json, os, subprocess, sys, warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rssqa.core import UnknownName, digest
from rssqa.data.datasets import folder_spec, read_image, read_mask, scan
from rssqa.data.splits import check_leak
from rssqa.data.synthetic import (
    BUILDING,
    CLASSES,
    GROUND,
    KINDS,
    PALETTE,
    ROAD,
    SCENE_TYPES,
    VEGETATION,
    VEHICLE,
    WATER,
    caption,
    colours,
    degrade,
    scene,
    write_scenes,
)


# ---- scenes

@pytest.mark.parametrize('scene_type', SCENE_TYPES)
@pytest.mark.parametrize('size', [16, 33, 64, 128])
def test_scene_keeps_the_convention(scene_type, size):
    for seed in range(3):
        s = scene(scene_type, seed, size)
        assert s.image.shape == (3, size, size) and s.image.dtype == np.float32
        assert s.image.flags.c_contiguous and 0 <= s.image.min() and s.image.max() <= 1
        assert s.mask.shape == (size, size) and s.mask.dtype == np.uint8 and s.mask.max() < len(CLASSES)
        assert s.scene_type == scene_type
        # there is something to be segmented
        assert s.image.std() > 0.02 and len(np.unique(s.mask)) > 1


def digest_of(scene_type, seed):
    s = scene(scene_type, seed, 48)
    return digest(np.round(s.image, 4), s.mask)


DIGESTS_ELSEWHERE = '''
import numpy as np
from rssqa.core import digest
from rssqa.data.synthetic import SCENE_TYPES, scene
for scene_type in SCENE_TYPES:
    for seed in (0, 5):
        s = scene(scene_type, seed, 48)
        print(digest(np.round(s.image, 4), s.mask))
'''


def test_scene_is_the_same_in_every_process():
    here = []
    for scene_type in SCENE_TYPES: here += [digest_of(scene_type, 0), digest_of(scene_type, 5)]
    # every scene type and seed is another scene
    assert len(set(here)) == 8
    for hashseed in '12':
        environment = os.environ | {'PYTHONHASHSEED': hashseed}
        command = [sys.executable, '-c', DIGESTS_ELSEWHERE]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.stdout.split() == here, done.stderr


def test_scene_neither_reads_nor_moves_global_randomness():
    np.random.seed(0)
    a = scene('town', 1, 32)
    first = np.random.rand()
    np.random.seed(0)
    assert first == np.random.rand() and (scene('town', 1, 32).image == a.image).all()


def class_shares(scene_type): # (6,) mean over twelve scenes
    counts = [np.bincount(scene(scene_type, s, 64).mask.ravel(), minlength=6) for s in range(12)]
    return np.mean(counts, 0) / 64**2


def test_scene_types_differ_as_their_names_say():
    share = {scene_type: class_shares(scene_type) for scene_type in SCENE_TYPES}
    assert share['flood'][WATER] > 3 * share['town'][WATER]
    assert share['town'][BUILDING] > 4 * share['rural'][BUILDING]
    assert share['rural'][VEGETATION] > share['town'][VEGETATION]
    assert all((v[[GROUND, ROAD, VEGETATION]] > 0.01).all() for v in share.values())


def nearest_mean_accuracy(s): # share of pixels whose colour is nearest to the mean colour of their own class
    means = np.full((6, 3), 9.0)
    for label in np.unique(s.mask): means[label] = s.image[:, s.mask == label].mean(1)
    distance = ((s.image[None] - means[:, :, None, None])**2).sum(1)
    return (distance.argmin(0) == s.mask).mean()


@pytest.mark.parametrize('scene_type', ['town', 'rural', 'flood'])
def test_image_shows_its_mask_but_colour_alone_is_not_enough(scene_type):
    accuracy = [nearest_mean_accuracy(scene(scene_type, seed, 96)) for seed in range(4)]
    assert np.mean(accuracy) > 0.5 and min(accuracy) < 0.995


def test_unknown_names_get_suggestions():
    with pytest.raises(UnknownName, match='scene type .*town'): scene('twon')
    with pytest.raises(UnknownName, match='noise'): degrade(np.zeros((3, 8, 8), np.float32), 'nois', .5)


@pytest.mark.parametrize('counts, words', [
    ({BUILDING: 50}, 'much building'),
    ({WATER: 10}, 'some water'),
    ({VEGETATION: 2}, 'hardly any vegetation'),
    ({VEHICLE: 60}, None),
])
def test_caption_follows_class_shares(counts, words):
    mask = np.zeros(100, np.uint8)
    for label, n in counts.items(): mask[:n] = label
    assert caption(mask.reshape(10, 10), 'town') == SCENE_TYPES['town'] + (f', with {words}' if words else '')


def test_caption_of_a_scene_is_that_of_its_mask():
    for scene_type in SCENE_TYPES:
        s = scene(scene_type, 2, 48)
        assert s.caption == caption(s.mask, scene_type) and s.caption.startswith(SCENE_TYPES[scene_type])


def test_colours_are_the_palette_and_255_is_black():
    mask = np.array([[0, 1, 2], [3, 4, 5], [255, 255, 0]], np.uint8)
    rgb = colours(mask)
    assert rgb.dtype == np.uint8 and (rgb[:2].reshape(6, 3) == PALETTE).all() and (rgb[2, :2] == 0).all()
    assert len(set(PALETTE)) == len(CLASSES) == 6


# ---- degradation

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('seed', range(4))
def test_degradation_grows_with_its_level_and_repeats(kind, seed):
    x = scene(list(SCENE_TYPES)[seed], seed, 64).image
    before = x.copy()
    degraded = [degrade(x, kind, level, seed) for level in (0, .1, .3, .5, .75, 1)]
    change = [np.abs(y - x).mean() for y in degraded]
    assert change[0] == 0 and (np.diff(change) > 0).all() and change[-1] > 0.008, change
    for y in degraded: assert y.shape == x.shape and y.dtype == np.float32 and 0 <= y.min() and y.max() <= 1
    assert np.array_equal(degraded[2], degrade(x, kind, .3, seed)) and np.array_equal(x, before)


@pytest.mark.parametrize('kind', KINDS)
def test_degradation_takes_any_shape_and_clips_its_level(kind):
    x = np.random.default_rng(0).random((3, 20, 33), np.float32)
    assert degrade(x, kind, .6).shape == x.shape
    assert np.array_equal(degrade(x, kind, 1), degrade(x, kind, 7))
    assert np.array_equal(degrade(x, kind, -1), x) and degrade(x, kind, 0) is not x


def test_only_noise_and_shadow_use_the_seed():
    x = scene('town', 0, 48).image
    seeded = {k for k in KINDS if not np.array_equal(degrade(x, k, 0.5, 1), degrade(x, k, 0.5, 2))}
    assert seeded == {'noise', 'shadow'}


def roughness(x): return np.abs(np.diff(x, axis=-1)).mean()


def greenness(x): return (x[1] - (x[0] + x[2]) / 2).mean()


def test_each_degradation_does_what_its_name_says():
    x = scene('rural', 1, 96).image
    degraded = {k: degrade(x, k, .8) for k in KINDS}
    assert roughness(degraded['blur']) < roughness(x) / 2
    assert roughness(degraded['resolution']) < roughness(x)
    assert roughness(degraded['noise']) > 2 * roughness(x)
    assert degraded['haze'].std() < x.std() / 2 and degraded['haze'].mean() > x.mean()
    assert degraded['shadow'].mean() < x.mean()
    assert greenness(degraded['season']) < greenness(x)


# ---- a folder like real data

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('synth'), ('town', 'flood'), scenes=5, size=32, damaged=.5)


def test_written_scenes_are_read_back(folder):
    table = scan(folder)
    spec = folder_spec(folder)
    rows = pd.read_csv(folder/'splits.csv').set_index('image')
    assert spec.classes == CLASSES and spec.palette == PALETTE
    assert spec.gsd_m == 0.3 and spec.name == 'synthetic'
    assert len(table) == 2 * 5 * 4 and table.scene.nunique() == 10 and table.image_id.is_unique
    assert set(table.split) == {'train', 'val', 'test'}
    check_leak(table)
    for row in table.itertuples(index=False):
        about = rows.loc[row.path]
        seed = int(about.scene[-4:])
        s = scene(about.scene_type, seed, 64)
        box = np.s_[about.y0:about.y0 + 32, about.x0:about.x0 + 32]
        original = s.image[:, *box]
        assert (read_mask(row, spec) == s.mask[box]).all()
        clean = np.abs(read_image(row) - original).max() <= 0.51 / 255
        if not clean:  # the table names kind and level
            degraded = degrade(original, about.kind, about.level, seed)
            assert np.abs(read_image(row) - degraded).mean() < 0.004
        assert clean == (about.kind == 'none') == (about.level == 0) and about.kind in (*KINDS, 'none')


def test_tiles_of_a_scene_share_split_and_degradation(folder):
    rows = pd.read_csv(folder/'splits.csv')
    assert (rows.groupby('scene')[['split', 'kind', 'level', 'scene_type']].nunique() == 1).all().all()
    assert 0 < (rows.kind != 'none').mean() < 1


@pytest.mark.parametrize('share', [0, 1])
def test_no_scene_or_every_scene_is_degraded(tmp_path, share):
    rows = pd.read_csv(write_scenes(tmp_path, scenes=2, size=16, damaged=share)/'splits.csv')
    assert ((rows.kind != 'none') == bool(share)).all() and len(rows) == 8
    assert json.loads((tmp_path/'classes.json').read_text())['dataset'] == 'synth_town'


def test_writing_twice_gives_the_same_bytes_and_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        a, b = (write_scenes(tmp_path/n, 'oblique', scenes=1, size=16, seed=3) for n in 'ab')
    files = sorted(p.relative_to(a) for p in a.rglob('*') if p.is_file())
    assert len(files) == 4 + 4 + 2 and all((a/f).read_bytes() == (b/f).read_bytes() for f in files)


def test_masks_open_in_colour_and_store_class_ids(folder):
    im = Image.open(next((folder/'masks').glob('*.png')))
    assert im.mode == 'P' and (np.asarray(im.convert('RGB')) == colours(np.asarray(im))).all()
