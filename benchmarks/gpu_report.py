"""The whole first contact with a GPU: builds, tests, sanitizes, measures and draws.

python -m benchmarks.gpu_report --out DIR                    # all parts, about an hour
python -m benchmarks.gpu_report --part build first --out DIR # what says most, in a few minutes
python -m benchmarks.gpu_report --device cpu --smoke         # the same commands on tiny shapes

Every part is a process of its own and ends within eight minutes on 16 cores and one GPU; `first`,
the headlines of every route with their gradients checked, within three. Parts come in the order of
what they are worth. Each writes its tables to the folder, and its output to PART.log;
gpu_report.md says how each part ended, and `predicted` sets the measurements beside what
benchmarks.model predicts. On a GPU `tune` writes the launches that it finds quickest to
csrc/cuda/tuning_table.h, and `build-tuned` builds with them. With --resume measurements of an
earlier run are kept, and only those left out are made.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.lib.cli import check_folder, program
from benchmarks.lib.registry import MODULES
from benchmarks.lib.tables import markdown, read_json
from experiments.lib.cli import main_guard, option, parse
from experiments.synthetic.settings import DEVICES
from metalora._checks import did_you_mean

ROOT = Path(__file__).resolve().parents[1]
BUDGET, LIMIT = 380, 480  # seconds that a part plans for, and after which it is ended
FIRST_BUDGET, FIRST_LIMIT = 140, 180  # of the first measurements
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


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "done", "failed" or "not run"."""

    part: str
    status: str
    seconds: float
    note: str = ""


def parts(device: str, out: Path, *, smoke: bool = False, resume: bool = False) -> list[Part]:
    """All parts, in order."""
    flags = ["--device", device, "--write", str(out)] + ["--smoke"] * smoke
    goals, others = ("autocast", "tf32"), ("bf16", "fp32")
    compiled = ("metalora", "merged", "compiled")
    budget = ["--budget-seconds", str(BUDGET), *(["--resume"] * resume)]

    def layers(
        name: str,
        *cases: str,
        precisions: Sequence[str] = goals,
        baselines: Sequence[str] = ("eager",),
        frozen: bool = False,
    ) -> Part:
        what = ["--cases", *cases, "--precisions", *precisions, "--baselines", *baselines]
        what += ["--name", f"lora_linear_{device}_{name}", *(["--frozen"] * frozen)]
        return Part(name, _module("lora_linear", *what, *budget, *flags))

    first = [
        *("--cases", *FIRST),
        *("--precisions", "autocast"),
        *("--baselines", "merged", "loop"),
    ]
    first += ["metalora", "--name", f"lora_linear_{device}_first"]
    first += ["--budget-seconds", str(FIRST_BUDGET), *(["--resume"] * resume), *flags]
    layer_files = sorted(map(str, out.glob(f"lora_linear_{device}*.json")))
    predicted = ("--cases", "goal", "b", "ragged", FIRST[2], "--precisions", *goals, *others)
    files = sorted(
        str(p) for name in (*MODULES, "steps") for p in out.glob(f"{name}_{device}*.json")
    )
    cases = ("--cases", HEADLINES["a"][0], "c", "--precisions", *goals)
    profiled = (*cases, "--baselines", "metalora", "--profile")
    missing = "" if importlib.util.find_spec("matplotlib") else "matplotlib is not installed"
    building = _python("setup.py", "build_ext", "--inplace")
    built = {"METALORA_BUILD": "none" if smoke else device}
    tuning = ["--budget-seconds", str(BUDGET), *flags]
    if device == "cuda" and not smoke:
        tuning.append("--install")
    return [
        Part("build", building, built),
        Part("first", _module("lora_linear", *first), limit=FIRST_LIMIT),
        _test(device, smoke),
        *(_sanitize(tool, device, "layers", LAYER_TESTS) for tool in TOOLS),
        Part("ceilings", _module("ceilings", *flags)),
        Part(
            "tune",
            _module("tune", *tuning),
            missing=_unless(device == "cuda" or smoke, "there is nothing to tune on a CPU"),
        ),
        Part("build-tuned", building, built),
        *(Part(name, _module(name, *budget, *flags)) for name in MODULES if name != "lora_linear"),
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
        Part("profile", _module("lora_linear", *profiled, *flags)),
        Part(
            "predicted",
            _module("model", *predicted, "--measured", *layer_files),
            missing=_unless(layer_files, "no results"),
        ),
        Part("plot", _module("plot", *files), missing=missing or _unless(files, "no results")),
    ]


