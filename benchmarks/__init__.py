"""Pachinko measured beside other ways to serve WebSockets: ``python -m benchmarks --help``."""
