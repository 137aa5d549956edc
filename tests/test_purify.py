"""Purification of captions: rules that settle, scores that resume, cuts that stay within their source, and noise that is found."""
import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.stats import binomtest

from rssqa.clip import purify as P
from rssqa.core import DataNotFound, Incompatible, SchemaError, UnknownName, digest
from rssqa.data.pairs import token_count
from rssqa.clip.purify import (
    CaptionerRewriter,
    RuleRewriter,
    agreement,
    apply_decisions,
    audit_noise,
    check_pairs,
    cut_pairs,
    cut_tokens,
    duplicate_groups,
    fold,
    image_groups,
    inject_noise,
    purify,
    read_scores,
    review_table,
    risk,
    risk_rules,
    score_pairs,
    segment,
    sentences,
    similarity,
    take_rewrites,
    thresholds,
    tidy,
    visible,
)

rules = RuleRewriter()


class Fake:
    "An encoder that knows how well a sentence fits: an image of brightness b and a sentence with =s have the cosine s, whatever b; other words have 0.5."
    name, dim, image_size = 'fake', 2, 4
    def __init__(self, mark='a'):
        self.fingerprint = digest(mark)
        self.images = 0
        self.texts = 0

    def encode_image(self, x):
        self.images += len(x)
        return SimpleNamespace(pooled=torch.tensor([[1.0, 0.0]] * len(x)))

    def encode_text(self, texts):
        self.texts += len(texts)
        s = torch.tensor([float(t.split('=')[1].split()[0].rstrip('.,')) if '=' in t else 0.5 for t in texts])
        return torch.stack([s, (1 - s**2).sqrt()], 1)


def table(captions, **columns): # one image a caption, unless told
    n = len(captions)
    base = dict(
        pair=[f'k{i}#0' for i in range(n)],
        key=[f'k{i}' for i in range(n)],
        caption=captions,
        source='web',
        split='train',
        tier='coarse',
        scene=[f's{i % 3}' for i in range(n)],
        path='',
    )
    return pd.DataFrame(base | columns)


def pictures(t): return {k: np.full((3, 4, 4), 0.5, np.float32) for k in t.key}
def clean(t, encoder=None, **kw):
    return purify(t, encoder or Fake(), images=kw.pop('images', pictures(t)), **kw)
def graded(n, start=0.0):
    return [f'harbour {i} with piers fit={start + i / n / 2:.3f} good' for i in range(n)]


# ---------------------------------------------------------------- table

@pytest.mark.parametrize('change,found', [(lambda t: t.drop(columns='tier'), 'tier'), (lambda t: t.assign(pair='same'), 'again'), (lambda t: t.assign(tier='rough'), 'rough')])
def test_what_is_no_table_of_pairs_is_refused(change, found):
    with pytest.raises(SchemaError, match=found): check_pairs(change(table(['a', 'b'])))


def test_absent_captions_are_empty_and_the_input_stays_as_it_is():
    t = table(['a', None, np.nan])
    assert (
        check_pairs(t.set_axis([5, 5, 7])).caption.tolist() == ['a', '', ''] and t.caption.isna().sum() == 2
    )


# ---------------------------------------------------------------- similarity

def test_each_image_and_each_sentence_is_encoded_once():
    t = table(['x=0.1', 'x=0.2', 'x=0.1', 'x=0.3'], key=['a', 'a', 'b', 'b'])
    e = Fake()
    assert np.allclose(similarity(t, e, pictures(t)), [0.1, 0.2, 0.1, 0.3], atol=1e-6) and (
        e.images,
        e.texts,
    ) == (2, 3)


@pytest.mark.parametrize('batch', [1, 2, 64])
def test_batches_change_nothing(batch):
    t = table(graded(7))
    assert np.allclose(similarity(t, Fake(), pictures(t), batch), [i / 14 for i in range(7)], atol=1e-3)


def test_images_of_several_sizes_are_opened_by_path(tmp_path):
    for i, size in enumerate([(5, 9), (30, 20)]):
        Image.new('RGB', size, (9, 99, 199)).save(tmp_path/f'{i}.png')
    t = table(['x=0.25', 'x=0.5'], path=[str(tmp_path/'0.png'), str(tmp_path/'1.png')])
    assert np.allclose(similarity(t, Fake()), [0.25, 0.5])


def test_unreadable_images_have_no_score_and_are_named(tmp_path):
    (tmp_path/'page.jpg').write_text('<html><body>404 not found</body></html>')
    Image.new('RGB', (8, 8)).save(tmp_path/'good.png')
    (tmp_path/'half.png').write_bytes((tmp_path/'good.png').read_bytes()[:40])
    t = table(
        ['x=0.5'] * 6,
        path=[
            str(tmp_path / 'page.jpg'),
            str(tmp_path / 'gone.png'),
            str(tmp_path / 'half.png'),
            '',
            np.nan,
            str(tmp_path / 'good.png'),
        ],
    )
    problems = {}
    out = similarity(t, Fake(), problems=problems)
    assert np.isnan(out[:5]).all() and out[5] == 0.5 and list(problems) == ['k0', 'k1', 'k2', 'k3', 'k4']
    assert 'web page' in problems['k0'] and 'gone.png' in problems['k1'] and 'path' in problems['k3']
    d = purify(t.assign(caption=[f'x{i}=0.5' for i in range(6)]), Fake())
    assert d.action.tolist() == ['drop-unreadable'] * 5 + ['keep'] and 'web page' in d.reason[0]


