"""Tests of the benchmarks, at their smallest scale."""
