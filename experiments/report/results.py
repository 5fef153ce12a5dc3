"""Committed results: what is kept of a run, and how it is read again."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.lib import units
from experiments.lib.errors import RunError
from experiments.lib.experiment import Experiment
from experiments.lib.manifest import MANIFEST, RETRAINED_MODEL
from experiments.lib.runs import RunFiles
from experiments.lib.units import RESULTS
from experiments.report.registry import experiment
from metalora._checks import first_of
from metalora._files import replacing
from metalora.meta.identity import differences

FOLDER = Path(__file__).resolve().parents[1] / "results"
COMPLETED, INTERIM = "completed", "interim"
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_PATH = re.compile(r"(^|[\s\"'=(])(/|~/|[A-Za-z]:\\)\w")  # an absolute one, anywhere in a text
_TRIALS = ("seeds", "first_seed")  # settings
_OF_A_RUN = {"notes": "processes", "data": RETRAINED_MODEL}  # entries that begin so
_SETTINGS_OF_THE_PLACE = ("--out", "--resume", "--device", "--download")


def load(name: str, folder: Path | None = None) -> RunFiles:
    """Opens committed results.

    Args:
        name: of the folder in experiments/results.
        folder: another place that holds them.

    Raises:
        RunError: they are missing or damaged.
    """
    path = (folder or FOLDER) / name
    manifest = _manifest(path)
    if not (path / RESULTS).is_file():
        raise RunError(f"{path} holds no {RESULTS}; add the run again")
    return RunFiles(path, manifest)


def add(run: Path, name: str, folder: Path | None = None) -> Path:
    """Keeps a run's numbers as committed results; those of the same name are replaced.

    A run that is not completed is kept as far as its units are finished, and marked as interim.

    Returns:
        The folder of the results.

    Raises:
        RunError: there is no run in the folder, it failed, has no finished unit, or its manifest
            names a place on this machine; or another experiment's results have this name.
    """
    out, of, kept, rows = _read(run, name, folder, "--add")
    files = [run / file for file in (of.report.files if of.report else ())]
    for path in files:
        if not path.is_file():
            raise RunError(f"--add: {path} is missing, which the figures of {of.name} need")
    for path in files:
        (out / path.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / path.name)
    return _write(out, kept, rows)


def add_trials(run: Path, name: str, folder: Path | None = None) -> Path:
    """Adds a run's trials to committed results, such as those that another machine made.

    Args:
        run: its folder. It is completed, its trials follow those of the results (--first-seed), and
            its code, data and other settings are the same. Its other files, such as samples of
            text, are not kept.
        name, folder: see `load`.

    Returns:
        The folder of the results.

    Raises:
        RunError: as for `add`; the results are interim; or the run differs in more than its trials.
    """
    flag = "--add-trials"
    kept = load(name, folder).manifest
    out, of, more, rows = _read(run, name, folder, flag)
    for what, manifest in ((f"the run of {name}", kept), (f"the run in {run}", more)):
        if manifest["status"] != COMPLETED:
            raise RunError(f"{flag}: {what} is not completed; finish it first")
        several = "resumed_at" in manifest
        if not manifest["commit"] or manifest["uncommitted_changes"] or several:
            raise RunError(f"{flag}: {what} is not of one commit, so no other has the same code")
    ours, others = ({k: m["settings"].pop(k, None) for k in _TRIALS} for m in (kept, more))
    if None in ours.values() or None in others.values():
        raise RunError(f"{flag}: {of.name} has no --first-seed; make all trials in one run")
    follows = ours["first_seed"] + ours["seeds"]
    if others["first_seed"] != follows:
        raise RunError(
            f"{flag}: the first trial of {run} is {others['first_seed']}, but {follows} follows "
            f"those of {name}; make more with --first-seed {follows}"
        )
    # A commit has the same settings in both; `_trimmed` may have left out others at another time.
    more["settings"] = {k: v for k, v in more["settings"].items() if k in kept["settings"]}
    for key in ("commit", "versions", "settings", "notes", "data"):
        here, there = (_of_all_trials(key, manifest[key]) for manifest in (kept, more))
        found = list(differences(key, here, there, here=f"in {run}"))
        if found:
            raise RunError(f"{flag}: in {name} {first_of(found, 3)}")
    before = (out / RESULTS).read_bytes()
    header, _, lines = rows.partition(b"\n")
    if before.partition(b"\n")[0] != header:
        raise RunError(f"{flag}: {run / RESULTS} has other columns than {name}")
    for where, content, own in ((name, before, ours), (run / RESULTS, rows, others)):
        wanted = {str(own["first_seed"] + i) for i in range(own["seeds"])}
        trials = {row["trial"] for row in csv.DictReader(io.StringIO(content.decode()))}
        if trials != wanted:
            shown = ", ".join(sorted(trials))
            raise RunError(f"{flag}: {where} has other trials than its settings say: {shown}")
    seeds = ours["seeds"] + others["seeds"]
    kept |= {
        "finished_units": kept["finished_units"] + more["finished_units"],
        "command": _with_seeds(kept["command"], seeds),
        "settings": kept["settings"] | ours | {"seeds": seeds},
        "data": more["data"] | kept["data"],
        "added": [
            *kept.get("added", []),
            others | {key: more[key] for key in ("machine", "started", "wall_seconds")},
        ],
    }
    return _write(out, kept, before + lines)


def _of_all_trials(key: str, values: Any) -> Any:
    """Returns what must be the same of an entry of the manifest, whatever the trials."""
    own = _OF_A_RUN.get(key)
    return {k: v for k, v in values.items() if not k.startswith(own)} if own else values


def _with_seeds(shown: str, seeds: int) -> str:
    """Returns a command with another number of trials."""
    words = shlex.split(shown)
    for place, word in enumerate(words):
        if word.partition("=")[0] == "--seeds":
            del words[place : place + (1 if "=" in word else 2)]
            break
    return shlex.join([*words, "--seeds", str(seeds)])


def _read(
    run: Path, name: str, folder: Path | None, flag: str
) -> tuple[Path, Experiment[Any], dict[str, Any], bytes]:
    """Returns where a run is kept, its experiment, what is kept of its manifest, and its rows."""
    if not _NAME.fullmatch(name):
        raise RunError(f"{flag}: a name has small letters, digits and hyphens, got {name!r}")
    manifest = _manifest(run)
    of = experiment(manifest["experiment"])
    out = (folder or FOLDER) / name
    if (out / MANIFEST).exists() and _manifest(out)["experiment"] != of.name:
        raise RunError(f"{flag}: {out} holds results of another experiment; choose another name")
    if manifest["status"] == "failed":
        reason = manifest.get("reason", "see error.txt")
        raise RunError(f"{flag}: the run in {run} failed: {reason}")
    if manifest["settings"].get("smoke"):
        raise RunError(f"{flag}: the run in {run} is a smoke run, whose numbers say nothing")
    count, rows = _finished(run)
    _check_rows(rows, run, flag)
    return out, of, _trimmed(manifest, of, count, flag), rows


def _write(out: Path, kept: Mapping[str, Any], rows: bytes) -> Path:
    with replacing(out / RESULTS) as file:
        file.write(rows)
    with replacing(out / MANIFEST) as file:
        file.write((json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode())
    return out


def compare(run: Path, name: str, folder: Path | None = None) -> tuple[list[str], bool]:
    """Holds the numbers of a run that repeats committed results to these, row by row.

    The run may have made a part of the trials or methods only; what it lacks is counted.

    Args:
        run: its folder; a run that is not completed is compared as far as its units are finished.
        name, folder: see `load`.

    Returns:
        A line for each metric and for each setting that differs, and whether all rows that both
        have show the same digits.

    Raises:
        RunError: one of them is missing or damaged, they are of different experiments, or they have
            no metric or no row in common.
    """
    kept, manifest = load(name, folder), _manifest(run)
    if manifest["experiment"] != kept.manifest["experiment"]:
        raise RunError(
            f"--compare: {run} is a run of {manifest['experiment']}, {name} of "
            f"{kept.manifest['experiment']}"
        )
    here = _values(csv.DictReader(io.StringIO(_finished(run)[1].decode())))
    there = _values(kept.rows())
    if not here.keys() & there.keys():
        raise RunError(f"--compare: {run} and {name} have no row in common")
    lines = []
    settings = kept.manifest["settings"]
    for key in sorted(settings.keys() & manifest["settings"].keys()):
        values = [json.dumps(of[key]) for of in (manifest["settings"], settings)]
        if values[0] != values[1] and not any(_PATH.search(value) for value in values):
            lines.append(f"setting {key}: {values[0]} in the run, {values[1]} in {name}")
    data = [of.get("data", {}) for of in (kept.manifest, manifest)]
    lines += [f"other {line}" for line in differences("data", data[0], data[1], here="in the run")]
    equal = True
    for metric in dict.fromkeys(metric for metric, *_ in here):
        common = [row for row in here if row[0] == metric and row in there]
        alike = sum(here[row] == there[row] for row in common)
        new = sum(row[0] == metric for row in here) - len(common)
        text = f"{metric}: {alike} of {len(common)} rows have the same digits"
        if alike < len(common):
            largest = max(abs(float(here[row]) - float(there[row])) for row in common)
            text += f", the largest difference is {largest:.3g}"
        if new:
            text += f"; {new} are not in {name}"
        lines.append(text)
        equal = equal and alike == len(common)
    left = len(there.keys() - here.keys())
    if left:
        lines.append(f"{left} of the {len(there)} rows of {name} are not in the run")
    return lines, equal


def _values(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, ...], str]:
    """Returns the value of each row by its metric and all other columns; {} without a metric."""
    found = {}
    for row in rows:
        if "metric" in row:
            others = [
                f"{key}={text}" for key, text in row.items() if key not in ("metric", "value")
            ]
            found[(row["metric"], *others)] = row["value"]
    return found


def command(argv: list[str]) -> str:
    """Returns a manifest's command as one types it in a clone, without this machine's places."""
    program, *given = argv[1:]
    module = program.removesuffix(".py").removesuffix("/__main__")
    place = module.rfind("experiments/")
    words = ["python", "-m", module[max(place, 0) :].replace("/", ".")]
    skip = False
    for word in given:
        flag = word.partition("=")[0]
        if word.startswith("--"):
            skip = flag in _SETTINGS_OF_THE_PLACE
            if not skip:
                words.append(f"{flag}=DIR" if _is_path(word.partition("=")[2]) else word)
        elif not skip:
            words.append("DIR" if _is_path(word) else word)
    return shlex.join(words)


def machine(found: Mapping[str, Any]) -> str:
    """Returns a manifest's machine in words."""
    threads, cores = found["threads"], found["cores"]
    words = [*found["gpus"], found["cpu"]]
    words.append(f"{threads} of {cores} cores" if threads < cores else f"{cores} cores")
    if found.get("memory_gib"):
        words.append(f"{found['memory_gib']:.0f} GiB")
    return ", ".join(words)


