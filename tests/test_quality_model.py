"""The quality model as an estimator: reproducible, savable, and independent of what it must not read."""
import json

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GroupKFold, cross_val_score

from hostile import flip_bit
from rssqa.segment.confidence import AGREEMENT
from rssqa.core import DataNotFound, Incompatible, MissingFeatures, Problem, SchemaError, read_json, write_json
from rssqa.segment.metrics import srocc
from rssqa.quality.features import FeatureExtractor, Prior, Reducer, Scaler
from rssqa.data.splits import validation_rows
from rssqa.quality.model import BLOCK_NAMES, QualityModel, explain, load_model, save_model
from rssqa.tables.store import Store, put_vectors
from trained import numbers, with_features, trained_setup

FAST = dict(epochs=8, members=2, images=8, dim=12, directions=4)


@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('features')


@pytest.fixture(scope='module')
def table(): return numbers()


@pytest.fixture(scope='module')
def new(): return numbers(seed=9).assign(image_id=lambda t: 'new' + t.image_id)


@pytest.fixture(scope='module')
def store(home, table, new): return with_features(home/'store', pd.concat([table, new]))


@pytest.fixture(scope='module')
def model(table, store): return QualityModel(semantic='sem/toy@1', store=store, **FAST).fit(table)


@pytest.fixture(scope='module')
def plain(table): return QualityModel(**FAST).fit(table)


# ---------------------------------------------------------------- an estimator like others

def test_parameters_are_plain_and_cloned(model):
    assert json.loads(json.dumps(model.get_params())) == model.get_params() == clone(model).get_params()
    assert not hasattr(clone(model), 'nets_') and clone(model).set_params(epochs=3).epochs == 3


def test_same_seed_same_model(table, model, new):
    again = clone(model).fit(table)
    assert np.array_equal(again.predict(new), model.predict(new)) and again.history_.equals(model.history_)
    assert not np.array_equal(clone(model).set_params(seed=1).fit(table).predict(new), model.predict(new))


def test_two_processes_train_the_same_networks(table, model, new):
    with joblib.parallel_config(n_jobs=2): again = clone(model).fit(table)
    assert np.abs(again.predict(new) - model.predict(new)).max() < 1e-6
    assert again.history_.member.tolist() == model.history_.member.tolist()


def test_another_target_is_measured_as_such(table, new):
    train = table.assign(miou=table.oa / 2)
    test = new.assign(miou=new.oa / 2)
    measures = QualityModel(**FAST, target='miou').fit(train).evaluate(test, train)
    renamed_train = train.assign(oa=train.miou)
    renamed_test = test.assign(oa=test.miou)
    expected = QualityModel(**FAST).fit(renamed_train).evaluate(renamed_test, renamed_train)
    assert measures['mae'] == pytest.approx(expected['mae'])


def test_scenes_may_be_numbers(table):
    numbered = table.assign(scene=pd.factorize(table.scene)[0])
    as_text = numbered.assign(scene=numbered.scene.astype(str))
    assert np.array_equal(validation_rows(numbered, 3), validation_rows(as_text, 3))


def test_validation_rows_are_whole_scenes_of_every_dataset(table):
    is_validation = validation_rows(table, 0)
    scenes = table.assign(is_validation=is_validation).groupby(['dataset', 'scene']).is_validation
    assert (scenes.nunique() == 1).all()
    assert (scenes.first().groupby('dataset').sum() == 1).all()


def test_weights_of_the_best_epoch_are_restored(table, new):
    "A run past its best epoch equals a run that ends there."
    noise = table.assign(oa=np.random.default_rng(0).permutation(table.oa))
    settings = dict(FAST, members=1, lr=0.03)
    long = QualityModel(**settings | dict(epochs=12)).fit(noise)
    best = int(long.history_.loss.argmin())
    assert best < len(long.history_) - 1                       # later epochs were worse
    short = QualityModel(**settings | dict(epochs=best + 1)).fit(noise)
    assert np.array_equal(long.predict(new), short.predict(new))


