"""Speed of encoders: every variant is the same function, and the choice of the fastest keeps to its bound."""
import pandas as pd
import pytest

from rssqa.bench.encoder_speed import DEFAULT_VARIANTS, bench_encoders, best_variant
from rssqa.clip.encoders import fast_bf16
from rssqa.core import UnknownName

TINY = dict(
    embed_dim=16,
    vision_cfg=dict(image_size=32, patch_size=8, width=32, head_width=16, layers=2),
    text_cfg=dict(context_length=8, vocab_size=100, width=16, heads=2, layers=1),
)


def test_every_variant_gives_the_same_vectors():
    table = bench_encoders(TINY, batch=2, rounds=2)
    assert tuple(table.index) == DEFAULT_VARIANTS
    assert table.speed['open_clip'] == 1 and (table.speed > 0).all()
    assert (table.cosine[['open_clip', 'float32', 'channels_last', 'frozen']] > 1 - 1e-5).all()
    assert (table.cosine[['int8', 'bfloat16']] > 0.99).all()
    assert ('bfloat16' in table.note['bfloat16']) == (not fast_bf16())


def test_variants_are_chosen_by_name():
    assert list(bench_encoders(TINY, 1, 1, ('frozen',)).index) == ['open_clip', 'frozen']
    with pytest.raises(UnknownName, match='frozen'): bench_encoders(TINY, 1, 1, ('froze',))


def test_the_best_is_the_fastest_that_is_close():
    table = pd.DataFrame(dict(speed=[1, 2, 3.0], cosine=[1, 0.9995, 0.99]), ['a', 'b', 'c'])
    assert best_variant(table) == 'b'
    assert best_variant(table, 0.9) == 'c'
    assert best_variant(table, 0.9999) == 'a'


def test_share_of_peak_is_work_over_what_is_possible():
    table = bench_encoders(TINY, 2, 1, ('float32',))
    assert table.images_s.gt(0).all() and table.share.between(0, 1.5, inclusive='neither').all()
    ratio = table.images_s['float32'] / table.images_s['open_clip']
    assert table.speed['float32'] == pytest.approx(ratio, rel=0.01)
