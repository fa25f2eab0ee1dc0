"""One way for every kind of part: register it, find it, create it, list it.

    heads = Registry("head")

    @heads.register("linear")
    class LinearHead(nn.Module):
        \"\"\"One linear layer for each token.\"\"\"    # the line that `dic-repa parts head` shows

    heads.create("linear", channels, embed_dim, grid)
    heads.create({"name": "my_package.heads:Deep", "layers": 4}, channels, embed_dim, grid)

A name is one that was registered, an entry point that an installed package offers in its own pyproject.toml,

    [project.entry-points."dic_repa.heads"]
    my-head = "my_package.heads:MyHead"

or `package.module:factory`. It must show that it makes such a part: it is registered, or a class with the methods that
`dic_repa.protocols` says, or a function that is annotated to return one. So `os:system` is no part. A file that came
with weights may name no factory at all, unless it is trusted (`dic_repa.trust`).

A registered name that ends in a colon is a *family*: `timm:` is called with what follows the colon, as its first
argument.
"""

import ast
import fnmatch
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dic_repa.errors import MISTAKES, UserError, did_you_mean, first_line, unknown_name
from dic_repa.runtime.kinds import wrong_kind
from dic_repa.runtime.progress import detail
from dic_repa.trust import is_factory

_CALLED = ("__call__", "__getitem__", "__len__")  # of a protocol's members, beside those with plain names


