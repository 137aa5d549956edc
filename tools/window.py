"""Take the picture of the Explorer for explanations/a_cluster: `uv run python tools/window.py`.

A real window on JupyterLab in a real browser, with the lasso that the page describes. The page's own cells make the
tiles.
"""
import io, tempfile
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright
from scipy.spatial import ConvexHull

from rssqa.testing.browser import CHROMIUM, FLAGS, JupyterLab, drag, run_all

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT/'nbs/images/cluster.png'
WINDOW = '''from rssqa.viz.explorer_widget import Explorer
rows = state.rows()
state.select([], reason='')
np.save({where!r}, rows)
window = Explorer(state, height=400)
np.save({points!r}, window.scatter.widget.points)
window'''


def page_cells(home: Path) -> list[str]: # those of the page up to the lasso, then the window
    page = nbformat.read(ROOT/'nbs/explanations/a_cluster.ipynb', 4)
    code = [c.source.replace('../../data', str(ROOT/'data')) for c in page.cells if c.cell_type == 'code']
    last = next(i for i, source in enumerate(code) if "reason='lasso'" in source)
    prepare = '\n'.join(code[:last + 1]).replace('\nsnapshot(state, tiles=0)', '') + ';'
    return [prepare, WINDOW.format(where=str(home/'rows.npy'), points=str(home/'points.npy'))]


def lasso_around(positions, rows, margin=8): # (n,2) pixels, rows inside -> corners of a closed line around them
    inside = positions[rows]
    hull = inside[ConvexHull(inside).vertices]
    outward = hull - hull.mean(0)
    corners = hull + margin * outward / np.linalg.norm(outward, axis=1, keepdims=True)
    return [*corners.tolist(), corners[0].tolist()]


def pixel_positions(points, canvas): # points: (n,2), -1..1 -> pixels of the page
    centre = np.array([canvas['x'] + canvas['width'] / 2, canvas['y'] + canvas['height'] / 2])
    return centre + points * [1, -1] * canvas['height'] / 2


def screenshot(page, home: Path) -> Image.Image: # of the window, with the lasso drawn
    page.locator('.rssqa-explorer canvas').first.wait_for()
    page.keyboard.press('Control+b')                               # hides the list of files
    page.wait_for_timeout(4000)
    window = page.locator('.rssqa-explorer').first
    window.scroll_into_view_if_needed()
    canvas = window.locator('canvas').first.bounding_box()
    positions = pixel_positions(np.load(home/'points.npy')[:, :2], canvas)
    rows = np.load(home/'rows.npy')
    page.get_by_title('Activate lasso selection').click()
    drag(page, lasso_around(positions, rows), 30)
    page.get_by_text(f'{len(rows)} selected (lasso)').wait_for()
    page.mouse.move(700, 8)                                        # no tooltip over the points
    page.wait_for_timeout(1500)
    return Image.open(io.BytesIO(window.screenshot()))


def main():
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        home = Path(folder)
        lab = JupyterLab(home/'lab')
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = chromium.new_page(viewport=dict(width=1420, height=1080))
            page.set_default_timeout(180_000)
            run_all(page, lab.url(lab.write('cluster.ipynb', *page_cells(home))))
            picture = screenshot(page, home)
        finally:
            chromium.close()
            lab.stop()
    PICTURE.parent.mkdir(exist_ok=True)
    few_colours = picture.convert('RGB').quantize(
        160, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE
    )
    few_colours.save(PICTURE, optimize=True)
    print(PICTURE.name, picture.size, PICTURE.stat().st_size)


if __name__ == '__main__': main()
