"""Choices and ratings are kept: states without a browser, buttons through their clicks, errors explained."""
import asyncio
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import rssqa.viz.widgets as module
from rssqa.core import BadImage, DataNotFound, Incompatible, SchemaError, UnknownName
from rssqa.data.synthetic import scene
from rssqa.quality.pack import Pack
from rssqa.viz.explorer import write_table
from rssqa.viz.degradation import as_png
from rssqa.viz.widgets import PairReviewer, Recommender, as_good, example_review, marked, read_table
from test_degradation import small_pack


@pytest.fixture(scope='module')
def pack(): return Pack(small_pack(), 'cpu')


def save_scene(scene_type, path):
    rgb = scene(scene_type, 3, 64).image.transpose(1, 2, 0)
    Image.fromarray((rgb * 255).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    home = tmp_path/'in'
    (home/'sub').mkdir(parents=True)
    save_scene('town', home/'a.png')
    save_scene('flood', home/'sub'/'b.png')
    (home/'c.png').write_text('<html>')
    return home


# ---------------------------------------------------------------- recommender

def test_a_folder_is_ranked_chosen_and_exported(pack, folder, tmp_path):
    r = Recommender(folder, pack)
    assert r.names == ['a.png', 'c.png', 'sub/b.png'] and len(r.table()) == 0
    reports = []
    table = r.rank_all(lambda n, of: reports.append((n, of)))
    assert list(table.image) == ['a.png', 'sub/b.png']
    assert reports[-1] == (3, 3) and list(r.problems) == ['c.png']
    ranking = r.ranked('a.png')
    r.choose(ranking.method[1], 'a.png')
    for name in ('t.csv', 't.parquet'):
        back = read_table(r.export(tmp_path/name))
        assert back.chosen[0] == ranking.method[1] and back.recommended[0] == ranking.method[0]
        assert back.by.tolist() == ['person', 'recommendation']
        assert float(back.predicted[0]) == pytest.approx(ranking.predicted[1])


def test_each_image_is_ranked_once(pack, monkeypatch):
    calls = []
    monkeypatch.setattr(module, 'rank', lambda *a, real=module.rank, **k: calls.append(1) or real(*a, **k))
    r = Recommender([scene('town', 1, 64).image], pack)
    r.ranked()
    r.rank_all()
    r.ranked('image 0')
    assert len(calls) == 1


def test_recommender_explains_errors(pack, folder, tmp_path):
    (tmp_path/'empty').mkdir()
    with pytest.raises(DataNotFound, match='no folder'): Recommender(tmp_path/'no', pack)
    with pytest.raises(DataNotFound, match='no image in'): Recommender(tmp_path/'empty', pack)
    with pytest.raises(DataNotFound, match='no image was given'): Recommender([], pack)
    r = Recommender(None, pack)
    with pytest.raises(DataNotFound, match='Open a folder'): r.ranked()
    with pytest.raises(DataNotFound, match='nothing to export'): r.export(tmp_path/'t.csv')
    r.open(folder)
    with pytest.raises(UnknownName, match='a.png'): r.ranked('aa.png')
    with pytest.raises(UnknownName, match='pspnet'): r.choose('pspnett')
    with pytest.raises(BadImage): r.ranked('c.png')
    r.ranked()
    with pytest.raises(Incompatible, match='.csv or .parquet'): r.export(tmp_path/'t.xlsx')


def is_cleared(view): return (view.maps.children, view.numbers.value, view.choice.options) == ((), '', ())


def pictures(view): return [box.children[0].value for box in view.maps.children]


def test_the_recommender_view(pack, folder, tmp_path):
    view = Recommender(None, pack).view()
    assert 'press Open' in view.message.value
    assert view.next.disabled and view.all.disabled and view.save.disabled
    view.folder.value = str(tmp_path/'no')
    view.opener.click()
    assert 'no folder' in view.message.value
    view.folder.value = str(folder)
    view.opener.click()
    assert view.message.value == '' and view.position.value == '1 of 3'
    assert len(view.maps.children) == 3 and view.back.disabled
    other = view.choice.options[1]
    view.choice.value = other
    assert view.state.chosen == {'a.png': other} and 'person' in view.choices.value
    view.next.click()
    assert 'c.png' in view.message.value and is_cleared(view)
    view.which.value = 'sub/b.png'
    assert view.next.disabled and view.message.value == ''
    assert view.choice.value == view.state.ranked().method[0]
    assert view.state.chosen == {'a.png': other}
    view.back.click()
    view.back.click()
    assert view.choice.value == other
    view.all.click()
    view.path.value = str(tmp_path/'t.csv')
    view.save.click()
    assert len(read_table(tmp_path/'t.csv')) == 2 and '2 rows' in view.saved.value
    assert '1 could not be read' in view.choices.value
    view.path.value = str(tmp_path/'t.xlsx')
    view.save.click()
    assert '.csv or .parquet' in view.saved.value


def test_an_answer_is_never_shown_under_another_name(pack, monkeypatch):
    "What a slow network answers stands under its own name, and images that were left are not ranked."
    ranked = []
    real = module.rank

    def slow(image, *args, **options):
        ranked.append(round(float(np.mean(image)), 6))
        time.sleep(.4)
        return real(image, *args, **options)

    monkeypatch.setattr(module, 'rank', slow)
    images = {name: scene('town', k, 64).image for k, name in enumerate('abc')}

    async def live():
        view = Recommender(images, pack).view()
        await asyncio.sleep(.1)                                              # `a` is being ranked
        assert 'segmenting' in view.position.value and is_cleared(view)
        view.next.click()
        view.next.click()
        assert view.which.value == 'c' and is_cleared(view)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        while not all(task.done() for task in tasks):
            if view.maps.children: assert pictures(view)[0] == as_png(images[view.which.value], 220)
            await asyncio.sleep(.02)
        assert pictures(view)[0] == as_png(images['c'], 220) and view.position.value == '3 of 3'
        assert 'c' in view.choices.value and not view.save.disabled
        view.back.click()
        view.back.click()                                                    # known already: at once
        assert pictures(view)[0] == as_png(images['a'], 220)
        return view

    view = asyncio.run(live())
    assert ranked == [round(float(np.mean(images[name])), 6) for name in 'ac']
    assert list(view.state.rankings) == ['a', 'c']


def test_ranking_all_images_can_be_stopped(pack, monkeypatch):
    "The window stays alive, Stop ends the run after the image at hand, what is done is kept, and it can go on."
    real = module.rank

    def slow(*args, **options):
        time.sleep(.2)
        return real(*args, **options)

    monkeypatch.setattr(module, 'rank', slow)
    images = {name: scene('town', k, 64).image for k, name in enumerate('abcdef')}

    async def until(is_done):
        for _ in range(1000):
            if is_done(): return
            await asyncio.sleep(.02)
        raise AssertionError('it never came')

    async def live():
        view = Recommender(images, pack).view()
        await until(lambda: view.maps.children)
        view.all.click()
        await until(lambda: len(view.state.rankings) >= 2)
        assert view.all.description == 'Stop' and 'of 6' in view.message.value
        view.all.click()
        assert view.all.description == 'Stopping …'
        await until(lambda: view.all.description == 'Rank all images')
        stopped_at = len(view.state.rankings)
        assert stopped_at < 6 and view.message.value == f'{stopped_at} of 6 images are ranked'
        await asyncio.sleep(.5)
        assert len(view.state.rankings) == stopped_at                        # nothing goes on in secret
        view.all.click()
        await until(lambda: view.message.value == '6 of 6 images are ranked')
        assert view.all.description == 'Rank all images'
        return view

    view = asyncio.run(live())
    assert list(view.state.rankings) == list('abcdef') and '6' in view.position.value


def test_another_folder_ends_a_run_over_all_images(pack, folder, monkeypatch):
    real = module.rank

    def slow(*args, **options):
        time.sleep(.2)
        return real(*args, **options)

    monkeypatch.setattr(module, 'rank', slow)

    async def live():
        view = Recommender({name: scene('town', k, 64).image for k, name in enumerate('abcdef')}, pack).view()
        view.all.click()
        await asyncio.sleep(.1)
        view.folder.value = str(folder)
        view.opener.click()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.gather(*tasks)
        assert view.all.description == 'Rank all images' and 'of 6' not in view.message.value
        return view

    view = asyncio.run(live())
    assert set(view.state.rankings) <= set(view.state.names) and view.state.names[0] == 'a.png'


def test_ties_are_named(pack, monkeypatch):
    ranking = pd.DataFrame(dict(method=['unet', 'logcan', 'pspnet'], as_good=[True, True, False]))
    assert as_good(ranking) == ['logcan'] and as_good(ranking.assign(as_good=False)) == []

    def tied(*args, real=module.rank, **options):
        found = real(*args, **options)
        return found.assign(as_good=True)

    monkeypatch.setattr(module, 'rank', tied)
    view = Recommender([scene('town', 1, 64).image], pack).view()
    first, second = view.state.ranked().method
    assert f'recommended: {first}</b>; as good, as far as can be told: {second}' in view.numbers.value
    captions = [box.children[1].value for box in view.maps.children]
    row = view.state.ranked().iloc[1]
    assert 'as good' in captions[2] and f'[{row.lower:.2f}, {row.upper:.2f}]' in captions[2]
    assert 'building' in view.numbers.value                                  # the legend of the classes


def watch_screen(view) -> list:
    "Record what is on the screen whenever the name or number of the image changes."
    screens = []

    def record(change): screens.append((view.which.value, pictures(view), view.numbers.value))

    view.which.observe(record, 'value')
    view.position.observe(record, 'value')
    return screens


@pytest.mark.parametrize('error', [None, BadImage('cannot read it', '', 'x'), RuntimeError('out of memory')],
                         ids=['slow', 'bad image', 'unforeseen error'])
def test_nothing_of_the_previous_image_is_shown_under_the_next_name(pack, monkeypatch, error):
    scenes = {name: scene(name, 2, 64).image for name in ('town', 'flood')}
    view = Recommender(scenes, pack).view()
    first = pictures(view)
    numbers = view.numbers.value
    real = module.rank
    during = [] # what one sees while the next image is ranked

    def slow_rank(*args, **options):
        during.append((view.which.value, is_cleared(view), 'segmenting' in view.position.value))
        if error: raise error
        return real(*args, **options)

    monkeypatch.setattr(module, 'rank', slow_rank)
    screens = watch_screen(view)
    view.next.click()
    assert during == [('flood', True, True)]
    # whatever appeared beside the new name was not of the old image
    assert screens
    for name, images, text in screens:
        if name == 'flood': assert not set(images) & set(first) and text != numbers
    assert view.position.value == '2 of 2'
    if error:
        assert is_cleared(view) and view.message.value and str(error).split('.')[0] in view.message.value
    else:
        assert len(pictures(view)) == 3 and pictures(view)[0] != first[0] and view.message.value == ''
    # back to the first image, which was ranked already
    view.back.click()
    assert pictures(view) == first and view.numbers.value == numbers and view.message.value == ''


def test_another_folder_with_the_same_names_shows_its_own_images(pack, tmp_path):
    for folder, scene_type in (('one', 'town'), ('two', 'flood')):
        (tmp_path/folder).mkdir()
        save_scene(scene_type, tmp_path/folder/'a.png')
    view = Recommender(tmp_path/'one', pack).view()
    first = pictures(view)
    view.folder.value = str(tmp_path/'two')
    view.opener.click()
    assert view.which.value == 'a.png' and pictures(view)[0] != first[0]


def test_a_wider_interval_is_explained(pack):
    view = Recommender([scene('town', 1, 64).image], pack).view()
    ranking = view.state.ranked()
    assert set(ranking.state) == {'widened'} and ranking.lower.lt(ranking.upper).all()
    assert 'wider intervals: ' in view.numbers.value and 'unlike the training images' in view.numbers.value


# ---------------------------------------------------------------- pair reviewer

@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_ratings_are_saved_and_resumed(tmp_path, suffix):
    review, images = example_review()
    path = tmp_path/f'v{suffix}'
    p = PairReviewer(review, path, images)
    for rating in ('right', 'wrong', 'skip', 'right'): p.rate(rating)
    # the order of the table may change
    q = PairReviewer(review.sample(8, random_state=1), path, images)
    def by_pair(reviewer): return reviewer.review.set_index('pair').rating.to_dict()
    assert q.remaining == 4 and by_pair(q) == by_pair(p) and q.review.skipped.sum() == 1
    while q.current is not None: q.rate('right')
    assert q.remaining == 0 and q.rating_accuracy().judged.sum() == 7
    with pytest.raises(SchemaError, match='no pair left'): q.rate('right')
    # a skipped pair can be rated after all
    q.index = int(np.flatnonzero(q.review.skipped)[0])
    q.rate('wrong')
    assert not q.review.skipped.any() and (read_table(path).rating != '').all()


def test_a_failed_save_takes_the_rating_back(tmp_path, monkeypatch):
    review, images = example_review()
    p = PairReviewer(review, tmp_path/'v.csv', images)
    view = p.view()
    p.rate('right')
    saved = (tmp_path/'v.csv').read_bytes()

    def full_disk(*args): raise OSError('disk full')

    monkeypatch.setattr(module, 'write_table', full_disk)
    view.buttons['wrong'].click()
    assert 'disk full' in view.message.value
    assert p.index == 1 and p.review.rating[1] == '' and (tmp_path/'v.csv').read_bytes() == saved


def test_reviewer_explains_errors(tmp_path):
    review, _ = example_review()
    with pytest.raises(SchemaError, match='no column before'): PairReviewer(review.drop(columns='before'))
    with pytest.raises(SchemaError, match='appears twice'): PairReviewer(pd.concat([review, review]))
    write_table(review.assign(pair=review.pair + 'x'), tmp_path/'v.csv')
    with pytest.raises(Incompatible, match='other pairs'): PairReviewer(review, tmp_path/'v.csv')
    with pytest.raises(UnknownName, match='right'): PairReviewer(review).rate('rigt')
    assert 'no pair in this table' in PairReviewer(review.head(0)).view().text.value


def send_key(view, key): # as the browser sends it
    data = dict(method='custom', content=dict(key=key))
    view.keyboard._handle_msg(dict(content=dict(data=data), buffers=[]))


def test_the_reviewer_view(tmp_path):
    review, images = example_review()
    review = review.assign(after=review.after.where(review.index != 1, ''))
    images = images | {review.key[2]: str(tmp_path/'gone.png')}
    view = PairReviewer(review, tmp_path/'v.csv', images).view()
    assert '0 rated, 0 skipped, 8 left' in view.position.value and view.back.disabled
    send_key(view, 'r')
    assert view.state.review.rating[0] == 'right'
    assert 'the pair leaves' in view.text.value and 'right so far' in view.shares.value
    send_key(view, 'x')
    assert view.state.index == 1
    view.buttons['skip'].click()
    assert 'gone.png' in view.message.value and view.picture.layout.display == 'none'
    view.back.click()
    view.buttons['wrong'].click()
    assert view.state.review.rating[1] == 'wrong' and view.state.index == 2
    for _ in range(6): view.press('r')
    assert 'All done' in view.text.value and all(b.disabled for b in view.buttons.values())


def test_changes_are_marked_and_escaped():
    removed = '<del style="background:#fbe3e0;color:#1d2329">&lt;b&gt;</del>'
    assert marked('a <b> c', 'a c') == (f'a {removed} c', 'a c')
    assert marked('', '') == ('', '')


def test_the_reviewer_says_what_is_in_the_file(tmp_path):
    review, images = example_review()
    path = tmp_path/'ratings.csv'
    view = PairReviewer(review, path, images).view()
    assert 'nothing saved yet' in view.position.value and not path.exists()
    view.press('r')
    assert '1 rated' in view.position.value and 'saved in ratings.csv' in view.position.value
    # a pair that the table rates and the file skips is skipped
    saved = read_table(path)
    saved.loc[1, 'skipped'] = True
    write_table(saved, path)
    again = PairReviewer(review.assign(rating='right'), path, images)
    assert again.review.rating[1] == '' and again.review.skipped[1]
    both = (again.review.rating != '') & again.review.skipped
    assert not both.any()
