"""Which folders the demo takes for its own."""

import json

import pytest

from fastfsl.cli.demo import DEMO_FILE, _claim
from fastfsl.errors import ConfigError


@pytest.mark.parametrize("content", ['{"complete": false}', '{"comp', "", "[]"])
def test_an_unfinished_demo_is_begun_again(tmp_path, content):
    (tmp_path / DEMO_FILE).write_text(content)
    _claim(tmp_path, force=False)
    assert json.loads((tmp_path / DEMO_FILE).read_text()) == {"complete": False}


def test_a_finished_demo_is_replaced_by_force_alone(tmp_path):
    (tmp_path / DEMO_FILE).write_text('{"complete": true}')
    with pytest.raises(ConfigError, match="--force"):
        _claim(tmp_path, force=False)
    _claim(tmp_path, force=True)


def test_the_users_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "demo"):
        with pytest.raises(ConfigError, match="choose another --out"):
            _claim(out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
