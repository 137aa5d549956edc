"The evaluation of the shipped pack: which tiles it may use, and what its measures mean."
import numpy as np
import pandas as pd
import pytest

from rssqa.bench import assessor as bench_module
from rssqa.bench.assessor import CHOICES, LATER, agreement_of, bench_later, held_out_rows, measure_pack
from rssqa.core import read_json
from rssqa.data.datasets import scan
from rssqa.data.synthetic import scene
from rssqa.quality.assessor import Assessor, TrainingImage
from rssqa.quality.pack import Pack, bundled_pack
from rssqa.tables.grid import PredictionGrid


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


def test_agreement_is_the_mean_share_of_other_maps_with_the_same_class():
    pred = np.random.default_rng(0).integers(3, size=(5, 6, 7)).astype(np.uint8)
    grid = PredictionGrid('image', 'd', list('abcde'), None, None, pred, None)
    for i, found in enumerate(agreement_of(grid)):
        others = [(pred[i] == pred[j]).mean() for j in range(5) if j != i]
        assert found == pytest.approx(np.mean(others))


def test_the_later_source_had_no_part_in_the_shipped_assessor():
    assessor = Assessor.load(bundled_pack()/'assessor')
    for sources in LATER.values():
        for source in sources:
            assert source not in assessor.sources and source not in assessor.datasets
            assert source not in set(assessor.calibration.dataset)


def drawn_images(n, side=64):
    "Drawn scenes with eight noisy maps each, as the committed tables would hold them."
    images = []
    for seed in range(n):
        drawn = scene('town', seed=seed, size=side)
        truth = drawn.mask[2::4, 2::4].astype(np.uint8)
        rng = np.random.default_rng(seed)
        wrong = rng.random((8, *truth.shape)) < np.linspace(0.05, 0.5, 8)[:, None, None]
        pred = np.where(wrong, rng.integers(6, size=wrong.shape), truth).astype(np.uint8)
        p = (np.eye(6)[pred].transpose(0, 3, 1, 2) * 190 + 10).astype(np.uint8)
        grid = PredictionGrid(f'i{seed}', 'elsewhere', [f'm{i}' for i in range(8)], p, p, pred, truth)
        oa = {m: float((x == truth).mean()) for m, x in zip(grid.methods, pred)}
        images.append(TrainingImage(drawn.image, grid, f's{seed}', oa))
    return images


def test_the_later_rows_are_those_of_the_shipped_assessor(monkeypatch):
    "Few drawn images in place of the coast: rows of every kind of input, and of agreement, on the same images."
    images = drawn_images(3)
    monkeypatch.setattr(bench_module, 'training_images', lambda *args: images)
    board = bench_later('nowhere').set_index('input')
    grids = {image.grid.image_id: image.grid for image in images}
    assert (board.dataset == 'elsewhere').all() and board.images.eq(3).all()
    assert {'many', 'few', 'one'} <= set(board.index)
    oa = [image.oa[m] for image in images for m in image.grid.methods]
    agreement = np.concatenate([agreement_of(grid) for grid in grids.values()])
    row = board.loc['agreement of all maps']
    assert row.mae == pytest.approx(np.abs(np.array(oa) - agreement).mean())
