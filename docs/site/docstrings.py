"""Docstrings where there is code instead of them: an extension of griffe, which reads the package's text."""

from __future__ import annotations

import ast
import inspect
import json
import re
from importlib import import_module
from typing import Any

import griffe
from pydantic import BaseModel


class FromCode(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Names that a package imports on first use, by its table `_EXPORTS`, as if it imported them."""
        for module in [pkg, *pkg.modules.values()]:
            if "_EXPORTS" in module.members:
                imported = import_module(module.path)
                for name, home in imported._EXPORTS.items():
                    module.set_member(name, griffe.Alias(name, f"{module.path}.{home}.{name}"))
                module.exports = list(imported.__all__)
        for section in (*pkg["recipe.schema"].classes.values(), *pkg["recipe.schema_sampling"].classes.values()):
            _tell_keys(section)

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """What a registry is for; the comment behind a field."""
        call = getattr(node, "value", None)
        comment = re.search(r"  # ([^:\[]+)$", attr.lines[0]) if attr.parent.is_class and attr.lines else None
        if comment and not attr.docstring:
            attr.docstring = griffe.Docstring(comment[1][0].upper() + comment[1][1:] + ".", parent=attr)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Registry" and not attr.docstring:
            kind = ast.literal_eval(call.args[0])
            slug = kind.replace(" ", "-").lower()
            text = f"The [registry][dic_repa.registry.Registry] of one kind of part: [{kind}](parts.md#{slug})."
            attr.docstring = griffe.Docstring(text, parent=attr)


def _tell_keys(section: griffe.Class) -> None:
    """The keys of a recipe's section, which pydantic has, as a table of attributes."""
    found = getattr(import_module(section.parent.path), section.name)
    if fields := getattr(found, "model_fields", {}):
        text = inspect.getdoc(found) if found.__doc__ else "A section of a recipe."
        lines = [f"    {key}: {field.description}{_default(field)}" for key, field in fields.items()]
        text = "\n".join([text, "", "Attributes:", *lines])
        section.docstring = griffe.Docstring(text, parent=section, parser="google")


def _default(field: Any) -> str:
    value = None if field.is_required() else field.get_default(call_default_factory=True)
    if field.is_required() or isinstance(value, BaseModel):
        return ""
    return f". Default: `{json.dumps(value)}`."
