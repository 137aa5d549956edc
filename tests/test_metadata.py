"""Words from metadata: zones, missing values, seasons of both halves of the earth, refusals."""
import datetime
import warnings

import numpy as np
import pytest

from rssqa.core import SchemaError
from rssqa.open_vocabulary.metadata import (
    BANDS, BOXES, DETAIL, LAND_COVER, NOTHING_KNOWN, climate_zone, prompts_from_metadata,
)


def test_every_place_has_a_zone_with_words():
    zones = {climate_zone(lat, lon) for lat in range(-90, 91, 3) for lon in range(-180, 181, 3)}
    assert zones == set(LAND_COVER)


def test_boxes_and_bands_are_sound():
    assert len({box.name for box in BOXES}) == len(BOXES)
    for box in BOXES:
        assert box.zone in LAND_COVER and -90 <= box.south < box.north <= 90 and -180 <= box.west < box.east <= 180
    limits = [limit for limit, _ in BANDS]
    assert limits == sorted(limits) and limits[-1] == 90 and {zone for _, zone in BANDS} <= set(LAND_COVER)
    assert [limit for limit, _ in DETAIL] == sorted(limit for limit, _ in DETAIL)


@pytest.mark.parametrize('lat, lon, zone', [
    (30.0, 31.2, 'arid'), (41.9, 12.5, 'mediterranean'),
    (-12.5, 132.0, 'tropical with a dry season'), (-3, -60, 'tropical wet'),
    (35.2, -75.6, 'subtropical'), (52.5, 13.4, 'temperate'), (55.8, 37.6, 'continental'), (64, 26, 'boreal'),
    (-75, 0, 'polar'), (90, 180, 'polar'), (-90, -180, 'polar'),
    (0, 0, 'tropical wet'), (-23.5, 170, 'tropical with a dry season'),
])
def test_known_places(lat, lon, zone): assert climate_zone(lat, lon) == zone


@pytest.mark.parametrize('lat, lon, found', [
    (90.1, 0, '90.1'), (-91, 0, '-91'), (0, 181, 'take 360'), (5_000_000, 0, 'metres'),
])
def test_places_off_the_earth_are_refused(lat, lon, found):
    with pytest.raises(SchemaError, match=found): climate_zone(lat, lon)
    with pytest.raises(SchemaError, match=found): prompts_from_metadata(lat, lon)


def test_not_a_number_is_unknown():
    with pytest.warns(UserWarning, match='no coordinates'):
        assert prompts_from_metadata(float('nan'), 5, float('nan')) == [NOTHING_KNOWN]
    with pytest.warns(UserWarning, match='no coordinates'):
        assert prompts_from_metadata(lat=np.float32(5)) == [NOTHING_KNOWN]                   # half a place is none
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(prompts_from_metadata(50, 10)) == 1


def test_each_known_value_adds_its_sentence():
    with pytest.warns(UserWarning):
        assert prompts_from_metadata(gsd=10, sensor=' Sentinel-2 ') == [
            'a satellite image with pixels of 10 metres', 'an image taken by Sentinel-2']
        assert prompts_from_metadata(sensor='  ') == [NOTHING_KNOWN]
        assert prompts_from_metadata(gsd=0.3)[0].startswith('a very detailed')
        assert prompts_from_metadata(gsd=30)[0].startswith('a coarse')


@pytest.mark.parametrize('lat, month, season', [
    (50, 1, 'winter'), (50, 2, 'winter'), (50, 3, 'spring'), (50, 8, 'summer'), (50, 11, 'autumn'), (50, 12, 'winter'),
    (-40, 1, 'summer'), (-40, 4, 'autumn'), (-40, 7, 'winter'), (-40, 12, 'summer'), (10, 1, ''), (-23.5, 7, ''),
])
def test_seasons_of_both_halves(lat, month, season):
    for date in (f'2020-{month:02}-15', datetime.date(2020, month, 15), f'2020-{month:02}-15T10:00:00Z'):
        words = prompts_from_metadata(lat, 100, date=date)
        assert words[1:] == ([f'an image taken in {season}'] if season else [])


@pytest.mark.parametrize('change, found', [
    (dict(gsd=0), 'above 0'), (dict(gsd=-1), 'above 0'), (dict(gsd=float('inf')), 'above 0'),
    (dict(date='15.3.2017'), '2017-03-15'), (dict(date=''), 'date'),
])
def test_wrong_values_are_refused(change, found):
    with pytest.raises(SchemaError, match=found): prompts_from_metadata(50, 10, **change)


def test_unknown_dates_are_left_out():
    for date in (None, float('nan')): assert len(prompts_from_metadata(50, 10, date=date)) == 1