def _trimmed(
    manifest: dict[str, Any], of: Experiment[Any], count: int, flag: str
) -> dict[str, Any]:
    """Returns what a reader needs of a manifest, and nothing of this machine's folders."""
    local = {f.name for f in dataclasses.fields(of.settings) if f.metadata.get("run_only")}
    paths = {f.name for f in dataclasses.fields(of.settings) if "Path" in str(f.type)}
    settings = {
        key: Path(value).name
        if isinstance(value, str) and (key in paths or _is_path(value))
        else value
        for key, value in manifest["settings"].items()
        if key not in local
    }
    # A run that was resumed with more is repeated by the command that asked for all of it.
    asked = [manifest, *manifest.get("extended", [])][-1]["command"]
    git = manifest.get("git") or {}
    kept = {
        "experiment": of.name,
        "status": manifest["status"] if manifest["status"] == COMPLETED else INTERIM,
        "finished_units": count,
        "command": command(asked),
        "commit": git.get("commit"),
        "uncommitted_changes": git.get("changed"),
        "machine": machine(manifest["machine"]),
        "started": manifest["started"],
        "resumed": len(manifest.get("resumed", [])),
        "wall_seconds": manifest.get("wall_seconds"),
        "versions": {k: v for k, v in manifest["versions"].items() if k != "native"},
        "settings": settings,
        "data": manifest["data"],
        "notes": manifest.get("notes", {}),
    }
    if elsewhere := _elsewhere(manifest):
        kept["resumed_at"] = elsewhere
    for key, value in kept.items():
        if _PATH.search(json.dumps(value, ensure_ascii=False)):
            raise RunError(
                f"{flag}: the manifest's {key!r} names a place on this machine: {value!r}; "
                "take it out of the run's manifest.json"
            )
    return kept


