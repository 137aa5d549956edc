"""Every notebook is a lesson on the installed package: its exported cells become imports of what they define."""
import os, symtable
from pathlib import Path

import pytest

from conftest import FLAGS
from forked import run_forked

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


def as_lesson(path: Path, flags: set):
    "Read a notebook; replace exported cells by imports from the package and empty the cells that must not run."
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    code = [c for c in nb.cells if c.cell_type == 'code']
    if str(getattr(nb, 'frontmatter_', {}).get('skip_exec', False)).lower() == 'true':
        for cell in code: cell.source = ''
    home = next((c.directives_['default_exp'][0] for c in code if 'default_exp' in c.directives_), None)
    for cell in code:
        d = cell.directives_
        if d.get('eval:') == ['false'] or (FLAGS.keys() - flags) & d.keys() or 'nbdev_export(' in cell.source:
            cell.source = ''
        elif kind := {'export', 'exports', 'exporti'} & d.keys():
            module = (d[kind.pop()] or [home])[0]
            cell.source = (
                f'from rssqa.{module} import ' + ', '.join(names)
                if (names := defined(cell.source))
                else f'import rssqa.{module}'
            )
    return nb


def run_lesson(path: Path, flags: set):
    "Run a notebook as Jupyter would, in its folder; raise with notebook, cell and line at the first error."
    from execnb.shell import CaptureShell
    os.chdir(path.parent)
    nb = as_lesson(path, flags)
    shell = CaptureShell(path, mpl_format='png')
    shell.run_all(nb, exc_stop=False, postproc=lambda cell: stop_at(shell, path, cell))


def stop_at(shell, path, cell):
    if shell.exc is None: return
    print(
        f'\n{path.name}, cell {cell.idx_}:\n'
        + '\n'.join(f'{i:>4}  {line}' for i, line in enumerate(cell.source.splitlines(), 1))
    )
    raise shell.exc


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_notebook(path, nb_flags):
    if why := run_forked(run_lesson, path, nb_flags, limit_s=600):
        pytest.fail(f'{name(path)}\n{why}', pytrace=False)