@pytest.mark.parametrize('bad', [np.full((3, 4, 4), np.nan), np.full((3, 4, 4), 7.0), np.zeros((4, 4, 9)), 'gone.png'])
def test_bad_arrays_are_named_too(bad):
    problems = {}
    assert np.isnan(similarity(table(['x']), Fake(), {'k0': bad}, problems=problems)).all() and list(
        problems
    ) == ['k0']


def test_an_encoder_that_gives_no_number_is_named():
    class Broken(Fake):
        def encode_image(self, x): return SimpleNamespace(pooled=torch.full((len(x), 2), torch.nan))
    t = table(['x', 'y'])
    problems = {}
    assert (
        np.isnan(similarity(t, Broken(), pictures(t), problems=problems)).all()
        and 'no number' in problems['k1']
    )
    assert (clean(t, Broken()).action == 'drop-unreadable').all()


def test_a_blank_caption_has_no_score_and_no_problem():
    t = table(['', '  ', 'x=0.5'])
    problems = {}
    assert (
        np.isnan(similarity(t, Fake(), pictures(t), problems=problems)).tolist() == [True, True, False]
        and problems == {}
    )


def test_no_pairs_have_no_scores(): assert similarity(table([]), Fake(), {}).shape == (0,)


def test_without_paths_or_images_nothing_can_be_scored():
    with pytest.raises(SchemaError, match='path'): similarity(table(['a']).drop(columns='path'), Fake())


# ---------------------------------------------------------------- metadata and what is visible

VISUAL = 'a stadium with a green lawn lies beside a car park.'
META = [
    'The image was acquired on 2015-07-04 at longitude 8.55 and latitude 47.37 in UTM zone 32T, the cloud cover is 2 percent.',
    'This satellite image has a ground sample distance of 0.51 metres and was taken in the summer season over the country of Chile.',
    'Sun elevation 51.2 degrees, off-nadir 12.1, timestamp 10:42:07, country code CHE.',
    'Acquisition date: 3 May; season: spring; sensor: Sentinel-2; latitude 61.2;',
    'captured by WorldView-2 in July 2014 with a resolution of 2 m.',
]


@pytest.mark.parametrize('meta', META)
def test_the_visual_sentence_behind_a_template_is_found(meta):
    assert segment(f'{meta} {VISUAL}')[1] == VISUAL and visible(f'{meta} {VISUAL}') == VISUAL
    assert segment(f'{VISUAL} {meta}')[1] == VISUAL


@pytest.mark.parametrize('text', [VISUAL, 'a river in autumn', 'some cars in a country town', 'a road of high resolution', '一条河流', '', 'trees cast shadows in July', 'a town located in a valley. two roads cross.', 'a river taken from above'])
def test_plain_sentences_are_visual(text): assert segment(text) == ('', text)


def test_metadata_within_a_sentence_is_parted_from_it():
    assert (
        segment('two ships in a harbour, acquired on 2015-07-04 at latitude 47.4')[1]
        == 'two ships in a harbour'
    )
    assert (
        segment('UTM zone 32T, longitude 8.5, two ships in a harbour, and a crane')[1]
        == 'two ships in a harbour, and a crane'
    )
    assert segment('An image taken at latitude 47.3 in UTM zone 5N')[1] == ''


def test_nothing_visible_leaves_the_caption(): assert visible(META[2]) == META[2] and visible('') == ''


words = st.sampled_from(
    'a the harbour boats two many beside road farm and with of large river near green trees'.split()
)
plain = st.lists(words, min_size=3, max_size=14).map(lambda w: 'a harbour is ' + ' '.join(w) + '.')


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(META), plain, st.booleans())
def test_any_plain_sentence_survives_any_template(meta, sentence, before):
    text = f'{sentence} {meta}' if before else f'{meta} {sentence}'
    new, _ = rules(text)
    assert fold(sentence) == fold(new) and token_count(new) <= 77


# ---------------------------------------------------------------- tidying

@pytest.mark.parametrize('text,new', [('a photo of a dam', 'a dam'), ('This is an image that shows a dam .', 'a dam.'), ('a  dam ,and   a lake . ', 'a dam ,and a lake.'), ('a dam &amp;amp; a lake', 'a dam & a lake'),
                                      ('the picture shows a photo of a dam', 'a dam'), ('In this image, there is a dam', 'a dam'), ('a dam, see https://a.example/b?c=1 for more', 'a dam, for more'),
                                      ('we can see a dam. We can see a lake.', 'a dam. a lake.'), ('dam_001.tif a dam', 'a dam'), ('a dam. A DAM . a lake.', 'a dam. a lake.'), ('<b>a dam</b>', 'a dam'),
                                      ('Copyright 2020 by nobody. a dam.', 'a dam.'), ('a dam!!! a lake..', 'a dam! a lake.'), ('a damm with a lkae', 'a damm with a lkae'), ('a dam\x00and\ta lake\n', 'a dam and a lake')])
def test_what_says_nothing_goes(text, new): assert rules(text)[0] == new


