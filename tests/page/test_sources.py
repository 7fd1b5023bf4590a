"""What the page is made of: words, colours, the build. None of it needs a browser, nor Node."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path

import pytest

from flows.alarms import ALARM_KINDS

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "web"
BUILT = ROOT / "gateway" / "page"
STYLE = (WEB / "src" / "style.css").read_text()
WORDS = {name: json.loads((WEB / "src" / "words" / f"{name}.json").read_text()) for name in ("zh", "en")}
COMPRESSED_BYTES_MAX = 1_500_000


# --- the build --------------------------------------------------------------------------------------------------------


def sources(folder: Path = WEB) -> list[Path]:
    """As web/vite.config.mjs lists them."""
    found: list[Path] = []
    for entry in sorted(folder.iterdir(), key=lambda path: path.name):
        if entry.name != "node_modules":
            found += sources(entry) if entry.is_dir() else [entry]
    return found


def test_page_was_built_from_these_sources() -> None:
    lines = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(WEB).as_posix()}\n" for path in sources()
    )
    built_from = (BUILT / "sources.sha256").read_text().strip()
    assert built_from == hashlib.sha256(lines.encode()).hexdigest(), "run `make page`, and commit what it writes"


def test_page_is_small() -> None:
    assert sum(path.stat().st_size for path in BUILT.rglob("*.gz")) < COMPRESSED_BYTES_MAX


def test_lock_file_names_no_server() -> None:
    assert re.findall(r'"resolved"|registry\.', (WEB / "package-lock.json").read_text()) == []


def test_every_library_of_the_page_is_named_with_its_licence() -> None:
    notices = (BUILT / "third-party-notices.txt").read_text()
    wanted = json.loads((WEB / "package.json").read_text())["dependencies"]
    assert wanted
    for name, version in wanted.items():
        assert re.search(rf"^{re.escape(name)} {re.escape(version)}\nLicence: \S", notices, re.MULTILINE), name
    assert "Copyright" in notices


def test_page_ships_with_the_package() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "gateway" in pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    ignored = (ROOT / ".gitignore").read_text().split()
    assert not {"page/", "assets/", "*.gz", "gateway/page/"} & set(ignored), "hatchling leaves out what git ignores"


# --- words ------------------------------------------------------------------------------------------------------------


def placeholders(words: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", words))


def test_every_word_is_there_in_both_languages() -> None:
    assert list(WORDS["zh"]) == list(WORDS["en"])
    assert [key for key in WORDS["zh"] if placeholders(WORDS["zh"][key]) != placeholders(WORDS["en"][key])] == []
    assert [key for language in WORDS.values() for key, words in language.items() if not words.strip()] == []


def test_chinese_words_are_chinese() -> None:
    """But for numbers, units and names that are the same in both."""
    same = {key for key, words in WORDS["zh"].items() if words == WORDS["en"][key]}
    assert all(re.fullmatch(r"[\d.p]+", WORDS["en"][key]) for key in same), same


def test_no_word_is_without_use() -> None:
    source = "".join(path.read_text() for path in (WEB / "src").glob("*.ts"))
    made_at_run_time = (
        "alarm.",
        "category.",
        "outcome.",
        "problem.",
        "reason.",
        "series.",
        "span.",
        "connection.",
        "role.",
        "sex.",
    )
    unused = [
        key
        for key in WORDS["en"]
        if f"'{key}'" not in source
        and not key.startswith(made_at_run_time)
        and not re.search(rf"`{key.rpartition('.')[0]}\.\$\{{", source)
    ]
    assert unused == []


# --- colours ----------------------------------------------------------------------------------------------------------


def tokens(selector: str) -> dict[str, str]:
    block = re.search(re.escape(selector) + r" \{(.*?)\n\}", STYLE, re.DOTALL)
    assert block
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", block[1]))


DARK = tokens(":root")
LIGHT = DARK | tokens(":root[data-theme='light']")


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_computed_as_wcag_does() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


TEXT = [
    *(
        (text, ground)
        for text in ("text", "muted", "link", "bad", "warn", "alert", "exercise")
        for ground in ("page", "panel", "raised")
    ),
    ("accent-text", "accent"),
    ("danger-text", "danger"),
    ("banner-text", "banner"),
    ("text", "mark"),
    ("good", "panel"),
]
SHAPES = [
    *(("control-line", ground) for ground in ("page", "panel", "raised")),
    *((f"series-{number}", "panel") for number in range(1, 7)),
    *((line, ground) for line in ("alert", "exercise", "draft") for ground in ("land", "sea")),
    ("accent", "panel"),
    ("accent", "page"),
]


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_text_can_be_read_and_shapes_can_be_told(theme: str) -> None:
    colours = DARK if theme == "dark" else LIGHT
    weak = {
        f"{front} on {back}": round(contrast(colours[front], colours[back]), 2)
        for pairs, least in ((TEXT, 4.5), (SHAPES, 3.0))
        for front, back in pairs
        if contrast(colours[front], colours[back]) < least
    }
    assert weak == {}


def test_no_colour_stands_outside_of_the_tokens() -> None:
    rules = STYLE[STYLE.index("*,\n") :]
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b", rules) == []
    assert set(re.findall(r"\brgb\([^)]*\)", rules)) == {"rgb(0 0 0 / 55%)"}


def test_every_kind_of_alarm_has_words_in_both_languages() -> None:
    for words in WORDS.values():
        assert {key.removeprefix("alarm.") for key in words if key.startswith("alarm.")} == set(ALARM_KINDS)
