"""Joins runs into one table with its figures: trials that ran in parallel or on other machines.

python -m experiments.language.join RUN RUN ... --out DIR
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.language.settings import LanguageSettings
from experiments.language.summary import tables
from experiments.lib import cli, units
from experiments.lib.errors import RunError
from experiments.lib.manifest import MANIFEST
from experiments.lib.runs import RunFiles, RunFolder, read_rows
from experiments.lib.units import RESULTS

# These settings may differ between the runs; the trials must.
FREE = {"seeds", "first_seed"} | {
    field.name for field in dataclasses.fields(LanguageSettings) if field.metadata.get("run_only")
}


@dataclasses.dataclass(frozen=True)
class JoinSettings:
    """Which runs to join."""

    runs: tuple[Path, ...] = cli.option(help="folders of finished runs", positional=True)
    out: Path | None = cli.option(None, help="folder of the result (default: one in runs/)")


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Joins runs as a command."""
    settings = cli.parse(
        JoinSettings,
        argv,
        prog="python -m experiments.language.join",
        description="Makes one table and its figures of runs that differ in their seeds.",
    )
    folder, chance = join(settings.runs, settings.out)
    print(tables(folder.rows(), chance))
    for path in sorted(folder.folder.glob("*.png")):
        print(f"figure:  {path}")


def join(runs: Sequence[Path], out: Path | None) -> tuple[RunFolder, float]:
    """Joins finished runs that differ only in their trials.

    The joined run has the first one's settings and data, and as its trials the smallest range that
    holds those of all runs.

    Returns:
        the folder with the results of all runs and their figures, and the chance level in percent.

    Raises:
        RunError: a folder holds no finished run, the runs differ in more than their trials, or
            have a trial in common.
    """
    from experiments.language.figures import draw  # matplotlib takes a second to import

    manifests = [_manifest(run) for run in runs]
    every = [RunFiles(*of).settings(LanguageSettings) for of in zip(runs, manifests, strict=True)]
    first = _fixed(manifests[0])
    trials: dict[str, Path] = {}
    rows: list[list[dict[str, str]]] = []
    for run, manifest in zip(runs, manifests, strict=True):
        fixed = _fixed(manifest)
        other = [name for name in {**first, **fixed} if first.get(name) != fixed.get(name)]
        if other:
            raise RunError(
                f"{run} and {runs[0]} differ in {', '.join(other)}; only runs that are equal but "
                "for --first-seed and --seeds can be joined"
            )
        found = read_rows(run / RESULTS)
        for trial in dict.fromkeys(row["trial"] for row in found):
            if trial in trials:
                raise RunError(f"{trials[trial]} and {run} both have trial {trial}")
            trials[trial] = run
        rows.append(found)
    chance = 100 / every[0].candidates
    start, stop = min(of.trials.start for of in every), max(of.trials.stop for of in every)
    settings = dataclasses.replace(
        every[0], first_seed=start, seeds=stop - start, out=out, resume=False
    )
    with RunFolder.create(out, settings, experiment="language", tag="joined") as folder:
        for name, sha256 in manifests[0]["data"].items():
            folder.add_data(name, sha256)
        folder.note(runs=[_origin(*of) for of in zip(runs, manifests, every, strict=True)])
        for run, found in zip(runs, rows, strict=True):
            folder.add_rows(found)
            for unit in sorted(units.finished(run, "runs") - folder.units_done):
                folder.mark_done(unit)
        draw(folder, chance)
    return folder, chance


def _manifest(run: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
        experiment, status = manifest["experiment"], manifest["status"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{run} holds no run ({MANIFEST} is missing or damaged)") from None
    if experiment != "language" or "candidates" not in manifest["settings"]:
        raise RunError(f"{run} holds no run of python -m experiments.language")
    if status != "completed":
        raise RunError(f"{run} is {status}; finish it with --resume --out {run}")
    return manifest


def _origin(run: Path, manifest: dict[str, Any], settings: LanguageSettings) -> dict[str, Any]:
    """Returns what tells where results come from, without any place of this machine."""
    commit = (manifest.get("git") or {}).get("commit")
    return {"folder": run.resolve().name, "commit": commit, "trials": list(settings.trials)}


def _fixed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns what must be the same: the settings and the data."""
    settings = {k: v for k, v in manifest["settings"].items() if k not in FREE}
    return {**settings, "data": manifest["data"]}


if __name__ == "__main__":
    main()
