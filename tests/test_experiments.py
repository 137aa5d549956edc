"""Experiments read committed numbers and draw them: they fit nothing, write nothing, and name missing files."""
import re, shutil

import nbformat
import pytest

from forked import run_forked
from test_notebooks import ROOT, run_lesson

PAGES = sorted((ROOT/'nbs/experiments').glob('*.ipynb'))
READS_RESULTS = [p for p in PAGES if p.stem in ('evidence', 'limits')]


def code(path): return '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code')


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_only_reads(path):
    assert (
        re.findall(
            r'\b(?:QualityModel|ConsensusModel|baselines|cross_predict|to_csv|to_parquet|savefig|save_\w+)\(|#\|\s*export',
            code(path),
        )
        == []
    )


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_one_title_and_a_lead(path):
    text = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown']
    assert re.match(r'# .+\n\n> .+', text[0]) and len(re.findall(r'^# \S', '\n'.join(text), re.M)) == 1


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_prose_holds_no_result(path):
    text = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
    assert re.findall(r'\d\.\d{3}|\d\.\d+ ?%', text) == [], (
        'results belong into outputs, which follow the files'
    )


def run_far_away(path, folder):
    "Run a notebook in a checkout without tables and results."
    target = folder/'nbs/experiments'/path.name
    target.parent.mkdir(parents=True)
    shutil.copy(ROOT/'settings.ini', folder)
    shutil.copy(path, target)
    run_lesson(target, set())


@pytest.mark.parametrize('path', READS_RESULTS, ids=lambda p: p.stem)
def test_missing_files_are_no_error(path, tmp_path):
    if why := run_forked(run_far_away, path, tmp_path, limit_s=300): pytest.fail(why, pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_runs(path):
    if why := run_forked(run_lesson, path, set(), limit_s=600): pytest.fail(why, pytrace=False)