def test_cross_validation_by_scene(table):
    scenes = table.dataset + table.scene
    scores = cross_val_score(QualityModel(**FAST), table, table.oa, groups=scenes, cv=GroupKFold(3))
    assert len(scores) == 3 and np.isfinite(scores).all() and scores.mean() > 0.5


def test_it_learns(plain, model, new):
    for m in (plain, model):
        p = m.predict(new)
        assert p.shape == (len(new),) and ((p > 0) & (p < 1)).all()
        assert srocc(new.oa, p) > 0.6 and m.score(new) > 0.5
    assert plain.evaluate(new, new)['mae'] < 0.1


def test_fit_does_not_touch_its_table(table):
    before = table.copy()
    m = QualityModel(**FAST).fit(table)
    m.predict(table)
    m.score(table)
    explain(m, table)
    pd.testing.assert_frame_equal(table, before)


def test_y_replaces_the_target(table, new):
    reversed_model = QualityModel(**FAST).fit(table, 1 - table.oa)
    assert srocc(new.oa, reversed_model.predict(new)) < -0.5
    assert reversed_model.score(new, 1 - new.oa) > 0.5
    assert srocc(new.miou, QualityModel(target='miou', **FAST).fit(table).predict(new)) > 0.7


def test_unfitted_model_is_refused(table, tmp_path):
    model = QualityModel()
    with pytest.raises(NotFittedError): model.predict(table)
    with pytest.raises(NotFittedError): model.embed(table)
    with pytest.raises(NotFittedError): explain(model, table)
    with pytest.raises(NotFittedError): save_model(model, tmp_path)


# ---------------------------------------------------------------- what a prediction depends on

@pytest.mark.parametrize('which', ['plain', 'model'])
def test_order_of_rows_does_not_matter(which, request, new):
    m = request.getfixturevalue(which)
    mixed = new.sample(frac=1, random_state=0)
    assert np.allclose(m.predict(mixed), pd.Series(m.predict(new), new.index)[mixed.index], atol=1e-6)
    assert np.allclose(m.embed(mixed), m.embed(new)[new.index.get_indexer(mixed.index)], atol=1e-5)


@pytest.mark.parametrize('which', ['plain', 'model'])
def test_other_images_do_not_matter(which, request, new):
    "Also where a column that is no share happens to stay within 0..1 in a small table."
    m = request.getfixturevalue(which)
    whole = request.getfixturevalue('new')
    whole = whole.assign(parts=np.where(whole.image_id == whole.image_id[0], 0.5, whole.parts))
    predicted = pd.Series(m.predict(whole), whole.index)
    for _, part in list(whole.groupby('image_id'))[:6]:
        assert np.allclose(m.predict(part), predicted[part.index], atol=1e-5)


def test_labels_of_new_rows_do_not_matter(model, new):
    blind = new.drop(columns=['oa', 'miou', 'mf1', 'n_valid', 'scene', 'split'])
    assert np.array_equal(model.predict(blind), model.predict(new))
    assert np.array_equal(model.predict(new.assign(oa=0.1)), model.predict(new))


def test_other_methods_of_the_same_image_do_matter(plain, new):
    one = new[new.method == 'm0']
    assert not np.allclose(plain.predict(one), plain.predict(new)[(new.method == 'm0').to_numpy()])


def test_index_may_repeat(model, new):
    twice = pd.concat([new, new.assign(image_id='b' + new.image_id)])
    m = QualityModel(**FAST).fit(twice)
    assert len(m.predict(twice)) == len(twice)


def test_a_method_outside_training_is_scored(plain, model, new, store):
    renamed = new.assign(method=new.method.replace('m2', 'm9'))
    for m in (plain, model): assert np.isfinite(m.predict(renamed)).all()
    assert not np.allclose(plain.predict(renamed), plain.predict(new))
    assert srocc(new.oa, plain.predict(renamed)) > 0.6


def test_a_dataset_outside_training_is_scored(plain, new):
    assert np.isfinite(plain.predict(new.assign(dataset='elsewhere'))).all()


