import numpy as np
import pytest
import torch

from fastfsl.flow import blended_targets, normalize, text_target_frame, text_targets


def setting():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 3])  # class 2 has no sample
    features = normalize(torch.randn(5, 8, generator=generator, dtype=torch.float64) + 3)
    texts = normalize(torch.randn(4, 8, generator=generator, dtype=torch.float64) - 2)
    return features, labels, texts


def centre_of(features, labels):
    return torch.stack([features[labels == label].mean(0) for label in (0, 1, 3)]).mean(0)


def across(vector, centre):
    return vector - (vector @ centre) / (centre @ centre) * centre


def test_the_formula_class_by_class():
    features, labels, texts = setting()
    found = blended_targets(features, labels, texts, 2.0)
    centre = centre_of(features, labels)
    for label, count in ((0, 3), (1, 1), (2, 0), (3, 1)):
        text = across(texts[label] - texts.mean(0), centre)
        direction = 2.0 * text / text.norm()
        if count:
            direction = direction + count * across(features[labels == label].mean(0) - centre, centre)
        expected = normalize(centre + 0.5 * (1 - centre @ centre).sqrt() * direction / direction.norm())
        np.testing.assert_allclose(found[label], expected, atol=1e-12)


@pytest.mark.parametrize("text_samples", [2.0, float("inf")])
def test_targets_are_unit_vectors_equally_far_from_the_mean(text_samples):
    features, labels, texts = setting()
    found = blended_targets(features, labels, texts, text_samples)
    centre = centre_of(features, labels)
    np.testing.assert_allclose(found.norm(dim=1), 1, atol=1e-12)
    tangent = 0.5 * (1 - centre @ centre).sqrt() / centre.norm()
    np.testing.assert_allclose(found @ normalize(centre), (1 / (1 + tangent**2).sqrt()).expand(4), atol=1e-12)


def test_the_ends_are_text_alone_and_class_means_alone():
    features, labels, texts = setting()
    texts_only = blended_targets(features, labels, texts, float("inf"))
    means_only = blended_targets(features, labels, texts, 0.0)
    centre = centre_of(features, labels)
    for label in range(4):
        text = across(texts[label] - texts.mean(0), centre)
        np.testing.assert_allclose(normalize(across(texts_only[label], centre)), normalize(text), atol=1e-12)
        if label != 2:
            np.testing.assert_allclose(means_only[label], normalize(features[labels == label].mean(0)), atol=1e-12)
    np.testing.assert_allclose(means_only[2], texts_only[2], atol=1e-12)


def test_texts_nearer_the_mean_of_the_texts_have_no_advantage():
    """Of moved texts that are normalised, unit(t_c + m - t), the nearest to t would be the nearest to most images."""
    features, labels, texts = setting()
    far = normalize(texts + torch.tensor([4.0, 0.0, 0.0, 0.0], dtype=torch.float64)[:, None] * (texts - texts.mean(0)))
    found = blended_targets(features, labels, far, float("inf"))
    centre = normalize(centre_of(features, labels))
    np.testing.assert_allclose(found @ centre, (found[0] @ centre).expand(4), atol=1e-12)


def test_every_prototype_has_the_target_of_its_own_samples():
    features, labels, texts = setting()
    prototypes = torch.tensor([0, 1, 1, 0, 0])
    found = blended_targets(features, labels, texts, 2.0, prototypes)
    assert found.shape == (4, 2, 8)
    centre = centre_of(features, labels)  # of classes, as ever
    text = across(texts[0] - texts.mean(0), centre)
    for rows, place in (([0], found[0, 0]), ([1, 2], found[0, 1])):
        direction = 2.0 * text / text.norm() + len(rows) * across(features[rows].mean(0) - centre, centre)
        expected = normalize(centre + 0.5 * (1 - centre @ centre).sqrt() * direction / direction.norm())
        np.testing.assert_allclose(place, expected, atol=1e-12)
    plain = blended_targets(features, labels, texts, 2.0)
    for label in (1, 2, 3):  # one sample or none
        for place in found[label]:
            np.testing.assert_allclose(place, plain[label], atol=1e-12)


def test_the_frame_gives_the_target_of_a_class_without_samples():
    features, labels, texts = setting()
    frame = text_target_frame(features, labels, texts)
    expected = blended_targets(features, labels, texts, 2.0)[2]
    np.testing.assert_allclose(text_targets(texts, *frame)[2], expected, atol=1e-12)


def test_a_flow_from_before_the_centre_was_kept_moves_texts_and_normalises_them():
    features, labels, texts = setting()
    shift, _ = text_target_frame(features, labels, texts)
    np.testing.assert_allclose(text_targets(texts, shift, None), normalize(texts + shift), atol=1e-12)


def test_without_a_frame_the_texts_are_the_targets():
    _, _, texts = setting()
    np.testing.assert_allclose(
        text_targets(texts, torch.zeros_like(texts[0]), torch.zeros_like(texts[0])), texts, atol=1e-12
    )


@pytest.mark.parametrize("same", [True, False])
def test_one_class_or_texts_that_are_all_the_same_have_targets(same):
    features, labels, texts = setting()
    texts = texts[:1].expand(4, -1) if same else texts[:1]
    labels = labels if same else torch.zeros(5, dtype=torch.int64)
    found = blended_targets(features, labels, texts, 2.0)
    assert torch.isfinite(found).all()
    np.testing.assert_allclose(found.norm(dim=1), 1, atol=1e-12)
