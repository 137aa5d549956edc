"The evaluation of the shipped pack: which tiles it may use, and what its measures mean."
import numpy as np
import pandas as pd
import pytest

from rssqa.bench.assessor import CHOICES, held_out_rows, measure_pack
from rssqa.core import read_json
from rssqa.data.datasets import scan
from rssqa.quality.pack import Pack, bundled_pack


def rows(seed=0, scenes=4, images=3, methods=('a', 'b', 'c')):
    rng = np.random.default_rng(seed)
    out = []
    for s in range(scenes):
        for i in range(images):
            oa = rng.uniform(0.3, 0.9, len(methods))
            predicted = oa + rng.normal(0, 0.05, len(methods))
            best = predicted.argmax()
            for m, name in enumerate(methods):
                out.append(dict(
                    dataset='d', scene=f's{s}', image_id=f'{s}-{i}', method=name, oa=oa[m], predicted=predicted[m],
                    lower=predicted[m] - 0.1, upper=predicted[m] + 0.1, recommended=m == best, usual=m == 0,
                    agreement=rng.random(), confidence=rng.random(),
                ))
    return pd.DataFrame(out)


def test_measures_are_those_of_a_plain_loop():
    table = rows()
    measured = measure_pack(table).set_index('group').loc['d']
    regret, usual = [], []
    for _, maps in table.groupby('image_id'):
        regret.append(maps.oa.max() - maps.oa[maps.recommended].iloc[0])
        usual.append(maps.oa.max() - maps.oa[maps.usual].iloc[0])
    assert measured['regret: advice'] == pytest.approx(np.mean(regret))
    assert measured.gap_closed == pytest.approx(1 - np.mean(regret) / np.mean(usual))
    assert measured.gap_lower <= measured.gap_closed <= measured.gap_upper
    assert measured.mae == pytest.approx((table.oa - table.predicted).abs().mean())
    assert measured.coverage == pytest.approx(((table.oa - table.predicted).abs() <= 0.1).mean())
    assert set(CHOICES) == {c.removeprefix('regret: ') for c in measured.index if c.startswith('regret: ')}


def test_scenes_count_equally_whatever_their_number_of_tiles():
    table = rows(scenes=2)
    first = table[table.scene == 's0']
    many = pd.concat([table, *[first.assign(image_id=first.image_id + f'.{i}') for i in range(5)]])
    equal = measure_pack(many).set_index('group').loc['scenes counted equally']
    once = measure_pack(table).set_index('group').loc['scenes counted equally']
    for column in ('mae', 'coverage', 'gap_closed', 'regret: agreement'):
        assert equal[column] == pytest.approx(once[column])


def test_never_changing_closes_nothing_and_is_never_wrong():
    table = rows().assign(recommended=lambda t: t.usual)
    measured = measure_pack(table).set_index('group').loc['all tiles']
    assert measured.gap_closed == 0 and measured.changed == 0 and measured.wrong_change == 0


@pytest.mark.real
def test_held_out_scenes_are_whole_and_a_small_part(real):
    pack = Pack(bundled_pack())
    tiles = pd.concat([scan(real/'seg'/dataset) for dataset in ('amazon_forest', 'mumbai_pleiades')], ignore_index=True)
    held_out = held_out_rows(tiles, pack)
    for dataset, part in tiles.groupby('dataset'):
        inside = held_out[part.index]
        assert 0.05 < inside.mean() < 0.3
        assert not set(part.scene[inside]) & set(part.scene[~inside])
        config = read_json(pack.folder/pack.config['networks'][dataset]['unet']/'config.json')
        assert config['holdout'] == 'scenes' and set(part.scene.astype(str)) == set(config['scenes'])


def test_tiles_without_an_answer_are_counted_apart():
    table = rows()
    one = table.image_id == table.image_id.iloc[0]
    table.loc[one, ['predicted', 'lower', 'upper', 'agreement', 'confidence']] = np.nan
    table.loc[one, 'recommended'] = False
    measured = measure_pack(table).set_index('group')
    assert measured.refused['d'] == 1 and measured.images['d'] == 11
    others = measure_pack(table[~one]).set_index('group')
    assert measured.mae['d'] == others.mae['d'] and others.refused['d'] == 0
