"""Purification of captions: rules that settle, scores that resume, cuts within each source, known noise found."""
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
from rssqa.clip.purify import CaptionerRewriter, RuleRewriter
from rssqa.clip.purify import apply_decisions, check_pairs, cut_pairs, purify, take_rewrites, thresholds
from rssqa.clip.purify import duplicate_groups, image_groups, read_scores, score_pairs, similarity
from rssqa.clip.purify import cut_tokens, normalise_text, sentences, split_metadata, clean_caption, visible_text
from rssqa.clip.purify import rating_accuracy, audit_noise, inject_noise, review_table, risk, risk_rules

rules = RuleRewriter()


class FakeEncoder:
    "The cosine of any image and a sentence with =s is s; of other sentences it is 0.5."
    name = 'fake'
    dim = 2
    image_size = 4

    def __init__(self, mark='a'):
        self.fingerprint = digest(mark)
        self.images = 0
        self.texts = 0

    def encode_image(self, x):
        self.images += len(x)
        return SimpleNamespace(pooled=torch.tensor([[1.0, 0.0]] * len(x)))

    def encode_text(self, texts):
        self.texts += len(texts)
        s = torch.tensor([cosine_of(text) for text in texts])
        return torch.stack([s, (1 - s**2).sqrt()], 1)


def cosine_of(text): # what the fake encoder reads
    return float(text.split('=')[1].split()[0].rstrip('.,')) if '=' in text else 0.5


def make_table(captions, **columns): # one image a caption, unless columns say otherwise
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


def pictures(table): return {key: np.full((3, 4, 4), 0.5, np.float32) for key in table.key}


def run_purify(table, encoder=None, images=None, **settings):
    images = pictures(table) if images is None else images
    return purify(table, encoder or FakeEncoder(), images=images, **settings)


def graded(n, start=0.0): # captions with growing scores
    return [f'harbour {i} with piers fit={start + i / n / 2:.3f} good' for i in range(n)]


# ---------------------------------------------------------------- table

BROKEN_TABLES = [
    (lambda t: t.drop(columns='tier'), 'tier'),
    (lambda t: t.assign(pair='same'), 'again'),
    (lambda t: t.assign(tier='rough'), 'rough'),
]


@pytest.mark.parametrize('change,found', BROKEN_TABLES)
def test_what_is_no_table_of_pairs_is_refused(change, found):
    with pytest.raises(SchemaError, match=found): check_pairs(change(make_table(['a', 'b'])))


def test_absent_captions_are_empty_and_the_input_stays_as_it_is():
    table = make_table(['a', None, np.nan])
    assert check_pairs(table.set_axis([5, 5, 7])).caption.tolist() == ['a', '', '']
    assert table.caption.isna().sum() == 2


# ---------------------------------------------------------------- similarity

def test_each_image_and_each_sentence_is_encoded_once():
    table = make_table(['x=0.1', 'x=0.2', 'x=0.1', 'x=0.3'], key=['a', 'a', 'b', 'b'])
    encoder = FakeEncoder()
    scores = similarity(table, encoder, pictures(table))
    assert np.allclose(scores, [0.1, 0.2, 0.1, 0.3], atol=1e-6)
    assert (encoder.images, encoder.texts) == (2, 3)


@pytest.mark.parametrize('batch', [1, 2, 64])
def test_batches_change_nothing(batch):
    table = make_table(graded(7))
    scores = similarity(table, FakeEncoder(), pictures(table), batch)
    assert np.allclose(scores, [i / 14 for i in range(7)], atol=1e-3)


def test_images_of_several_sizes_are_opened_by_path(tmp_path):
    for i, size in enumerate([(5, 9), (30, 20)]):
        Image.new('RGB', size, (9, 99, 199)).save(tmp_path/f'{i}.png')
    table = make_table(['x=0.25', 'x=0.5'], path=[str(tmp_path/'0.png'), str(tmp_path/'1.png')])
    assert np.allclose(similarity(table, FakeEncoder()), [0.25, 0.5])


def test_unreadable_images_have_no_score_and_are_named(tmp_path):
    (tmp_path/'page.jpg').write_text('<html><body>404 not found</body></html>')
    Image.new('RGB', (8, 8)).save(tmp_path/'good.png')
    (tmp_path/'half.png').write_bytes((tmp_path/'good.png').read_bytes()[:40])
    page, gone, half, good = (str(tmp_path/name) for name in ('page.jpg', 'gone.png', 'half.png', 'good.png'))
    table = make_table(['x=0.5'] * 6, path=[page, gone, half, '', np.nan, good])
    problems = {}
    scores = similarity(table, FakeEncoder(), problems=problems)
    assert np.isnan(scores[:5]).all() and scores[5] == 0.5
    assert list(problems) == ['k0', 'k1', 'k2', 'k3', 'k4']
    assert 'web page' in problems['k0'] and 'gone.png' in problems['k1'] and 'path' in problems['k3']
    decisions = purify(table.assign(caption=[f'x{i}=0.5' for i in range(6)]), FakeEncoder())
    assert decisions.action.tolist() == ['drop-unreadable'] * 5 + ['keep']
    assert 'web page' in decisions.reason[0]


BAD_IMAGES = [np.full((3, 4, 4), np.nan), np.full((3, 4, 4), 7.0), np.zeros((4, 4, 9)), 'gone.png']


@pytest.mark.parametrize('bad', BAD_IMAGES)
def test_bad_arrays_are_named_too(bad):
    problems = {}
    assert np.isnan(similarity(make_table(['x']), FakeEncoder(), {'k0': bad}, problems=problems)).all()
    assert list(problems) == ['k0']


