"""What a function says that needs a package which is absent, of another version, or broken."""

import sys

import pytest
from torch import nn

from metalora._optional import require
from metalora.hf import disable_packing, enable_packing, packing_problem


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Installs packages, each with its version, what it requires and its code, for one test."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, version=None, requires=(), code=None):
        if version is not None:
            lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
            lines += [f"Requires-Dist: {line}" for line in requires]
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text("\n".join(lines) + "\n")
        if code is not None:
            (tmp_path / f"{name}.py").write_text(code)
            monkeypatch.delitem(sys.modules, name, raising=False)

    yield install
    sys.modules.pop("threadbare", None)


RANGE = ["numpy", "threadbare<0.22,>=0.17; extra == 'experiments'"]


@pytest.mark.parametrize("version", ["0.17", "0.21.9", "0.18.0.dev0", "0.20+local"])
def test_a_version_within_the_range_is_imported(packages, version):
    packages("metalora", "0.0", RANGE)
    packages("threadbare", version, code="name = 'found'")
    assert require("threadbare", "weave").name == "found"


@pytest.mark.parametrize("version", ["0.9.0", "0.22.0", "1.0", "0.17.0rc1"])
def test_other_versions_are_refused_and_not_imported(packages, version):
    packages("metalora", "0.0", RANGE)
    packages("threadbare", version, code="1 / 0")
    with pytest.raises(ImportError) as raised:
        require("threadbare", "weave")
    assert str(raised.value) == (
        f"weave: needs threadbare >=0.17,<0.22, but {version} is installed; "
        "pip install 'threadbare>=0.17,<0.22'"
    )


@pytest.mark.parametrize(
    ("requires", "install"),
    [(RANGE, "'threadbare>=0.17,<0.22'"), (["threadbare; extra == 'hf'"], "threadbare")],
)
def test_an_absent_package_is_named_with_what_installs_it(packages, requires, install):
    packages("metalora", "0.0", requires)
    with pytest.raises(ImportError) as raised:
        require("threadbare", "weave")
    assert str(raised.value) == f"weave: needs the package threadbare; pip install {install}"


def test_without_a_range_any_version_will_do(packages):
    packages("metalora", "0.0", ["threadbare"])
    packages("threadbare", "0.0.1", code="name = 'found'")
    assert require("threadbare", "weave").name == "found"


def test_a_package_without_metadata_will_do(packages):
    packages("metalora", "0.0", RANGE)
    packages("threadbare", code="name = 'found'")
    assert require("threadbare", "weave").name == "found"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import a_part_that_is_missing", "No module named 'a_part_that_is_missing'"),
        ("from math import nothing", "cannot import name 'nothing' from 'math'"),
    ],
)
def test_a_broken_package_is_not_taken_for_an_absent_one(packages, code, reason):
    packages("metalora", "0.0", RANGE)
    packages("threadbare", "0.18", code=code)
    with pytest.raises(ImportError) as raised:
        require("threadbare", "weave")
    assert str(raised.value).startswith(f"weave: threadbare 0.18 cannot be imported: {reason}")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("function", [enable_packing, disable_packing, packing_problem])
def test_without_transformers_packing_says_what_to_install(monkeypatch, function):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = f"{function.__name__}: needs the package transformers; pip install '?transformers"
    with pytest.raises(ImportError, match=message):
        function(nn.Linear(2, 2))
