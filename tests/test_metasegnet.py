"""The segmenter that reads metadata: exact limits of the gate, what it depends on, training, refusals."""
import pytest
import torch

from rssqa.core import Incompatible
from rssqa.open_vocabulary import metasegnet as module
from rssqa.open_vocabulary.metasegnet import MetadataFusion, MetaSegmenter, train_with_metadata


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MetaSegmenter(6, 8, 3, 16).eval()


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_closed_gate_is_the_image_alone(model):
    features, sentences = draw(3, 6, 5, 4), draw(3, 2, 8)
    assert model(features, sentences).equal(model(features)) and model(features).shape == (3, 3, 10, 8)
    model.fusion.gate.data.fill_(0.3)
    assert not model(features, sentences).allclose(model(features), atol=1e-4)


def test_the_gate_is_bounded_and_odd(model):
    fusion, parts, sentences = model.fusion, draw(1, 16, 4, 4), draw(1, 2, 8)
    answers = []
    for gate in (0.5, -0.5, 100.0):
        fusion.gate.data.fill_(gate)
        answers.append(fusion(parts, sentences) - parts)
    assert torch.allclose(answers[0], -answers[1], atol=1e-6)
    assert torch.allclose(answers[0] / torch.tensor(0.5).tanh(), answers[2], atol=1e-5)   # tanh ends at 1


def test_images_of_a_batch_do_not_see_each_others_sentences(model):
    model.fusion.gate.data.fill_(1.0)
    features, sentences = draw(2, 6, 4, 4), draw(2, 3, 8)
    both = model(features, sentences)
    assert torch.allclose(both[:1], model(features[:1], sentences[:1]), atol=1e-5)
    changed = sentences.clone()
    changed[1] = 0
    assert torch.allclose(model(features, changed)[0], both[0], atol=1e-5)
    assert not torch.allclose(model(features, changed)[1], both[1], atol=1e-4)


def test_the_order_of_sentences_does_not_matter_their_words_do(model):
    model.fusion.gate.data.fill_(1.0)
    features, sentences = draw(1, 6, 4, 4), draw(1, 3, 8)
    out = model(features, sentences)
    assert torch.allclose(model(features, sentences.flip(1)), out, atol=1e-5)
    assert not torch.allclose(model(features, sentences[:, :1]), out, atol=1e-4)


@pytest.mark.parametrize('shape', [(2, 8), (1, 3, 8), (2, 3, 7)])
def test_other_sentences_are_refused(model, shape):
    with pytest.raises(Incompatible, match=r'expected \(2, sentences, 8\)'): model(draw(2, 6, 4, 4), draw(*shape))


def data(n=12):
    labels = torch.randint(3, (n, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return draw(n, 6, 4, 4), labels, draw(n, 2, 8, seed=2)


def test_training_is_reproducible_and_opens_the_gate():
    features, labels, sentences = data()
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        trained = train_with_metadata(MetaSegmenter(6, 8, 3, 16), features, labels, sentences, steps=5, batch=4)
        states.append(trained.state_dict())
    assert all(value.equal(states[1][name]) for name, value in states[0].items())
    assert states[0]['fusion.gate'].abs().item() > 0


def test_without_sentences_the_fusion_learns_nothing():
    features, labels, _ = data()
    torch.manual_seed(0)
    trained = train_with_metadata(MetaSegmenter(6, 8, 3, 16), features, labels, steps=5, batch=4)
    assert trained.fusion.gate.item() == 0


def test_images_without_weight_are_not_learned_from():
    features, labels, _ = data()
    features[6:] = float('nan')
    weight = torch.tensor([1.0] * 6 + [0.0] * 6)
    torch.manual_seed(0)
    trained = train_with_metadata(MetaSegmenter(6, 8, 3, 16), features, labels, weight=weight, steps=5, batch=4)
    assert all(value.isfinite().all() for value in trained.state_dict().values())


def test_unlabelled_batches_leave_the_weights_finite():
    features, labels, _ = data()
    labels[1:] = 255
    torch.manual_seed(0)
    trained = train_with_metadata(MetaSegmenter(6, 8, 3, 16), features, labels, steps=8, batch=1)
    assert all(value.isfinite().all() for value in trained.state_dict().values())
    with pytest.raises(Incompatible, match='no label'):
        train_with_metadata(MetaSegmenter(6, 8, 3, 16), features, torch.full_like(labels, 255))


def test_some_steps_are_without_sentences(monkeypatch):
    features, labels, sentences = data()
    given = []
    forward = MetaSegmenter.forward
    def noted(self, features, sentences=None):
        given.append(sentences is not None)
        return forward(self, features, sentences)
    monkeypatch.setattr(module.MetaSegmenter, 'forward', noted)
    train_with_metadata(MetaSegmenter(6, 8, 3, 16), features, labels, sentences, steps=60, batch=1)
    assert 40 <= sum(given) <= 56 and len(given) == 60


def test_heads_must_divide_the_channels():
    with pytest.raises(AssertionError, match='divisible'): MetadataFusion(10, 8)
