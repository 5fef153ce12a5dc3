"""README.md and the pages of docs/: the parts between markers are written from the results."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from experiments.lib.errors import RunError
from experiments.lib.manifest import MANIFEST
from experiments.lib.runs import RunFiles
from experiments.lib.tables import Table
from experiments.report import results
from experiments.report.registry import experiment
from metalora._checks import did_you_mean

ROOT = Path(__file__).resolve().parents[2]
FIGURES = Path("docs") / "figures"
BENCHMARKS = "benchmarks"
_MARKED = re.compile(
    r"<!-- (?P<kind>table|figure) (?P<what>[^\n]*?) -->\n(?P<body>.*?)<!-- end -->",
    re.DOTALL,
)
_OPEN = re.compile(r"^<!-- (?:table|figure) ", re.MULTILINE)
_COMMAND_WIDTH = 96
_HASH = re.compile("^[0-9a-f]{8,}")
_DIGEST = "Numbers"  # the key of a PNG's text that says what it was drawn from


class Report:
    """One pass over all pages; a context manager, since figures are drawn in a temporary folder.

    Attributes:
        missing: the results that pages name and that are not there yet.
    """

    def __init__(self, root: Path, *, redraw: bool = False):
        self.root = root
        self.missing: list[str] = []
        self._redraw = redraw
        self._results = root / results.FOLDER.relative_to(ROOT)
        self._scratch = tempfile.TemporaryDirectory()
        self._tables: dict[str, Mapping[str, Table]] = {}
        self._drawn: dict[str, dict[str, Path]] = {}
        self._commands: set[tuple[Path, str]] = set()

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._scratch.cleanup()

    def run(self, *, write: bool) -> list[str]:
        """Compares every page and figure with the results, and brings them up to date.

        Args:
            write: without it nothing is changed.

        Returns:
            A line for everything that differs or, with ``write``, that was written.

        Raises:
            RunError: a page names something that does not exist, or results are damaged.
        """
        found: list[str] = []
        for page in [self.root / "README.md", *sorted((self.root / "docs").rglob("*.md"))]:
            text = page.read_text(encoding="utf-8")
            parts: list[str] = []
            at, differing = 0, []
            for marked in _MARKED.finditer(text):
                body = self._body(page, marked["kind"], marked["what"], found, write)
                if body != marked["body"]:
                    differing.append(f"{marked['kind']} {marked['what'].partition('|')[0].strip()}")
                parts += [text[at : marked.start("body")], body]
                at = marked.end("body")
            if len(parts) != 2 * len(_OPEN.findall(text)):
                raise RunError(f"{self._name(page)}: a marker has no <!-- end --> before the next")
            if differing and write:
                page.write_text("".join(parts) + text[at:], encoding="utf-8")
            told = "wrote" if write else "differs from the results:"
            found += [f"{self._name(page)}: {told} {what}" for what in differing]
        return found

    def _body(self, page: Path, kind: str, what: str, found: list[str], write: bool) -> str:
        names, _, alt = what.partition("|")
        name, *part = names.split()
        if len(part) > 1 or (kind == "figure" and not (part and alt.strip())):
            wanted = "NAME [TABLE]" if kind == "table" else "NAME FIGURE | what it shows"
            raise RunError(f"{self._name(page)}: a {kind} is {wanted}, got {what!r}")
        if name != BENCHMARKS and not (self._results / name).is_dir():
            if name not in self.missing:
                self.missing.append(name)
            return f"\n*Not measured yet: no run has been committed as `{name}`.*\n\n"
        try:
            if kind == "table":
                return self._table(page, name, *part)
            path = self._figure(name, part[0], found, write)
        except RunError as error:
            raise RunError(f"{self._name(page)}, {kind} {names.strip()}: {error}") from None
        return f"\n![{alt.strip()}]({_link(path, page)})\n\n"

    def _table(self, page: Path, name: str, part: str = "") -> str:
        if name == BENCHMARKS:
            from benchmarks.lib.report import tables  # not installed, as the pages are not

            table = _chosen(tables(), part, "table")
            return f"\n{table.markdown()}\n\n{table.caption}\n\n"
        run = results.load(name, self._results)
        if name not in self._tables:
            self._tables[name] = _report(run).tables(run)
        table = _chosen(self._tables[name], part, "table")
        lines = [table.markdown(), "", " ".join(filter(None, [table.caption, _status(run)]))]
        rows = _link(run.folder, page)
        parts = [run.manifest, *run.manifest.get("added", [])]  # with those of other machines
        machines = " and ".join(dict.fromkeys(part["machine"] for part in parts))
        dates = " and ".join(dict.fromkeys(part["started"][:10] for part in parts))
        seconds = sum(part.get("wall_seconds") or 0 for part in parts)
        facts = [fact for fact in (_duration(seconds), dates, _commit(run)) if fact]
        if page.parent == self.root:  # short, for the front page
            lines[-1] += f" ([rows and command]({rows}))"
        else:
            lines[-1] += f" {'; '.join([machines, *facts])}; [rows]({rows})."
            if (page, name) not in self._commands:  # once for each run
                self._commands.add((page, name))
                lines += ["", _shown(run.manifest["command"])]
        return "\n" + "\n".join(lines) + "\n\n"

    def _figure(self, name: str, part: str, found: list[str], write: bool) -> Path:
        if name == BENCHMARKS:
            from benchmarks.lib import report

            path = self.root / "docs" / f"{part}.png"
            numbers = [report.numbers_of(part)]
        else:
            run = results.load(name, self._results)
            path = self.root / FIGURES / name / f"{part}.png"
            numbers = [file for file in run.folder.iterdir() if file.name != MANIFEST]
        wanted = _digest(numbers)
        if path.is_file() and _drawn_from(path) == wanted and not self._redraw:
            return path
        state = "drawn"
        if write:
            drawn = self._draw_benchmark(part) if name == BENCHMARKS else self._draw(run, part)
            path.parent.mkdir(parents=True, exist_ok=True)
            _copy_with_digest(drawn, path, wanted)
        else:
            state = "is of other numbers than the results" if path.is_file() else "is missing"
        line = f"{self._name(path)}: {state}"
        if line not in found:
            found.append(line)
        return path

    def _draw(self, run: RunFiles, part: str) -> Path:
        name = run.folder.name
        if name not in self._drawn:
            copy = Path(self._scratch.name) / name
            shutil.copytree(run.folder, copy)
            drawn = _report(run).figures(RunFiles(copy, run.manifest))
            self._drawn[name] = {figure.stem: figure for figure in drawn}
        path: Path = _chosen(self._drawn[name], part, "figure")
        return path

    def _draw_benchmark(self, part: str) -> Path:
        from benchmarks.lib.report import draw_figure

        folder = Path(self._scratch.name) / BENCHMARKS
        folder.mkdir(exist_ok=True)
        return draw_figure(part, folder)

    def _name(self, page: Path) -> str:
        return str(page.relative_to(self.root))


def _report(run: RunFiles) -> Any:
    return experiment(run.manifest["experiment"]).report


def _chosen(found: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in found:
        names = ", ".join(repr(n) for n in found)
        hint = did_you_mean(name, list(found))
        raise RunError(f"there is no {kind} {name!r}{hint}; there are {names}")
    return found[name]


def _link(path: Path, page: Path) -> str:
    """Returns a path as a page in the same clone links to it."""
    shared = Path(*_common(path.parts, page.parent.parts))
    up = len(page.parent.parts) - len(shared.parts)
    return "/".join([".."] * up + list(path.relative_to(shared).parts))


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return a[:same]


def _status(run: RunFiles) -> str:
    if run.manifest["status"] == results.COMPLETED:
        return ""
    units = run.manifest["finished_units"]
    return f"**Interim:** the run goes on; finished units of work so far: {units}."


def _duration(seconds: float) -> str:
    if not seconds:
        return ""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _commit(run: RunFiles) -> str:
    commit = run.manifest.get("commit")
    if not commit:
        return ""
    changed = " with changes" if run.manifest.get("uncommitted_changes") else ""
    states = run.manifest.get("resumed_at", [])
    at = "".join(f", resumed at {_HASH.sub(lambda found: found[0][:7], of)}" for of in states)
    return f"commit {commit[:7]}{changed}{at}"


def _shown(command: str) -> str:
    """Returns a command as a block of code, broken into lines that fit a page."""
    lines, line = [], ""
    for word in shlex.split(command):
        word = shlex.quote(word)
        if line and len(line) + 1 + len(word) > _COMMAND_WIDTH:
            lines.append(line + " \\")
            line = "    " + word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join("    " + each for each in [*lines, line])


def _digest(numbers: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(numbers):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _drawn_from(path: Path) -> str | None:
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(_DIGEST)


def _copy_with_digest(source: Path, path: Path, digest: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_DIGEST, digest)
    with Image.open(source) as image:
        image.save(path, pnginfo=info, dpi=image.info.get("dpi"), optimize=True)
