"""What people choose and judge is kept: states without a browser, buttons through their clicks, faults explained."""
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import rssqa.viz.widgets as module
from rssqa.core import BadImage, DataNotFound, Incompatible, SchemaError, UnknownName
from rssqa.viz.widgets import PairReviewer, Recommender, example_review, marked, read_table, write_table
from rssqa.quality.recommend import Pack
from rssqa.data.synthetic import scene
from test_degradation import small_pack


@pytest.fixture(scope='module')
def pack(): return Pack(small_pack(), 'cpu')


@pytest.fixture
def folder(tmp_path):
    (tmp_path/'in'/'sub').mkdir(parents=True)
    for name, look in (('a.png', 'town'), ('sub/b.png', 'flood')):
        Image.fromarray((scene(look, 3, 64).image.transpose(1, 2, 0) * 255).astype(np.uint8)).save(
            tmp_path / 'in' / name
        )
    (tmp_path/'in'/'c.png').write_text('<html>')
    return tmp_path/'in'


def test_a_folder_is_ranked_chosen_and_exported(pack, folder, tmp_path):
    r = Recommender(folder, pack)
    assert r.names == ['a.png', 'c.png', 'sub/b.png'] and len(r.table()) == 0
    ticks = []
    t = r.rank_all(lambda n, of: ticks.append((n, of)))
    assert list(t.image) == ['a.png', 'sub/b.png'] and ticks[-1] == (3, 3) and list(r.problems) == ['c.png']
    worse = r.ranked('a.png').method[1]
    r.choose(worse, 'a.png')
    for name in ('t.csv', 't.parquet'):
        back = read_table(r.export(tmp_path/name))
        assert (
            back.chosen[0] == worse
            and back.by.tolist() == ['person', 'recommendation']
            and back.recommended[0] == r.ranked('a.png').method[0]
        )
        assert float(back.predicted[0]) == pytest.approx(r.ranked('a.png').predicted[1])


def test_each_image_is_ranked_once(pack, monkeypatch):
    calls = []
    monkeypatch.setattr(module, 'rank', lambda *a, real=module.rank, **k: calls.append(1) or real(*a, **k))
    r = Recommender([scene('town', 1, 64).image], pack)
    r.ranked()
    r.rank_all()
    r.ranked('image 0')
    assert len(calls) == 1


def test_recommender_explains_faults(pack, folder, tmp_path):
    (tmp_path/'empty').mkdir()
    for images, words in ((tmp_path/'no', 'no folder'), (tmp_path/'empty', 'no image in'), ([], 'no image was given')):
        with pytest.raises(DataNotFound, match=words): Recommender(images, pack)
    r = Recommender(None, pack)
    with pytest.raises(DataNotFound, match='Open a folder'): r.ranked()
    with pytest.raises(DataNotFound, match='nothing to export'): r.export(tmp_path/'t.csv')
    r.open(folder)
    with pytest.raises(UnknownName, match='a.png'): r.ranked('aa.png')
    with pytest.raises(UnknownName, match='pspnet'): r.choose('pspnett')
    with pytest.raises(BadImage): r.ranked('c.png')
    r.ranked()
    with pytest.raises(Incompatible, match='.csv or .parquet'): r.export(tmp_path/'t.xlsx')


def test_the_recommender_view(pack, folder, tmp_path):
    view = Recommender(None, pack).view()
    assert 'press Open' in view.said.value and view.next.disabled and view.all.disabled and view.save.disabled
    view.folder.value = str(tmp_path/'no')
    view.opener.click()
    assert 'no folder' in view.said.value
    view.folder.value = str(folder)
    view.opener.click()
    assert (
        view.said.value == ''
        and view.place.value == '1 of 3'
        and len(view.maps.children) == 3
        and view.back.disabled
    )
    other = view.choice.options[1]
    view.choice.value = other
    assert view.state.chosen == {'a.png': other} and 'person' in view.picks.value
    view.next.click()
    assert 'c.png' in view.said.value and view.maps.children == () and view.choice.options == ()
    view.which.value = 'sub/b.png'
    assert (
        view.next.disabled
        and view.choice.value == view.state.ranked().method[0]
        and view.state.chosen == {'a.png': other}
    )
    view.back.click()
    view.back.click()
    assert view.choice.value == other
    view.all.click()
    view.path.value = str(tmp_path/'t.csv')
    view.save.click()
    assert (
        len(read_table(tmp_path / 't.csv')) == 2
        and '2 rows' in view.saved.value
        and '1 could not be read' in view.picks.value
    )
    view.path.value = str(tmp_path/'t.xlsx')
    view.save.click()
    assert '.csv or .parquet' in view.saved.value


