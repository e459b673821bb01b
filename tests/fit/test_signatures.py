"""Options of methods as read from the sources: those of the classes themselves."""

import inspect
import subprocess
import sys
from typing import get_type_hints

import pytest

from fastfsl.fit.methods import _READOUT, METHODS, RESERVED, SOURCES
from fastfsl.fit.signatures import read_options

EVERY = {method.name: method for method in (*METHODS.values(), *SOURCES.values(), _READOUT)}


@pytest.mark.parametrize("name", EVERY)
def test_options_read_from_the_source_are_those_of_the_class(name):
    cls = EVERY[name].implementation
    hints = get_type_hints(cls.__init__)
    others = (*RESERVED, "class_embeddings")
    expected = {option: hints[option] for option in inspect.signature(cls).parameters if option not in others}
    read = read_options(EVERY[name].path, others)
    # None would do as well, by an import; but then a wrong option is told seconds later.
    assert read == expected
    assert list(read) == list(expected)


@pytest.mark.parametrize("path", ["fastfsl.nowhere:A", "fastfsl.heads:Nowhere", "fastfsl.fit.methods:METHODS"])
def test_what_cannot_be_read_is_left_to_an_import(path):
    assert read_options(path) is None


def test_a_configuration_is_resolved_without_torch():
    code = (
        "import sys; from fastfsl.fit.config import load_config; "
        "load_config(flags={'method': 'mps+fma', 'fma': {'num_blocks': 3}}); "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "sklearn", "scipy", "open_clip"} & set(done.stdout.split())
