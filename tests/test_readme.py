"""The README: its messages are the code's, its Chinese version has the same commands."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("README.md", "README.zh.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """Every fenced block with its language, in order."""
    return re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)


def messages_of_the_code() -> str:
    """Every text in the code, one a line; what is filled in is `…`."""
    texts = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "smolkit").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(getattr(part, "value", "") if type(part) is ast.Constant else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_messages_are_those_of_the_code() -> None:
    section = read("README.md").split("\n## Troubleshooting by error message\n")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)
    assert 10 <= len(messages) <= 20
    known = messages_of_the_code()
    for message in messages:
        for piece in filter(None, (piece.strip(" ;:()") for piece in message.split("…"))):
            assert piece in known, f"{message!r}: nothing says {piece!r}"


def test_both_languages_have_the_same_blocks() -> None:
    """Commands and code are the same to the byte, in the same order."""
    english, chinese = (blocks(read(name)) for name in LANGUAGES)
    assert len(english) > 30
    assert chinese == english


def test_both_languages_have_the_same_parts() -> None:
    """As many headings of each level and as many table rows, and each names the other at its top."""
    for pattern in (r"^(#+) ", r"^(\|)", r"^( *- )"):
        english, chinese = (
            re.findall(pattern, re.sub(r"^```.*?^```$", "", read(name), flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
            for name in LANGUAGES
        )
        assert english == chinese, pattern
    assert "(README.zh.md)" in read("README.md")[:200] and "(README.md)" in read("README.zh.md")[:200]


@pytest.mark.parametrize("name", [*LANGUAGES, "CONTRIBUTING.md", "CHANGELOG.md", "docs/comparison.md"])
def test_links_lead_somewhere(name: str) -> None:
    """To files that are there, and to headings of the same file."""
    text = read(name)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / name).parent.joinpath(path).exists(), target
        if anchor:
            page = text if not path else (ROOT / name).parent.joinpath(path).read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target