@pytest.mark.parametrize('text', ['a satellite image of forest.', 'an aerial view of a town', 'in the picture frame shop', 'a product warehouse where goods are delivered by lorry', 'a temple from above', 'there is a river .5 km wide',
                                  '一条河流穿过城市。河边有树。', 'a beach 🌊 and a bar 🏖️', 'a < b > c', 'the shown roads', 'v1.2 of the road'])
def test_what_says_something_stays(text): assert tidy(text) == (text, [])


@given(st.text(max_size=120))
def test_sentences_joined_are_the_text_again(text): assert ''.join(sentences(text)) == text


# ---------------------------------------------------------------- tokens and the rewriter

def test_tokens_are_those_of_open_clip():
    import open_clip
    text = 'many planes are parked in an airport near several buildings.'
    assert token_count(text) == int((open_clip.get_tokenizer('ViT-B-32')([text]) != 0).sum())


def test_a_cut_ends_behind_a_sentence_or_a_word():
    assert cut_tokens('a dam. a lake. a road.', 10) == 'a dam. a lake.'
    short = cut_tokens('a large and quiet lake with very many small white boats', 9)
    assert (
        token_count(short) <= 9
        and 'a large and quiet lake with very many small white boats'.startswith(short + ' ')
        and not short.endswith(('with', 'and'))
    )
    assert 1 < len(cut_tokens('河' * 500, 20)) < 20


noise = st.one_of(
    st.text(max_size=300),
    st.lists(
        st.sampled_from(
            [
                'a photo of',
                'this image shows',
                '&amp;',
                '&lt;b&gt;',
                '.',
                ' . ',
                'a.tif',
                'http://x.y',
                'longitude 3.1,',
                'UTM zone 3',
                '河流。',
                '🌊',
                'a river',
                'in the summer season',
                'and',
                'copyright',
                ',',
                '(',
                ')',
                'file data archive product',
                'resolution',
                '?',
                'there is a harbour with boats',
                'acquired on',
            ]
        ),
        max_size=60,
    ).map(' '.join),
)


@settings(max_examples=150, deadline=None)
@given(noise, st.sampled_from([8, 20, 77]), st.sampled_from(['drop', 'behind']))
def test_rewriting_settles_and_fits(text, limit, metadata):
    r = RuleRewriter(limit, metadata)
    new, why = r(text)
    assert r(new) == (new, '') and token_count(new) <= limit and bool(why) == (new != text)
    assert token_count(new) <= token_count(text) or 'joined' in why


@pytest.mark.parametrize('text', ['boat ' * 800, 'x' * 4000, '河' * 4000, '🌊' * 1000, 'There is a boat. ' * 250, '&amp;' * 800, 'a photo of ' * 400, '. ' * 2000, 'longitude 3, ' * 300])
def test_four_thousand_characters_fit(text):
    new, _ = rules(text)
    assert token_count(new) <= 77 and rules(new) == (new, '')


def test_metadata_goes_behind_where_it_is_wanted():
    text = f'{META[0]} {VISUAL}'
    behind = RuleRewriter(metadata='behind')
    new, why = behind(text)
    assert (
        new.startswith(VISUAL)
        and 'UTM zone 32T' in new
        and why == 'visual sentence first'
        and token_count(new) <= 77
    )
    new, why = behind(f'{META[0]} a stadium with a lawn')
    assert new.startswith('a stadium with a lawn. The image') and 'joined' in why
    # nothing else is there
    assert rules(f'{META[0]} {META[1]}')[0].startswith('The image was acquired')


def test_settings_of_the_rewriter_are_checked_and_named():
    assert (
        len({r.fingerprint for r in (rules, RuleRewriter(40), RuleRewriter(metadata='behind'))}) == 3
        and RuleRewriter().fingerprint == rules.fingerprint
    )
    with pytest.raises(UnknownName): RuleRewriter(metadata='front')
    with pytest.raises(Incompatible): RuleRewriter(3)


# ---------------------------------------------------------------- captioners

def test_a_captioner_describes_each_image_once():
    seen = []
    def teller(image):
        seen.append(image.shape)
        return 'a photo of a mill . '
    t = table(['x=0.1', 'y=0.1', 'a mill.'], key=['a', 'a', 'b'])
    r = CaptionerRewriter(teller, pictures(t))
    out = [r(c, dict(key=k)) for c, k in zip(t.caption, t.key)]
    assert out == [('a mill.', 'described by teller')] * 2 + [('a mill.', '')] and seen == [(3, 4, 4)] * 2


def test_a_captioner_in_purification():
    t = table(['x=0.5', 'y=0.6', 'z=0.7', 'w=0.95'])
    d = clean(t, rewriter=CaptionerRewriter(lambda image: 'mill=0.9', pictures(t)), cut=0.25)
    assert (
        d.action.tolist() == ['cut', 'rewrite', 'rewrite', 'keep']
        and d.reason[3].startswith('rewrite lost: described')
        and d.new_score[3] == pytest.approx(0.9)
    )


def test_a_captioner_that_cannot_open_an_image_leaves_the_caption():
    t = table(['x=0.5', 'y=0.6'])
    d = clean(t, rewriter=CaptionerRewriter(lambda image: 'mill=0.9', {'k0': pictures(t)['k0']}), cut=0)
    assert d.action.tolist() == ['rewrite', 'keep'] and 'no image k1' in d.reason[1]


