"""Typed configs: the `config` decorator, load, override, and errors that name the dotted key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from selfsup_ray.credentials import require_no_credentials
from selfsup_ray.errors import ConfigError


def _not_bool(value: Any) -> Any:
    # YAML reads `yes` and `on` as true, which Python would count as 1.
    if isinstance(value, bool):
        raise ValueError("a number is wanted here, not true or false")
    return value


_Int = Annotated[int, BeforeValidator(_not_bool)]
_Float = Annotated[float, BeforeValidator(_not_bool)]

Positive = Annotated[_Int, Field(gt=0)]
NonNegative = Annotated[_Int, Field(ge=0)]
PositiveFloat = Annotated[_Float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[_Float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[_Float, Field(ge=0, le=1)]

C = TypeVar("C")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def config(cls: type[C]) -> type[C]:
    """Turn a class into a frozen, keyword-only, validated config that forbids unknown keys.

    A bad value raises ConfigError naming the dotted key, however the config is made. Rules about
    two fields go in `__post_init__` and raise ValueError naming both. A class may have `NOT_HERE`:
    keys that people look for in it, and why they are not there.
    """
    rules = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)
    made = pydantic_dataclass(frozen=True, kw_only=True, config=rules)(cls)
    plain_init = made.__init__

    @functools.wraps(plain_init)
    def checked_init(self: Any, *args: Any, **values: Any) -> None:
        try:
            plain_init(self, *args, **values)
        except ValidationError as error:
            raise ConfigError(explain(error, cls=made, prefix="")) from None

    made.__init__ = checked_init  # type: ignore[method-assign]
    return cast("type[C]", made)


@config
class Resources:
    """What a stage asks of the cluster; never changes a result, so not part of its fingerprint."""

    workers: NonNegative = 1
    """Worker processes. Trained stages: 0 runs the loop in this process, without Ray Train."""
    cpus: PositiveFloat = 1
    """CPUs of each worker."""
    gpus: NonNegativeFloat = 0
    """GPUs of each worker."""

    @property
    def fewest(self) -> int:
        """Workers that there must be room for."""
        return self.workers


def build(cls: type[C], values: Mapping[str, Any], *, prefix: str = "") -> C:
    """Return a validated `cls` made from nested plain values.

    Raises ConfigError with the dotted key below `prefix`, the value, and what is allowed.
    """
    require_no_credentials(values, key=prefix)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(explain(error, cls=cls, prefix=prefix)) from None


MAX_VALUES = 100_000
"""Values in a YAML file, each counted as often as aliases repeat it."""


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many values a node unfolds to: infinitely many when it lies within itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = [part if isinstance(part, tuple) else (part,) for part in below]
        known[id(node)] = 1 + sum(_num_values(n, known) for pair in pairs for n in pair)
    return known[id(node)]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses a key given twice and reads 1e-3 as the number it is."""

    def get_single_node(self) -> Any:
        """Return the document; one whose aliases unfold to millions of values is an error."""
        node = super().get_single_node()
        if node is not None and _num_values(node, {}) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"it unfolds to more than {MAX_VALUES:,} values", node.start_mark
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node; a key given twice is an error, not the last one wins."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1, which PyYAML follows, wants a dot and a sign in the exponent: 1.0e-3.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Return the plain values in a YAML text; no tag in it can call anything.

    Raises yaml.YAMLError.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, read with the safe loader.

    Raises ConfigError when the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        values = parse_yaml(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}: {error.strerror}. Give the path of a YAML file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, got {type(values).__name__}.")
    return values


def load(cls: type[C], path: Path, changes: Mapping[str, Any] | None = None) -> C:
    """Return the config in a YAML file with dotted-key changes applied on top."""
    values = read_yaml(path)
    try:
        return build(cls, changed(values, changes or {}))
    except ConfigError as error:
        # A change from the command line is the caller's, not the file's.
        own = not changes or not _is_valid(cls, values)
        raise ConfigError(f"{path}: {error}" if own else str(error)) from None


def _is_valid(cls: type[Any], values: Mapping[str, Any]) -> bool:
    try:
        build(cls, values)
    except ConfigError:
        return False
    return True


def to_dict(value: Any) -> Any:
    """Return a config as nested plain values that YAML and JSON can hold and `build` reads back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def override(value: C, changes: Mapping[str, Any]) -> C:
    """Return a new validated config with dotted keys changed, e.g. {"pretext.optim.lr": 0.1}."""
    return build(type(value), changed(to_dict(value), changes))


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with dotted keys replaced; a new variant `name` drops the old's keys."""
    result: dict[str, Any] = {key: item for key, item in values.items()}
    # Names first: choosing another variant must not discard a key given for that variant.
    for dotted in sorted(changes, key=lambda key: not key.endswith(".name")):
        _set(result, dotted.split("."), changes[dotted])
    return result


def _set(values: dict[str, Any], keys: list[str], item: Any) -> None:
    head, *rest = keys
    if not rest:
        if head == "name" and values.get("name", item) != item:
            values.clear()
        values[head] = item
        return
    below = values.get(head)
    values[head] = dict(below) if isinstance(below, Mapping) else {}
    _set(values[head], rest, item)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values as one level of dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, item in values.items():
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def by_place(value: Any) -> Any:
    """Return a list of nested values, such as layers, as a mapping by place; others as they are."""
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        return value
    return {"length": len(value), **{str(i): one for i, one in enumerate(value)}}