class Registry:
    """Factories of one `kind` of part, by name.

    Args:
        kind: the word that messages use, such as "time weight".
        modules: where the parts of this package are; `package.*` is every module of a package. They are imported when
            the parts are listed, or a name is looked up that is not known yet.
        key: where a recipe names such a part, such as `alignments.0.time_weight`.
        functions: whether a function is such a part itself, and does not make one.
    """

    def __init__(self, kind: str, modules: Sequence[str] = (), key: str = "", functions: bool = False):
        self.kind, self.key, self.functions = kind, key, functions
        self.slug = kind.replace(" ", "-").lower()  # as `dic-repa parts` takes it
        self.group = f"dic_repa.{self.slug}{'es' if kind.endswith('s') else 's'}"  # of entry points
        words = re.split("[ -]", kind)
        # The class of `dic_repa.protocols` that says what such a part must have.
        self.protocol = "".join(word if word.isupper() else word.capitalize() for word in words)
        self._modules = list(modules)
        self._entries: dict[str, Any] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def register(self, name: str, **facts: Any) -> Callable[[Any], Any]:
        """Decorator that registers its class or function as `name`; a UserError if another one has that name.

        `facts` are for lists, such as a solver's order; `fact` returns them. A `description` replaces the docstring.
        """

        def decorate(entry):
            known = self._entries.get(name)
            if known is not None and not _same(known, entry):
                raise UserError(f"{self.kind} '{name}' is registered already; choose another name")
            self._entries[name], self._facts[name] = entry, facts
            return entry

        return decorate

    def find(self, name: str) -> Any:
        """The class or function that `name` stands for.

        Raises:
            UserError: that lists the near names, or says what a module or an entry point lacks.
        """
        family, colon, rest = name.partition(":")
        if family + colon not in self._entries:
            self._load_modules()
        if name in self._entries and not name.endswith(":"):
            return self._entries[name]
        if colon and family + colon in self._entries:
            if not rest:
                raise UserError(f"{self.kind} '{name}' is a family; put a model's name behind the colon")
            return functools.partial(self._entries[family + colon], rest)
        offered = _entry_points(self.group, tuple(sys.path))
        if name in offered:
            return self._load(offered[name])
        if not colon:
            raise unknown_name(self.kind, name, self.names())
        found = import_factory(name, self.kind)
        if not any(entry is found for entry in self._entries.values()):
            self._check_factory(name, found)
        return found

    def _check_factory(self, name: str, found: Any) -> None:
        """A UserError unless what was named as `package.module:factory` shows that it is, or makes, such a part."""
        where = f"dic_repa.protocols.{self.protocol} says what it must have"
        if str(getattr(found, "__module__", "")).partition(".")[0] in sys.stdlib_module_names:
            raise UserError(f"{name} is a part of Python, and no {self.kind}; {where}")
        if self.functions and inspect.isfunction(found):
            return
        made = _returned(found) if inspect.isroutine(found) else found if isinstance(found, type) else type(found)
        if made is None:
            raise UserError(
                f"{self.kind} '{name}' does not say what it makes: name a class, or register the function, or annotate "
                f"what it returns; {where}"
            )
        if "integrate" in dir(made) and self.kind.endswith("solver"):  # it takes all steps itself
            return
        known = {name for base in made.__mro__ for name in vars(base)}  # any class has a `__call__`, of its type
        if missing := [method for method in self._methods() if method not in known]:
            raise UserError(f"{name} is no {self.kind}: it has no {' and no '.join(missing)}; {where}")

    def _methods(self) -> list[str]:
        """The methods of this kind's protocol; none for a kind that has no protocol."""
        protocol = getattr(importlib.import_module("dic_repa.protocols"), self.protocol, None)
        methods = inspect.getmembers(protocol, inspect.isfunction)
        return [name for name, _ in methods if not name.startswith("_") or name in _CALLED]

    def create(self, spec: Any, *args: Any, **options: Any) -> Any:
        """The part that `spec` says: a name, a mapping of `name` and options, or the part itself, which is returned.

        Args:
            spec: what a recipe gives.
            args: what every part of this kind is made with.
            options: further options, beside those of a mapping.

        Raises:
            UserError: for an unknown name, and options that the part does not take.
        """
        if isinstance(spec, Mapping):
            if not isinstance(spec.get("name"), str):
                raise UserError(f"{dict(spec)}: a {self.kind} with options needs its name as well")
            options = {key: value for key, value in spec.items() if key != "name"} | options
            spec = spec["name"]
        if not isinstance(spec, str):
            if spec is None or isinstance(spec, bool | int | float | Sequence):
                raise UserError(f"{spec!r} is no {self.kind}: give its name, or a mapping of its name and options")
            return spec
        factory = self.find(spec)
        self.check_options(spec, factory, args, options)
        try:
            return factory(*args, **options)
        except UserError:
            raise
        except MISTAKES as error:
            out_of_memory = getattr(sys.modules.get("torch"), "OutOfMemoryError", ())
            if not options or isinstance(error, out_of_memory):
                raise  # not the fault of what the user gave
            raise UserError(f"{self.kind} '{spec}' does not take these options: {first_line(error)}") from error

    def check_options(
        self, name: str, factory: Any, args: Sequence[Any], options: Mapping[str, Any], hint: str = ""
    ) -> None:
        """A UserError for an option that `factory` does not take, or for one that is missing (with the `hint`)."""
        try:
            signature = inspect.signature(factory)
        except (TypeError, ValueError):  # written in C
            return
        parameters = signature.parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][len(args) :]
        takes = [p.name for p in named]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            for option in options:
                if option not in takes:
                    raise unknown_name(f"option of {self.kind} '{name}':", option, takes)
        if needs := [p.name for p in named if p.default is p.empty and p.name not in options]:
            raise UserError(f"{self.kind} '{name}' needs {' and '.join(needs)}{hint}")
        try:
            signature.bind(*args, **options)
        except TypeError as error:
            raise UserError(f"{self.kind} '{name}': {error}") from None
        if wrong := wrong_kind(factory, options):
            raise UserError(f"{self.kind} '{name}': {wrong}")

    def check_has(self, name: str, part: Any, needs: Sequence[str]) -> None:
        """A UserError if the part that `name` gave lacks an attribute that it `needs`."""
        if missing := [attribute for attribute in needs if not hasattr(part, attribute)]:
            raise UserError(
                f"{self.kind} '{name}' gives a {type(part).__name__} without {' and '.join(missing)}; "
                f"dic_repa.protocols.{self.protocol} says what it must have"
            )

    def names(self, pattern: str = "*") -> list[str]:
        """The sorted names that match a shell `pattern`, those of entry points among them."""
        return sorted(fnmatch.filter(self, pattern))

    def describe(self, name: str) -> str:
        """One line about a part: its `description`, or else the first sentence of its docstring."""
        given = self.fact(name, "description")
        return given if isinstance(given, str) else first_sentence(inspect.getdoc(self._entry(name)) or "")

    def fact(self, name: str, key: str, default: Any = None) -> Any:
        """What a part was registered with as `key`, or else its attribute of that name."""
        entry = self._entry(name)
        facts = self._facts.get(name, {})
        return facts[key] if key in facts else getattr(entry, key, default)

    def _entry(self, name: str) -> Any:
        return self._entries[name] if name in self._entries else self.find(name)

    def __iter__(self) -> Iterator[str]:
        """The names in the order in which they were registered, then those of entry points."""
        self._load_modules()
        return iter(dict.fromkeys([*self._entries, *_entry_points(self.group, tuple(sys.path))]))

    def _load_modules(self) -> None:
        while self._modules:
            name = self._modules.pop(0)
            module = importlib.import_module(name.removesuffix(".*"))
            if name.endswith(".*"):
                self._modules += [found.name for found in pkgutil.iter_modules(module.__path__, f"{module.__name__}.")]

    def _load(self, point: importlib.metadata.EntryPoint) -> Any:
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "an installed package"
            where = f"{self.kind} '{point.name}' of {package} cannot be loaded from {point.value}"
            raise UserError(f"{where} ({error}); fix or remove it") from error


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, without its full stop, on one line."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<!\bal)(?<!\beq)\.\s", paragraph)[0].rstrip(".:")


