"""The whole first contact with a GPU: builds, tests, sanitizes, measures and draws.

python -m benchmarks.gpu_report --out DIR                         # what fits into 560 seconds
python -m benchmarks.gpu_report --deadline-seconds 6000 --out DIR # all parts
python -m benchmarks.gpu_report --device cpu --smoke              # the same on tiny shapes

Every part is a process of its own and ends within eight minutes on 16 cores and one GPU, or when
the report's time is up; `test-gpu`, the tests that need a GPU, and `first`, the headlines of every
route with their gradients checked, within three. Parts come in the order of what they are worth,
and none follows a build that failed. Each writes its tables to the folder, and its output to
PART.log; gpu_report.md says how each part ended, and `predicted` sets the measurements beside what
benchmarks.model predicts. Whenever the report is ended, what was there at the end of the last part
is in the folder and in --archive. On a GPU `tune` writes the launches that it finds quickest to
csrc/cuda/tuning_table.h, and `build-tuned` builds with them. With --resume measurements of an
earlier run are kept, and only those left out are made.

The report reads its own arguments, so that it runs without cyclopts, as the build and the tests
that need a GPU do. Packages that other parts need and do not find are named on its first line.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from benchmarks.lib.registry import MODULES
from benchmarks.lib.tables import markdown, read_json, write_json
from metalora._checks import did_you_mean
from metalora._files import replacing

ROOT = Path(__file__).resolve().parents[1]
BUDGET, LIMIT = 380, 480  # seconds that a part plans for, and after which it is ended
FIRST_BUDGET, FIRST_LIMIT = 140, 180  # of the first measurements
GPU_TESTS_LIMIT = 150
DEADLINE = 560.0  # of a first contact in one command of ten minutes
SHORTEST = 15.0  # seconds, in less of which no part gets anywhere
SHOWN_LINES, SHOWN_COLUMNS = 40, 160  # of the log of a part that failed
FOUND_ERRORS = 86  # the sanitizer's exit code, none of pytest's
# Compiling takes a minute or more for every case, so only the headlines are compiled.
HEADLINES = {
    "a": ("a 768→768 L40 T10 r8", "a 768→3072 L40 T10 r8"),
    "c": ("c 512→256 16384 rows/task T4 r1", "c 64→256 131072 rows/task T4 r1"),
}
# A case of each route, and what each was changed for.
FIRST = (
    "a 768→768 L40 T10 r8",
    "c 64→256 131072 rows/task T4 r1",
    "a 768→768 L40 T10 r8 p0.1",
    "b 4096→4096 8k rows T4 r16",
    "a 768→768 T10 r8 Zipf",
)
TOOLS = ("memcheck", "racecheck", "initcheck")
# Every kernel of layers in every dtype, and those of the trainers: as much as a tool that makes all
# launches many times slower gets through in a part.
LAYER_TESTS = ("tests/cuda/test_lora_linear.py", "tests/cuda/test_on_gpu.py", "tests/ops")
TRAINER_TESTS = ("tests/cuda/test_linear_training.py", "tests/cuda/test_shallow_training.py")
# All files with tests that need a GPU, the most telling first.
GPU_TESTS = (
    "tests/cuda/test_on_gpu.py",
    "tests/cuda/test_lora_linear.py",
    "tests/ops/test_dropout.py",
    "tests/nn/test_embedding.py",
    *TRAINER_TESTS,
    "tests/hf/test_packing.py",
    "tests/hf/test_causal.py",
    "tests/benchmarks/test_measure.py",
    "tests/benchmarks/test_lora_linear.py",
    "tests/experiments/test_phase.py",
)
# What parts import beyond torch, by the name of the module; and the wheels to carry for it to
# where nothing can be fetched: those of a package with what it needs and few machines have.
PACKAGES = {
    "pybind11": ("pybind11",),
    "ninja": ("ninja",),
    "setuptools": ("setuptools",),
    "pytest": ("pytest", "iniconfig", "pluggy"),
    "hypothesis": ("hypothesis", "sortedcontainers"),
    "cyclopts": ("cyclopts", "docstring-parser", "rich-rst"),
    "transformers": ("transformers",),
    "peft": ("peft",),
    "matplotlib": ("matplotlib",),
}
# Rounds at the size of the paper's: 10 tasks with 8 turns of 20 candidates.
PAPER = ("--model", "roberta-base-size", "--tasks", "10", "--turns", "8", "--precision", "bf16")


@dataclass(frozen=True)
class Part:
    """One command; with ``tests``, at least one test must pass in it."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    tests: bool = False
    missing: str = ""  # the reason if the part cannot run here
    limit: float = LIMIT  # seconds
    packages: Sequence[str] = ()  # those of PACKAGES that it imports


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "done", "failed" or "not run"; or that it is "running"."""

    part: str
    status: str
    seconds: float
    note: str = ""


def parts(
    device: str,
    out: Path,
    *,
    smoke: bool = False,
    resume: bool = False,
    left: float = float("inf"),
) -> list[Part]:
    """All parts, in order; those that measure plan for the seconds that are left."""
    flags = ["--device", device, "--write", str(out)] + ["--smoke"] * smoke
    goals, others = ("autocast", "tf32"), ("bf16", "fp32")
    compiled = ("metalora", "merged", "compiled")
    planned = _planned(BUDGET, LIMIT, left)
    budget = ["--budget-seconds", planned, *(["--resume"] * resume)]

    def layers(
        name: str,
        *cases: str,
        precisions: Sequence[str] = goals,
        baselines: Sequence[str] = ("eager",),
        frozen: bool = False,
    ) -> Part:
        what = ["--cases", *cases, "--precisions", *precisions, "--baselines", *baselines]
        what += ["--name", f"lora_linear_{device}_{name}", *(["--frozen"] * frozen)]
        return _measured(name, "lora_linear", *what, *budget, *flags)

    first = [
        *("--cases", *FIRST),
        *("--precisions", "autocast"),
        *("--baselines", "merged", "loop"),
    ]
    first += ["metalora", "--name", f"lora_linear_{device}_first"]
    first += ["--budget-seconds", _planned(FIRST_BUDGET, FIRST_LIMIT, left)]
    first += [*(["--resume"] * resume), *flags]
    layer_files = sorted(map(str, out.glob(f"lora_linear_{device}*.json")))
    predicted = ("--cases", "goal", "b", "ragged", FIRST[2], "--precisions", *goals, *others)
    files = sorted(
        str(p) for name in (*MODULES, "steps") for p in out.glob(f"{name}_{device}*.json")
    )
    cases = ("--cases", HEADLINES["a"][0], "c", "--precisions", *goals)
    profiled = (*cases, "--baselines", "metalora", "--profile")
    tuning = ["--budget-seconds", planned, *flags]
    if device == "cuda" and not smoke:
        tuning.append("--install")
    return [
        _build("build", device, smoke),
        _gpu_tests(device),
        Part("first", _module("lora_linear", *first), limit=FIRST_LIMIT, packages=["cyclopts"]),
        *(_sanitize(tool, device, "layers", LAYER_TESTS) for tool in TOOLS),
        _measured("ceilings", "ceilings", *flags),
        Part(
            "tune",
            _module("tune", *tuning),
            missing=_unless(device == "cuda" or smoke, "there is nothing to tune on a CPU"),
            packages=["cyclopts"],
        ),
        _build("build-tuned", device, smoke),
        *(_measured(name, name, *budget, *flags) for name in MODULES if name != "lora_linear"),
        *(_sanitize(tool, device, "trainers", TRAINER_TESTS) for tool in TOOLS),
        _encoders("steps", *budget, *flags),
        _encoders("language", *PAPER, *flags),
        layers("layers-a", "a", baselines=("eager", "metalora-keep")),
        layers("layers-a-other", "a", precisions=others),
        layers("layers-b", "b", precisions=goals + others),
        layers("layers-c", "c", precisions=goals + others, baselines=("eager", "metalora-keep")),
        layers("layers-ragged", "ragged", precisions=goals + others),
        layers("routes", "routes", baselines=("routes",)),
        layers("frozen", "goal", "b", frozen=True),
        *(
            layers(f"compiled-{g}-{p}", *HEADLINES[g], precisions=(p,), baselines=compiled)
            for g in HEADLINES
            for p in goals
        ),
        _measured("profile", "lora_linear", *profiled, *flags),
        Part(
            "predicted",
            _module("model", *predicted, "--measured", *layer_files),
            missing=_unless(layer_files, "no results"),
            packages=["cyclopts"],
        ),
        Part(
            "plot",
            _module("plot", *files),
            missing=_unless(files, "no results"),
            packages=["cyclopts", "matplotlib"],
        ),
        _all_tests(smoke),
    ]


def _planned(budget: int, limit: int, left: float) -> str:
    """The seconds to plan for in a part that is ended when those left are over."""
    return str(int(budget * min(1.0, left / limit)))


def _build(name: str, device: str, smoke: bool) -> Part:
    """Builds for the GPU that is there, and not for the usual two architectures."""
    environment = {"METALORA_BUILD": "none" if smoke else device}
    if device == "cuda":
        environment["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST", "native")
    packages = ["pybind11", "ninja", "setuptools"]
    return Part(name, _python("setup.py", "build_ext", "--inplace"), environment, packages=packages)


def _measured(name: str, module: str, *arguments: str) -> Part:
    return Part(name, _module(module, *arguments), packages=["cyclopts"])


def _encoders(name: str, *arguments: str) -> Part:
    """A benchmark that trains encoders of transformers, also through PEFT."""
    # The versions allocate pieces of unlike sizes, which would fragment the memory.
    memory = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    packages = ["cyclopts", "transformers", "peft"]
    return Part(name, _module(name, *arguments), memory, packages=packages)


def _pytest(name: str, *arguments: str, limit: float = LIMIT) -> Part:
    """Tests; those of packages that are absent cannot be collected, and the others still run."""
    command = _python("-m", "pytest", "--continue-on-collection-errors", *arguments)
    return Part(name, command, tests=True, limit=limit, packages=["pytest", "hypothesis"])


def _gpu_tests(device: str) -> Part:
    part = _pytest("test-gpu", "-m", "gpu", "-v", "--tb=short", *GPU_TESTS, limit=GPU_TESTS_LIMIT)
    return replace(part, missing=_unless(device == "cuda", "these tests need a GPU"))


def _all_tests(smoke: bool) -> Part:
    where = ["tests/test_readme.py"] if smoke else []
    workers = ["-n", "8"] if not smoke and importlib.util.find_spec("xdist") else []
    return _pytest("test", "-q", *where, *workers)


def _sanitize(tool: str, device: str, what: str, tests: Sequence[str]) -> Part:
    """GPU tests under a tool, with an allocation of its own for every tensor."""
    if device == "cpu":
        missing = "there is nothing to sanitize on a CPU"
    else:
        hint = "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
        missing = _unless(shutil.which("compute-sanitizer"), hint)
    # initcheck must also see torch's kernels, since they write what ours read.
    ours = [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=metalora"]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), *ours]
    # A CUDA graph cannot be captured without the caching allocator; large or compiled tests would
    # take the tool too long.
    left_out = "not graph and not inductor and not beyond"
    pytest = _python("-m", "pytest", *tests, "-m", "gpu", "-k", left_out)
    pytest += ["-x", "-q"]
    caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    name = f"sanitize-{what}-{tool}"
    packages = ["pytest", "hypothesis"]
    return Part(name, [*command, *pytest], caching, True, missing, packages=packages)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _module(name: str, *arguments: str) -> list[str]:
    return _python("-m", f"benchmarks.{name}", *arguments)


def _unless(there: object, missing: str) -> str:
    return "" if there else missing


def absent(part: Part) -> list[str]:
    """The packages that the part imports and that are not installed."""
    return [name for name in part.packages if not importlib.util.find_spec(name)]


def missing_packages(every: Sequence[Part]) -> str:
    """One line that names the packages which parts need and do not find, and how to carry them."""
    names = list(dict.fromkeys(name for part in every for name in absent(part)))
    if not names:
        return ""
    wheels = " ".join(wheel for name in names for wheel in PACKAGES[name])
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"not installed: {', '.join(names)}; where nothing can be fetched, carry wheels: "
        f"`pip download --no-deps --only-binary=:all: --python-version {version} -d .whl {wheels}` "
        "elsewhere, then here `pip install --no-index --no-deps --target /tmp/site .whl/*.whl` and "
        "`export PYTHONPATH=/tmp/site`"
    )


def run(part: Part, out: Path) -> Outcome:
    """Runs one part with its output in PART.log; ends it and its children at the limit."""
    missing = part.missing
    if not missing and absent(part):
        missing = f"not installed: {', '.join(absent(part))}"
    if missing:
        return Outcome(part.name, "not run", 0.0, missing)
    start = time.monotonic()
    log = log_of(part.name, out)
    with log.open("w", encoding="utf-8") as file:
        file.write(shlex.join(part.command) + "\n")
        file.flush()
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            # A part that is ended has its output in the log up to there.
            env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(part.limit)
            note = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            note = f"ended after {part.limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    counts = ""
    if part.tests:
        counts, problem = _test_counts(text)
        note = note or problem
    status = "failed" if note else "done"
    note = "; ".join(filter(None, (note, counts)))
    return Outcome(part.name, status, time.monotonic() - start, note)


def log_of(name: str, out: Path) -> Path:
    return out / f"{name}.log"


def last_lines(log: Path) -> str:
    """The end of a log, short enough for a terminal that keeps little."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
    return "\n".join("  | " + line[:SHOWN_COLUMNS] for line in lines)


