"""What all sections of a recipe have in common."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dic_repa.errors import UserError
from dic_repa.recipe.keys import explain_mistakes, flatten
from dic_repa.runtime.table import html_table


class Section(BaseModel):
    """A part of a recipe, in which unknown keys are errors, from a file and from Python."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a key as a recipe would; a wrong value is a UserError and changes nothing."""
        if name.startswith("_"):
            return super().__setattr__(name, value)
        try:
            changed = type(self).model_validate({**self.__dict__, name: value})
        except ValidationError as error:
            raise UserError(explain_mistakes(type(self), error)) from None
        super().__setattr__(name, getattr(changed, name))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def _repr_html_(self) -> str:
        """A notebook shows the parts' names, and what is not a default."""
        keys, changed = (flatten(self.model_dump(mode="json", exclude_defaults=less)) for less in (False, True))
        shown = [(key, value) for key, value in keys.items() if key in changed or key.endswith((".name", ".metric"))]
        return html_table([("key", "value"), *((key, json.dumps(value, ensure_ascii=False)) for key, value in shown)])