def test_what_returns_no_text_is_no_rewriter():
    with pytest.raises(Incompatible, match='rewriter'):
        clean(table(['x']), rewriter=lambda caption, row: (None, ''))


def tiny_captioner(folder):
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )
    names = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '[DEC]', *'abcdefghijklmnopqrstuvwxyz', 'harbour']
    (folder/'vocab.txt').write_text('\n'.join(names))
    text = dict(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=8,
        encoder_hidden_size=16,
        bos_token_id=5,
        sep_token_id=3,
        pad_token_id=0,
        eos_token_id=3,
    )
    torch.manual_seed(0)
    net = BlipForConditionalGeneration(
        BlipConfig(
            text_config=text,
            vision_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
            ),
            projection_dim=8,
        )
    )
    net.save_pretrained(folder)
    BlipProcessor(
        BlipImageProcessor(size=dict(height=16, width=16)), BertTokenizerFast(str(folder / 'vocab.txt'))
    ).save_pretrained(folder)
    return folder


def test_a_network_of_transformers_writes_captions(tmp_path):
    text = P.load_captioner(str(tiny_captioner(tmp_path)), tokens=6)(np.full((3, 20, 30), 0.5, np.float32))
    assert isinstance(text, str) and text == P.load_captioner(str(tmp_path), tokens=6)(
        np.full((3, 20, 30), 0.5, np.float32)
    )


def test_files_that_a_captioner_lacks_are_named(tmp_path):
    tiny_captioner(tmp_path)
    (tmp_path/'model.safetensors').unlink()
    with pytest.raises(DataNotFound) as e: P.load_captioner(str(tmp_path))
    assert e.value.found == 'missing: weights'
    with pytest.raises(DataNotFound, match='nobody/absent') as e: P.load_captioner('nobody/absent')
    assert 'config.json' in e.value.found and 'tokenizer' in e.value.found


# ---------------------------------------------------------------- duplicates

def brute(captions, near): # connected components over all pairs
    sets = [frozenset(fold(c).split()) for c in captions]
    root = list(range(len(captions)))
    for i in range(len(sets)):
        for j in range(i):
            if sets[i] and sets[j] and len(sets[i] & sets[j]) >= near * len(sets[i] | sets[j]) - 1e-9:
                a, b = root[i], root[j]
                root = [min(a, b) if r in (a, b) else r for r in root]
    return root


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.sampled_from('abcdefghijklm'), min_size=1, max_size=12).map(' '.join), max_size=14), st.sampled_from([0.5, 0.75, 0.9, 1.0]))
def test_near_duplicates_are_those_of_all_comparisons(captions, near):
    assert (
        duplicate_groups(captions, near).tolist() == pd.factorize(np.array(brute(captions, near)))[0].tolist()
    )


def test_groups_fold_case_blanks_and_punctuation():
    assert duplicate_groups(
        ['A dam.', ' a  DAM !', 'a dam near', '', ' ', '...', '🌊', '一条河', '一条河。', 'a_dam']
    ).tolist() == [0, 0, 1, -1, -1, -1, -1, 2, 2, 0]
    assert duplicate_groups([]).tolist() == [] == duplicate_groups([], near=0.9).tolist()


def test_only_a_second_caption_of_one_image_is_dropped():
    t = table(['a dam', 'A dam.', 'a dam', 'a lake'], key=['a', 'a', 'b', 'b'])
    d = clean(t, cut=0)
    assert (
        d.action.tolist() == ['keep', 'drop-duplicate', 'keep', 'keep']
        and d.group.tolist() == [0, 0, 0, 1]
        and 'k0#0' in d.reason[1]
    )


def test_the_fine_twin_stays_and_equal_files_are_one_image(tmp_path):
    for name in 'abc':
        Image.new('RGB', (4, 4), (9, 9, 9) if name < 'c' else (8, 8, 8)).save(tmp_path/f'{name}.png')
    t = table(
        ['a dam'] * 4,
        tier=['coarse', 'fine', 'fine', 'fine'],
        path=[str(tmp_path / f'{n}.png') for n in 'abcd'],
    )
    assert image_groups(t).tolist() == [0, 0, 1, 2]
    assert clean(t.assign(image=image_groups(t))).action.tolist() == [
        'drop-duplicate',
        'keep',
        'keep',
        'keep',
    ]


def test_captions_that_become_one_are_duplicates():
    t = table(['a dam fit=0.6', 'a photo of a dam fit=0.6', 'this image shows a dam fit=0.6'], key='a')
    d = clean(t, cut=0)
    assert (
        d.action.tolist() == ['keep', 'drop-duplicate', 'drop-duplicate']
        and d.text.tolist() == t.caption.tolist()
        and 'once rewritten' in d.reason[2]
    )


# ---------------------------------------------------------------- thresholds and steps