def _encoders(name: str, *arguments: str) -> Part:
    """A benchmark that trains encoders of transformers, also through PEFT."""
    absent = [name for name in ("transformers", "peft") if not importlib.util.find_spec(name)]
    missing = f"{' and '.join(absent)} not installed" if absent else ""
    # The versions allocate pieces of unlike sizes, which would fragment the memory.
    memory = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    return Part(name, _module(name, *arguments), memory, missing=missing)


def _test(device: str, smoke: bool) -> Part:
    where = ["tests/test_readme.py"] if smoke else []
    workers = ["-n", "8"] if not smoke and importlib.util.find_spec("xdist") else []
    return Part("test", _python("-m", "pytest", "-q", *where, *workers), tests=True)


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
    return Part(name, [*command, *pytest], caching, tests=True, missing=missing)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _module(name: str, *arguments: str) -> list[str]:
    return _python("-m", f"benchmarks.{name}", *arguments)


def _unless(there: object, missing: str) -> str:
    return "" if there else missing


def run(part: Part, out: Path) -> Outcome:
    """Runs one part with its output in PART.log; ends it and its children at the limit."""
    if part.missing:
        return Outcome(part.name, "not run", 0.0, part.missing)
    start = time.monotonic()
    log = out / f"{part.name}.log"
    with log.open("w", encoding="utf-8") as file:
        file.write(shlex.join(part.command) + "\n")
        file.flush()
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=os.environ | part.environment,
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
    path.write_text(json.dumps(list(known.values()), indent=1) + "\n", encoding="utf-8")
    rows = [[o["part"], o["status"], f"{o['seconds']:.0f}", o["note"]] for o in known.values()]
    text = markdown(["part", "", "seconds", ""], rows) + "\n"
    (out / "gpu_report.md").write_text(text, encoding="utf-8")
    return text


PARTS = tuple(part.name for part in parts("cpu", Path()))


@dataclass(frozen=True)
class Settings:
    """Settings of the report."""

    part: tuple[str, ...] = option(
        ("all",), help=f"the parts to run, or how their names begin: {', '.join(PARTS)}"
    )
    out: Path | None = option(None, help="folder to write (default: benchmarks/results)")
    device: str = option("cuda", choices=DEVICES, help="where to measure")
    smoke: bool = option(False, help="tiny shapes and a few samples")
    resume: bool = option(False, help="keep what was measured before")

    def __post_init__(self) -> None:
        check_folder("out", self.out)
        self.parts()

    def parts(self) -> list[str]:
        """The names of the parts to run, in order."""
        wanted: set[str] = set()
        for word in PARTS if "all" in self.part else self.part:
            found = [word] if word in PARTS else [n for n in PARTS if n.startswith(word)]
            if not found:
                raise ValueError(
                    f"argument --part: there is no {word!r}; there are {', '.join(PARTS)}"
                    f"{did_you_mean(word, PARTS)}"
                )
            wanted.update(found)
        return [name for name in PARTS if name in wanted]


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; 1 if one of them failed, else 0."""
    settings = parse(Settings, argv, prog=program("gpu_report"), description=__doc__ or "")
    out = (settings.out or ROOT / "benchmarks" / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for name in settings.parts():
        # Made anew for every part: the last one draws the files of those before it.
        every = parts(settings.device, out, smoke=settings.smoke, resume=settings.resume)
        part = next(p for p in every if p.name == name)
        print(f"{name} …", flush=True)
        outcomes.append(run(part, out))
        print(f"  {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s {outcomes[-1].note}")
        text = write_summary(outcomes, out)
    print(text)
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    main()