def test_a_table_without_agreement(table, new, plain):
    train = table.drop(columns=list(AGREEMENT))
    test = new.drop(columns=list(AGREEMENT))
    assert srocc(new.oa, QualityModel(**FAST).fit(train).predict(test)) > 0.7
    assert np.isfinite(plain.predict(test)).all()                     # known in training, absent now
    assert srocc(new.oa, QualityModel(cross_method=False, **FAST).fit(table).predict(new)) > 0.7


@pytest.mark.parametrize('share', [0.3, 1.0])
def test_missing_values_give_finite_predictions(share, table, new):
    known = np.random.default_rng(0).random(len(table)) > share
    m = QualityModel(**FAST).fit(table.assign(conf=table.conf.where(known)))
    assert np.isfinite(m.predict(new)).all()
    assert np.isfinite(m.predict(new.assign(conf=np.nan, entropy=np.inf))).all()


# ---------------------------------------------------------------- refusals

def test_missing_columns_are_named(plain, new):
    with pytest.raises(MissingFeatures, match='conf_t'): plain.predict(new.drop(columns='conf_t'))
    with pytest.raises(MissingFeatures, match='label-free'):
        QualityModel(**FAST).fit(new[['image_id', 'dataset', 'scene', 'method', 'oa']])
    with pytest.raises(SchemaError, match='nope'): QualityModel(target='nope').fit(new)


LABELS = dict(
    nan=(lambda oa: oa.where(oa.index != 3), 'NaN'),
    infinite=(lambda oa: oa.where(oa.index != 3, np.inf), 'infinite'),
    percent=(lambda oa: oa * 100, 'percent'),
    negative=(lambda oa: oa - 1, '0..1'),
    words=(lambda oa: oa.map('{:.1f} %'.format), 'no numbers'),
)


@pytest.mark.parametrize('labels', LABELS)
@pytest.mark.parametrize('as_y', [False, True])
def test_labels_that_are_no_accuracies_are_refused(labels, as_y, table, plain, new):
    change, word = LABELS[labels]
    oa = change(table.oa)
    arguments = (table, oa.to_numpy()) if as_y else (table.assign(oa=oa),)
    with pytest.raises(SchemaError, match=word) as caught: QualityModel(**FAST).fit(*arguments)
    assert caught.value.found and caught.value.todo
    with pytest.raises(SchemaError, match=word): plain.score(*arguments)


def test_labels_of_another_length_are_refused(table):
    with pytest.raises(SchemaError, match='one value a row'): QualityModel(**FAST).fit(table, table.oa[:-1])


TABLES = dict(
    numpy=(lambda t: t.select_dtypes('number').to_numpy(), 'ndarray'),
    dictionary=(lambda t: t.to_dict('list'), 'dict'),
    no_method=(lambda t: t.drop(columns='method'), 'no column method'),
    no_names=(lambda t: t.drop(columns=['image_id', 'dataset']), 'no column image_id, dataset'),
    unknown_columns=(lambda t: pd.DataFrame(dict(a=[1.0], oa=[.5])), 'no column image_id'),
    empty=(lambda t: t[:0], 'no rows'),
    twice=(lambda t: pd.concat([t, t[:2]], ignore_index=True), '2 rows whose image_id and method'),
    unnamed=(lambda t: t.assign(method=t.method.where(t.index != 1, None)), '1 rows without'),
)


@pytest.mark.parametrize('change', TABLES)
def test_tables_of_another_form_are_refused_in_fit_and_predict(change, table, plain, new):
    make, words = TABLES[change]
    for use in (lambda: QualityModel(**FAST).fit(make(table)), lambda: plain.predict(make(new))):
        with pytest.raises(SchemaError, match=words) as caught: use()
        assert caught.value.found and caught.value.todo


def test_text_where_numbers_are_expected_is_refused(plain, new):
    with pytest.raises(SchemaError, match='conf_t'): plain.predict(new.assign(conf_t=new.conf_t.astype(str)))


def test_features_that_were_never_extracted_are_named(table, store, model, new):
    with pytest.raises(MissingFeatures, match='sem/toy@2'):
        QualityModel(semantic='sem/toy@2', store=store, **FAST).fit(table)
    with pytest.raises(MissingFeatures, match='no rows for 1 of'):
        model.predict(new.assign(image_id=new.image_id.replace(new.image_id[0], 'unknown')))


