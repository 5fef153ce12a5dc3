"""What `import metalora` promises: few imports, quick, layered, and it can explain itself."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from metalora import _library, build_info
from metalora._library import native_available

ROOT = Path(__file__).resolve().parents[1]
# Each layer imports only from those before it (and from itself).
LAYERS = ["_checks", "_errors", "_draws", "_optional", "_files", "_warn", "_library", "_matmul"]
LAYERS += ["_transforms", "reference", "ops", "nn", "adapters", "meta", "linear", "shallow"]
LAYERS += ["io", "hf"]
WITHOUT_CIRCLES = ["metalora", "experiments", "benchmarks"]
# Stand beside these, not above all that comes before them.
_BELOW = {"_checks", "_files", "_warn", "_library", "_draws", "reference", "ops"}
SIDE_BY_SIDE = {"linear": _BELOW, "shallow": _BELOW}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=120,
    )


def layer_of(module: str) -> str | None:
    """The layer of a dotted module name, or None where it is not metalora's."""
    parts = module.split(".")
    return parts[1] if parts[0] == "metalora" and len(parts) > 1 else None


def imported_modules(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "metalora":
                names.update(f"metalora.{alias.name}" for alias in node.names)
    return names


def violations(layer: str, names: set[str]) -> set[str]:
    allowed = SIDE_BY_SIDE.get(layer, set(LAYERS[: LAYERS.index(layer) + 1])) | {layer}
    used = {found for name in names if (found := layer_of(name))}
    outside = {n for n in names if n.split(".")[0] in ("experiments", "benchmarks", "tests")}
    return (used - allowed) | outside


def files_of(layer: str) -> list[Path]:
    folder = ROOT / "metalora" / layer
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_only_what_stands_before_them(layer: str) -> None:
    files = files_of(layer)
    assert files
    for path in files:
        assert not violations(layer, imported_modules(path)), path


def test_every_layer_is_walked() -> None:
    folder = ROOT / "metalora"
    found = {p.stem for p in folder.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    found |= {p.stem for p in folder.glob("*.py")} - {"__init__", "__main__"}
    assert found == set(LAYERS)


def test_the_walk_finds_a_violation(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from metalora import meta\n    import experiments.lib.runs\n")
    assert violations("ops", imported_modules(planted)) == {"meta", "experiments.lib.runs"}


def imports_of(package: str) -> dict[str, set[str]]:
    """Of each module of a package, the modules of it that it imports, also for type checks only."""
    names = {}
    for path in (ROOT / package).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names[name.removesuffix(".__init__")] = path
    found = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
                found[name] |= inner or {node.module}
        found[name] &= names.keys() - {name}
    return found


def circles(imports: dict[str, set[str]]) -> set[str]:
    """The modules that are in a circle of imports, or that only import such modules."""
    left = {name: set(used) for name, used in imports.items()}
    while free := {name for name, used in left.items() if not used}:
        left = {name: used - free for name, used in left.items() if name not in free}
    return set(left)


@pytest.mark.parametrize("package", WITHOUT_CIRCLES)
def test_no_imports_go_in_a_circle(package: str) -> None:
    assert not circles(imports_of(package))


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


@pytest.mark.slow
def test_import_is_quick_and_brings_only_torch_and_numpy() -> None:
    code = """
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import metalora
seconds = time.process_time() - start
roots = {name.split(".")[0] for name in set(sys.modules) - before}
foreign = {r for r in roots if r not in sys.stdlib_module_names | {"metalora", "torch", "numpy"}}
print(seconds, sorted(foreign), torch.cuda.is_initialized())
"""
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    seconds, rest = run.stdout.split(" ", 1)
    assert rest.strip() == "[] False"
    assert float(seconds) < 1


@pytest.mark.slow
def test_main_explains_the_installation() -> None:
    run = python("-m", "metalora")
    assert run.returncode == 0, run.stderr
    for word in ("torch:", "CPU library:", "CUDA library:", "lora_linear"):
        assert word in run.stdout


@pytest.mark.slow
def test_native_kernels_can_be_switched_off() -> None:
    code = """
import torch
from metalora import ops
p = torch.randn(6, 3), torch.randn(2, 3), None, torch.randn(1, 1, 3), torch.randn(1, 2, 1)
ptr = torch.tensor([0, 6])
print(ops.lora_linear(*p, ptr).shape, ops.lora_linear_route(p[0], p[1], p[3]))
try:
    ops.lora_linear(*p, ptr, route="token")
except RuntimeError as error:
    print(error)
"""
    run = python("-c", code, METALORA_NATIVE="0")
    assert run.returncode == 0, run.stderr
    assert "torch.Size([6, 2])" in run.stdout
    assert "switched off by METALORA_NATIVE=0" in run.stdout
    assert "route='token' cannot be had" in run.stdout
    assert "METALORA_NATIVE=0" in python("-m", "metalora", METALORA_NATIVE="0").stdout


@pytest.mark.slow
@pytest.mark.skipif(not native_available(), reason="the native CPU library is not loaded")
@pytest.mark.parametrize(
    ("variable", "value", "shown"),
    [
        ("METALORA_MATMUL", "default", "fp32 matmul:  default (METALORA_MATMUL=default)"),
        ("METALORA_CPU_ISA", "portable", "portable (METALORA_CPU_ISA=portable; this CPU has "),
        ("ATEN_CPU_CAPABILITY", "default", "portable (ATEN_CPU_CAPABILITY=default; this CPU has "),
    ],
)
def test_the_report_says_why(variable: str, value: str, shown: str) -> None:
    if variable != "METALORA_MATMUL" and build_info()["best instructions"] == "portable":
        pytest.skip("this CPU has the portable kernels only")
    run = python("-m", "metalora", **{variable: value})
    assert run.stderr == ""
    assert shown in run.stdout


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("METALORA_MATMUL", "mkl", "must be one of auto, default, onednn, got 'mkl'; it is taken"),
        ("METALORA_CPU_ISA", "sse", "must be one of portable, avx2, avx512, avx512_bf16, got 'sse"),
        ("METALORA_CPU_ISA", "avx512", "=avx512 cannot be had: the most that this CPU and this"),
    ],
)
def test_a_variable_that_cannot_be_followed_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    module = SimpleNamespace(build_info=lambda: {"best instructions": "avx2"})
    monkeypatch.setattr(_library, "_cpu_module", module)
    monkeypatch.setenv(variable, value)
    with pytest.warns(UserWarning, match=variable) as warned:
        _library._check_variables()
    (warning,) = warned
    assert said in str(warning.message)
    assert "\n" not in str(warning.message)


def test_variables_that_can_be_followed_are_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(build_info=lambda: {"best instructions": "avx2"})
    monkeypatch.setattr(_library, "_cpu_module", module)
    for matmul, instructions in (("auto", "avx2"), ("onednn", "portable"), ("", "")):
        monkeypatch.setenv("METALORA_MATMUL", matmul)
        monkeypatch.setenv("METALORA_CPU_ISA", instructions)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _library._check_variables()


def test_environment_variables_are_documented() -> None:
    """CONTRIBUTING.md lists every METALORA_ variable that the code reads."""
    used: set[str] = set()
    sources = [ROOT / "setup.py", *(ROOT / "metalora").rglob("*.py")]
    sources += list((ROOT / "experiments").rglob("*.py"))
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value
                if name.startswith("METALORA_") and name.isupper() and name.isidentifier():
                    used.add(name)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert used >= {"METALORA_BUILD", "METALORA_NATIVE"}
    assert all(f"`{name}`" in text for name in used)