def test_an_encoder_that_gives_no_number_is_named():
    class Broken(FakeEncoder):
        def encode_image(self, x): return SimpleNamespace(pooled=torch.full((len(x), 2), torch.nan))
    table = make_table(['x', 'y'])
    problems = {}
    assert np.isnan(similarity(table, Broken(), pictures(table), problems=problems)).all()
    assert 'no number' in problems['k1']
    assert (run_purify(table, Broken()).action == 'drop-unreadable').all()


def test_a_blank_caption_has_no_score_and_no_problem():
    table = make_table(['', '  ', 'x=0.5'])
    problems = {}
    scores = similarity(table, FakeEncoder(), pictures(table), problems=problems)
    assert np.isnan(scores).tolist() == [True, True, False] and problems == {}


def test_no_pairs_have_no_scores(): assert similarity(make_table([]), FakeEncoder(), {}).shape == (0,)


def test_without_paths_or_images_nothing_can_be_scored():
    table = make_table(['a']).drop(columns='path')
    with pytest.raises(SchemaError, match='path'): similarity(table, FakeEncoder())


# ---------------------------------------------------------------- metadata and what is visible

VISUAL = 'a stadium with a green lawn lies beside a car park.'
METADATA = [
    'The image was acquired on 2015-07-04 at longitude 8.55 and latitude 47.37 in UTM zone 32T, the cloud cover is 2 '
    'percent.',
    'This satellite image has a ground sample distance of 0.51 metres and was taken in the summer season over the '
    'country of Chile.',
    'Sun elevation 51.2 degrees, off-nadir 12.1, timestamp 10:42:07, country code CHE.',
    'Acquisition date: 3 May; season: spring; sensor: Sentinel-2; latitude 61.2;',
    'captured by WorldView-2 in July 2014 with a resolution of 2 m.',
]


@pytest.mark.parametrize('metadata', METADATA)
def test_the_visual_sentence_behind_a_template_is_found(metadata):
    assert split_metadata(f'{metadata} {VISUAL}')[1] == VISUAL
    assert visible_text(f'{metadata} {VISUAL}') == VISUAL
    assert split_metadata(f'{VISUAL} {metadata}')[1] == VISUAL


PLAIN_TEXTS = [
    VISUAL, 'a river in autumn', 'some cars in a country town', 'a road of high resolution', '一条河流', '',
    'trees cast shadows in July', 'a town located in a valley. two roads cross.', 'a river taken from above',
]


@pytest.mark.parametrize('text', PLAIN_TEXTS)
def test_plain_sentences_are_visual(text): assert split_metadata(text) == ('', text)


METADATA_INSIDE = [
    ('two ships in a harbour, acquired on 2015-07-04 at latitude 47.4', 'two ships in a harbour'),
    ('UTM zone 32T, longitude 8.5, two ships in a harbour, and a crane', 'two ships in a harbour, and a crane'),
    ('An image taken at latitude 47.3 in UTM zone 5N', ''),
]


@pytest.mark.parametrize('text,visual', METADATA_INSIDE)
def test_metadata_within_a_sentence_is_parted_from_it(text, visual): assert split_metadata(text)[1] == visual


def test_nothing_visible_leaves_the_caption():
    assert visible_text(METADATA[2]) == METADATA[2]
    assert visible_text('') == ''


words = st.sampled_from(
    'a the harbour boats two many beside road farm and with of large river near green trees'.split()
)
plain = st.lists(words, min_size=3, max_size=14).map(lambda w: 'a harbour is ' + ' '.join(w) + '.')


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(METADATA), plain, st.booleans())
def test_any_plain_sentence_survives_any_template(metadata, sentence, before):
    text, _ = rules(f'{sentence} {metadata}' if before else f'{metadata} {sentence}')
    assert normalise_text(sentence) == normalise_text(text) and token_count(text) <= 77


# ---------------------------------------------------------------- boilerplate

TIDIED = [
    ('a photo of a dam', 'a dam'),
    ('This is an image that shows a dam .', 'a dam.'),
    ('a  dam ,and   a lake . ', 'a dam ,and a lake.'),
    ('a dam &amp;amp; a lake', 'a dam & a lake'),
    ('the picture shows a photo of a dam', 'a dam'),
    ('In this image, there is a dam', 'a dam'),
    ('a dam, see https://a.example/b?c=1 for more', 'a dam, for more'),
    ('we can see a dam. We can see a lake.', 'a dam. a lake.'),
    ('dam_001.tif a dam', 'a dam'),
    ('a dam. A DAM . a lake.', 'a dam. a lake.'),
    ('<b>a dam</b>', 'a dam'),
    ('Copyright 2020 by nobody. a dam.', 'a dam.'),
    ('a dam!!! a lake..', 'a dam! a lake.'),
    ('a damm with a lkae', 'a damm with a lkae'),
    ('a dam\x00and\ta lake\n', 'a dam and a lake'),
]


@pytest.mark.parametrize('text,new', TIDIED)
def test_what_says_nothing_is_removed(text, new): assert rules(text)[0] == new


MEANINGFUL = [
    'a satellite image of forest.', 'an aerial view of a town', 'in the picture frame shop',
    'a product warehouse where goods are delivered by lorry', 'a temple from above', 'there is a river .5 km wide',
    '一条河流穿过城市。河边有树。', 'a beach 🌊 and a bar 🏖️', 'a < b > c', 'the shown roads', 'v1.2 of the road',
]


