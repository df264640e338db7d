"""The suites: a folder each, with its workloads and, in `task.py`, what a process does for one of its providers."""