def _test_counts(text: str) -> tuple[str, str]:
    """pytest's last line, and the problem if no test passed: running nothing is no success."""
    lines = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|skipped)", line)]
    if not lines:
        return "", "pytest counted no tests"
    last = lines[-1].strip("= ")
    return last, "" if re.search(r"[1-9]\d* passed", last) else "no test passed"


def write_summary(outcomes: Sequence[Outcome], out: Path) -> str:
    """Writes gpu_report.json and .md, keeping the outcomes of other parts from earlier calls."""
    path = out / "gpu_report.json"
    before = read_json(path) if path.exists() else []
    known = {one["part"]: one for one in before} | {o.part: asdict(o) for o in outcomes}
    write_json(path, list(known.values()))
    rows = [[o["part"], o["status"], f"{o['seconds']:.0f}", o["note"]] for o in known.values()]
    text = markdown(["part", "", "seconds", ""], rows) + "\n"
    with replacing(out / "gpu_report.md") as file:
        file.write(text.encode())
    return text


def write_archive(path: Path, out: Path) -> None:
    """Replaces the archive, in one step, by one of all files of the folder."""
    files = sorted(p for p in out.iterdir() if p.is_file() and p.resolve() != path.resolve())
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for one in files:
            archive.add(one, one.name)


PARTS = tuple(part.name for part in parts("cpu", Path()))


