"""The benchmarks of ``make bench``: snapfs beside what it is to be measured with, in one run, in turns.

Rooms: ``rows`` what a row of the table is; ``table`` and ``plot`` how it is shown; ``place`` where a run keeps its files, on
which processors things run, what it started; ``wire``, ``containerd``, ``minimal`` the opponents; ``populate`` makes large
roots quickly; ``clients`` is many clients at once; every other module holds the benchmarks of one subject.
"""
