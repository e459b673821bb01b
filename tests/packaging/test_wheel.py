"""What the wheel holds."""


def test_nothing_but_fastfsl_stands_at_the_top(wheel_files, pyproject):
    # Other projects own the names `kernels` and `export`, and popular libraries probe for them.
    version = pyproject["project"]["version"]
    assert {name.split("/")[0] for name in wheel_files} == {"fastfsl", f"fastfsl-{version}.dist-info"}


def test_every_module_is_in_it(wheel_files, checkout):
    modules = {path.relative_to(checkout).as_posix() for path in (checkout / "fastfsl").rglob("*.py")}
    for folder in ("kernels", "export"):
        modules |= {f"fastfsl/{path.relative_to(checkout).as_posix()}" for path in (checkout / folder).rglob("*.py")}
    assert {name for name in wheel_files if name.endswith(".py")} == modules


def test_the_tiny_clip_and_the_typing_marker_are_in_it(wheel_files, checkout):
    weights = {path.relative_to(checkout).as_posix() for path in (checkout / "fastfsl/demo/tiny_clip").iterdir()}
    assert any(name.endswith(".safetensors") for name in weights)
    assert weights | {"fastfsl/py.typed"} <= wheel_files


def test_licence_and_command_are_in_it(wheel_files, pyproject):
    info = f"fastfsl-{pyproject['project']['version']}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= wheel_files