class Arguments(argparse.ArgumentParser):
    """Arguments whose mistakes are one line, as those of other commands are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The report's arguments, with the names of its parts in order."""
    parser = Arguments(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=98),
    )
    add = parser.add_argument
    about = f"the parts to run, or how their names begin (default: all): {', '.join(PARTS)}"
    add("--part", nargs="+", action="extend", metavar="PART", help=about)
    add("--out", type=Path, help="folder to write (default: benchmarks/results)")
    add("--archive", type=Path, help="a .tgz of that folder, made anew after every part")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="where to measure")
    add("--smoke", action="store_true", help="tiny shapes and a few samples")
    add("--resume", action="store_true", help="keep what was measured before")
    deadline = f"seconds after which all is ended (default: {DEADLINE:.0f})"
    add("--deadline-seconds", type=float, default=DEADLINE, help=deadline)
    given = parser.parse_args(argv)
    wanted: set[str] = set()
    for word in given.part or PARTS:
        found = PARTS if word == "all" else [n for n in PARTS if n == word]
        found = found or [n for n in PARTS if n.startswith(word)]
        if not found:
            parser.error(
                f"argument --part: there is no {word!r}; there are {', '.join(PARTS)}"
                f"{did_you_mean(word, PARTS)}"
            )
        wanted.update(found)
    given.part = [name for name in PARTS if name in wanted]
    if not given.deadline_seconds > 0:
        parser.error(f"argument --deadline-seconds: must be > 0, got {given.deadline_seconds}")
    given.out = (given.out or ROOT / "benchmarks" / "results").resolve()
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {given.out}: {error.strerror}")
    return given


