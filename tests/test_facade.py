"""The names people type first: `rssqa.x` and `from rssqa.all import *`."""
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rssqa
import rssqa.all


def test_facade_names_resolve_to_the_things_they_name():
    for name, module in rssqa._HOME.items():
        assert getattr(rssqa, name) is getattr(importlib.import_module(f'rssqa.{module}'), name), name
    assert set(rssqa._HOME) <= set(dir(rssqa))
    # a module of that name would hide the function once it is imported
    modules = {path.stem for path in Path(rssqa.__file__).parent.iterdir()}
    assert not modules & set(rssqa._HOME)


def test_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match='no attribute'): rssqa.scoer


def test_star_import_offers_what_it_lists():
    names = rssqa.all.__all__
    assert len(names) == len(set(names)) > 60
    assert all(hasattr(rssqa.all, name) for name in names)
    expected = {'QualityModel', 'build_sqed', 'score', 'CrossGating', 'load_encoder', 'scene'}
    assert expected <= set(names)


HEAVY = 'open_clip', 'umap', 'matplotlib', 'timm', 'ipywidgets'


def test_star_import_stays_light():
    code = f'import sys; from rssqa.all import *; print(*[m for m in {HEAVY} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
