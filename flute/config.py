"""`ModelSpec`: which layers of a model are quantized and how; the ``quantization_config`` in config.json.

::

    {"quant_method": "flute", "format_version": 1,
     "bits": 4, "group_size": 64, "table": "nf4", "vector_size": 1,     the spec of every layer,
     "overrides": {"model.layers.0.mlp.down_proj": {"bits": 3}},        except these, which change some of its fields,
     "modules_to_not_convert": ["lm_head"],                             and these, which stay dense
     "lm_head": false,                                                  whether the output head is quantized too,
     "experts": true}                                                   and stacked experts (left out if not)

A pattern names modules in one of three ways, and never by prefix (``model.layers.1`` is not ``model.layers.10``)::

    model.layers.1.mlp.up_proj        exactly this module
    *.mlp.down_proj                   a glob: ``*`` is any text, dots included, ``?`` one character
    re:.*layers\\.[0-3]\\..*            a regular expression that must match the whole name

An exact name beats a pattern, and two patterns that say different things about one module are refused, so the order of
keys never matters (JSON tools sort them). A checkpoint holds exact names only: patterns are resolved when it is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from .errors import SpecError
from .spec import CUSTOM_TABLE, QuantSpec

QUANT_METHOD = "flute"
FORMAT_VERSION = 1
_SPEC_KEYS = tuple(f.name for f in fields(QuantSpec))
_REQUIRED = ("quant_method", "format_version", "bits", "group_size", "table")
_OPTIONAL = ("vector_size", "hadamard_size", "zero_points")
_KEYS = (*_REQUIRED, *_OPTIONAL, "overrides", "modules_to_not_convert", "lm_head", "experts")
_UPSTREAM_KEYS = ("num_bits", "num_sms_packed", "num_sms", "example_batch_size")


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` (exact name, glob, or ``re:`` and a regular expression) means the module ``name``."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or (_is_pattern(pattern) and fnmatchcase(name, pattern))


def _is_pattern(text: str) -> bool:
    return text.startswith("re:") or "*" in text or "?" in text


def _check_pattern(field_name: str, pattern: object) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise SpecError(f"{field_name} holds {pattern!r}; give module names, globs or re:... as text")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise SpecError(f"{field_name} holds {pattern!r}, which is no regular expression: {error}") from None
    return pattern


def changed(spec: QuantSpec, changes: Mapping[str, Any]) -> QuantSpec:
    """``spec`` with some fields changed; a named table follows ``bits`` (nf4 with bits=3 becomes nf3).

    Raises:
        SpecError: an unknown field, or the result breaks a rule of QuantSpec.
    """
    values = {**spec.to_dict(), **changes}
    if "table" not in changes and spec.table != CUSTOM_TABLE:
        family = spec.table[:-1]
        if spec.unit_variance:
            family = "gausspair" if values["vector_size"] == 2 else "gauss"
        values["table"] = f"{family}{values['bits']}"
        if values["vector_size"] == 2 and not spec.unit_variance:
            values["table"] = CUSTOM_TABLE
    return QuantSpec.from_dict(values)


@dataclass(frozen=True)
class ModelSpec:
    """How a whole model is quantized. Checks every limit when made; to JSON and back unchanged.

    Args:
        spec: the spec of every quantized layer without an override.
        overrides: pattern -> the fields of ``spec`` to change for the modules it names.
        modules_to_not_convert: patterns of modules left dense; they win over overrides.
        lm_head: whether the output head is quantized too.
        experts: whether the stacked weights of mixtures of experts are quantized too.

    Raises:
        SpecError: a value breaks a rule; the line names the pattern.
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] = ()
    lm_head: bool = False
    experts: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.spec, QuantSpec):
            raise SpecError(f"spec is a {type(self.spec).__name__}; give a QuantSpec")
        for name in ("lm_head", "experts"):
            if type(getattr(self, name)) is not bool:
                raise SpecError(f"{name}={getattr(self, name)!r} is not true or false")
        if not isinstance(self.modules_to_not_convert, (list, tuple)):  # a plain str would be taken letter by letter
            raise SpecError(f"modules_to_not_convert={self.modules_to_not_convert!r} is not a list of module names")
        for pattern in self.modules_to_not_convert:
            _check_pattern("modules_to_not_convert", pattern)
        object.__setattr__(self, "modules_to_not_convert", tuple(self.modules_to_not_convert))
        if not isinstance(self.overrides, dict):
            raise SpecError(
                f"overrides is a {type(self.overrides).__name__}; give {{module pattern: {{field: value}}}}"
            )
        assert self._override_specs is not None  # checks every override now rather than at its first use

    @cached_property
    def _override_specs(self) -> dict[str, QuantSpec]:
        specs = {}
        for pattern, changes in self.overrides.items():
            _check_pattern("overrides", pattern)
            if not isinstance(changes, dict):
                raise SpecError(f"overrides[{pattern!r}] is {changes!r}; give an object such as {{'bits': 3}}")
            try:
                specs[pattern] = changed(self.spec, changes)
            except SpecError as error:
                raise SpecError(f"overrides[{pattern!r}]: {error}") from None
        return specs

    @cached_property
    def _dense(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """Exact names (looked up) and patterns (tried one by one) of the modules left dense."""
        patterns = tuple(p for p in self.modules_to_not_convert if _is_pattern(p))
        return frozenset(self.modules_to_not_convert), patterns

    @cached_property
    def _override_patterns(self) -> tuple[str, ...]:
        return tuple(p for p in self.overrides if _is_pattern(p))

    def is_dense(self, name: str, *aliases: str) -> bool:
        """Whether ``modules_to_not_convert`` names this module, under this or another of its names."""
        exact, patterns = self._dense
        return any(n in exact or any(matches(p, n) for p in patterns) for n in (name, *aliases))

    def spec_for(self, name: str, *aliases: str) -> QuantSpec | None:
        """The spec of the module called ``name`` (or one of ``aliases``), None if it stays dense.

        Says nothing about whether the module can be quantized at all: that is for whoever knows the model.

        Raises:
            SpecError: two patterns give this module different specs.
        """
        if self.is_dense(name, *aliases):
            return None
        names = (name, *aliases)
        for alias in names:
            if alias in self.overrides:
                return self._override_specs[alias]
        hits = [p for p in self._override_patterns if any(matches(p, n) for n in names)]
        found = {self._override_specs[p] for p in hits}
        if len(found) > 1:
            raise SpecError(f"overrides {', '.join(map(repr, hits))} all match {name!r} and disagree; name it exactly")
        return found.pop() if found else self.spec

    def resolved(self, quantized: Mapping[str, QuantSpec], dense: Iterable[str], *, experts: bool = False) -> ModelSpec:
        """The same with exact names only, as a checkpoint holds it.

        Args:
            quantized: spec of every module that was quantized, by exact name.
            dense: exact names of every linear module that was not.
            experts: whether there are stacked experts among ``quantized``.
        """
        default = asdict(self.spec)
        overrides = {}
        for name, spec in quantized.items():
            if spec != self.spec:
                overrides[name] = {key: value for key, value in asdict(spec).items() if value != default[key]}
        return ModelSpec(self.spec, overrides, tuple(dense), self.lm_head, experts)

    # ---- JSON ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of config.json: plain JSON values."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            **self.spec.to_dict(),
            "overrides": {pattern: dict(changes) for pattern, changes in self.overrides.items()},
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "lm_head": self.lm_head,
            **({"experts": True} if self.experts else {}),  # without them, older versions can read it
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`: unknown keys are refused, and so is a record of another method or version.

        Raises:
            SpecError: one line that names the key and the rule.
        """
        if not isinstance(values, Mapping):
            raise SpecError(f"quantization_config is a {type(values).__name__}; a JSON object is needed")
        upstream = [key for key in _UPSTREAM_KEYS if key in values]
        if upstream:
            raise SpecError(
                f"quantization_config has {', '.join(upstream)}: a checkpoint of the original FLUTE, packed for one "
                "GPU; run flute convert on it"
            )
        method = values.get("quant_method")
        if method != QUANT_METHOD:
            raise SpecError(f"quantization_config has quant_method={method!r}; flute reads {QUANT_METHOD!r}")
        version = values.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise SpecError(
                f"format_version={version!r} is not {FORMAT_VERSION}; this flute is too old or too new for it"
            )
        unknown = sorted(str(key) for key in values if key not in _KEYS)
        missing = [key for key in _REQUIRED if key not in values]
        if unknown or missing:
            what = f"unknown key {', '.join(unknown)}" if unknown else f"no key {', '.join(missing)}"
            raise SpecError(f"quantization_config has {what}; its keys are {', '.join(_KEYS)}")
        return cls(
            QuantSpec.from_dict({key: values[key] for key in _SPEC_KEYS if key in values}),
            values.get("overrides", {}),
            values.get("modules_to_not_convert", ()),
            values.get("lm_head", False),
            values.get("experts", False),
        )
