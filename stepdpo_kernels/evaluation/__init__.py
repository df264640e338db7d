"""How often a model's final answers are right, with its standard error, and whether one model beats another."""

from __future__ import annotations
