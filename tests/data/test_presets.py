import pytest

from fastfsl.data import PRESETS, TEMPLATES, clean_class_name, prompt_names, resolve_templates


def test_every_standard_set_has_one_prompt_with_one_place_for_the_name():
    assert len(PRESETS) == 11
    assert set(TEMPLATES) == set(PRESETS) | {"generic", "ensemble"}
    for key in PRESETS:
        (template,) = resolve_templates(key)
        assert template.count("{}") == 1


def test_split_files_are_the_communitys():
    files = {preset.split_file for preset in PRESETS.values()} - {None}
    names = "Caltech101 OxfordPets StanfordCars OxfordFlowers Food101 SUN397 DescribableTextures EuroSAT UCF101"
    assert files == {f"split_zhou_{name}.json" for name in names.split()}
    assert len({preset.folder for preset in PRESETS.values()}) == 11


@pytest.mark.parametrize(
    ("key", "found", "words"),
    [
        ("imagenet", "missile (n04008634)", "missile"),
        ("imagenet", "jack-o'-lantern", "jack-o'-lantern"),
        ("caltech101", "Faces", "face"),
        ("caltech101", "Leopards", "leopard"),
        ("caltech101", "crocodile_head", "crocodile head"),
        ("oxford-pets", "Egyptian_Mau", "egyptian mau"),
        ("oxford-pets", "american_pit_bull_terrier", "american pit bull terrier"),
        ("stanford-cars", "AM General Hummer SUV 2000", "2000 AM General Hummer SUV"),
        ("stanford-cars", "Chevrolet Silverado 1500 Extended Cab 2012", "2012 Chevrolet Silverado 1500 Extended Cab"),
        ("flowers102", "hard-leaved pocket orchid", "hard-leaved pocket orchid"),
        ("food101", "apple_pie", "apple pie"),
        ("fgvc-aircraft", "F-16A/B", "F-16A/B"),
        ("fgvc-aircraft", "DHC-8-100", "DHC-8-100"),
        ("sun397", "/a/airplane_cabin", "airplane cabin"),
        ("sun397", "/a/apartment_building/outdoor", "outdoor apartment building"),
        ("sun397", "outdoor apartment_building", "outdoor apartment building"),
        ("dtd", "polka-dotted", "polka-dotted"),
        ("eurosat", "AnnualCrop", "Annual Crop Land"),
        ("eurosat", "SeaLake", "Sea or Lake"),
        ("eurosat", "Forest", "Forest"),
        ("ucf101", "ApplyEyeMakeup", "Apply Eye Makeup"),
        ("ucf101", "Clean_And_Jerk", "Clean And Jerk"),
        ("ucf101", "YoYo", "Yo Yo"),
    ],
)
def test_names_of_the_sets_read_as_words(key, found, words):
    assert prompt_names([found], key) == (words,)
    assert prompt_names([words], key) == (words,)  # names of the split files are left as they are
    assert clean_class_name(words) == words


def test_other_prompts_leave_names_alone():
    names = ("AnnualCrop", "a_b")
    for templates in ("generic", "a photo of {}.", ["a {}", "the {}"]):
        assert prompt_names(names, templates) == names
