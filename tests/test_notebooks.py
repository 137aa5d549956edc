"""Every notebook is a lesson on the installed package: its exported cells become imports of what they define."""
import os, symtable
from pathlib import Path

import pytest

from conftest import FLAGS
from forked import run_forked
from solutions import SOLUTIONS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    p for p in (ROOT / 'nbs').rglob('*.ipynb') if not {'experiments', '.ipynb_checkpoints'} & set(p.parts)
)


def name(path: Path) -> str: return path.relative_to(ROOT/'nbs').as_posix()


def defined(source: str) -> list[str]:
    "Names that running this code would set at the top level."
    return [
        s.get_name()
        for s in symtable.symtable(source, 'cell', 'exec').get_symbols()
        if s.is_assigned() or s.is_imported()
    ]


def is_skipped(nb) -> bool: return str(getattr(nb, 'frontmatter_', {}).get('skip_exec', False)).lower() == 'true'


def lesson_source(cell, home: str, flags: set) -> str:
    "What a cell runs as: nothing if it is opt-in, an import of its names if it is exported, else itself."
    directives = cell.directives_
    opt_in = (FLAGS.keys() - flags) & directives.keys()
    if directives.get('eval:') == ['false'] or opt_in or 'nbdev_export(' in cell.source: return ''
    exported = {'export', 'exports', 'exporti'} & directives.keys()
    if not exported: return cell.source
    module = (directives[exported.pop()] or [home])[0]
    names = defined(cell.source)
    return f'from rssqa.{module} import ' + ', '.join(names) if names else f'import rssqa.{module}'


def as_lesson(path: Path, flags: set):
    "Read a notebook; exported cells become imports, cells that must not run are emptied, exercises are solved."
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    code = [c for c in nb.cells if c.cell_type == 'code']
    home = next((c.directives_['default_exp'][0] for c in code if 'default_exp' in c.directives_), None)
    skipped = is_skipped(nb)
    for cell in code: cell.source = '' if skipped else lesson_source(cell, home, flags)
    if path.parent.name == 'tutorials': code[-1].source += '\n' + SOLUTIONS[path.stem]
    return nb


def run_lesson(path: Path, flags: set):
    "Run a notebook as Jupyter would, in its folder; raise with notebook, cell and line at the first error."
    from execnb.shell import CaptureShell
    os.chdir(path.parent)
    shell = CaptureShell(path, mpl_format='png')
    shell.run_all(as_lesson(path, flags), exc_stop=False, postproc=lambda cell: stop_at(shell, path, cell))


def stop_at(shell, path, cell):
    "Raise the error of a cell, after its source with line numbers."
    if shell.exc is None: return
    lines = [f'{i:>4}  {line}' for i, line in enumerate(cell.source.splitlines(), 1)]
    print(f'\n{path.name}, cell {cell.idx_}:', *lines, sep='\n')
    raise shell.exc


def test_every_tutorial_is_solved_here_and_not_on_its_page():
    pages = {p.stem: p.read_text(encoding='utf-8') for p in NOTEBOOKS if p.parent.name == 'tutorials'}
    assert pages.keys() == SOLUTIONS.keys()
    assert [name for name, page in pages.items() if 'assert check(' in page] == []


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_notebook(path, nb_flags):
    if why := run_forked(run_lesson, path, nb_flags, limit_s=600):
        pytest.fail(f'{name(path)}\n{why}', pytrace=False)
