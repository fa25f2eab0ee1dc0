"""What every section of a recipe is."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dic_repa.errors import UserError
from dic_repa.recipe.keys import explain_mistake


class Section(BaseModel):
    """A part of a recipe, in which unknown keys are errors, from a file and from Python."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a key as if it stood in a recipe; what it does not take is a UserError, and changes nothing."""
        if name.startswith("_"):
            return super().__setattr__(name, value)
        try:
            changed = type(self).model_validate({**self.__dict__, name: value})
        except ValidationError as error:
            raise UserError("; ".join(explain_mistake(type(self), e) for e in error.errors())) from None
        super().__setattr__(name, getattr(changed, name))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__  # wherever it was found
