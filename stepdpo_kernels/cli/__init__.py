"""The `stepdpo` command."""

from __future__ import annotations

try:
    from stepdpo_kernels.cli.main import main
except ModuleNotFoundError as error:
    if error.name in ("typer", "rich"):
        raise ModuleNotFoundError(
            f"the stepdpo command needs the package {error.name}: pip install 'stepdpo-kernels[train]'", name=error.name
        ) from error
    raise

__all__ = ["main"]
