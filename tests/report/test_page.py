"""The page holds whatever users call their classes and files, and needs nothing but itself."""

import html.parser
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfsl.errors import ConfigError
from fastfsl.report import (
    Figure,
    Gallery,
    Picture,
    Section,
    Series,
    Table,
    confusion_parts,
    flow_map,
    line_chart,
    reliability_figure,
    write_report,
)
from fastfsl.report.page import _page
from fastfsl.report.text import escaped, plain

NAMES = (
    "<script>alert(1)</script>",
    "\"quoted\" 'twice' & </svg></table>",
    "שלום עולם \u202eevil",
    "\U0001f98b\U0001f469\u200d\U0001f52c",
    "nul\x00 bell\x07 half\ud800\nline",
    "n" * 5000,
)


class Strict(html.parser.HTMLParser):
    """Refuses what may not be in a report, and tags that do not close."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "image", "use", "a"}
        for name, value in attrs:
            if tag == "img" and name == "src":  # in the page itself
                assert value.startswith("data:image/jpeg;base64,")
                continue
            assert not name.startswith("on")
            assert name not in {"src", "href", "xlink:href", "srcset", "action"}
            assert "url(" not in (value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parts(names, seed=0):
    rng = np.random.default_rng(seed)
    size = len(names)
    labels = np.arange(6 * size) % size
    probabilities = rng.dirichlet(np.ones(size), len(labels))
    features = rng.normal(size=(3, len(labels), 7))
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    return [
        *confusion_parts(labels, probabilities.argmax(axis=1), names),
        reliability_figure(probabilities, labels),
        flow_map(list(features), labels, features[0, :size], names),
        Figure(
            line_chart(names, [Series(name, tuple(rng.random(size))) for name in names], x_label=names[0], y_label=""),
            names[0],
            names[1 % size],
            Table(("", names[0]), [(name, 1.0) for name in names]),
        ),
        names[0],
    ]


def check(page: str) -> Strict:
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert "url(" not in page
    assert "@import" not in page
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")
    return parser


def test_hostile_names_stay_text(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, NAMES[0], [Section(NAMES[1], parts(NAMES)), Section("empty", [])], footer=NAMES[4])
    page = path.read_bytes().decode()
    words = "".join(check(page).words)
    assert "<script>alert(1)</script>" in words
    assert "שלום עולם \ufffdevil" in words
    assert NAMES[3] in words
    assert "nul\ufffd bell\ufffd half\ufffd line" in words
    assert "n" * 301 not in words
    assert "empty" not in words
    assert path.stat().st_size < 5e6


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4))
def test_any_name_is_kept_apart_from_the_markup(names):
    page = _page(names[0], [Section(names[-1], parts(tuple(names)))], names[0])
    page.encode()
    check(page)


@given(st.text())
def test_escaped_text_is_one_line_of_harmless_signs(text):
    shown = escaped(text)
    assert not set("<>\"'\n\r\x00") & set(shown)
    assert len(plain(text)) <= 300


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, "title", [Section("all", parts(NAMES))])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write_report(tmp_path / "b", "title", [Section("all", parts(NAMES, seed=1))])
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_it_is_made_for_phones_print_dark_rooms_and_readers(tmp_path):
    write_report(tmp_path / "a.html", "title", [Section("all", parts(("one", "two")))])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    for words in ("width=device-width", "prefers-color-scheme:dark", "@media print", "default-src 'none'", 'lang="en"'):
        assert words in page
    assert page.count("<details>") == 4  # each plot has its figures as a table
    # On a phone each plot is another drawing that fits, in letters of the same size; names leave room for values.
    for where in ("screen", "phone"):
        drawn = re.findall(rf'<div class="{where}"><svg[^>]* viewBox="0 0 (\d+) \d+"', page)
        assert len(drawn) == 4
        assert where == "screen" or all(int(width) <= 343 for width in drawn)
    narrow = page[page.index("(max-width:44rem)") :]
    assert ".phone{display:block}.screen{display:none}" in narrow
    assert "min-width:calc(" not in page
    assert "tbody th{overflow-wrap:anywhere" in narrow
    assert 'scope="row"' in page
    assert '<td class="n"><bdi>' in page  # numbers stand right


@pytest.mark.parametrize("size", [2, 5, 12, 30])
def test_no_plot_is_wider_than_a_phone_or_cut_off(size):
    names = tuple(f"a long class name {index}" for index in range(size))
    for part in parts(names):
        if not isinstance(part, Figure):
            continue
        narrow = part.drawing.narrow
        assert narrow is not None
        assert narrow.width <= 343
        for x, anchor, words in re.findall(
            r'<text[^>]* x="(-?[\d.]+)" y="[^"]*" text-anchor="(\w+)">([^<]*)<', narrow.to_svg("d")
        ):
            # Letters of 12 pixels are about 6.2 wide.
            wide = 6.2 * len(words)
            start = float(x) - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
            assert start >= -4, words
            assert start + wide <= narrow.width + 8, words


def test_of_many_classes_the_worst_confusions_are_listed():
    names = tuple(f"class {index}" for index in range(102))
    labels = np.repeat(np.arange(102), 4)
    predicted = labels.copy()
    predicted[:3] = (7, 7, 9)
    predicted[40] = 11
    about, pairs, classes = confusion_parts(labels, predicted, names)
    assert "102 classes" in str(about)
    assert isinstance(pairs, Table)
    assert isinstance(classes, Table)
    assert pairs.rows[0] == ("class 0", "class 7", 2, 4)
    assert len(pairs.rows) == 3
    assert classes.rows[0] == ("class 0", 75.0, 4, "class 7 (2), class 9 (1)")
    assert classes.rows[1] == ("class 10", 25.0, 4, "class 11 (1)")
    assert confusion_parts(labels, labels, names) == ["No sample was taken for another class."]


def test_pictures_are_in_the_page_itself(tmp_path):
    gallery = Gallery([Picture(b"\xff\xd8jpeg", NAMES[0], NAMES[1]), Picture(b"", "gone.png", "a, taken for b")])
    write_report(tmp_path / "a.html", "title", [Section("Mistakes", [gallery])])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    words = "".join(check(page).words)
    assert NAMES[0] not in page
    assert "gone.png" in words
    assert page.count("<img ") == 1
    assert "img-src data:" in page


def _light(colour):
    """Relative luminance of WCAG 2.1, of (3,) from 0 to 1."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def test_every_number_of_a_matrix_stands_out_from_its_cell(tmp_path):
    names = tuple(f"class {index}" for index in range(21))
    taken = [np.where(np.arange(20) < index, index, (index + 1) % 21) for index in range(21)]
    labels, predicted = np.repeat(np.arange(21), 20), np.concatenate(taken)
    write_report(tmp_path / "a.html", "title", [Section("all", confusion_parts(labels, predicted, names))])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    cells = re.findall(r'fill-opacity="([\d.]+)"[^>]*><title>[^<]*</title></rect><text( class="over")?', page)
    shares = {float(share): "over" if over else "ink" for share, over in cells if float(share)}
    assert len(shares) == 20
    for theme in page.split("{color-scheme", 1)[1].split("@media")[:3]:
        colours = {
            name: np.array([int(value[at : at + 2], 16) for at in range(0, 6, 2)]) / 255
            for name, digits in re.findall(r"--(ink|paper|fill|over):#([0-9a-f]+);", theme)
            for value in [digits if len(digits) == 6 else "".join(2 * digit for digit in digits)]
        }
        for share, words in shares.items():
            ground = _light(share * colours["fill"] + (1 - share) * colours["paper"])
            low, high = sorted((ground, _light(colours[words])))
            assert (high + 0.05) / (low + 0.05) >= 3.9, (theme[:40], share)


def test_a_thousand_classes_stay_small(tmp_path):
    names = tuple(f"class {index}" for index in range(1000))
    labels = np.arange(5000) % 1000
    probabilities = np.full((5000, 1000), 1e-3)
    states = [np.eye(1000)[labels][:, :64] + 0.1 for _ in range(11)]
    found = [
        *confusion_parts(labels, (labels * 7) % 1000, names),
        reliability_figure(probabilities, labels),
        flow_map(states, labels, np.eye(1000, 64) + 0.1, names),
    ]
    assert sum(isinstance(part, Figure) for part in found) == 2  # no matrix of a million cells
    write_report(tmp_path / "a.html", "many", [Section("all", found)])
    assert (tmp_path / "a.html").stat().st_size < 5e5


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_report(tmp_path / "file" / "a.html", "title", [])


def test_it_needs_numpy_alone():
    code = "import fastfsl.report, sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"matplotlib", "torch", "scipy", "sklearn", "PIL"} & set(done.stdout.split())
