import numpy as np
import torch

from fastfsl.flow import blended_targets, normalize, target_shift


def setting():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 3])  # class 2 has no sample
    features = normalize(torch.randn(5, 8, generator=generator, dtype=torch.float64) + 3)
    texts = normalize(torch.randn(4, 8, generator=generator, dtype=torch.float64) - 2)
    return features, labels, texts


def test_the_formula_class_by_class():
    features, labels, texts = setting()
    found = blended_targets(features, labels, texts, 2.0)
    means = {label: features[labels == label].mean(0) for label in (0, 1, 3)}
    centre = (means[0] + means[1] + means[3]) / 3
    for label, count in ((0, 3), (1, 1), (2, 0), (3, 1)):
        sample_part = count * (means[label] - centre) if count else 0.0
        blended = centre + (2.0 * (texts[label] - texts.mean(0)) + sample_part) / (2.0 + count)
        np.testing.assert_allclose(found[label], blended / blended.norm(), atol=1e-12)


def test_the_ends_are_text_alone_and_class_means_alone():
    features, labels, texts = setting()
    texts_only = blended_targets(features, labels, texts, float("inf"))
    means_only = blended_targets(features, labels, texts, 0.0)
    for label in (0, 1, 3):
        np.testing.assert_allclose(means_only[label], normalize(features[labels == label].mean(0)), atol=1e-12)
    centre = torch.stack([features[labels == label].mean(0) for label in (0, 1, 3)]).mean(0)
    np.testing.assert_allclose(means_only[2], normalize(centre + texts[2] - texts.mean(0)), atol=1e-12)
    np.testing.assert_allclose(texts_only[0], normalize(centre + texts[0] - texts.mean(0)), atol=1e-12)


def test_every_prototype_has_the_target_of_its_own_samples():
    features, labels, texts = setting()
    prototypes = torch.tensor([0, 1, 1, 0, 0])
    found = blended_targets(features, labels, texts, 2.0, prototypes)
    assert found.shape == (4, 2, 8)
    centre = torch.stack([features[labels == label].mean(0) for label in (0, 1, 3)]).mean(0)  # of classes, as ever
    for rows, place in (([0], found[0, 0]), ([1, 2], found[0, 1])):
        text = 2.0 * (texts[0] - texts.mean(0))
        blended = centre + (text + len(rows) * (features[rows].mean(0) - centre)) / (2.0 + len(rows))
        np.testing.assert_allclose(place, blended / blended.norm(), atol=1e-12)
    plain = blended_targets(features, labels, texts, 2.0)
    for label in (1, 2, 3):  # one sample or none
        for place in found[label]:
            np.testing.assert_allclose(place, plain[label], atol=1e-12)


def test_the_shift_gives_the_target_of_a_class_without_samples():
    features, labels, texts = setting()
    shift = target_shift(features, labels, texts)
    np.testing.assert_allclose(
        normalize(texts + shift)[2], blended_targets(features, labels, texts, 2.0)[2], atol=1e-12
    )
