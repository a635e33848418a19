"""README and docs/ as tests read them: their code blocks, commands, links and sentences."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# The pages that people write. The others in docs/ are generated.
WRITTEN = (
    README,
    *(
        DOCS / f"{name}.md"
        for name in (
            "index",
            "schemes",
            "recipes",
            "calibrate",
            "export",
            "evaluate",
            "sensitivity",
            "files",
            "kernels",
        )
    ),
)


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block.

    path: of the document.
    line: number of its first line.
    language: the word after the fence, or "".
    text: what is between the fences.
    """

    path: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def code_blocks(path: Path) -> list[CodeBlock]:
    text = path.read_text(encoding="utf-8")
    return [
        CodeBlock(path, text.count("\n", 0, found.start()) + 2, found[1], found[2])
        for found in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def commands(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each command: lines with `$` in transcripts, all lines in shell blocks."""
    for block in code_blocks(path):
        for line in block.text.splitlines():
            if block.language == "console" and line.startswith("$ "):
                yield block.where, line[2:].partition("  #")[0]
            elif block.language == "sh" and line.strip():
                yield block.where, line.partition("  #")[0]


def links(path: Path) -> list[str]:
    """The targets of links and images, without those of other sites."""
    text = _without_code(path.read_text(encoding="utf-8"))
    return [each for each in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in each]


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", _without_code(path.read_text(encoding="utf-8")), re.M)
    return {
        re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")
        for heading in headings
    }


def sentences(path: Path) -> Iterator[str]:
    """The sentences of the prose: of paragraphs, list items and table cells. Code in a line counts
    as one word.
    """
    text = re.sub(r"<!--.*?-->", "", _without_code(path.read_text(encoding="utf-8")), flags=re.S)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for paragraph in _paragraphs(text):
        for sentence in re.split(r"(?<=[.!?])[*_]*\s+", paragraph):
            if re.search(r"\w", sentence):
                yield sentence.strip()


def word_count(sentence: str) -> int:
    return len(re.findall(r"[^\W_][\w'’.,%+−-]*", sentence))


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs, list items and table cells, each in one line."""
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        begins = re.match(r"\s*(?:[-*]|\d+\.)\s+|\||#", line)
        if lines and (begins or not line.strip()):
            yield " ".join(lines)
            lines = []
        if line.startswith("|"):
            yield from (cell.strip() for cell in line.strip("|").split("|"))
        elif line.strip() and not line.startswith("#"):
            lines.append(re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "", line).strip())


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