@pytest.mark.parametrize('text', MEANINGFUL)
def test_what_says_something_stays(text): assert clean_caption(text) == (text, [])


@given(st.text(max_size=120))
def test_sentences_joined_are_the_text_again(text): assert ''.join(sentences(text)) == text


# ---------------------------------------------------------------- tokens and the rewriter

def test_tokens_are_those_of_open_clip():
    import open_clip
    text = 'many planes are parked in an airport near several buildings.'
    assert token_count(text) == int((open_clip.get_tokenizer('ViT-B-32')([text]) != 0).sum())


def test_a_cut_ends_behind_a_sentence_or_a_word():
    assert cut_tokens('a dam. a lake. a road.', 10) == 'a dam. a lake.'
    long = 'a large and quiet lake with very many small white boats'
    short = cut_tokens(long, 9)
    assert token_count(short) <= 9
    assert long.startswith(short + ' ') and not short.endswith(('with', 'and'))
    assert 1 < len(cut_tokens('河' * 500, 20)) < 20


FRAGMENTS = [
    'a photo of', 'this image shows', '&amp;', '&lt;b&gt;', '.', ' . ', 'a.tif', 'http://x.y', 'longitude 3.1,',
    'UTM zone 3', '河流。', '🌊', 'a river', 'in the summer season', 'and', 'copyright', ',', '(', ')',
    'file data archive product', 'resolution', '?', 'there is a harbour with boats', 'acquired on',
]
any_text = st.one_of(st.text(max_size=300), st.lists(st.sampled_from(FRAGMENTS), max_size=60).map(' '.join))


@settings(max_examples=150, deadline=None)
@given(any_text, st.sampled_from([8, 20, 77]), st.sampled_from(['drop', 'behind']))
def test_rewriting_settles_and_fits(text, limit, metadata):
    rewriter = RuleRewriter(limit, metadata)
    new, reason = rewriter(text)
    assert rewriter(new) == (new, '')
    assert token_count(new) <= limit
    assert bool(reason) == (new != text)
    assert token_count(new) <= token_count(text) or 'joined' in reason


LONG_TEXTS = [
    'boat ' * 800, 'x' * 4000, '河' * 4000, '🌊' * 1000, 'There is a boat. ' * 250, '&amp;' * 800,
    'a photo of ' * 400, '. ' * 2000, 'longitude 3, ' * 300,
]


@pytest.mark.parametrize('text', LONG_TEXTS)
def test_four_thousand_characters_fit(text):
    new, _ = rules(text)
    assert token_count(new) <= 77 and rules(new) == (new, '')


def test_metadata_goes_behind_where_it_is_wanted():
    behind = RuleRewriter(metadata='behind')
    new, reason = behind(f'{METADATA[0]} {VISUAL}')
    assert new.startswith(VISUAL) and 'UTM zone 32T' in new
    assert reason == 'visual sentence first' and token_count(new) <= 77
    new, reason = behind(f'{METADATA[0]} a stadium with a lawn')
    assert new.startswith('a stadium with a lawn. The image') and 'joined' in reason


def test_metadata_stays_where_nothing_else_is_there():
    assert rules(f'{METADATA[0]} {METADATA[1]}')[0].startswith('The image was acquired')


def test_settings_of_the_rewriter_are_checked_and_named():
    fingerprints = {r.fingerprint for r in (rules, RuleRewriter(40), RuleRewriter(metadata='behind'))}
    assert len(fingerprints) == 3 and RuleRewriter().fingerprint == rules.fingerprint
    with pytest.raises(UnknownName): RuleRewriter(metadata='front')
    with pytest.raises(Incompatible): RuleRewriter(3)


# ---------------------------------------------------------------- captioners

def test_a_captioner_describes_each_image_once():
    shapes = []
    def captioner(image):
        shapes.append(image.shape)
        return 'a photo of a mill . '
    table = make_table(['x=0.1', 'y=0.1', 'a mill.'], key=['a', 'a', 'b'])
    rewriter = CaptionerRewriter(captioner, pictures(table))
    texts = [rewriter(caption, dict(key=key)) for caption, key in zip(table.caption, table.key)]
    assert texts == [('a mill.', 'described by captioner')] * 2 + [('a mill.', '')]
    assert shapes == [(3, 4, 4)] * 2


def describe_mill(image): return 'mill=0.9'


def test_a_captioner_in_purification():
    table = make_table(['x=0.5', 'y=0.6', 'z=0.7', 'w=0.95'])
    decisions = run_purify(table, rewriter=CaptionerRewriter(describe_mill, pictures(table)), cut=0.25)
    assert decisions.action.tolist() == ['cut', 'rewrite', 'rewrite', 'keep']
    assert decisions.reason[3].startswith('rewrite lost: described')
    assert decisions.new_score[3] == pytest.approx(0.9)


def test_a_captioner_that_cannot_open_an_image_leaves_the_caption():
    table = make_table(['x=0.5', 'y=0.6'])
    first_only = {'k0': pictures(table)['k0']}
    decisions = run_purify(table, rewriter=CaptionerRewriter(describe_mill, first_only), cut=0)
    assert decisions.action.tolist() == ['rewrite', 'keep'] and 'no image k1' in decisions.reason[1]


def test_what_returns_no_text_is_no_rewriter():
    with pytest.raises(Incompatible, match='rewriter'):
        run_purify(make_table(['x']), rewriter=lambda caption, row: (None, ''))


