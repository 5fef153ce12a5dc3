"""Makes a folder of plain text per language of the manual pages that Debian has translated.

    apt-get download manpages-cs manpages-de manpages-fr ...    # as any user; nothing is installed
    python -m experiments.text.manpages FOLDER --out DIR

FOLDER has packages (``*.deb``, unpacked by dpkg-deb) or is a tree such as ``/usr/share/man``. Pages
become ``DIR/<language>/<page>.txt``; those without a language are English. Of the groff source
only the prose is kept: requests are dropped but for headings and words set in bold or italics.
"""

from __future__ import annotations

import dataclasses
import gzip
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from experiments.lib import cli
from experiments.lib.errors import DataError

SHORTEST = 200  # characters of a page; shorter ones only refer to others
_SECTION = re.compile(r"man[1-9]")
_WORDS = re.compile(r'"((?:[^"]|"")*)"|(\S+)')  # the arguments of a request
_HEADINGS = ("SH", "SS")
_SET = ("B", "I", "R", "BI", "BR", "IB", "IR", "RB", "RI", "SM", "SB", "TP", "IP")
_JOINED = ("BI", "BR", "IB", "IR", "RB", "RI")  # their arguments stand without spaces between
_CHARACTERS = {
    "-": "-", "e": "\\", "&": "", "|": "", "^": "", "/": "", ",": "", "%": "", ":": "", "c": "",
    " ": " ", "~": " ", "0": " ", "'": "'", "`": "`", ".": ".",
}  # fmt: skip
_NAMED = {
    "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "Fo": "«", "Fc": "»",
    "em": "—", "en": "–", "hy": "-", "mi": "-", "bu": "•", "co": "©", "rs": "\\", "ti": "~",
    "ha": "^", "ga": "`", "bv": "|", "ss": "ß", "Bq": "„", "bq": "‚", "->": "→", "+-": "±",
}  # fmt: skip
_ESCAPE = re.compile(
    r"\\(?:f(?:\[[^]]*\]|\(..|.)|s[-+]?\d+|\*(?:\[[^]]*\]|\(..|.)|[hvwlLoZ]'[^']*'|\[([^]]*)\]|\((..)|(.))"
)


@dataclasses.dataclass(frozen=True)
class ManpagesSettings:
    """Where the pages are, and where their text goes."""

    source: Path = cli.option(help="folder of packages, or of a tree of pages", positional=True)
    out: Path = cli.option(Path("manpages"), help="folder of the text: a folder per language")


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Makes the folders as a command."""
    settings = cli.parse(
        ManpagesSettings,
        argv,
        prog="python -m experiments.text.manpages",
        description="Makes a folder of plain text per language of Debian's manual pages.",
    )
    for language, (pages, size) in sorted(make(settings.source, settings.out).items()):
        print(f"{language:<8} {pages:>5} pages {size / 1000:>8.0f} kB")


def make(source: Path, out: Path) -> dict[str, tuple[int, int]]:
    """Writes every page's text and returns the number and the bytes of the pages by language.

    Raises:
        DataError: there are no pages, or a package cannot be unpacked.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; give one of manpages-*.deb, or a tree of pages")
    packages = sorted(source.glob("*.deb"))
    found: dict[str, tuple[int, int]] = {}
    for root in tqdm(packages or [source], desc="manpages", disable=None):
        with tempfile.TemporaryDirectory() as scratch:
            tree = _unpacked(root, Path(scratch)) if packages else root
            for language, name, text in pages(tree):
                data = text.encode()
                folder = out / language
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{name}.txt").write_bytes(data)
                count, size = found.get(language, (0, 0))
                found[language] = count + 1, size + len(data)
    if not found:
        raise DataError(
            f"{source}: no manual pages; wanted packages (*.deb) or folders such as de/man1"
        )
    return found


def pages(tree: Path) -> Iterator[tuple[str, str, str]]:
    """Yields language, name and text of every page below a tree such as ``/usr/share/man``."""
    for path in sorted(tree.rglob("*")):
        if not _SECTION.fullmatch(path.parent.name) or path.is_symlink() or not path.is_file():
            continue
        language = path.parent.parent.name
        language = "en" if path.parent.parent in (tree, tree / "usr/share/man") else language
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        text = plain_text(data.decode("utf-8", errors="replace"))
        if len(text) >= SHORTEST:
            yield language, path.name.removesuffix(".gz"), text


def plain_text(source: str) -> str:
    """Returns the prose of a page's groff source: headings, and paragraphs of one line each."""
    paragraphs: list[list[str]] = [[]]
    skipping = ""  # the request that ends what is left out: tables and macros
    for line in source.splitlines():
        if skipping:
            skipping = "" if line.startswith(skipping) else skipping
            continue
        if line.startswith((".", "'")):
            request, _, rest = line[1:].strip().partition(" ")
            if request in ("TS", "de", "ig", "EQ"):
                skipping = {"TS": ".TE", "EQ": ".EN"}.get(request, "..")
                continue
            words = [_unescaped(a.replace('""', '"') or b) for a, b in _WORDS.findall(rest)]
            if request in _HEADINGS:
                paragraphs += [[" ".join(words)], []]
            elif request in ("PP", "P", "LP", "sp"):
                paragraphs.append([])
            elif request == "IP":
                paragraphs.append(words[:1])
            elif request == "TP":
                paragraphs.append([])
            elif request in _SET and words:
                paragraphs[-1].append(("" if request in _JOINED else " ").join(words))
        elif not line.strip():
            paragraphs.append([])
        else:
            paragraphs[-1].append(_unescaped(line))
    lines = (" ".join(" ".join(words).split()) for words in paragraphs)
    return "\n".join(line for line in lines if line) + "\n"


def _unescaped(text: str) -> str:
    text = text.partition('\\"')[0]  # a comment

    def one(found: re.Match[str]) -> str:
        long, short, character = found.groups()
        if character is not None:
            return _CHARACTERS.get(character, "")
        name = long if short is None else short
        if name is None:  # fonts, sizes and registers
            return ""
        if (code := re.fullmatch(r"u([0-9A-F]{4,6})", name)) is not None:
            return chr(int(code[1], 16))
        return _NAMED.get(name, "")

    return _ESCAPE.sub(one, text)


def _unpacked(package: Path, folder: Path) -> Path:
    try:
        done = subprocess.run(
            ["dpkg-deb", "-x", str(package), str(folder)], capture_output=True, text=True
        )
    except FileNotFoundError:
        raise DataError(
            "dpkg-deb is not installed; unpack the packages elsewhere and give the tree of pages"
        ) from None
    if done.returncode:
        raise DataError(f"{package} cannot be unpacked: {done.stderr.strip()}; download it again")
    return folder


if __name__ == "__main__":
    main()