@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.sampled_from('ab')), min_size=1, max_size=40), st.floats(0, 0.99))
def test_no_source_loses_more_than_its_share(rows, cut):
    s = np.array([r[0] for r in rows])
    source = np.array([r[1] for r in rows])
    low = s < thresholds(s, source, cut)
    for name in 'ab':
        mine = source == name
        assert low[mine].sum() <= cut * mine.sum() + 1e-6
        if len(set(s[mine])) == mine.sum(): assert low[mine].sum() == int(cut * mine.sum() + 1e-9)
    assert (s < thresholds(s, source, cut, 'pooled')).sum() <= cut * len(s) + 1e-6


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30), st.floats(0, 0.9), st.floats(0.1, 3), st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
def test_the_scale_of_the_scores_does_not_matter(s, cut, scale, shift):
    s = np.round(np.array(s), 3)
    assert (
        (s < thresholds(s, ['a'] * len(s), cut))
        == (np.round(s * 8, 3) < thresholds(np.round(s * 8, 3), ['a'] * len(s), cut))
    ).all()


def test_scores_that_do_not_count_move_no_threshold():
    assert (
        thresholds([np.nan, 0.1, 0.2, np.nan], ['a'] * 4, 0.5).tolist() == [0.2] * 4
        and np.isnan(thresholds([np.nan], ['a'])).all()
        and len(thresholds([], [])) == 0
    )
    assert thresholds([0.1, 0.2], ['a', 'b'], 0.5, floor=0.15).tolist() == [0.15, 0.2]


@pytest.mark.parametrize('bad', [-0.1, 1, 2])
def test_impossible_settings_are_refused_before_the_work(bad):
    e = Fake()
    with pytest.raises(Incompatible, match='share'): clean(table(['a']), e, cut=bad)
    with pytest.raises(UnknownName, match='per source'): clean(table(['a']), e, keep='per sauce')
    assert e.images == 0


def test_the_worst_third_of_each_source_goes():
    t = table(graded(9) + graded(6, 0.4), source=['low'] * 9 + ['high'] * 6)
    d = clean(t, cut=1 / 3)
    assert np.flatnonzero(d.action == 'cut').tolist() == [0, 1, 2, 9, 10] and d.threshold.nunique() == 2
    assert np.flatnonzero(clean(t, cut=1 / 3, keep='pooled').action == 'cut').tolist() == [0, 1, 2, 3, 4]
    assert (clean(t, cut=0, floor=0.42).action == 'cut').tolist() == (d.score < 0.42).tolist()


def test_the_fine_tier_is_kept_as_it_is():
    t = table(
        [f'a photo of a dam fit=0.0{i}' for i in range(5)] + ['', 'a photo of a dam fit=0.00'],
        tier='fine',
        key=[*'abcdef', 'a'],
    )
    d = clean(t, cut=0.9, floor=0.9)
    assert (
        d.action.tolist() == ['keep'] * 5 + ['drop-blank', 'drop-duplicate']
        and d.text.tolist() == t.caption.tolist()
        and d.threshold.isna().all()
    )


def test_blank_captions_and_mere_boilerplate_are_named():
    d = clean(table(['', None, ' \t', '!!!', 'a photo of', 'https://a.example/b', 'a dam fit=0.9']), cut=0)
    assert d.action.tolist() == ['drop-blank'] * 6 + ['keep'] and d.reason[4] == 'nothing but boilerplate'


def test_the_score_is_that_of_what_is_visible():
    t = table([f'{META[0]} a dam fit=0.9', 'a dam fit=0.8'])
    s = score_pairs(t, Fake(), images=pictures(t))
    assert (
        s.score.round(3).tolist() == [0.9, 0.8]
        and s.text[0] == 'a dam fit=0.9'
        and s.tokens[0] > 50 > s.new_tokens[0]
        and s.whole.notna().all()
    )


def test_a_rewrite_must_earn_its_place():
    t = table(['a=0.5', 'b=0.6', 'c=0.7', 'd=0.8'])
    told = {'a=0.5': 'z=0.9', 'b=0.6': 'z=0.595', 'c=0.7': 'z=0.6', 'd=0.8': 'd=0.8'}
    def rewriter(caption, row): return told[caption], 'told'
    d = clean(t, rewriter=rewriter, cut=0)
    assert (
        d.action.tolist() == ['rewrite', 'rewrite', 'keep', 'keep']
        and d.reason.tolist() == ['told', 'told', 'rewrite lost: told', '']
        and d.text.tolist() == ['z=0.9', 'z=0.595', 'c=0.7', 'd=0.8']
    )
    assert clean(t, rewriter=rewriter, cut=0, tolerance=0).action.tolist() == [
        'rewrite',
        'keep',
        'keep',
        'keep',
    ]
    # below the threshold 0.7
    assert clean(t, rewriter=lambda c, row: ('z=0.605', ''), cut=0.5, tolerance=0.5).action.tolist() == [
        'cut',
        'cut',
        'keep',
        'keep',
    ]


def test_rewriting_never_touches_what_was_cut():
    d = clean(table(['a=0.1', 'b=0.9']), rewriter=lambda c, row: ('z=0.99', 'better'), cut=0.5)
    assert d.action.tolist() == ['cut', 'rewrite'] and d.text[0] == 'a=0.1' and np.isnan(d.new_score[0])