def save_tiny_captioner(folder):
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration
    from transformers import BlipImageProcessor, BlipProcessor
    tokens = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '[DEC]', *'abcdefghijklmnopqrstuvwxyz', 'harbour']
    (folder/'vocab.txt').write_text('\n'.join(tokens))
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    special = dict(bos_token_id=5, sep_token_id=3, pad_token_id=0, eos_token_id=3)
    text = size | special | dict(vocab_size=len(tokens), projection_dim=8, encoder_hidden_size=16)
    vision = size | dict(image_size=16, patch_size=8)
    torch.manual_seed(0)
    network = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=8))
    network.save_pretrained(folder)
    image_processor = BlipImageProcessor(size=dict(height=16, width=16))
    BlipProcessor(image_processor, BertTokenizerFast(str(folder/'vocab.txt'))).save_pretrained(folder)


def test_a_network_of_transformers_writes_captions(tmp_path):
    save_tiny_captioner(tmp_path)
    image = np.full((3, 20, 30), 0.5, np.float32)
    text = P.load_captioner(str(tmp_path), tokens=6)(image)
    assert isinstance(text, str)
    assert text == P.load_captioner(str(tmp_path), tokens=6)(image)


def test_files_that_a_captioner_lacks_are_named(tmp_path):
    save_tiny_captioner(tmp_path)
    (tmp_path/'model.safetensors').unlink()
    with pytest.raises(DataNotFound) as e: P.load_captioner(str(tmp_path))
    assert e.value.found == 'missing: weights'
    with pytest.raises(DataNotFound, match='nobody/absent') as e: P.load_captioner('nobody/absent')
    assert 'config.json' in e.value.found and 'tokenizer' in e.value.found


# ---------------------------------------------------------------- duplicates

def groups_by_brute_force(captions, near): # connected components over all pairs
    sets = [frozenset(normalise_text(caption).split()) for caption in captions]
    root = list(range(len(captions)))
    for i in range(len(sets)):
        for j in range(i):
            if not (sets[i] and sets[j]): continue
            if len(sets[i] & sets[j]) >= near * len(sets[i] | sets[j]) - 1e-9:
                joined = (root[i], root[j])
                root = [min(joined) if r in joined else r for r in root]
    return root


letters = st.lists(st.sampled_from('abcdefghijklm'), min_size=1, max_size=12).map(' '.join)


@settings(max_examples=80, deadline=None)
@given(st.lists(letters, max_size=14), st.sampled_from([0.5, 0.75, 0.9, 1.0]))
def test_near_duplicates_are_those_of_all_comparisons(captions, near):
    expected = pd.factorize(np.array(groups_by_brute_force(captions, near)))[0]
    assert duplicate_groups(captions, near).tolist() == expected.tolist()


def test_groups_ignore_case_blanks_and_punctuation():
    captions = ['A dam.', ' a  DAM !', 'a dam near', '', ' ', '...', '🌊', '一条河', '一条河。', 'a_dam']
    assert duplicate_groups(captions).tolist() == [0, 0, 1, -1, -1, -1, -1, 2, 2, 0]
    assert duplicate_groups([]).tolist() == []
    assert duplicate_groups([], near=0.9).tolist() == []


def test_only_a_second_caption_of_one_image_is_dropped():
    table = make_table(['a dam', 'A dam.', 'a dam', 'a lake'], key=['a', 'a', 'b', 'b'])
    decisions = run_purify(table, cut=0)
    assert decisions.action.tolist() == ['keep', 'drop-duplicate', 'keep', 'keep']
    assert decisions.group.tolist() == [0, 0, 0, 1]
    assert 'k0#0' in decisions.reason[1]


def test_the_fine_twin_stays_and_equal_files_are_one_image(tmp_path):
    for name in 'abc':
        Image.new('RGB', (4, 4), (9, 9, 9) if name < 'c' else (8, 8, 8)).save(tmp_path/f'{name}.png')
    paths = [str(tmp_path/f'{name}.png') for name in 'abcd']
    table = make_table(['a dam'] * 4, tier=['coarse', 'fine', 'fine', 'fine'], path=paths)
    assert image_groups(table).tolist() == [0, 0, 1, 2]
    decisions = run_purify(table.assign(image=image_groups(table)))
    assert decisions.action.tolist() == ['drop-duplicate', 'keep', 'keep', 'keep']


def test_captions_that_become_one_are_duplicates():
    captions = ['a dam fit=0.6', 'a photo of a dam fit=0.6', 'this image shows a dam fit=0.6']
    decisions = run_purify(make_table(captions, key='a'), cut=0)
    assert decisions.action.tolist() == ['keep', 'drop-duplicate', 'drop-duplicate']
    assert decisions.text.tolist() == captions
    assert 'once rewritten' in decisions.reason[2]


# ---------------------------------------------------------------- thresholds and steps

scored_rows = st.lists(st.tuples(st.floats(-1, 1), st.sampled_from('ab')), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(scored_rows, st.floats(0, 0.99))
def test_no_source_loses_more_than_its_share(rows, cut):
    scores = np.array([score for score, _ in rows])
    source = np.array([name for _, name in rows])
    low = scores < thresholds(scores, source, cut)
    for name in 'ab':
        of_source = source == name
        n = of_source.sum()
        assert low[of_source].sum() <= cut * n + 1e-6
        if len(set(scores[of_source])) == n: assert low[of_source].sum() == int(cut * n + 1e-9)
    assert (scores < thresholds(scores, source, cut, 'pooled')).sum() <= cut * len(scores) + 1e-6


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30), st.floats(0, 0.9))
@settings(max_examples=40, deadline=None)
def test_the_scale_of_the_scores_does_not_matter(scores, cut):
    small = np.round(np.array(scores), 3)
    large = np.round(small * 8, 3)
    source = ['a'] * len(scores)
    is_cut = small < thresholds(small, source, cut)
    assert is_cut.tolist() == (large < thresholds(large, source, cut)).tolist()


