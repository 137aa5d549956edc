"""The names people type first: `rssqa.x` and `from rssqa.all import *`."""
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rssqa
import rssqa.all


def test_facade_names_resolve_to_the_things_they_name():
    for name, home in rssqa._HOME.items():
        assert getattr(rssqa, name) is getattr(importlib.import_module(f'rssqa.{home}'), name), name
    assert set(rssqa._HOME) <= set(dir(rssqa))
    modules = {p.stem for p in Path(rssqa.__file__).parent.iterdir()}
    # a module of that name would hide the function once it is imported
    assert not modules & set(rssqa._HOME)
    with pytest.raises(AttributeError, match='no attribute'): rssqa.scoer


def test_star_import_offers_what_it_lists():
    assert len(rssqa.all.__all__) == len(set(rssqa.all.__all__)) > 60
    assert all(hasattr(rssqa.all, name) for name in rssqa.all.__all__)
    assert {'QualityModel', 'build_sqed', 'score', 'CrossGating', 'load_encoder', 'scene'} <= set(
        rssqa.all.__all__
    )


def test_star_import_stays_light():
    code = 'import sys; from rssqa.all import *; print(*[m for m in ("open_clip", "umap", "matplotlib", "timm", "ipywidgets") if m in sys.modules])'
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout.split()
        == []
    )
