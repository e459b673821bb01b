import numpy as np
import pytest
import torch

from fastfsl.encoders import class_embeddings, load_encoder
from fastfsl.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def encoder(model_folder):
    return load_encoder(f"local-dir:{model_folder}")


def test_one_template_is_the_embedding_of_the_prompt(encoder):
    embeddings = class_embeddings(encoder, ["cat", "sea_lion"], "a photo of a {}.")
    expected = encoder.encode_texts(["a photo of a cat.", "a photo of a sea lion."]).numpy()
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)


def test_several_templates_are_averaged_after_normalising_and_normalised_again(encoder):
    templates = ["a {}.", "the {} in a {{}}".replace("{{}}", "box"), "{}"]
    embeddings = class_embeddings(encoder, ["cat", "dog", "owl"], templates)
    for row, name in zip(embeddings, ["cat", "dog", "owl"], strict=True):
        tokens = encoder.tokenizer([template.replace("{}", name) for template in templates])
        with torch.inference_mode():
            texts = encoder.model.encode_text(tokens)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        mean = texts.mean(0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


def test_many_prompts_take_several_batches(encoder):
    names = [f"thing number {number}" for number in range(150)]
    embeddings = class_embeddings(encoder, names, ["a {}.", "the {}."])
    np.testing.assert_allclose(
        embeddings[140:], class_embeddings(encoder, names[140:], ["a {}.", "the {}."]), atol=1e-5
    )


def test_classes_that_read_alike_are_warned_of(encoder):
    long = "very " * 30
    with pytest.warns(UserWarning, match=r"same text \(it takes 16 tokens.* cat' = 'very .* dog'"):
        class_embeddings(encoder, [f"{long} cat", f"{long} dog"])


def test_classes_that_differ_in_underscores_alone_are_warned_of(encoder):
    with pytest.warns(UserWarning, match="cannot tell them apart: 'red_kite' = 'red kite'; change"):
        class_embeddings(encoder, ["red_kite", "red kite"])


def test_every_group_of_classes_that_read_alike_is_named(encoder):
    names = ["red kite", "owl", "red_kite", "Red Kite", "OWL", "tern", "sea  gull", "sea gull"]
    with pytest.warns(UserWarning, match="cannot tell them apart") as caught:
        class_embeddings(encoder, names, ["a {}.", "the {}."])
    (warning,) = caught
    groups = "'red kite' = 'red_kite' = 'Red Kite'; 'owl' = 'OWL'; 'sea  gull' = 'sea gull'; change"
    assert groups in str(warning.message)


def test_a_template_given_twice_is_no_likeness_of_classes(encoder):
    class_embeddings(encoder, ["cat", "dog"], ["a {}.", "a {}."])  # a warning would be an error here


def test_bad_templates_and_names(encoder):
    with pytest.raises(ConfigError, match="exactly once"):
        class_embeddings(encoder, ["cat", "dog"], "a {} {}")
    with pytest.raises(DataError, match="no word"):
        class_embeddings(encoder, ["cat", "_"])


def test_presets_read_the_names_of_their_set_as_words(encoder):
    embeddings = class_embeddings(encoder, ["AnnualCrop", "River"], "eurosat")
    expected = ["a centered satellite photo of Annual Crop Land.", "a centered satellite photo of River."]
    np.testing.assert_allclose(embeddings, encoder.encode_texts(expected).numpy(), atol=1e-6)
    of_own_prompt = class_embeddings(encoder, ["AnnualCrop", "River"], "a centered satellite photo of {}.")
    assert np.abs(of_own_prompt[0] - embeddings[0]).max() > 1e-3