def test_scores_that_do_not_count_move_no_threshold():
    assert thresholds([np.nan, 0.1, 0.2, np.nan], ['a'] * 4, 0.5).tolist() == [0.2] * 4
    assert np.isnan(thresholds([np.nan], ['a'])).all()
    assert len(thresholds([], [])) == 0
    assert thresholds([0.1, 0.2], ['a', 'b'], 0.5, floor=0.15).tolist() == [0.15, 0.2]


@pytest.mark.parametrize('bad', [-0.1, 1, 2])
def test_impossible_settings_are_refused_before_the_work(bad):
    encoder = FakeEncoder()
    with pytest.raises(Incompatible, match='share'): run_purify(make_table(['a']), encoder, cut=bad)
    with pytest.raises(UnknownName, match='per source'): run_purify(make_table(['a']), encoder, keep='per sauce')
    assert encoder.images == 0


def test_the_worst_third_of_each_source_is_cut():
    table = make_table(graded(9) + graded(6, 0.4), source=['low'] * 9 + ['high'] * 6)
    decisions = run_purify(table, cut=1 / 3)
    assert np.flatnonzero(decisions.action == 'cut').tolist() == [0, 1, 2, 9, 10]
    assert decisions.threshold.nunique() == 2
    pooled = run_purify(table, cut=1 / 3, keep='pooled')
    assert np.flatnonzero(pooled.action == 'cut').tolist() == [0, 1, 2, 3, 4]
    floored = run_purify(table, cut=0, floor=0.42)
    assert (floored.action == 'cut').tolist() == (decisions.score < 0.42).tolist()


def test_the_fine_tier_is_kept_as_it_is():
    captions = [f'a photo of a dam fit=0.0{i}' for i in range(5)] + ['', 'a photo of a dam fit=0.00']
    decisions = run_purify(make_table(captions, tier='fine', key=[*'abcdef', 'a']), cut=0.9, floor=0.9)
    assert decisions.action.tolist() == ['keep'] * 5 + ['drop-blank', 'drop-duplicate']
    assert decisions.text.tolist() == captions
    assert decisions.threshold.isna().all()


def test_blank_captions_and_mere_boilerplate_are_named():
    captions = ['', None, ' \t', '!!!', 'a photo of', 'https://a.example/b', 'a dam fit=0.9']
    decisions = run_purify(make_table(captions), cut=0)
    assert decisions.action.tolist() == ['drop-blank'] * 6 + ['keep']
    assert decisions.reason[4] == 'nothing but boilerplate'


def test_the_score_is_that_of_what_is_visible():
    table = make_table([f'{METADATA[0]} a dam fit=0.9', 'a dam fit=0.8'])
    scores = score_pairs(table, FakeEncoder(), images=pictures(table))
    assert scores.score.round(3).tolist() == [0.9, 0.8]
    assert scores.text[0] == 'a dam fit=0.9'
    assert scores.tokens[0] > 50 > scores.new_tokens[0]
    assert scores.whole.notna().all()


def test_a_rewrite_that_matches_worse_is_not_taken():
    table = make_table(['a=0.5', 'b=0.6', 'c=0.7', 'd=0.8'])
    rewrites = {'a=0.5': 'z=0.9', 'b=0.6': 'z=0.595', 'c=0.7': 'z=0.6', 'd=0.8': 'd=0.8'}
    def rewriter(caption, row): return rewrites[caption], 'better'
    decisions = run_purify(table, rewriter=rewriter, cut=0)
    assert decisions.action.tolist() == ['rewrite', 'rewrite', 'keep', 'keep']
    assert decisions.reason.tolist() == ['better', 'better', 'rewrite lost: better', '']
    assert decisions.text.tolist() == ['z=0.9', 'z=0.595', 'c=0.7', 'd=0.8']
    strict = run_purify(table, rewriter=rewriter, cut=0, tolerance=0)
    assert strict.action.tolist() == ['rewrite', 'keep', 'keep', 'keep']


def test_a_rewrite_below_the_threshold_is_not_taken():
    table = make_table(['a=0.5', 'b=0.6', 'c=0.7', 'd=0.8'])
    decisions = run_purify(table, rewriter=lambda caption, row: ('z=0.605', ''), cut=0.5, tolerance=0.5)
    assert decisions.action.tolist() == ['cut', 'cut', 'keep', 'keep'] # the threshold is 0.7


def test_rewriting_never_touches_what_was_cut():
    table = make_table(['a=0.1', 'b=0.9'])
    decisions = run_purify(table, rewriter=lambda caption, row: ('z=0.99', 'better'), cut=0.5)
    assert decisions.action.tolist() == ['cut', 'rewrite']
    assert decisions.text[0] == 'a=0.1' and np.isnan(decisions.new_score[0])


def test_steps_are_pure_and_give_what_purify_gives():
    table = make_table(graded(8) + ['a photo of a dam fit=0.77', ''])
    scores = score_pairs(table, FakeEncoder(), images=pictures(table))
    cuts = cut_pairs(table, scores)
    before = [frame.copy() for frame in (table, scores, cuts)]
    pd.testing.assert_frame_equal(take_rewrites(table, cuts, scores), run_purify(table))
    for frame, copy in zip((table, scores, cuts), before): pd.testing.assert_frame_equal(frame, copy)
    assert list(cuts) == 'pair key score action text new_score reason group threshold'.split()


