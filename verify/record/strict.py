"""The base of everything that is kept as a record."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

#: A digest as hashlib prints it.
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@cache
def _every_field(model: type[BaseModel]) -> set[str]:
    return set(model.model_fields)


class Strict(BaseModel):
    """The base of everything in a record: no unknown field, NaN and Inf as strings."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    def model_post_init(self, context: Any) -> None:
        # pydantic's per-object set of the given fields is never used, and is most of the memory of a record
        object.__setattr__(self, "__pydantic_fields_set__", _every_field(type(self)))
