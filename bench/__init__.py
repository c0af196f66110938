"""Benchmarks of a checkout: `python -m bench` for tables, `pytest bench/ --benchmark-only` for pytest-benchmark."""