def test_cutting_leaves_its_input_as_it_is():
    table = make_table(graded(8) + ['a photo of a dam fit=0.77', ''])
    scores = score_pairs(table, FakeEncoder(), images=pictures(table))
    before = [frame.copy() for frame in (table, scores)]
    cut_pairs(table, scores)
    for frame, copy in zip((table, scores), before): pd.testing.assert_frame_equal(frame, copy)


def test_the_order_of_pairs_does_not_matter():
    table = make_table(graded(9) + ['a photo of a dam fit=0.77'])
    shuffled = table.sample(frac=1, random_state=1)
    by_pair = [run_purify(t).set_index('pair').sort_index().drop(columns='group') for t in (table, shuffled)]
    pd.testing.assert_frame_equal(*by_pair)


def test_an_empty_table_is_purified_at_once(tmp_path):
    for store in (None, tmp_path):
        decisions = purify(make_table([]), FakeEncoder(), images={}, store=store)
        assert len(decisions) == 0 and 'action' in decisions
        assert len(apply_decisions(make_table([]), decisions)) == 0


def test_one_line_of_counts_is_printed(monkeypatch, capsys):
    monkeypatch.setenv('RSSQA_QUIET', '0')
    long = f'{METADATA[0]} {METADATA[1]} {METADATA[4]} dam fit=0.9 with a lake'
    table = make_table(['a=0.1', 'b=0.2', 'c=0.3', long, '', 'a=0.1'], key=['a', 'b', 'c', 'd', 'e', 'a'])
    run_purify(table, cut=0.25)
    assert capsys.readouterr().err.splitlines()[-1] == (
        '6 pairs: 2 kept, 1 rewritten, 1 cut, 1 duplicates, 1 blank, 0 unreadable; '
        'longer than 77 tokens: 1 before, 0 after'
    )


# ---------------------------------------------------------------- store, resume, shards

many = make_table([f'{caption} .' for caption in graded(23)], key=[f'k{i // 2}' for i in range(23)])


def test_an_interrupted_run_goes_on_where_it_ended(tmp_path):
    class Stops(FakeEncoder):
        def encode_image(self, x):
            if self.images >= 6: raise KeyboardInterrupt
            return super().encode_image(x)
    with pytest.raises(KeyboardInterrupt): run_purify(many, Stops(), store=tmp_path, every=4)
    parts = sorted(p.name for p in (tmp_path/'scores').iterdir())
    assert 0 < len(parts) < 6 and not (tmp_path/'decisions.parquet').exists()
    encoder = FakeEncoder()
    pd.testing.assert_frame_equal(run_purify(many, encoder, store=tmp_path, every=4), run_purify(many))
    assert encoder.images == 12 - 6 and len(list((tmp_path/'scores').iterdir())) == 6
    on_disk = pd.read_parquet(tmp_path/'decisions.parquet').astype(dict(text=object))
    expected = run_purify(many).astype(dict(text=object))
    pd.testing.assert_frame_equal(on_disk, expected, check_dtype=False)


def test_a_finished_store_is_not_scored_again(tmp_path):
    run_purify(many, store=tmp_path, every=4)
    encoder = FakeEncoder()
    run_purify(many, encoder, store=tmp_path, every=4)
    assert encoder.images == encoder.texts == 0
    run_purify(many, encoder, store=tmp_path, every=4, resume=False)
    assert encoder.images == 12


OTHER_SETTINGS = [
    dict(cut=0.4), dict(keep='pooled'), dict(floor=0.1), dict(rewriter=RuleRewriter(40)),
    dict(encoder=FakeEncoder('b')), dict(every=5), dict(tolerance=0.2),
]


@pytest.mark.parametrize('other', OTHER_SETTINGS)
def test_another_run_in_the_same_store_is_refused(tmp_path, other):
    run_purify(many, store=tmp_path, every=4)
    changed = dict(store=tmp_path, every=4) | other
    with pytest.raises(Incompatible, match='another run') as e: run_purify(many, **changed)
    assert f'{next(iter(other))}:' in e.value.found and 'resume=False' in e.value.todo
    pd.testing.assert_frame_equal(run_purify(many, **changed, resume=False), run_purify(many, **other))


def test_other_captions_in_the_same_store_are_refused(tmp_path):
    run_purify(many, store=tmp_path)
    with pytest.raises(Incompatible, match='another run') as e:
        run_purify(many.assign(caption='new'), store=tmp_path)
    assert 'table' in e.value.found
    with pytest.raises(Incompatible, match='other pairs'): read_scores(many[:3], tmp_path)


@pytest.mark.parametrize('n', [2, 3, 7])
def test_shards_merge_to_the_whole(tmp_path, n):
    shards = [score_pairs(many, FakeEncoder(), images=pictures(many), shard=(i, n), every=3) for i in range(n)]
    assert sorted(pd.concat(shards).pair) == sorted(many.pair)
    assert sum(shard.key.nunique() for shard in shards) == many.key.nunique() # no image is in two shards
    runs = [run_purify(many, store=tmp_path, shard=(i, n), every=3) for i in reversed(range(n))]
    assert all(decisions is None for decisions in runs[:-1])
    pd.testing.assert_frame_equal(runs[-1], run_purify(many))
    whole = score_pairs(many, FakeEncoder(), images=pictures(many))
    pd.testing.assert_frame_equal(read_scores(many, tmp_path), whole, check_dtype=False)


