"""What an active subject offers of the published API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from verify.errors import SubjectLacks, skip
from verify.subject.published import NAMES, OPTIONAL, Name, signature_differs

if TYPE_CHECKING:
    from verify.subject.subject import Subject


def differences(subject: Subject) -> dict[Name, tuple[str, bool]]:
    """What is wrong with each published name that an active subject lacks (True) or gives another signature (False)."""
    found = {}
    for name in (*NAMES, *OPTIONAL):
        try:
            differs = signature_differs(name, subject.attribute(name.module, name.name))
        except SubjectLacks as error:
            found[name] = str(error), True
        else:
            found |= {name: (f"{name.module}.{name.name}: {differs}", False)} if differs else {}
    return found


def optional(subject: Subject, module: str, name: str) -> Any:
    """The subject's object for an optional published name; ends the check as SKIP(PKG_MISSING) if there is none.

    Raises AssertionError if its signature differs from the published one, and SubjectLacks if its module exists but
    does not import.
    """
    (published,) = (one for one in OPTIONAL if (one.module, one.name) == (module, name))
    where = subject.place(module, name)[0]
    try:
        found = subject.attribute(module, name)
    except SubjectLacks as error:
        cause = error.__cause__
        absent = cause.name if isinstance(cause, ModuleNotFoundError) else None
        own = absent is not None and f"{absent}.".startswith(f"{subject.package}.")
        if not isinstance(cause, AttributeError) and (absent is None or (own and not where.startswith(absent))):
            raise
        skip("PKG_MISSING", f"{error}; it is optional")
    differs = signature_differs(published, found)
    assert not differs, f"{module}.{name}: {differs}"
    return found
