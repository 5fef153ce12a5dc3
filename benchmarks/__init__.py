"""Timings of metalora beside what one would write without it, each behind a correctness gate."""