def test_missing_shards_are_counted(tmp_path):
    run_purify(many, store=tmp_path, shard=(1, 3), every=4)
    with pytest.raises(DataNotFound, match='0of3-00000') as e: read_scores(many, tmp_path)
    assert 'parts are missing' in e.value.found
    with pytest.raises(Incompatible, match='store'): run_purify(many, shard=(0, 3))
    for shard in ((3, 3), (-1, 3)):
        with pytest.raises(Incompatible, match='shard'):
            score_pairs(many, FakeEncoder(), images={}, shard=shard)


@pytest.mark.parametrize('shards,every', [(1, 3), (2, 4), (3, 100)])
def test_parts_keep_the_captions_of_an_image_together(shards, every):
    parts = []
    for i in range(shards): parts += [many.iloc[rows] for rows in P._part_rows(many, (i, shards), every)]
    assert sorted(pd.concat(parts).index) == list(range(23))
    assert sum(part.key.nunique() for part in parts) == many.key.nunique()


def test_a_score_cannot_be_used_for_other_pairs():
    scores = score_pairs(many, FakeEncoder(), images=pictures(many))
    for other in (many[:5], many.assign(pair=[f'x{i}' for i in range(23)])):
        with pytest.raises(Incompatible, match='other pairs'): cut_pairs(other, scores)


# ---------------------------------------------------------------- applying

def test_decisions_are_applied_by_pair():
    table = make_table(graded(6) + ['a photo of a dam fit=0.8', ''])
    decisions = run_purify(table)
    purified = apply_decisions(table, decisions.sample(frac=1, random_state=0))
    assert set(purified.action) == {'keep', 'rewrite'}
    assert purified.caption.iloc[-1] == 'a dam fit=0.8'
    assert purified.original.iloc[-1] == 'a photo of a dam fit=0.8'
    assert len(purified) == decisions.action.isin(['keep', 'rewrite']).sum()
    assert list(purified.columns) == [*table.columns, 'original', 'action']
    kept = purified[purified.action == 'keep']
    assert (kept.caption == kept.original).all()


def test_decisions_of_other_pairs_or_captions_are_refused():
    table = make_table(graded(6))
    decisions = run_purify(table)
    others = [
        (table[:4], 'other pairs'),
        (table.assign(pair=table.pair + 'x'), 'other pairs'),
        (table.assign(caption='new words'), 'other captions'),
    ]
    for other, message in others:
        with pytest.raises(Incompatible, match=message): apply_decisions(other, decisions)
    with pytest.raises(UnknownName, match='keep'): apply_decisions(table, decisions.assign(action='keeep'))


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
    sound = np.array([risk(caption) for caption in SOUND])
    invented = np.array([risk(caption) for caption in INVENTED])
    assert (sound[:, None] < invented).mean() > 0.95
    assert (invented > 0).all() and (sound == 0).all()


@given(st.text(max_size=200))
def test_risk_is_a_share_and_names_its_rules(text):
    assert 0 <= risk(text) < 1 and (risk(text) > 0) == bool(risk_rules(text))


@given(st.sampled_from(SOUND + INVENTED), st.sampled_from(INVENTED))
def test_more_suspect_words_never_lower_the_risk(a, b):
    assert risk(f'{a}. {b}') >= max(risk(a), risk(b)) - 1e-9


def test_each_rule_fires_alone():
    fired = set(risk_rules('cars', 'rs3/ben'))
    for caption in INVENTED: fired |= set(risk_rules(caption))
    assert fired == {*P.RISKS, 'colours', 'repetition', 'smaller than a pixel'}
    assert risk_rules('some cars', 'ucm') == {}


# ---------------------------------------------------------------- review

def test_review_shows_every_kind_of_decision():
    table = make_table(graded(40) + ['a photo of a dam fit=0.8', ''], source=['a', 'b'] * 21)
    decisions = run_purify(table)
    review = review_table(table, decisions, 12, seed=3)
    assert len(review) == 12 and review.pair.is_unique and (review.rating == '').all()
    assert set(review.action) == set(decisions.action)
    assert set(review[review.action == 'cut'].source) == {'a', 'b'}
    rewritten = review[review.action == 'rewrite'].iloc[0]
    assert (rewritten.before, rewritten.after) == ('a photo of a dam fit=0.8', 'a dam fit=0.8')
    assert (review[review.action == 'cut'].after == '').all()


def test_review_is_drawn_from_its_seed():
    table = make_table(graded(40) + ['a photo of a dam fit=0.8', ''], source=['a', 'b'] * 21)
    decisions = run_purify(table)
    review = review_table(table, decisions, 12, seed=3)
    pd.testing.assert_frame_equal(review, review_table(table, decisions, 12, seed=3))
    assert not review.equals(review_table(table, decisions, 12, seed=4))
    assert len(review_table(table, decisions, 1000)) == 42
    assert len(review_table(make_table([]), run_purify(make_table([])), 5)) == 0


def test_agreement_counts_what_was_rated():
    ratings = ['right', 'Right ', 'wrong', '', 'right', None, 'right']
    reviewed = pd.DataFrame(dict(action=['cut'] * 4 + ['keep'] * 3, rating=ratings))
    shares = rating_accuracy(reviewed)
    assert shares.judged.to_dict() == dict(cut=3, keep=2)
    assert shares.share.to_dict() == {'cut': pytest.approx(2 / 3), 'keep': 1}
    assert ((shares.low <= shares.share) & (shares.share <= shares.high)).all()
    interval = binomtest(2, 3).proportion_ci(method='wilson')
    assert tuple(shares.loc['cut', ['low', 'high']]) == pytest.approx((interval.low, interval.high))
    assert len(rating_accuracy(reviewed.assign(rating=''))) == 0
    with pytest.raises(SchemaError, match='yes'): rating_accuracy(reviewed.assign(rating='yes'))


