"""Packages that only some functions need: imported when such a function is called."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from metalora._checks import first_line


def require(package: str, function: str) -> Any:
    """Imports and returns ``package`` for ``function``.

    The supported versions are those of metalora's own requirements, whichever extra names the
    package; where metalora runs without having been installed, any version will do.

    Raises:
        ImportError: if it is not installed, is of another version, or fails to be imported.
    """
    wanted = _supported(package)
    install = f"pip install '{package}{wanted}'" if wanted else f"pip install {package}"
    version = _installed(package)
    if version and wanted and not _lies_in(version, wanted):
        raise ImportError(
            f"{function}: needs {package} {wanted}, but {version} is installed; {install}"
        )
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ImportError(f"{function}: needs the package {package}; {install}") from None
        which = f"{package} {version}" if version else f"the package {package}"
        raise ImportError(
            f"{function}: {which} cannot be imported: {first_line(error)}; {install}"
        ) from error


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _supported(package: str) -> str:
    """For example ">=0.17,<0.22"; "" if any version is."""
    from packaging.requirements import Requirement  # which peft and transformers need themselves

    try:
        requirements = [Requirement(text) for text in metadata.requires("metalora") or ()]
    except metadata.PackageNotFoundError:
        return ""
    ranges = {str(s) for r in requirements if r.name == package for s in r.specifier}
    return ",".join(sorted(ranges, reverse=True))


def _lies_in(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)