def read_source(module: str, variable: str) -> dict[str, str]:
    """Names and descriptions of what a `module` registers in `variable`, from its text: importing torch would make help
    and completion slow. It sees names that are written out, in a decorator or on a line of its own.
    """
    found: dict[str, str] = {}
    file = getattr(importlib.util.find_spec(module), "origin", "")
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        calls: list[ast.expr] = list(getattr(node, "decorator_list", []))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            calls = [node.value.func]
        for call in calls:
            if isinstance(call, ast.Call) and ast.unparse(call.func) == f"{variable}.register":
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                described = given.get("description")
                docstring = ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None
                text = ast.literal_eval(described) if described else first_sentence(docstring or "")
                found[ast.literal_eval(call.args[0])] = text
    return found


def _returned(function: Any) -> type | None:
    """The class that a function is annotated to return, if that can be told."""
    try:
        returned = typing.get_type_hints(function).get("return")
    except Exception:  # an annotation may be any expression, and fail in any way
        return None
    return returned if isinstance(returned, type) else None


def _same(known: Any, entry: Any) -> bool:
    """Whether both are one thing: a module that is reloaded, or run as __main__ and imported, registers it again."""
    places = [(getattr(e, "__module__", ""), getattr(e, "__qualname__", repr(e))) for e in (known, entry)]
    same_module = places[0][0] == places[1][0] or "__main__" in (places[0][0], places[1][0])
    return same_module and places[0][1] == places[1][1]


def import_factory(name: str, kind: str = "part") -> Any:
    """What `package.module:factory` names.

    Raises:
        UserError: `name` has another form, or there is no such module, or nothing to call in it.
    """
    module, _, factory = name.partition(":")
    if not is_factory(name):
        raise UserError(f"{kind} '{name}' is neither a known name nor of the form package.module:factory")
    found = import_plugin(module)
    if not callable(getattr(found, factory, None)):
        public = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{kind} '{name}': {module} has no '{factory}' to call{did_you_mean(factory, public)}")
    return getattr(found, factory)


def import_plugin(name: str) -> ModuleType:
    """Import the module `name`, which is looked for in the current folder too, as `python -m` does.

    Raises:
        UserError: it is not found; errors inside it are left as they are.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"plugin '{name}' is no name of a module: without .py and slashes, such as my_parts")
    add_folders([os.getcwd()])
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            raise  # the plugin was found, and misses something of its own
        raise UserError(
            f"plugin '{name}' was not found; put {name}.py beside the recipe, run from its folder or install it"
        ) from None
    detail(f"plugin {name}: {getattr(module, '__file__', None)}")
    return module


def add_folders(folders: Iterable[str]) -> None:
    """Let modules be imported from the current folder first, as `python -m` does, and then from `folders`."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    here = sys.path.index(os.getcwd() if os.getcwd() in sys.path else "")
    for folder in reversed([folder for folder in folders if folder not in sys.path]):
        sys.path.insert(here + 1, folder)


@functools.lru_cache(maxsize=128)  # looking through all that is installed takes milliseconds
def _entry_points(group: str, _places: tuple[str, ...]) -> dict[str, importlib.metadata.EntryPoint]:
    """What other packages offer in `group`, by name, with `sys.path` as it is now."""
    return {point.name: point for point in importlib.metadata.entry_points(group=group)}
