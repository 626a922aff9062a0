"""Benchmarks: each number stands behind a green check of its case, in a JSONL row with what it was measured on."""
