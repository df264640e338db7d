"""Trainers that people already have, on packed forests and our head. Each module asks for its package when imported."""
