from __future__ import annotations

import pytest

from verify.errors import ConfigurationError
from verify.run import manifest
from verify.run.manifest import survey
from verify.subject.find import find_subject
from verify.tests.samples import REPOSITORY


def test_a_run_that_cannot_interpret_kernels_is_refused_instead_of_blaming_the_subject(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manifest, "interpreter_conflict", lambda: "Triton and numpy do not fit; install another")
    subject = find_subject("bundled", REPOSITORY)
    with pytest.raises(ConfigurationError, match="without a GPU the kernels are interpreted, but Triton and numpy"):
        survey("cpu", subject, REPOSITORY)
    assert survey("cpu", subject, REPOSITORY, simulated=120).target == "sm120"
