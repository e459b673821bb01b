import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfsl.data import TEMPLATES, clean_class_name, fill, resolve_templates
from fastfsl.errors import ConfigError, DataError


def test_presets_hold_valid_templates():
    assert {"generic", "ensemble"} < TEMPLATES.keys()
    assert len(TEMPLATES["ensemble"]) == 7
    # The eleven sets of the field's benchmark, one prompt each.
    assert len(TEMPLATES) == 2 + 11
    for name, templates in TEMPLATES.items():
        assert resolve_templates(name) == templates
        assert resolve_templates(templates) == templates


def test_one_template_or_several():
    assert resolve_templates("a {} drawing") == ("a {} drawing",)
    assert resolve_templates(["a {}", "the {}"]) == ("a {}", "the {}")


@pytest.mark.parametrize("bad", ["a {} and a {}", "a {name}", "a {", "a }{", "{{}}", "a {0}"])
def test_templates_need_one_place_for_the_name(bad):
    with pytest.raises(ConfigError, match="exactly once"):
        resolve_templates(bad)
    with pytest.raises(ConfigError, match="exactly once"):
        resolve_templates(["a {}", bad])


def test_unknown_presets_and_no_templates():
    with pytest.raises(ConfigError, match="did you mean 'eurosat'"):
        resolve_templates("euro-sat")
    with pytest.raises(ConfigError, match="exactly once"):
        resolve_templates(["a photo"])
    with pytest.raises(ConfigError, match="no prompt template"):
        resolve_templates([])


def test_names_are_cleaned_and_filled_in():
    assert clean_class_name("  golden__retriever \n") == "golden retriever"
    assert fill(("a {}.", "{} texture"), "sea_{}lion") == ("a sea {}lion.", "sea {}lion texture")
    with pytest.raises(DataError, match="no word"):
        clean_class_name("_ _")


@given(st.text())
def test_cleaning_twice_changes_nothing(name):
    try:
        cleaned = clean_class_name(name)
    except DataError:
        return
    assert clean_class_name(cleaned) == cleaned
