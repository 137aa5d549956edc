"""Synthetic scenes: the same on every machine, true to their masks, damaged by a known amount, readable as a dataset."""
import json, os, subprocess, sys, warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rssqa.core import UnknownName, digest
from rssqa.data.datasets import check_leak, folder_spec, read_image, read_mask, scan
from rssqa.data.synthetic import (
    BUILDING,
    CLASSES,
    GROUND,
    KINDS,
    SCENE_TYPES,
    PALETTE,
    ROAD,
    VEGETATION,
    VEHICLE,
    WATER,
    caption,
    colours,
    degrade,
    scene,
    write_scenes,
)

PRINT = 'from rssqa.core import digest; from rssqa.data.synthetic import *; print(*(digest(np.round(scene(l, s, 48).image, 4), scene(l, s, 48).mask) for l in SCENE_TYPES for s in (0, 5)))'


# ---- scenes

@pytest.mark.parametrize('scene_type', SCENE_TYPES)
@pytest.mark.parametrize('size', [16, 33, 64, 128])
def test_scene_keeps_the_convention(scene_type, size):
    for seed in range(3):
        s = scene(scene_type, seed, size)
        assert (
            s.image.shape == (3, size, size)
            and s.image.dtype == np.float32
            and s.image.flags.c_contiguous
            and 0 <= s.image.min()
            and s.image.max() <= 1
        )
        assert (
            s.mask.shape == (size, size)
            and s.mask.dtype == np.uint8
            and s.mask.max() < len(CLASSES)
            and s.scene_type == scene_type
        )
        # something is there to be segmented
        assert s.image.std() > 0.02 and len(np.unique(s.mask)) > 1


def test_scene_is_the_same_in_every_process():
    want = [
        digest(np.round(scene(l, s, 48).image, 4), scene(l, s, 48).mask) for l in SCENE_TYPES for s in (0, 5)
    ]
    # every scene_type and seed is another scene
    assert len(set(want)) == 8
    for hashseed in '12':
        done = subprocess.run(
            [sys.executable, '-c', 'import numpy as np; ' + PRINT],
            capture_output=True,
            text=True,
            env=os.environ | {'PYTHONHASHSEED': hashseed},
        )
        assert done.stdout.split() == want, done.stderr


def test_scene_neither_reads_nor_moves_global_randomness():
    np.random.seed(0)
    a = scene('town', 1, 32)
    first = np.random.rand()
    np.random.seed(0)
    assert first == np.random.rand() and (scene('town', 1, 32).image == a.image).all()


def test_looks_differ_as_their_names_say():
    share = {
        scene_type: np.mean(
            [np.bincount(scene(scene_type, s, 64).mask.ravel(), minlength=6) / 64**2 for s in range(12)], 0
        )
        for scene_type in SCENE_TYPES
    }
    assert (
        share['flood'][WATER] > 3 * share['town'][WATER]
        and share['town'][BUILDING] > 4 * share['rural'][BUILDING]
    )
    assert share['rural'][VEGETATION] > share['town'][VEGETATION] and all(
        (v[[GROUND, ROAD, VEGETATION]] > 0.01).all() for v in share.values()
    )


def test_picture_shows_its_mask():
    for scene_type in ('town', 'rural', 'flood'):
        right = []
        for seed in range(4):
            s = scene(scene_type, seed, 96)
            means = np.stack(
                [
                    s.image[:, s.mask == c].mean(1) if (s.mask == c).any() else np.full(3, 9.0)
                    for c in range(6)
                ]
            )
            right.append((((s.image[None] - means[:, :, None, None])**2).sum(1).argmin(0) == s.mask).mean())
        # colour tells much, and not all
        assert np.mean(right) > 0.5 and min(right) < 0.995


def test_unknown_names_get_suggestions():
    with pytest.raises(UnknownName, match='town'): scene('twon')
    with pytest.raises(UnknownName, match='noise'): degrade(np.zeros((3, 8, 8), np.float32), 'nois', .5)


@pytest.mark.parametrize('shares, words', [({BUILDING: 50}, 'much building'), ({WATER: 10}, 'some water'), ({VEGETATION: 2}, 'hardly any vegetation'), ({VEHICLE: 60}, None)])
def test_caption_counts(shares, words):
    mask = np.zeros(100, np.uint8)
    for c, n in shares.items(): mask[:n] = c
    assert caption(mask.reshape(10, 10), 'town') == SCENE_TYPES['town'] + (f', with {words}' if words else '')


def test_caption_of_a_scene_is_that_of_its_mask():
    for scene_type in SCENE_TYPES:
        s = scene(scene_type, 2, 48)
        assert s.caption == caption(s.mask, scene_type) and s.caption.startswith(SCENE_TYPES[scene_type])


def test_colours_are_the_palette_and_255_is_black():
    mask = np.array([[0, 1, 2], [3, 4, 5], [255, 255, 0]], np.uint8)
    rgb = colours(mask)
    assert (
        rgb.dtype == np.uint8
        and (rgb[:2].reshape(6, 3) == PALETTE).all()
        and (rgb[2, :2] == 0).all()
        and len(set(PALETTE)) == len(CLASSES) == 6
    )


