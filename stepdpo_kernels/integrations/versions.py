"""Which versions of somebody else's package an integration was written against."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from stepdpo_kernels.types import StepDPOError


def require(package: str, at_least: str, below: str) -> Version:
    """The installed version of a package; StepDPOError where there is none, or not one in [at_least, below)."""
    wanted = f"{package}>={at_least},<{below}"
    try:
        found = Version(version(package))
    except PackageNotFoundError as error:
        raise StepDPOError(f"{package} is not installed: pip install '{wanted}'") from error
    if not Version(at_least) <= found < Version(below):
        raise StepDPOError(
            f"{package} {found} is not supported, its trainer may compute something else: pip install '{wanted}', or "
            "use a stepdpo-kernels that knows it"
        )
    return found
