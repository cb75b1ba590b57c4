"""Pieces of scripts/benchmark.py."""
