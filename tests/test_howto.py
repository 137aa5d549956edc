"""How-to pages: the recipe of each own-X page is one short cell, runs verbatim by itself, and what it
registers passes the conformance check."""
import os

import nbformat
import pytest

from forked import run_forked
from test_notebooks import ROOT

RECIPES = dict(
    own_dataset='check_dataset',
    own_method='check_segmenter',
    own_encoder='check_encoder',
    own_fusion='check_fusion',
)


def recipe(name: str) -> str:
    "The first code cell."
    return next(
        c.source for c in nbformat.read(ROOT / f'nbs/how-to/{name}.ipynb', 4).cells if c.cell_type == 'code'
    )


def check_dataset():
    from rssqa.core import datasets
    from rssqa.data.datasets import read_image, read_mask, scan
    from rssqa.data.splits import check_leak
    tiles = scan('mycity', 'mycity')
    spec = datasets['mycity']
    assert len(tiles) == 8 and tiles.scene.nunique() == 4
    for row in tiles.itertuples():
        mask = read_mask(row, spec)
        assert read_image(row).shape[1:] == mask.shape and mask.max() < len(spec.classes)
    check_leak(tiles.assign(split=tiles.scene))


def run(name, folder):
    os.chdir(folder)
    exec(compile(recipe(name), name, 'exec'), {'__name__': '__main__'})
    from rssqa.clip.encoders import check_encoder
    from rssqa.quality.fusion import check_fusion
    from rssqa.segment.protocol import check_segmenter
    dict(
        check_dataset=check_dataset,
        check_segmenter=lambda: check_segmenter('my.city'),
        check_encoder=lambda: check_encoder('my-encoder'),
        check_fusion=lambda: check_fusion('bilinear'),
    )[RECIPES[name]]()


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_is_short(name):
    lines = [line for line in recipe(name).splitlines() if line.strip()]
    assert 5 <= len(lines) <= 25 and not recipe(name).startswith('#|')


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_runs_verbatim(name, tmp_path):
    if why := run_forked(run, name, tmp_path, limit_s=120): pytest.fail(why, pytrace=False)


def broken(name, folder, old, new):
    os.chdir(folder)
    source = recipe(name)
    assert old in source
    exec(compile(source.replace(old, new), name, 'exec'), {'__name__': '__main__'})


BROKEN = [
    ('own_method', 'Net(4)', 'Net(5)', 'logits have shape'),
    ('own_method', "layers=('decoder', 'encoder')", "layers=('neck',)", 'cannot read features of neck'),
    ('own_encoder', 'normalize(dense.mean((2, 3)))', 'dense.mean((2, 3))', 'not of length 1'),
    ('own_encoder', 'check_batch(x, self.name)', 'pass', '0..255 are accepted'),
    ('own_fusion', 'torch.tanh(self.sem(sem)) * ', '', 'no gradient reaches sem.weight'),
]


@pytest.mark.parametrize('name, old, new, fault', BROKEN)
def test_a_broken_recipe_is_refused(name, old, new, fault, tmp_path):
    assert fault in run_forked(broken, name, tmp_path, old, new, limit_s=120).lower()