def unset_keys(config: Any) -> frozenset[str]:
    """Return the dotted keys of a config that have their default value."""
    if isinstance(config, tuple):
        return frozenset(f"{i}.{key}" for i, one in enumerate(config) for key in unset_keys(one))
    found: set[str] = set()
    if not dataclasses.is_dataclass(config):
        return frozenset()
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value == default:
            found |= flatten({field.name: to_dict(value)}).keys()
        else:
            found |= {f"{field.name}.{key}" for key in unset_keys(value)}
    return frozenset(found)


def explain(error: ValidationError, *, cls: type, prefix: str) -> str:
    """Return the first problem of a pydantic error as one sentence with its dotted key."""
    problem = error.errors()[0]
    loc = _places(problem)
    key = ".".join(filter(None, [prefix, *_written(cls, loc)]))
    match problem["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            here = _configs_at(cls, loc[:-1])
            for refused in filter(None, (vars(c).get("NOT_HERE") for c in _bases(here))):
                if loc[-1] in refused:
                    return f"`{key}` cannot be set: {refused[loc[-1]]}."
            allowed = sorted({f.name for c in here for f in dataclasses.fields(c)})
            near = difflib.get_close_matches(loc[-1], allowed, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`? " if near else ""
            return f"Unknown key `{key}`: {hint}Allowed here: {', '.join(allowed)}."
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"`{key}` is required and has no default. Set it in the YAML file or as {key}=…."
        case "union_tag_not_found" | "union_tag_invalid":
            return _explain_variant(problem, f"{key}.name" if key else "name")
    others = [_message(other) for other in error.errors() if _places(other) == loc]
    message = ", or: ".join(dict.fromkeys(others))  # more than one for a union such as `str | int`
    plain = isinstance(problem["input"], str | int | float | list | tuple | None)
    shown = f" Got {problem['input']!r}." if plain else ""
    return f"`{key}`: {message}.{shown}" if key else f"{message}.{shown}"


# What pydantic adds to an error's place for a member of a union: not a key that anyone wrote.
_MEMBER = re.compile(
    r"(str|int|float|bool|none|(tuple|list|dict|set|literal|constrained|function|is-instance)\W.*)$"
)


def _places(problem: Any) -> list[str]:
    return [str(part) for part in problem["loc"] if not _MEMBER.match(str(part))]


def _message(problem: Any) -> str:
    return str(problem["msg"]).removeprefix("Value error, ").rstrip(".")


def _explain_variant(problem: Any, key: str) -> str:
    """Return the sentence for a tagged union whose `name` is missing or unknown."""
    context = problem["ctx"]
    if "tag" not in context:
        return f"`{key}` is required: it chooses the variant. Add it to {problem['input']!r}."
    allowed = [name.strip(" '") for name in context["expected_tags"].split(",")]
    near = difflib.get_close_matches(context["tag"], allowed, n=1, cutoff=0.5)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return f"`{key}`: {context['tag']!r} is not one of {', '.join(allowed)}.{hint}"


def _configs_in(annotation: Any) -> Iterator[type]:
    """Yield the config classes an annotation may hold, through unions, Annotated and containers."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        yield annotation
    for part in typing.get_args(annotation):
        if isinstance(part, type) or typing.get_origin(part) is not None:
            yield from _configs_in(part)


def _walk(cls: type, loc: list[str]) -> Iterator[tuple[str, list[type], bool]]:
    """Yield (part, configs below it, whether the part is a union tag) along an error's location."""
    here: list[type] = [cls]
    for part in loc:
        tagged = [c for c in here if part in _tags(c)]
        named = [f for c in here for f in _hints(c).items() if f[0] == part]
        if tagged and not named:
            here = tagged
            yield part, here, True
            continue
        here = [c for _, hint in named for c in _configs_in(hint)]
        yield part, here, False


def _written(cls: type, loc: list[str]) -> list[str]:
    """Drop union tags from an error's location: the user never wrote them."""
    return [part for part, _, is_tag in _walk(cls, loc) if not is_tag]


def _configs_at(cls: type, loc: list[str]) -> list[Any]:
    """Return the configs that may stand at an error's location."""
    here = [cls]
    for _, here, _ in _walk(cls, loc):  # noqa: B007  the last one is wanted
        pass
    return here


def _bases(classes: list[Any]) -> Iterator[type]:
    yield from itertools.chain.from_iterable(c.__mro__ for c in classes)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@functools.cache
def _tags(cls: type) -> frozenset[str]:
    hint = _hints(cls).get("name")
    if typing.get_origin(hint) is not typing.Literal:
        return frozenset()
    return frozenset(str(value) for value in typing.get_args(hint))


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return (dotted key, value) of a command line's `key=value`; the value is read as YAML.

    Raises ConfigError when there is no `=`.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"`{text}` is not of the form key=value, e.g. pretext.epochs=10.")
    try:
        return key, parse_yaml(value)
    except yaml.YAMLError:
        return key, value


__all__ = [
    "NonNegative",
    "NonNegativeFloat",
    "Positive",
    "PositiveFloat",
    "Resources",
    "Share",
    "build",
    "changed",
    "config",
    "flatten",
    "load",
    "override",
    "parse_assignment",
    "parse_yaml",
    "read_yaml",
    "to_dict",
]
