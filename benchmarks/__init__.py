"""Measurements that anybody can run again: `python -m benchmarks --help`. README.md beside this file says how."""