def test_steps_are_pure_and_give_what_purify_gives():
    t = table(graded(8) + ['a photo of a dam fit=0.77', ''])
    s = score_pairs(t, Fake(), images=pictures(t))
    before = s.copy(), t.copy()
    first = cut_pairs(t, s)
    kept = first.copy()
    pd.testing.assert_frame_equal(take_rewrites(t, first, s), clean(t))
    pd.testing.assert_frame_equal(first, kept)
    pd.testing.assert_frame_equal(s, before[0])
    pd.testing.assert_frame_equal(t, before[1])
    assert list(kept) == [
        'pair',
        'key',
        'score',
        'action',
        'text',
        'new_score',
        'reason',
        'group',
        'threshold',
    ]


def test_the_order_of_pairs_does_not_matter():
    t = table(graded(9) + ['a photo of a dam fit=0.77'])
    mixed = t.sample(frac=1, random_state=1)
    a, b = (clean(x).set_index('pair').sort_index().drop(columns='group') for x in (t, mixed))
    pd.testing.assert_frame_equal(a, b)


def test_an_empty_table_is_purified_at_once(tmp_path):
    for store in (None, tmp_path):
        d = purify(table([]), Fake(), images={}, store=store)
        assert len(d) == 0 and 'action' in d and len(apply_decisions(table([]), d)) == 0


def test_one_line_of_counts_is_said(monkeypatch, capsys):
    monkeypatch.setenv('RSSQA_QUIET', '0')
    clean(
        table(
            [
                'a=0.1',
                'b=0.2',
                'c=0.3',
                f'{META[0]} {META[1]} {META[4]} dam fit=0.9 with a lake',
                '',
                'a=0.1',
            ],
            key=['a', 'b', 'c', 'd', 'e', 'a'],
        ),
        cut=0.25,
    )
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == '6 pairs: 2 kept, 1 rewritten, 1 cut, 1 duplicates, 1 blank, 0 unreadable; longer than 77 tokens: 1 before, 0 after'
    )


# ---------------------------------------------------------------- store, resume, shards

many = table([f'{c} .' for c in graded(23)], key=[f'k{i // 2}' for i in range(23)])


def test_an_interrupted_run_goes_on_where_it_ended(tmp_path):
    class Stops(Fake):
        def encode_image(self, x):
            if self.images >= 6: raise KeyboardInterrupt
            return super().encode_image(x)
    with pytest.raises(KeyboardInterrupt): clean(many, Stops(), store=tmp_path, every=4)
    parts = sorted(p.name for p in (tmp_path/'scores').iterdir())
    assert 0 < len(parts) < 6 and not (tmp_path/'decisions.parquet').exists()
    e = Fake()
    pd.testing.assert_frame_equal(clean(many, e, store=tmp_path, every=4), clean(many))
    assert e.images == 12 - 6 and len(list((tmp_path/'scores').iterdir())) == 6
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / 'decisions.parquet').astype(dict(text=object)),
        clean(many).astype(dict(text=object)),
        check_dtype=False,
    )
    again = Fake()
    clean(many, again, store=tmp_path, every=4)
    assert again.images == again.texts == 0
    clean(many, again, store=tmp_path, every=4, resume=False)
    assert again.images == 12


@pytest.mark.parametrize('other', [dict(cut=0.4), dict(keep='pooled'), dict(floor=0.1), dict(rewriter=RuleRewriter(40)), dict(encoder=Fake('b')), dict(every=5), dict(tolerance=0.2)])
def test_another_run_in_the_same_store_is_refused(tmp_path, other):
    clean(many, store=tmp_path, every=4)
    with pytest.raises(Incompatible, match='another run') as e:
        clean(many, **dict(store=tmp_path, every=4) | other)
    assert f'{next(iter(other))}:' in e.value.found and 'resume=False' in e.value.todo
    pd.testing.assert_frame_equal(
        clean(many, **dict(store=tmp_path, every=4, resume=False) | other),
        clean(many, **{k: v for k, v in other.items()}),
    )


def test_other_captions_in_the_same_store_are_refused(tmp_path):
    clean(many, store=tmp_path)
    with pytest.raises(Incompatible, match='another run') as e:
        clean(many.assign(caption='new'), store=tmp_path)
    assert 'table' in e.value.found
    with pytest.raises(Incompatible, match='other pairs'): read_scores(many[:3], tmp_path)


@pytest.mark.parametrize('n', [2, 3, 7])
def test_shards_merge_to_the_whole(tmp_path, n):
    shards = [score_pairs(many, Fake(), images=pictures(many), shard=(i, n), every=3) for i in range(n)]
    assert sorted(p for s in shards for p in s.pair) == sorted(many.pair) and not any(
        set(a.key) & set(b.key) for i, a in enumerate(shards) for b in shards[:i]
    )
    out = [clean(many, store=tmp_path, shard=(i, n), every=3) for i in reversed(range(n))]
    assert all(o is None for o in out[:-1])
    pd.testing.assert_frame_equal(out[-1], clean(many))
    pd.testing.assert_frame_equal(
        read_scores(many, tmp_path), score_pairs(many, Fake(), images=pictures(many)), check_dtype=False
    )


def test_missing_shards_are_counted(tmp_path):
    clean(many, store=tmp_path, shard=(1, 3), every=4)
    with pytest.raises(DataNotFound, match='0of3-00000') as e: read_scores(many, tmp_path)
    assert 'parts are missing' in e.value.found
    with pytest.raises(Incompatible, match='store'): clean(many, shard=(0, 3))
    for shard in ((3, 3), (-1, 3)):
        with pytest.raises(Incompatible, match='shard'): score_pairs(many, Fake(), images={}, shard=shard)


