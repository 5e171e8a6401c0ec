"""Tools to test runs with: traces of what their steps compute, and where two of them diverge."""

from trainkit.testing.divergence import Difference, diagnose, differences
from trainkit.testing.fingerprint import fingerprint, fingerprints
from trainkit.testing.step_trace import Record, StepTrace, read_trace

__all__ = [
    "Difference",
    "Record",
    "StepTrace",
    "diagnose",
    "differences",
    "fingerprint",
    "fingerprints",
    "read_trace",
]
