"""A subject with the published layout and faults of published implementations, from descriptions of their behaviour.

``verify/tests/selftest/test_faulty.py`` has the list, with the checks that fail for each.
"""

__version__ = "0.2.0"