def test_parts_keep_the_captions_of_an_image_together():
    for n, every in ((1, 3), (2, 4), (3, 100)):
        parts = [many.iloc[rows] for i in range(n) for rows in P._parts(many, (i, n), every)]
        assert (
            sorted(i for p in parts for i in p.index) == list(range(23))
            and sum(p.key.nunique() for p in parts) == many.key.nunique()
        )


def test_a_score_cannot_be_used_for_other_pairs():
    s = score_pairs(many, Fake(), images=pictures(many))
    for other in (many[:5], many.assign(pair=[f'x{i}' for i in range(23)])):
        with pytest.raises(Incompatible, match='other pairs'): cut_pairs(other, s)


# ---------------------------------------------------------------- applying

def test_decisions_are_applied_by_pair():
    t = table(graded(6) + ['a photo of a dam fit=0.8', ''])
    d = clean(t)
    out = apply_decisions(t, d.sample(frac=1, random_state=0))
    assert (
        set(out.action) == {'keep', 'rewrite'}
        and out.caption.iloc[-1] == 'a dam fit=0.8'
        and out.original.iloc[-1] == 'a photo of a dam fit=0.8'
        and len(out) == (d.action.isin(['keep', 'rewrite'])).sum()
    )
    assert (
        list(out.columns) == [*t.columns, 'original', 'action']
        and (out[out.action == 'keep'].caption == out[out.action == 'keep'].original).all()
    )


def test_decisions_of_other_pairs_or_captions_are_refused():
    t = table(graded(6))
    d = clean(t)
    for other, text in ((t[:4], 'other pairs'), (t.assign(pair=t.pair + 'x'), 'other pairs'), (t.assign(caption='new words'), 'other captions')):
        with pytest.raises(Incompatible, match=text): apply_decisions(other, d)
    with pytest.raises(UnknownName, match='keep'): apply_decisions(t, d.assign(action='keeep'))


# ---------------------------------------------------------------- risk

SOUND = [
    'several boats are moored in a harbour',
    'a wide river flows past green fields',
    'many planes are parked beside a terminal',
    'two tennis courts are near a road',
    'a dense residential area with narrow streets',
    'some trees surround a square building',
    'a beach with white waves',
    'a viaduct crosses farmland',
    '一条河流',
]
INVENTED = [
    'a man in a blue shirt is standing near a pond',
    'the building has a large logo that reads CITY MALL',
    'a beautiful and serene lake under a clear blue sky',
    'there are exactly 17 cars and 23 trees',
    'perhaps a school that was founded long ago',
    'a close-up of a dog on a kitchen floor',
    'a red, blue, green, yellow and white roof',
    'the the river river is is wide',
    'the tower is 1,432.5 feet high and famous among tourists',
]


def test_invented_things_are_suspect_and_sound_ones_are_not():
    a = np.array([risk(c) for c in SOUND])
    b = np.array([risk(c) for c in INVENTED])
    assert (a[:, None] < b).mean() > 0.95 and (b > 0).all() and (a == 0).all()


@given(st.text(max_size=200))
def test_risk_is_a_share_and_names_its_rules(text):
    assert 0 <= risk(text) < 1 and (risk(text) > 0) == bool(risk_rules(text))


@given(st.sampled_from(SOUND + INVENTED), st.sampled_from(INVENTED))
def test_more_suspect_words_never_lower_the_risk(a, b):
    assert risk(f'{a}. {b}') >= max(risk(a), risk(b)) - 1e-9


def test_each_rule_fires_alone():
    fired = {n for c in INVENTED for n in risk_rules(c)} | set(risk_rules('cars', 'rs3/ben'))
    assert (
        fired == {*P.RISKS, 'colours', 'repetition', 'smaller than a pixel'}
        and risk_rules('some cars', 'ucm') == {}
    )


# ---------------------------------------------------------------- review

def test_review_shows_every_kind_of_decision():
    t = table(graded(40) + ['a photo of a dam fit=0.8', ''], source=['a', 'b'] * 21)
    d = clean(t)
    r = review_table(t, d, 12, seed=3)
    assert (
        len(r) == 12
        and set(r.action) == set(d.action)
        and (r.rating == '').all()
        and r.pair.is_unique
        and set(r[r.action == 'cut'].source) == {'a', 'b'}
    )
    pd.testing.assert_frame_equal(r, review_table(t, d, 12, seed=3))
    assert (
        not r.equals(review_table(t, d, 12, seed=4))
        and len(review_table(t, d, 1000)) == 42
        and len(review_table(table([]), clean(table([])), 5)) == 0
    )
    row = r[r.action == 'rewrite'].iloc[0]
    assert (row.before, row.after) == ('a photo of a dam fit=0.8', 'a dam fit=0.8') and (
        r[r.action == 'cut'].after == ''
    ).all()