def test_another_encoder_cannot_stand_in(model, new, tmp_path):
    save_model(model, tmp_path/'m')
    images = new.image_id.unique()
    put_vectors(Store(tmp_path/'s'), 'sem/toy@2', images, np.ones((len(images), 12)))
    with pytest.raises(MissingFeatures, match='sem/toy@1|intermediate/'):
        load_model(tmp_path/'m', str(tmp_path/'s')).predict(new)


def test_fusion_with_a_typo_is_suggested(table):
    with pytest.raises(KeyError, match='mean scgb'): QualityModel(fusion='scgv', **FAST).fit(table)


# ---------------------------------------------------------------- poor data

@pytest.mark.parametrize('size', [
    dict(datasets=1),
    dict(methods=1),
    dict(datasets=1, methods=1),
    dict(scenes=1),
    dict(scenes=2, images=1),
    dict(datasets=1, scenes=1, images=2),
    dict(datasets=1, scenes=1, images=1),
])
def test_small_tables(size):
    t = numbers(**size)
    p = QualityModel(**FAST).fit(t).predict(t)
    assert np.isfinite(p).all() and ((p > 0) & (p < 1)).all()


@pytest.mark.parametrize('value', [0.0, 0.7, 1.0])
def test_constant_accuracy(value, table):
    p = QualityModel(**FAST).fit(table.assign(oa=value)).predict(table)
    assert np.isfinite(p).all() and abs(p - value).mean() < 0.1


def test_constant_columns(table):
    t = table.assign(conf=0.5, entropy=0.0, energy=3.0)
    assert np.isfinite(QualityModel(**FAST).fit(t).predict(t)).all()


def test_incomplete_grid(table, new):
    incomplete = table.drop(table.sample(frac=0.4, random_state=0).index)
    assert srocc(new.oa, QualityModel(**FAST).fit(incomplete).predict(new)) > 0.7


# ---------------------------------------------------------------- files and reasons

def feature_options(kind, store): # of QualityModel
    if kind == 'everything': return dict(semantic='sem/toy@1', store=store)
    if kind == 'semantics only':
        return dict(semantic='sem/toy@1', store=store, intermediate=False, fusion='scgb-symmetric')
    return dict(cross_method=False) if kind == 'no cross-method features' else {}


KINDS = ['everything', 'plain', 'semantics only', 'no cross-method features']


@pytest.mark.parametrize('kind', KINDS)
def test_saved_model_predicts_the_same(kind, table, new, store, tmp_path):
    options = feature_options(kind, store)
    model = QualityModel(**options, **FAST).fit(table)
    folder = save_model(model, tmp_path/'m', data='numbers', srocc=0.9)
    assert store not in (folder/'config.json').read_text()
    loaded = load_model(folder, options.get('store', ''))
    assert loaded.facts_ == dict(data='numbers', srocc=0.9)
    assert np.abs(loaded.predict(new) - model.predict(new)).max() < 1e-6
    assert np.abs(loaded.embed(new) - model.embed(new)).max() < 1e-4
    assert explain(loaded, new).columns.equals(explain(model, new).columns)
    save_model(loaded, tmp_path/'again')
    again = load_model(tmp_path/'again', options.get('store', ''))
    assert np.array_equal(again.predict(new), loaded.predict(new))


@pytest.mark.parametrize('kind', KINDS)
def test_features_are_rebuilt_from_their_state(kind, table, new, store):
    model = QualityModel(**feature_options(kind, store), **FAST).fit(table)
    fitted = model.features_
    settings = dict(
        store=fitted.store,
        semantic=fitted.semantic,
        intermediate=fitted.intermediate,
        cross_method=fitted.cross_method,
        dim=fitted.dim,
    )
    rebuilt = FeatureExtractor.from_state(fitted.state(), **settings)
    expected = fitted.transform(new)
    blocks = rebuilt.transform(new)
    for name in (*BLOCK_NAMES, 'method'):
        assert np.array_equal(getattr(blocks, name), getattr(expected, name)), name
    assert {name: getattr(blocks, name).shape[1] for name in BLOCK_NAMES} == rebuilt.widths