# ---------------------------------------------------------------- known noise

kinds_of_place = ['harbour', 'farm', 'stadium'] * 20
scenes = make_table(
    [f'there is a {kind} beside the road in place {i} of many' for i, kind in enumerate(kinds_of_place)]
)


def test_noise_is_seeded_and_recorded():
    noisy = inject_noise(scenes, 0.5, seed=1)
    pd.testing.assert_frame_equal(noisy, inject_noise(scenes, 0.5, seed=1))
    assert noisy.noise.value_counts().to_dict() == {'': 30, 'shuffled': 10, 'truncated': 10, 'boilerplate': 10}
    assert noisy.clean.tolist() == scenes.caption.tolist()
    assert ((noisy.noise == '') == (noisy.caption == noisy.clean)).all()
    assert not noisy.equals(inject_noise(scenes, 0.5, seed=2)) and 'noise' not in scenes


def test_each_noise_is_what_its_name_says():
    scene_of = dict(zip(scenes.caption, scenes.scene))
    for row in inject_noise(scenes, 1.0).itertuples():
        if row.noise == 'shuffled': assert scene_of[row.caption] != row.scene
        if row.noise == 'truncated':
            assert row.clean.startswith(row.caption)
            assert 0.1 <= len(row.caption.split()) / len(row.clean.split()) <= 0.5
        if row.noise == 'boilerplate':
            assert row.caption.endswith(f' {row.clean}') and len(row.caption) > len(row.clean) + 60


def test_without_scenes_captions_are_shuffled_between_images():
    table = scenes.drop(columns='scene')
    noisy = inject_noise(table, 1.0, ('shuffled',))
    assert (noisy.noise == 'shuffled').all() and (noisy.caption != noisy.clean).all()
    assert set(noisy.caption) <= set(table.caption)


def test_only_the_tier_asked_for_is_spoilt():
    noisy = inject_noise(scenes.assign(tier=['fine', 'coarse'] * 30), 1.0)
    assert (noisy[noisy.tier == 'fine'].noise == '').all() and (noisy[noisy.tier == 'coarse'].noise != '').all()
    with pytest.raises(UnknownName, match='truncated'): inject_noise(scenes, kinds=('truncatd',))


def test_noise_that_cannot_be_made_leaves_a_caption_clean():
    assert (inject_noise(make_table(['same words here'] * 5), 1.0, ('shuffled',)).noise == '').all()
    assert (inject_noise(make_table(['', ' ', 'dam']), 1.0, ('truncated',)).noise == '').all()


def test_every_padding_is_removed():
    noisy = inject_noise(scenes, 1.0, ('boilerplate',))
    assert [rules(caption)[0] for caption in noisy.caption] == noisy.clean.tolist()
    assert noisy.caption.str[:20].nunique() >= 4


class PlaceEncoder(FakeEncoder):
    "Image i and a sentence that names place i have the same vector; other sentences are the same to all."
    dim = 61

    def encode_image(self, x):
        return SimpleNamespace(pooled=torch.eye(61)[(x.mean((1, 2, 3)) * 59).round().long()])

    def encode_text(self, texts): return torch.stack([self.encode_one(text) for text in texts])

    def encode_one(self, text):
        if 'place ' not in text: return torch.full((61,), 61**-0.5)
        return torch.eye(61)[int(text.split('place ')[1].split()[0])]


def test_audit_counts_what_became_of_noise():
    noisy = inject_noise(scenes, 0.6, seed=2)
    images = {f'k{i}': np.full((3, 4, 4), i / 59, np.float32) for i in range(60)}
    audit = audit_noise(noisy, run_purify(noisy, PlaceEncoder(), images, cut=0.2))
    assert audit.index.tolist() == ['boilerplate', 'shuffled', 'truncated', 'clean']
    assert audit.n.tolist() == [12, 12, 12, 24]
    assert audit.out.tolist() == [0, 1, 0, 0]
    assert audit.restored.tolist() == [1, 0, 0, 1]
    assert audit.kept.tolist() == [0, 0, 1, 0]
    assert audit.auroc.iloc[:3].tolist() == [0.5, 1, 1] and np.isnan(audit.auroc['clean'])


# ---------------------------------------------------------------- real captions

def test_real_noise_is_found(real):
    from rssqa.clip.encoders import load_encoder
    pairs = pd.read_csv(real/'pairs'/'pairs.csv')
    pairs = pairs[pairs.source.isin(['rsicd', 'ucm']) & (pairs.split != 'train')].drop_duplicates('filepath')
    pairs = pairs.groupby('source').sample(55, random_state=0).reset_index(drop=True)
    names = [f'{path}#0' for path in pairs.filepath]
    paths = [str(real/'pairs'/path) for path in pairs.filepath]
    pairs = pairs.assign(pair=names, key=pairs.filepath, tier='coarse', path=paths)
    noisy = inject_noise(pairs, 0.45, ('shuffled', 'boilerplate'), seed=0)
    audit = audit_noise(noisy, purify(noisy, load_encoder('clip-rs-mini', device='cpu'), cut=0.25))
    assert audit.auroc['shuffled'] > 0.85
    assert audit.out['shuffled'] > 0.7 and audit.out['clean'] < 0.15
    not_cut = 1 - audit.out['boilerplate']
    assert audit.restored['boilerplate'] / not_cut > 0.9
