"""Seeded faults that the unit layer must kill, `make faults`: the tests of the tests.

`catalogue` has the faults, `trial` runs tests on a copy of the repository that has one of them, `python -m
validation.faults` runs them all and prints which test killed which.
"""
