"""Run, clean and export notebooks: `build.py nbs/11_data.datasets.ipynb …`. A `.py` in jupytext's percent
format becomes its notebook first."""
import argparse, os, sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('PYDEVD_DISABLE_FILE_VALIDATION', '1')

import jupytext, nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.config import add_init
from nbdev.doclinks import _build_modidx
from nbdev.export import nb_export

sys.path.insert(0, str(Path(__file__).parent))
from clean import ROOT, dumps, faults

FLAGS = ('slow', 'gpu', 'weights', 'real')


def as_notebook(path: Path) -> Path:
    "Turn a percent-format script into its notebook, keeping outputs of unchanged cells."
    if path.suffix == '.ipynb': return path.resolve()
    name = path.stem + '.ipynb'
    target = next((p for p in (ROOT/'nbs').rglob(name)), ROOT/'nbs'/name)
    nb = jupytext.read(path)
    if target.exists(): keep_outputs(nb, nbformat.read(target, as_version=4))
    target.write_text(dumps(nb), encoding='utf-8')
    return target


def keep_outputs(new, old) -> None:
    "Give cells of a notebook the outputs of cells with the same source in another."
    outputs = {cell.source: cell.outputs for cell in old.cells if cell.cell_type == 'code'}
    for cell in new.cells:
        if cell.cell_type == 'code': cell.outputs = outputs.get(cell.source, [])


def execute(path: Path, flags: set) -> None:
    "Run a notebook in a fresh kernel; cells with a flag that was not asked for keep their old output."
    nb = nbformat.read(path, as_version=4)
    parked = {}
    for i, cell in enumerate(nb.cells):
        first = cell.source.split('\n', 3)[:3]
        lines = {line.strip() for line in first}
        if cell.cell_type == 'code' and lines & {f'#| {flag}' for flag in FLAGS if flag not in flags}:
            parked[i] = (cell.source, cell.outputs)
            cell.source = ''
    try:
        NotebookClient(
            nb, timeout=1200, store_widget_state=False, resources={'metadata': {'path': str(path.parent)}}
        ).execute()
    finally:
        for i, (source, outputs) in parked.items(): nb.cells[i].source, nb.cells[i].outputs = source, outputs
    nb.metadata.pop('widgets', None)
    path.write_text(dumps(nb), encoding='utf-8')


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('files', nargs='+', type=Path)
    ap.add_argument('--no-run', action='store_true', help='convert and export only')
    ap.add_argument('--flags', default='', help='opt-in cells to run, such as "real slow"')
    args = ap.parse_args()
    for path in map(as_notebook, args.files):
        nb_export(str(path), lib_path=str(ROOT/'rssqa'))
        if not args.no_run:
            try: execute(path, set(args.flags.split()))
            except CellExecutionError as e: sys.exit(f'{path.name}: {e}')
        print(path.relative_to(ROOT), f'{path.stat().st_size // 1024} KB', *faults(path))
    os.chdir(ROOT)
    add_init(ROOT/'rssqa')
    _build_modidx()


if __name__ == '__main__': main()
