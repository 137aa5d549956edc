"""Take the picture of the Explorer for explanations/a_cluster: `uv run python tools/window.py` writes nbs/images/cluster.png.

A real window on JupyterLab in a real browser, with the lasso that the page tells of; the page's own cells make the tiles.
"""
import io, tempfile
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright
from scipy.spatial import ConvexHull

from rssqa.bench.explorer_speed import CHROMIUM, FLAGS, JupyterLab, drag, run_all

ROOT = Path(__file__).resolve().parents[1]
WINDOW = '''from rssqa.viz.explorer_widget import Explorer
rows = state.rows()
state.select([], reason='')
np.save({where!r}, rows)
window = Explorer(state, height=400)
np.save({points!r}, window.scatter.widget.points)
window'''


def cells(home: Path) -> list[str]: # those of the page up to the lasso, then the window
    page = nbformat.read(ROOT/'nbs/explanations/a_cluster.ipynb', 4)
    code = [c.source.replace('../../data', str(ROOT/'data')) for c in page.cells if c.cell_type == 'code']
    last = next(i for i, c in enumerate(code) if "reason='lasso'" in c)
    return [
        '\n'.join(code[: last + 1]).replace('\nsnapshot(state, tiles=0)', '') + ';',
        WINDOW.format(where=str(home / 'rows.npy'), points=str(home / 'points.npy')),
    ]


def loop(at, rows, air=8): # (n,2) pixels, rows inside -> corners of a lasso round them
    hull = at[rows][ConvexHull(at[rows]).vertices]
    out = hull - hull.mean(0)
    corners = hull + air * out / np.linalg.norm(out, axis=1, keepdims=True)
    return [*corners.tolist(), corners[0].tolist()]


def main():
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        home = Path(folder)
        lab = JupyterLab(home/'lab')
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = chromium.new_page(viewport=dict(width=1420, height=1080))
            page.set_default_timeout(180_000)
            run_all(page, lab.url(lab.write('cluster.ipynb', *cells(home))))
            page.locator('.rssqa-explorer canvas').first.wait_for()
            page.keyboard.press('Control+b')                               # the file list takes room
            page.wait_for_timeout(4000)
            window = page.locator('.rssqa-explorer').first
            window.scroll_into_view_if_needed()
            box = window.locator('canvas').first.bounding_box()
            points = np.load(home/'points.npy')[:, :2]
            rows = np.load(home/'rows.npy')
            at = (
                np.array([box['x'] + box['width'] / 2, box['y'] + box['height'] / 2])
                + points * [1, -1] * box['height'] / 2
            )
            page.get_by_title('Activate lasso selection').click()
            drag(page, loop(at, rows), 30)
            page.get_by_text(f'{len(rows)} selected (lasso)').wait_for()
            page.mouse.move(700, 8)                                        # no tooltip over the points
            page.wait_for_timeout(1500)
            shot = Image.open(io.BytesIO(window.screenshot()))
        finally:
            chromium.close()
            lab.stop()
    (path := ROOT/'nbs/images/cluster.png').parent.mkdir(exist_ok=True)
    shot.convert('RGB').quantize(
        160, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE
    ).save(path, optimize=True)
    print(path.name, shot.size, path.stat().st_size)


if __name__ == '__main__': main()