def _elsewhere(manifest: Mapping[str, Any]) -> list[str]:
    """Returns the other commits, or states of a checkout, at which a run was resumed."""
    states = [one.get("git") for one in manifest.get("resumed", []) if isinstance(one, dict)]
    named = [_named(git or {}) for git in [manifest.get("git"), *states]]
    return [name for name in dict.fromkeys(named) if name != named[0]]


def _named(git: Mapping[str, Any]) -> str:
    if not git.get("commit"):
        return "an unknown commit"
    return f"{git['commit']}{' with changes' if git.get('changed') else ''}"


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../")) or ("/" in text and Path(text).exists())


def _finished(run: Path) -> tuple[int, bytes]:
    try:
        count, rows = units.finished_results(run)
    except FileNotFoundError as error:
        raise RunError(f"{error.filename} is missing") from None
    if not rows:
        raise RunError(f"the run in {run} has no finished unit yet")
    return count, rows


def _check_rows(rows: bytes, run: Path, flag: str) -> None:
    header, *lines = csv.reader(io.StringIO(rows.decode(errors="replace")))
    wrong = next((n for n, line in enumerate(lines, 2) if len(line) != len(header)), None)
    if wrong is not None or not lines:
        raise RunError(
            f"{flag}: line {wrong or 2} of {run / RESULTS} must have {len(header)} values"
        )


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        right = isinstance(manifest["experiment"], str) and isinstance(manifest["status"], str)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        right = False
    if not right:
        raise RunError(f"{path} holds no run ({MANIFEST} is missing or damaged)")
    return dict(manifest)
