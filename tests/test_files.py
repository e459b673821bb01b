import errno

import pytest

from fastfsl.errors import ConfigError
from fastfsl.files import check_output, staged_directory, staged_file

MARKER = "run.json"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(target, text="new", **options):
    with staged_directory(target, marker=MARKER, **options) as staging:
        (staging / MARKER).write_text(text)


def test_folder_appears_complete(tmp_path):
    target = tmp_path / "a" / "run"
    with staged_directory(target, marker=MARKER) as staging:
        (staging / MARKER).write_text("x")
        assert not target.exists()
    assert (target / MARKER).read_text() == "x"
    assert names(target.parent) == ["run"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_block_leaves_the_old_folder(tmp_path, error):
    target = tmp_path / "run"
    write(target, "old")

    def interrupted():
        with staged_directory(target, marker=MARKER, force=True) as staging:
            (staging / MARKER).write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert (target / MARKER).read_text() == "old"
    assert names(tmp_path) == ["run"]


def test_force_replaces_ours_and_only_ours(tmp_path):
    target = tmp_path / "run"
    write(target, "old")
    with pytest.raises(ConfigError, match="--force"):
        write(target)
    write(target, force=True)
    assert (target / MARKER).read_text() == "new"
    assert names(tmp_path) == ["run"]
    (target / MARKER).unlink()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not replaced"):
        write(target, force=True)
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(ConfigError, match="not replaced"):
        write(link, force=True)


def test_a_full_disk_is_a_typed_error(tmp_path):
    def full():
        with staged_directory(tmp_path / "run", marker=MARKER):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigError, match="No space left"):
        full()
    assert names(tmp_path) == []


def test_a_read_error_inside_the_block_is_not_blamed_on_the_output(tmp_path):
    def unreadable():
        with staged_directory(tmp_path / "run", marker=MARKER):
            (tmp_path / "nowhere").read_text()

    with pytest.raises(FileNotFoundError):
        unreadable()


def test_an_output_below_a_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not a writable folder"):
        check_output(tmp_path / "file" / "run", marker=MARKER)


def test_a_name_no_file_system_takes_is_refused_before_the_work(tmp_path):
    with pytest.raises(ConfigError, match="too long"):
        check_output(tmp_path / ("x" * 300), marker=MARKER)


def test_file_appears_complete(tmp_path):
    target = tmp_path / "a" / "x.json"
    with staged_file(target) as staging:
        staging.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["x.json"]


def test_an_interrupted_file_leaves_the_old_one(tmp_path):
    target = tmp_path / "x.json"
    target.write_text("old")

    def interrupted():
        with staged_file(target) as staging:
            staging.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x.json"]