def _ended(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)  # so that the part that runs is ended, too


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the parts; ends with 1 if one of them failed, else with 0."""
    start = time.monotonic()
    given = arguments(argv)
    make = partial(parts, given.device, given.out, smoke=given.smoke, resume=given.resume)
    told = missing_packages([part for part in make() if part.name in given.part])
    if told:
        print(told, flush=True)
    outcomes: list[Outcome] = []
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        text = _run_all(given, make, start, outcomes)
    finally:
        signal.signal(signal.SIGTERM, before)
        if given.archive:  # with the log of a part that was interrupted
            write_archive(given.archive, given.out)
    print(text, flush=True)
    sys.exit(any(outcome.status == "failed" for outcome in outcomes))


def _run_all(
    given: argparse.Namespace,
    make: Callable[..., list[Part]],
    start: float,
    outcomes: list[Outcome],
) -> str:
    """Runs the parts that were asked for, adds how they ended, and returns the summary."""
    stopped = ""
    for name in given.part:
        left = given.deadline_seconds - (time.monotonic() - start)
        # Made anew for every part: the last ones draw the files of those before them.
        part = next(p for p in make(left=left) if p.name == name)
        if not stopped and left < SHORTEST:
            stopped = f"the {given.deadline_seconds:.0f} s were over"
        if stopped:
            outcomes.append(Outcome(name, "not run", 0.0, stopped))
            continue
        print(f"{name} …", flush=True)
        write_summary([*outcomes, Outcome(name, "running", 0.0)], given.out)
        outcome = run(replace(part, limit=min(part.limit, left)), given.out)
        outcomes.append(outcome)
        print(f"  {outcome.status}, {outcome.seconds:.0f} s {outcome.note}", flush=True)
        if outcome.status == "failed":
            print(last_lines(log_of(name, given.out)), flush=True)
            stopped = f"{name} failed" if name.startswith("build") else ""
        write_summary(outcomes, given.out)
        if given.archive:
            write_archive(given.archive, given.out)
    return write_summary(outcomes, given.out)


if __name__ == "__main__":
    main()
