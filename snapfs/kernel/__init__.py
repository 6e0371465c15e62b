"""The system calls and kernel tables that Python's standard library lacks, each behind a small typed function."""