def test_predictions_may_be_missing(pack, monkeypatch):
    real = module.rank
    monkeypatch.setattr(module, 'rank', lambda *a, **k: real(*a, **k).assign(predicted=np.nan))
    view = Recommender([scene('town', 1, 64).image], pack).view()
    assert (
        'no prediction' in view.numbers.value
        and 'no interval: no prediction' in view.numbers.value
        and '–' in view.picks.value
    )


@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_verdicts_are_saved_and_resumed(tmp_path, suffix):
    review, images = example_review()
    path = tmp_path/f'v{suffix}'
    p = PairReviewer(review, path, images)
    for rating in ('right', 'wrong', 'skip', 'right'): p.judge(rating)
    # the order of the table may change
    q = PairReviewer(review.sample(8, random_state=1), path, images)
    assert (
        q.left == 4
        and q.review.set_index('pair').rating.to_dict() == p.review.set_index('pair').rating.to_dict()
        and q.review.skipped.sum() == 1
    )
    while q.current is not None: q.judge('right')
    assert q.left == 0 and q.agreement().judged.sum() == 7
    with pytest.raises(SchemaError, match='no pair left'): q.judge('right')
    # a skipped pair can be judged after all
    q.at = int(np.flatnonzero(q.review.skipped)[0])
    q.judge('wrong')
    assert not q.review.skipped.any() and (read_table(path).rating != '').all()


def test_a_failed_save_takes_the_verdict_back(tmp_path, monkeypatch):
    review, images = example_review()
    p = PairReviewer(review, tmp_path/'v.csv', images)
    view = p.view()
    p.judge('right')
    kept = (tmp_path/'v.csv').read_bytes()
    monkeypatch.setattr(module, 'write_table', lambda *a: (_ for _ in ()).throw(OSError('disk full')))
    view.buttons['wrong'].click()
    assert (
        'disk full' in view.said.value
        and p.at == 1
        and p.review.rating[1] == ''
        and (tmp_path / 'v.csv').read_bytes() == kept
    )


def test_reviewer_explains_faults(tmp_path):
    review, _ = example_review()
    with pytest.raises(SchemaError, match='no column before'): PairReviewer(review.drop(columns='before'))
    with pytest.raises(SchemaError, match='appears twice'): PairReviewer(pd.concat([review, review]))
    write_table(review.assign(pair=review.pair + 'x'), tmp_path/'v.csv')
    with pytest.raises(Incompatible, match='other pairs'): PairReviewer(review, tmp_path/'v.csv')
    with pytest.raises(UnknownName, match='right'): PairReviewer(review).judge('rigt')
    assert 'no pair in this table' in PairReviewer(review.head(0)).view().text.value


def test_the_reviewer_view(tmp_path):
    review, images = example_review()
    view = PairReviewer(
        review.assign(after=review.after.where(review.index != 1, '')),
        tmp_path / 'v.csv',
        images | {review.key[2]: str(tmp_path / 'gone.png')},
    ).view()
    assert '0 judged, 0 skipped, 8 left' in view.place.value and view.back.disabled
    # as the browser sends it
    view.keyboard._handle_msg(
        dict(content=dict(data=dict(method='custom', content=dict(key='r'))), buffers=[])
    )
    assert (
        view.state.review.rating[0] == 'right'
        and 'the pair leaves' in view.text.value
        and 'right so far' in view.shares.value
    )
    view.buttons['skip'].click()
    assert 'gone.png' in view.said.value and view.picture.layout.display == 'none'
    view.back.click()
    view.buttons['wrong'].click()
    assert view.state.review.rating[1] == 'wrong' and view.state.at == 2
    for _ in range(6): view.press('r')
    assert 'All done' in view.text.value and all(b.disabled for b in view.buttons.values())


def test_changes_are_marked_and_escaped():
    assert marked('a <b> c', 'a c') == (
        'a <del style="background:#fbe3e0">&lt;b&gt;</del> c',
        'a c',
    ) and marked('', '') == ('', '')
