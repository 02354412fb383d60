"""What an active subject offers of the published API."""

from __future__ import annotations

import dis
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verify.errors import SubjectLacks, SubjectNeeds
from verify.subject.published import DISPATCH, NAMES, OPTIONAL, Name, Renamed, dispatch_alone, signature_differs

if TYPE_CHECKING:
    from verify.subject.subject import Subject


@dataclass(frozen=True, slots=True)
class Examined:
    """What an active subject has of a published name. ``problem`` is empty if it is as published."""

    name: Name
    offered: bool
    problem: str = ""


def examined(subject: Subject) -> dict[str, list[Examined]]:
    """Every published name by capability, with what an active subject has of it."""
    found: dict[str, list[Examined]] = {}
    for name in (*NAMES, *OPTIONAL):
        found.setdefault(name.capability, []).append(_examine(subject, name))
    by_name = {(one.name.module, one.name.name): one for every in found.values() for one in every}
    if dispatch_alone(lambda *name: by_name[name].offered):
        found["pytorch"] = [by_name[DISPATCH]]
    return found


def _examine(subject: Subject, name: Name) -> Examined:
    try:
        attribute = subject.attribute(name.module, name.name)
    except (SubjectLacks, SubjectNeeds) as error:
        return Examined(name, False, str(error))
    except Exception as error:  # the import of a subject may fail in any way
        return Examined(name, False, f"{name.module} does not import ({type(error).__name__}: {error})")
    if unwritten(attribute):
        return Examined(name, False, f"{name.name} only raises NotImplementedError")
    return Examined(name, True, signature_differs(name, attribute))


def unwritten(found: Any) -> bool:
    """Whether a function, or the constructor of a class, never returns and can raise NotImplementedError."""
    function = found.function if isinstance(found, Renamed) else found
    if isinstance(function, type):
        function = vars(function).get("__init__")
    code = getattr(function, "__code__", None)
    if code is None or "NotImplementedError" not in code.co_names:
        return False
    return not any(one.opname.startswith("RETURN") for one in dis.get_instructions(code))


#: The options of a score, which ``rank_keys`` does not have: it ranks by the mean, in half pairs.
_NOT_OF_RANKING = ("aggregation", "style", "disable_mlr", "disable_trig")


def narrowed(subject: Subject, capability: str) -> dict[str, tuple[Any, ...]]:
    """The values that the functions of a capability (``triton``, ``pytorch``, ``ranking``) are declared to take, by
    property of a problem.
    """
    left_out = _NOT_OF_RANKING if capability == "ranking" else ()
    return {name: values for name, values in subject.narrowed.items() if name not in left_out}


def optional(subject: Subject, module: str, name: str) -> Any:
    """The subject's object for an optional published name.

    Raises SubjectLacks if there is none, and AssertionError if its signature differs from the published one.
    """
    (published,) = (one for one in OPTIONAL if (one.module, one.name) == (module, name))
    found = subject.attribute(module, name)
    differs = signature_differs(published, found)
    assert not differs, f"{module}.{name}: {differs}"
    return found