def test_states_are_plain_facts_and_arrays(table):
    x = np.random.default_rng(0).normal(size=(30, 5))
    scaler = Scaler().fit(x)
    reducer = Reducer(3).fit(x)
    prior = Prior().fit(table)
    assert np.array_equal(Scaler.from_state(scaler.state()).transform(x), scaler.transform(x))
    assert np.array_equal(Reducer.from_state(reducer.state()).transform(x), reducer.transform(x))
    read = Prior.from_state(json.loads(json.dumps(prior.state())))
    for training in (False, True):
        assert np.array_equal(read.transform(table, training), prior.transform(table, training))


def test_missing_and_torn_files_are_named(plain, tmp_path):
    with pytest.raises(Problem, match='nowhere'): load_model(tmp_path/'nowhere')
    (save_model(plain, tmp_path/'m')/'config.json').write_text('{"kind": ')
    with pytest.raises(Problem, match='config.json'): load_model(tmp_path/'m')


@pytest.mark.parametrize('at', [3, 200, -1])
def test_one_flipped_bit_of_the_weights_is_refused(at, plain, new, tmp_path):
    folder = save_model(plain, tmp_path/'m')
    flip_bit(folder/'weights.safetensors', at)
    with pytest.raises(Incompatible, match='not the ones that were saved') as caught: load_model(folder)
    assert 'digest' in caught.value.found and caught.value.todo


def test_a_model_of_the_time_before_digests_is_read_and_its_faults_are_named(plain, new, tmp_path):
    folder = save_model(plain, tmp_path/'m')
    config = read_json(folder/'config.json')
    del config['digests']
    write_json(folder/'config.json', config)
    assert np.allclose(load_model(folder).predict(new), plain.predict(new))
    write_json(folder/'config.json', config | dict(params=config['params'] | dict(dim=7)))
    with pytest.raises(Incompatible, match='do not fit together'): load_model(folder)
    write_json(folder/'config.json', dict(kind='QualityModel'))
    with pytest.raises(Incompatible, match='do not fit together'): load_model(folder)
    (folder/'weights.safetensors').write_bytes(b'<html>')
    with pytest.raises(Incompatible, match='(?i)not a safetensors file'): load_model(folder)
    (folder/'weights.safetensors').unlink()
    with pytest.raises(DataNotFound, match='weights.safetensors'): load_model(folder)


def test_explain_names_the_blocks(model, plain, new):
    parts = explain(model, new)
    assert list(parts) == ['predicted', *BLOCK_NAMES] and parts.index.equals(new.index)
    assert np.array_equal(parts.predicted, model.predict(new))
    assert (parts.drop(columns='predicted').abs().mean() > 0).all()
    assert list(explain(plain, new)) == ['predicted', 'single_map', 'cross_method', 'prior']


def test_a_part_is_what_is_missing_without_its_block(plain, new):
    from dataclasses import replace
    from rssqa.quality import model as module
    parts = explain(plain, new)
    blocks = plain.features_.transform(new)
    for name in 'single_map', 'cross_method', 'prior':
        without = replace(blocks, **{name: np.zeros_like(getattr(blocks, name))})
        expected = np.mean([module._predict(net, without) for net in plain.nets_], 0)
        np.testing.assert_allclose(parts.predicted - parts[name], expected, atol=1e-6)


def test_vectors_may_be_given_instead_of_a_store(model, new, store, tmp_path):
    from rssqa.tables.sqed import stored_features
    from rssqa.tables.store import get_vectors
    semantic = get_vectors(Store(store), 'sem/toy@1', new.image_id)
    intermediate = stored_features(Store(store), new)
    without_store = load_model(save_model(model, tmp_path/'m'))
    predicted = without_store.predict(new, semantic, intermediate)
    assert np.allclose(predicted, model.predict(new), atol=1e-6)


def test_on_trained_networks():
    setup = trained_setup()
    model = QualityModel(store=str(setup.home/'store'), **FAST).fit(setup.sqed)
    assert model.features_.intermediate_reducers.keys() == set(setup.sqed.method)
    assert np.isfinite(model.predict(setup.sqed)).all()
