"""Monitoring: no more false alarms than promised, changes are seen and named, odd folders are refused or left out."""
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rssqa.cli import main
from rssqa.core import DataNotFound, Incompatible
from rssqa.data.synthetic import SCENE_TYPES, scene
from rssqa.quality.monitor import Evidence, describe_images, fewest_scenes_to_alarm, median_of_scenes, monitor
from rssqa.quality.pack import open_pack

KINDS = list(SCENE_TYPES)


def write(folder, seeds, change=lambda x: x):
    folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds):
        image = np.clip(change(scene(KINDS[i % len(KINDS)], seed, 64).image), 0, 1)
        Image.fromarray((255 * image).astype(np.uint8).transpose(1, 2, 0)).save(folder/f'{i:02}.png')
    return folder


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('series')
    write(home/'checked', range(36))
    write(home/'same', range(100, 110))
    write(home/'dark', range(200, 212), lambda x: 0.35 * x)
    return home


@pytest.fixture(scope='module')
def found(home): return monitor([home/'same', home/'dark'], home/'checked', level=0.05)


# ---------------------------------------------------------------- evidence

@pytest.mark.parametrize('draw', [np.random.Generator.standard_normal, np.random.Generator.standard_cauchy,
                                  lambda rng, size: rng.integers(3, size=size).astype(float)])
def test_no_more_false_alarms_than_promised(draw):
    rng = np.random.default_rng(0)
    highest = []
    for _ in range(200):
        evidence = Evidence(draw(rng, size=25))
        values = []
        for score in draw(rng, size=120):
            evidence.update(score)
            values.append(evidence.value)
        highest.append(max(values))
    assert np.mean(np.array(highest) >= 10) <= 0.1                     # chance of ever reaching 1 / level


def test_p_values_are_uniform_while_nothing_changes():
    rng = np.random.default_rng(1)
    p = np.concatenate([[Evidence(rng.normal(size=19)).update(rng.normal())] for _ in range(2000)])
    for level in (0.05, 0.2, 0.5, 0.9): assert abs((p <= level).mean() - level) < 0.035


def test_a_larger_change_is_seen_sooner_and_a_smaller_score_is_no_evidence():
    def delay(shift):
        rng = np.random.default_rng(2)
        evidence = Evidence(rng.normal(size=60))
        for n in range(1, 200):
            evidence.update(rng.normal() + shift)
            if evidence.value >= 100: return n
        return 200
    assert delay(4) <= delay(2) < delay(0) == 200 == delay(-4)


def test_ties_are_no_evidence():
    evidence = Evidence(np.zeros(30))
    for _ in range(50): assert evidence.update(0.0) == 1
    assert evidence.value <= 1


# ---------------------------------------------------------------- folders

def test_a_change_raises_an_alarm_and_is_named(found):
    assert found.periods.alarm.tolist() == [False, True]
    assert found.periods.changed[0] == '' and 'darker' in found.periods.changed[1]
    assert found.periods.score[1] > found.periods.score[0] and found.scenes.p.between(0, 1).all()
    assert 'ALARM' in str(found) and 'at most 5%' in str(found)


def test_an_alarm_stays_on(home):
    later = monitor([home/'dark', home/'same'], home/'checked', level=0.05)
    assert later.periods.alarm.tolist() == [True, True]


def test_tiles_of_one_scene_count_once(home, tmp_path):
    write(tmp_path/'dark'/'one', range(200, 212), lambda x: 0.35 * x)
    found = monitor([tmp_path/'dark'], home/'checked')
    assert found.periods[['images', 'scenes']].iloc[0].tolist() == [12, 1] and len(found.scenes) == 1
    assert not found.periods.alarm[0]                                  # one scene is not evidence enough


def test_the_median_of_a_scene_is_taken():
    images = pd.DataFrame(dict(scene=['b', 'a', 'b', 'b'], score=[1.0, 7.0, 2.0, 9.0]))
    assert median_of_scenes(images).to_dict() == {'b': 2.0, 'a': 7.0}
    assert list(median_of_scenes(images).index) == ['b', 'a']


def test_images_without_data_and_files_that_are_none_are_left_out(tmp_path):
    folder = write(tmp_path/'mixed', range(3))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder/'black.png')
    (folder/'broken.png').write_bytes(b'no image')
    described = describe_images(folder, open_pack(None).assessor)
    assert described.path.tolist() == ['00.png', '01.png', '02.png']


def test_what_cannot_be_watched_is_refused(home, tmp_path):
    with pytest.raises(Incompatible, match='(?i)5 or more'): monitor([home/'same'], write(tmp_path/'few', range(3)))
    (tmp_path/'empty').mkdir()
    with pytest.raises(Incompatible, match='(?i)no image'): monitor([tmp_path/'empty'], home/'checked')
    with pytest.raises(DataNotFound, match='nowhere'): monitor([tmp_path/'nowhere'], home/'checked')
    with pytest.raises(Incompatible, match='(?i)suffix'): monitor([home/'same'], home/'checked', out=tmp_path/'t.txt')


def test_an_image_is_checked_without_maps(home):
    assessor = open_pack(None).assessor
    black = np.zeros((3, 64, 64), np.float32)
    assert assessor.check_image(black).refused and not assessor.check_image(home/'same'/'00.png').refused


def test_the_command_writes_the_table(home, tmp_path, capsys):
    out = tmp_path/'periods.csv'
    with pytest.raises(SystemExit) as stop:
        folders = [str(home/'same'), str(home/'dark'), '--reference', str(home/'checked')]
        main(['monitor', *folders, '-o', str(out), '--level', '.05'])
    assert stop.value.code == 0 and 'ALARM' in capsys.readouterr().out
    assert pd.read_csv(out).period.tolist() == ['same', 'dark']


@pytest.mark.parametrize('reference, level', [(5, .01), (20, .01), (20, .2), (200, .001)])
def test_no_series_raises_an_alarm_earlier_than_said(reference, level):
    fewest = fewest_scenes_to_alarm(reference, level)
    rng = np.random.default_rng(reference)
    for _ in range(50):
        evidence = Evidence(rng.normal(size=reference))
        alarms = []
        for score in rng.normal(size=fewest - 1) + rng.choice([0, 5, 50]) * np.arange(1, fewest):
            evidence.update(score)
            alarms.append(evidence.value >= 1 / level)
        assert not any(alarms)
    assert fewest_scenes_to_alarm(reference, 1e-9, most=3) == 0
