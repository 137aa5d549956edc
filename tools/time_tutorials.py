"""Time the tutorials: `uv run python tools/time_tutorials.py` runs each in a fresh kernel, one after
another, and writes data/results/tutorials.csv. On a busy machine the seconds are too high: `load` says how many
processes competed for the cores, `cpu_seconds` what the kernel itself used."""
import os, resource, time
from pathlib import Path

import nbformat
import pandas as pd
from nbclient import NotebookClient

threads = os.environ.get('OMP_NUM_THREADS')
# sets one thread; a reader's machine has all
from build import FLAGS
if threads is None: del os.environ['OMP_NUM_THREADS']
from rssqa.provenance import save_results

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 60 # seconds


def cpu_of_children() -> float: # seconds, of processes that have ended
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(path: Path) -> dict: # seconds, cpu_seconds, load
    "Time all cells that a reader's machine runs, imports and the start of the kernel included."
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if not any(f'#| {f}' in c.source[:60] for f in FLAGS)]
    start, cpu = time.perf_counter(), cpu_of_children()
    NotebookClient(
        nb, timeout=600, store_widget_state=False, resources={'metadata': {'path': str(path.parent)}}
    ).execute()
    taken = time.perf_counter() - start
    return dict(seconds=taken, cpu_seconds=cpu_of_children() - cpu, load=os.getloadavg()[0])


def main():
    rows = []
    for path in sorted((ROOT/'nbs/tutorials').glob('*.ipynb')):
        rows.append(dict(tutorial=path.stem, target=LIMIT) | timed(path))
        print('{tutorial:28} {seconds:6.1f} s, {cpu_seconds:6.1f} of the processor'.format(**rows[-1]), flush=True)
    board = pd.DataFrame(rows).set_index('tutorial')
    save_results(
        board.assign(met=['yes' if s <= LIMIT else 'no' for s in board.seconds]),
        ROOT / 'data/results/tutorials.csv',
        'each in a fresh kernel, one after another; imports included',
        'what each tutorial makes',
        0,
        'python tools/time_tutorials.py',
        cores=os.cpu_count(),
    )


if __name__ == '__main__': main()
