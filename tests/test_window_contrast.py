"""Every text of the small windows can be read in JupyterLab, in the light theme and in the dark one."""
import os

import pytest

from browser import choose_theme, chromium, faint_texts, lab, page, run_all  # noqa: F401 (fixtures)
from rssqa.data.synthetic import write_scenes
from test_degradation import small_pack

WINDOWS = dict(
    recommender='''from rssqa.quality.pack import bundled_pack
from rssqa.viz.widgets import Recommender
window = Recommender('town/images', PACK).view()
window.next.click()
window''',
    reviewer='''from rssqa.viz.widgets import PairReviewer, example_review
review, images = example_review()
window = PairReviewer(review, 'v.csv', images).view()
window.buttons['wrong'].click()
window''',
    degradation='''from rssqa.viz.degradation import DegradationExplorer
DegradationExplorer(PACK, size=64).view()''',
)


SHOWN = dict(recommender='predicted OA', reviewer='rated', degradation='90 % interval') # a text of the finished window


@pytest.mark.parametrize('name', WINDOWS)
def test_a_window_can_be_read_in_both_themes(page, lab, name):
    if not (lab.home/'town').exists(): write_scenes(lab.home/'town', 'town', 2, 64)
    source = WINDOWS[name].replace('PACK', f"'{small_pack()}'")
    lab.write(f'{name}.ipynb', source)
    run_all(page, lab.url(f'{name}.ipynb'))
    part = page.locator('.jp-OutputArea-output .jupyter-widgets').first
    part.wait_for(timeout=90_000)
    part.get_by_text(SHOWN[name]).first.wait_for(timeout=90_000)
    for theme in ('JupyterLab Light', 'JupyterLab Dark'):
        choose_theme(page, theme)
        page.wait_for_timeout(300)
        if 'RSSQA_SHOTS' in os.environ: page.screenshot(path=f'{os.environ["RSSQA_SHOTS"]}/{name}-{theme[11:]}.png')
        assert faint_texts(part) == [], theme
