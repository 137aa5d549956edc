"""Soft-guided segmentation by words: limits of the gate, any classes in any order, what is frozen stays."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rssqa.data.datasets import IGNORE
from rssqa.open_vocabulary.soft_guided import (
    SCALE, Guided, SceneBias, SoftGuided, guided_loss, scene_bias, tune,
)

B, C, D, T, SIDE = 2, 12, 8, 5, 6


@pytest.fixture
def made():
    torch.manual_seed(0)
    features = torch.randn(B, C, SIDE, SIDE)
    frozen = F.normalize(torch.randn(B, D, SIDE, SIDE), dim=1)
    text = F.normalize(torch.randn(T, D), dim=1)
    return features, frozen, text, torch.randn(D)


def trained(model): # any weights
    for p in model.parameters(): nn.init.normal_(p, std=0.4)
    return model


def cost_of(parts, text):
    cost = torch.einsum('bdhw,td->bthw', parts, text)
    return SCALE * F.interpolate(cost, scale_factor=2, mode='bilinear', align_corners=False)


def test_a_gate_of_one_is_the_frozen_map_to_the_bit(made):
    features, frozen, text, bias = made
    model = trained(SoftGuided(C, bias, gate=1.0, guided=False))
    assert torch.equal(model(features, frozen, text).logits, cost_of(frozen, text))


def test_a_gate_of_zero_is_plain_tuning(made):
    features, frozen, text, bias = made
    model = trained(SoftGuided(C, bias, gate=0.0, guided=False))
    tuned = F.normalize(frozen + model.adapter(features), dim=1)
    assert torch.equal(model(features, frozen, text).logits, cost_of(tuned, text))


def test_an_untrained_model_is_the_frozen_one(made):
    features, frozen, text, bias = made
    assert torch.allclose(SoftGuided(C, bias)(features, frozen, text).logits, cost_of(frozen, text), atol=1e-4)


@pytest.mark.parametrize('guided', [True, False])
@pytest.mark.parametrize('seed', range(3))
def test_classes_in_another_order_give_the_same_map(made, guided, seed):
    features, frozen, text, bias = made
    model = trained(SoftGuided(C, bias, guided=guided))
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    whole = torch.randn(B, D)
    a, b = model(features, frozen, text, whole), model(features, frozen, text[order], whole)
    assert torch.allclose(a.logits[:, order], b.logits, atol=1e-3) and torch.equal(a.gate, b.gate)


def test_without_the_scene_a_further_class_changes_no_other(made):
    features, frozen, text, bias = made
    model = trained(SoftGuided(C, bias, guided=False))
    few, many = model(features, frozen, text[:3]), model(features, frozen, text)
    assert torch.allclose(few.logits, many.logits[:, :3], atol=1e-5)


def test_any_number_of_classes(made):
    features, frozen, text, bias = made
    model = trained(SoftGuided(C, bias))
    for n in (1, 2, T):
        output = model(features, frozen, text[:n])
        assert output.logits.shape == (B, n, 2 * SIDE, 2 * SIDE)
        assert output.gate.shape == (B, 1, SIDE, SIDE) and output.gate.gt(0).all() and output.gate.lt(1).all()
        assert torch.allclose(output.tuned.norm(dim=1), torch.ones(B, SIDE, SIDE), atol=1e-5)


def test_what_is_frozen_stays_to_the_bit(made):
    features, frozen, text, bias = made
    before = [x.clone() for x in (features, frozen, text, bias)]
    model = SoftGuided(C, bias)
    labels = torch.randint(T, (B, 2 * SIDE, 2 * SIDE))
    tune(model, features, frozen, text, labels, steps=3, batch=2)
    assert all(torch.equal(a, b) for a, b in zip(before, (features, frozen, text, bias)))
    assert torch.equal(model.scene.bias, bias) and not any(n.endswith('bias') and n == 'scene.bias' for n, _ in
                                                           model.named_parameters())
    assert not torch.equal(model(features, frozen, text).logits, cost_of(frozen, text))


def test_the_same_seed_gives_the_same_weights(made):
    features, frozen, text, bias = made
    labels = torch.randint(T, (B, 2 * SIDE, 2 * SIDE))
    def one(seed):
        torch.manual_seed(5)
        return tune(SoftGuided(C, bias), features, frozen, text, labels, steps=4, batch=1, seed=seed).state_dict()
    a, b, c = one(0), one(0), one(1)
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


def test_the_loss_by_hand(made):
    _, frozen, text, _ = made
    torch.manual_seed(1)
    output = Guided(torch.randn(B, 2, 2 * SIDE, 2 * SIDE), F.normalize(torch.randn(B, D, SIDE, SIDE), dim=1), None)
    nothing = torch.full((B, 2 * SIDE, 2 * SIDE), IGNORE)
    apart = 1 - (output.tuned * frozen).sum(1)
    assert torch.allclose(guided_loss(output, nothing, frozen), apart.mean())
    labels = torch.randint(2, (B, 2 * SIDE, 2 * SIDE))
    expected = F.cross_entropy(output.logits, labels)
    assert torch.allclose(guided_loss(output, labels, frozen, align=0), expected)
    assert torch.allclose(guided_loss(output, labels, frozen), expected + 0.1 * apart.mean())
    half = labels.clone()
    half[:, :SIDE] = IGNORE
    assert torch.allclose(
        guided_loss(output, half, frozen, align=2.0),
        F.cross_entropy(output.logits, half, ignore_index=IGNORE)
        + (2 * apart[:, :SIDE // 2].sum() + 0.1 * apart[:, SIDE // 2:].sum()) / apart.numel(), atol=1e-5)


def test_the_bias_of_the_scene():
    class Encoder:
        def encode_text(self, texts):
            return torch.tensor([[1.0, 'above' in t or 'aerial' in t or 'satellite' in t] for t in texts])
    assert scene_bias(Encoder()).tolist() == [0.0, 1.0]
    parts, text = torch.randn(1, 4, 3, 3), torch.randn(2, 4)
    same, unchanged = SceneBias(torch.randn(4), 2)(parts, text)
    assert torch.equal(same, parts) and torch.equal(unchanged, text)