def test_agreement_counts_what_was_judged():
    r = pd.DataFrame(
        dict(
            action=['cut'] * 4 + ['keep'] * 3, rating=['right', 'Right ', 'wrong', '', 'right', None, 'right']
        )
    )
    a = agreement(r)
    assert (
        a.judged.to_dict() == dict(cut=3, keep=2)
        and a.share.to_dict() == {'cut': pytest.approx(2 / 3), 'keep': 1}
        and ((a.low <= a.share) & (a.share <= a.high)).all()
    )
    with pytest.raises(SchemaError, match='yes'): agreement(r.assign(rating='yes'))
    assert (
        tuple(a.loc['cut', ['low', 'high']])
        == pytest.approx(tuple(binomtest(2, 3).proportion_ci(method='wilson')))
        and len(agreement(r.assign(rating=''))) == 0
    )


# ---------------------------------------------------------------- known noise

scenes = table(
    [
        f'there is a {n} beside the road in place {i} of many'
        for i, n in enumerate(['harbour', 'farm', 'stadium'] * 20)
    ]
)


def test_noise_is_seeded_and_told():
    a = inject_noise(scenes, 0.5, seed=1)
    b = inject_noise(scenes, 0.5, seed=1)
    pd.testing.assert_frame_equal(a, b)
    assert (
        a.noise.value_counts().to_dict() == {'': 30, 'shuffled': 10, 'truncated': 10, 'boilerplate': 10}
        and a.clean.tolist() == scenes.caption.tolist()
        and ((a.noise == '') == (a.caption == a.clean)).all()
    )
    assert not a.equals(inject_noise(scenes, 0.5, seed=2)) and 'noise' not in scenes


def test_each_noise_is_what_it_says():
    t = inject_noise(scenes, 1.0)
    owner = dict(zip(scenes.caption, scenes.scene))
    for r in t.itertuples():
        if r.noise == 'shuffled': assert owner[r.caption] != r.scene
        if r.noise == 'truncated':
            assert (
                r.clean.startswith(r.caption) and 0.1 <= len(r.caption.split()) / len(r.clean.split()) <= 0.5
            )
        if r.noise == 'boilerplate':
            assert r.caption.endswith(f' {r.clean}') and len(r.caption) > len(r.clean) + 60


def test_only_the_tier_asked_for_is_spoilt():
    t = inject_noise(scenes.assign(tier=['fine', 'coarse'] * 30), 1.0)
    assert (t[t.tier == 'fine'].noise == '').all() and (t[t.tier == 'coarse'].noise != '').all()
    # no other caption to take
    assert (inject_noise(table(['same words here'] * 5), 1.0, ('shuffled',)).noise == '').all()
    assert (inject_noise(table(['', ' ', 'dam']), 1.0, ('truncated',)).noise == '').all()
    with pytest.raises(UnknownName, match='truncated'): inject_noise(scenes, kinds=('truncatd',))


def test_every_padding_is_removed():
    t = inject_noise(scenes, 1.0, ('boilerplate',))
    assert [rules(c)[0] for c in t.caption] == t.clean.tolist() and t.caption.str[:20].nunique() >= 4


def test_audit_tells_what_became_of_noise():
    class Knows(Fake):                                              # image i and a sentence that names place i are one vector
        dim = 61
        def encode_image(self, x):
            return SimpleNamespace(pooled=torch.eye(61)[(x.mean((1, 2, 3)) * 59).round().long()])
        def encode_text(self, texts):
            return torch.stack(
                [
                    torch.eye(61)[int(t.split('place ')[1].split()[0])]
                    if 'place ' in t
                    else torch.full((61,), 61**-0.5)
                    for t in texts
                ]
            )
    t = inject_noise(scenes, 0.6, seed=2)
    a = audit_noise(
        t,
        clean(
            t, Knows(), cut=0.2, images={f'k{i}': np.full((3, 4, 4), i / 59, np.float32) for i in range(60)}
        ),
    )
    assert a.index.tolist() == ['boilerplate', 'shuffled', 'truncated', 'clean'] and a.n.tolist() == [
        12,
        12,
        12,
        24,
    ]
    assert (
        a.out.tolist() == [0, 1, 0, 0]
        and a.restored.tolist() == [1, 0, 0, 1]
        and a.kept.tolist() == [0, 0, 1, 0]
    )
    assert a.auroc.iloc[:3].tolist() == [0.5, 1, 1] and np.isnan(a.auroc['clean'])


# ---------------------------------------------------------------- the real thing

def test_real_noise_is_found(real):
    from rssqa.clip.encoders import load_encoder
    t = pd.read_csv(real/'pairs'/'pairs.csv')
    t = (
        t[t.source.isin(['rsicd', 'ucm']) & (t.split != 'train')]
        .drop_duplicates('filepath')
        .groupby('source')
        .sample(55, random_state=0)
        .reset_index(drop=True)
    )
    t = t.assign(
        pair=[f'{p}#0' for p in t.filepath],
        key=t.filepath,
        tier='coarse',
        path=[str(real / 'pairs' / p) for p in t.filepath],
    )
    noisy = inject_noise(t, 0.45, ('shuffled', 'boilerplate'), seed=0)
    audit = audit_noise(noisy, purify(noisy, load_encoder('clip-rs-mini', device='cpu'), cut=0.25))
    assert audit.auroc['shuffled'] > 0.85 and audit.out['shuffled'] > 0.7 and audit.out['clean'] < 0.15
    # of those that were not cut
    assert audit.restored['boilerplate'] / (1 - audit.out['boilerplate']) > 0.9