# ---- damage

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('seed', range(4))
def test_damage_grows_with_its_level_and_repeats(kind, seed):
    x = scene(list(SCENE_TYPES)[seed], seed, 64).image
    before = x.copy()
    made = [degrade(x, kind, level, seed) for level in (0, .1, .3, .5, .75, 1)]
    far = [np.abs(y - x).mean() for y in made]
    assert far[0] == 0 and (np.diff(far) > 0).all() and far[-1] > 0.008, far
    assert all(y.shape == x.shape and y.dtype == np.float32 and 0 <= y.min() and y.max() <= 1 for y in made)
    assert np.array_equal(made[2], degrade(x, kind, .3, seed)) and np.array_equal(x, before)


@pytest.mark.parametrize('kind', KINDS)
def test_damage_takes_any_shape_and_clips_its_level(kind):
    x = np.random.default_rng(0).random((3, 20, 33), np.float32)
    assert degrade(x, kind, .6).shape == x.shape
    assert (
        np.array_equal(degrade(x, kind, 1), degrade(x, kind, 7))
        and np.array_equal(degrade(x, kind, -1), x)
        and degrade(x, kind, 0) is not x
    )


def test_only_noise_and_shadow_use_the_seed():
    x = scene('town', 0, 48).image
    assert {k for k in KINDS if not np.array_equal(degrade(x, k, 0.5, 1), degrade(x, k, 0.5, 2))} == {
        'noise',
        'shadow',
    }


def test_each_damage_does_what_it_is_called():
    x = scene('rural', 1, 96).image
    rough = lambda y: np.abs(np.diff(y, axis=-1)).mean()
    hurt = {k: degrade(x, k, .8) for k in KINDS}
    assert (
        rough(hurt['blur']) < rough(x) / 2
        and rough(hurt['resolution']) < rough(x)
        and rough(hurt['noise']) > 2 * rough(x)
    )
    assert (
        hurt['haze'].std() < x.std() / 2
        and hurt['haze'].mean() > x.mean()
        and hurt['shadow'].mean() < x.mean()
    )
    green = lambda y: (y[1] - (y[0] + y[2]) / 2).mean()
    assert green(hurt['season']) < green(x)


# ---- a folder like real data

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('synth'), ('town', 'flood'), scenes=5, size=32, damaged=.5)


def test_written_scenes_are_read_back(folder):
    table = scan(folder)
    spec = folder_spec(folder)
    rows = pd.read_csv(folder/'splits.csv').set_index('image')
    assert (
        spec.classes == CLASSES and spec.palette == PALETTE and spec.gsd_m == 0.3 and spec.name == 'synthetic'
    )
    assert (
        len(table) == 2 * 5 * 4
        and table.scene.nunique() == 10
        and set(table.split) == {'train', 'val', 'test'}
        and table.image_id.is_unique
    )
    check_leak(table)
    for row in table.itertuples(index=False):
        about = rows.loc[row.path]
        seed = int(about.scene[-4:])
        s = scene(about.scene_type, seed, 64)
        box = np.s_[about.y0:about.y0 + 32, about.x0:about.x0 + 32]
        assert (read_mask(row, spec) == s.mask[box]).all()
        clean = np.abs(read_image(row) - s.image[:, *box]).max() <= 0.51 / 255
        if not clean:  # the table tells how
            assert (
                np.abs(read_image(row) - degrade(s.image[:, *box], about.kind, about.level, seed)).mean()
                < 0.004
            )
        assert clean == (about.kind == 'none') == (about.level == 0) and about.kind in (*KINDS, 'none')


def test_share_of_damaged_scenes_and_split_by_scene(folder):
    rows = pd.read_csv(folder/'splits.csv')
    assert (rows.groupby('scene')[['split', 'kind', 'level', 'scene_type']].nunique() == 1).all().all()
    assert 0 < (rows.kind != 'none').mean() < 1


@pytest.mark.parametrize('share', [0, 1])
def test_none_or_all_damaged(tmp_path, share):
    rows = pd.read_csv(write_scenes(tmp_path, scenes=2, size=16, damaged=share)/'splits.csv')
    assert ((rows.kind != 'none') == bool(share)).all() and len(rows) == 8
    assert json.loads((tmp_path/'classes.json').read_text())['dataset'] == 'synth_town'


def test_writing_twice_gives_the_same_bytes_and_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        a, b = (write_scenes(tmp_path/n, 'oblique', scenes=1, size=16, seed=3) for n in 'ab')
    files = sorted(p.relative_to(a) for p in a.rglob('*') if p.is_file())
    assert len(files) == 4 + 4 + 2 and all((a/f).read_bytes() == (b/f).read_bytes() for f in files)


def test_masks_open_in_colour_and_hold_ids(folder):
    im = Image.open(next((folder/'masks').glob('*.png')))
    assert im.mode == 'P' and (np.asarray(im.convert('RGB')) == colours(np.asarray(im))).all()
