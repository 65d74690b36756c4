"""The settings in a `config.json`, by name, wherever they stand and however they are spelt.

The rule of reading, once for all of them: a setting may stand in several places and under several
names. Null and absent are the same and agree with everything; values that are set must agree, or
the file is refused, since two programs would each follow another one. What is not read is asked
about in `known_fields`, wherever it stands: harmful values are refused, unknown names reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from megrez_gguf.errors import ConfigError
from megrez_gguf.text import clip

T = TypeVar("T")

# Objects whose fields are settings of the model like those beside them.
_ROPE = ("rope_parameters", "rope_scaling")
_TEXT = "text_config"
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")

# Other spellings of what is read, as the families that Megrez2 borrows from have them.
ALIASES = {
    "bias": "attention_bias",
    "qkv_bias": "attention_bias",
    "use_qkv_bias": "attention_bias",
    "add_qkv_bias": "attention_bias",
    "attention_head_dim": "head_dim",
    "kv_channels": "head_dim",
    "dtype": "torch_dtype",
    "hidden_activation": "hidden_act",
    "activation_function": "hidden_act",
    "moe_k": "num_experts_per_tok",
    "moe_top_k": "num_experts_per_tok",
    "moe_topk": "num_experts_per_tok",
    "num_experts_per_token": "num_experts_per_tok",
    "moe_num_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "moe_num_shared_experts": "n_shared_experts",
    "num_shared_experts": "n_shared_experts",
    "moe_renormalize": "norm_topk_prob",
    "moe_routed_scaling_factor": "routed_scaling_factor",
    "route_scale": "routed_scaling_factor",
    "router_scaling_factor": "routed_scaling_factor",
    "num_expert_group": "n_group",
    "num_mtp_layers": "num_nextn_predict_layers",
    "rope_base": "rope_theta",
    "rotary_base": "rope_theta",
    "rotary_embedding_base": "rope_theta",
    "rope_percent": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
    "rotary_percent": "partial_rotary_factor",
}
# In the objects of the rotary embedding; elsewhere these names are too general to mean this.
_ROPE_ALIASES = ALIASES | {
    "type": "rope_type",
    "factor": "rope_factor",
    "truncate": "rope_truncate",
}

_SHOWN = {"rope_factor": "factor", "rope_truncate": "truncate"}


def _is_layer_type(key: str, value: Any) -> bool:
    """Whether `key` of an object of the rotary embedding stands for such an object itself."""
    return key in _LAYER_TYPES or (
        isinstance(value, dict) and not value.keys().isdisjoint(("rope_theta", "rope_type", "type"))
    )


class Settings:
    """Typed reads of a parsed `config.json`; remembers what was read."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        """Raises ConfigError for a place that is no object, or types of layer that differ."""
        self.source = source
        self.remarks: list[str] = []
        """What the user should know of values that were accepted."""
        self._found: dict[str, list[tuple[str, Any]]] = {}
        self._read: set[str] = set()
        self._collect(raw, "")

    # --- where settings stand ---

    def _collect(self, raw: Mapping[str, Any], prefix: str) -> None:
        """The whole file, or its object for the language model."""
        places = _ROPE if prefix else (*_ROPE, _TEXT)
        for key, value in raw.items():
            where = prefix + key
            if key not in places:
                self._add(ALIASES.get(key, key), where, value)
            elif value is not None and not isinstance(value, dict):
                self.fail(where, f"expected an object or null, found {clip(value)}")
            elif value and key == _TEXT:
                self._collect(value, f"{where}.")
            elif value:
                self._collect_rope(value, where)

    def _collect_rope(self, raw: Mapping[str, Any], place: str) -> None:
        """An object of the rotary embedding, or one that holds such an object for each type of
        layer."""
        kinds = [key for key, value in raw.items() if _is_layer_type(key, value)]
        for other in kinds[1:]:
            if raw[other] != raw[kinds[0]]:
                self.disagree(*((f"{place}.{kind}", raw[kind]) for kind in (kinds[0], other)))
        if kinds:
            beside = {key: value for key, value in raw.items() if key not in kinds}
            place, raw = f"{place}.{kinds[0]}", raw[kinds[0]]
            if not isinstance(raw, dict):
                self.fail(place, f"expected an object, found {clip(raw)}")
            for key, value in beside.items():
                self._add(_ROPE_ALIASES.get(key, key), f"{place.rpartition('.')[0]}.{key}", value)
        for key, value in raw.items():
            self._add(_ROPE_ALIASES.get(key, key), f"{place}.{key}", value)
        if raw.get("rope_type") is None and raw.get("type") is None:
            if raw.get("factor") not in (None, 1):
                self.fail(
                    f"{place}.rope_type",
                    f"missing beside factor = {clip(raw['factor'])}; name the type that is meant "
                    "(linear, yarn), or default for none",
                )
            # As everybody reads it; what stands elsewhere may contradict it.
            self._add("rope_type", f"{place}.rope_type", "default")

    def _add(self, name: str, where: str, value: Any) -> None:
        self._found.setdefault(name, []).append((where, value))

    def fields(self) -> Iterator[tuple[str, str, Any]]:
        """(name, where it stands, value) of all that is set, also of what was read."""
        for name, found in self._found.items():
            for where, value in found:
                if value is not None:
                    yield name, where, value

    def unread(self) -> Iterator[tuple[str, str, Any]]:
        """`fields` that nobody has read so far."""
        return (field for field in self.fields() if field[0] not in self._read)

    # --- what is wrong with them ---

    def fail(self, where: str, reason: str) -> NoReturn:
        raise ConfigError(f"{self.source}: `{where}`: {reason}")

    def disagree(self, one: tuple[str, Any], other: tuple[str, Any]) -> NoReturn:
        self.fail(
            one[0],
            f"is {clip(one[1])}, and `{other[0]}` is {clip(other[1])}: they set the same, and "
            "programs differ in which one they follow; leave only the one that is meant",
        )

    # --- typed reads ---

    def values(self, name: str) -> list[Any]:
        """The values of a setting, not checked."""
        return [value for _, value in self._found.get(name, ()) if value is not None]

    def has(self, name: str) -> bool:
        """Whether the setting has a value anywhere."""
        return bool(self.values(name))

    def ignore(self, name: str) -> list[str]:
        """Where a setting has values, which are not asked about any more."""
        self._read.add(name)
        return [where for where, value in self._found.get(name, ()) if value is not None]

    def is_null(self, name: str) -> bool:
        """Whether the setting is there, and null wherever it is."""
        return name in self._found and not self.has(name)

    def where(self, name: str) -> str:
        """The first place where the setting has a value, or is null, or its name."""
        found = self._found.get(name, [])
        places = [where for where, value in found if value is not None] + [w for w, _ in found]
        return places[0] if places else _SHOWN.get(name, name)

    def read(
        self, name: str, expected: str, parse: Callable[[str, Any], T], default: T | None = None
    ) -> T:
        """The one value of a setting; `parse(where, value)` checks its type.

        Raises ConfigError: it is missing and has no default, or two of its values differ.
        """
        self._read.add(name)
        found = [(w, value, parse(w, value)) for w, value in self._found.get(name, ())
                 if value is not None]  # fmt: skip
        if not found:
            if default is None:
                self.fail(self.where(name), f"required ({expected}) and missing")
            return default
        for other in found[1:]:
            if other[2] != found[0][2]:
                self.disagree(found[0][:2], other[:2])
        return found[0][2]

    def integer(
        self, name: str, default: int | None = None, minimum: int = 0, maximum: int = 2**31 - 1
    ) -> int:
        def parse(where: str, value: Any) -> int:
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, bool) or not isinstance(value, int):
                self.fail(where, f"expected an integer, found {clip(value)}")
            if not minimum <= value <= maximum:
                self.fail(
                    where, f"expected an integer from {minimum} to {maximum}, found {clip(value)}"
                )
            return value

        return self.read(name, "integer", parse, default)

    def number(self, name: str, default: float | None = None, positive: bool = False) -> float:
        """A number that float32, which GGUF stores it in, can hold."""

        def parse(where: str, value: Any) -> float:
            if isinstance(value, bool) or not isinstance(value, int | float):
                self.fail(where, f"expected a number, found {clip(value)}")
            # Not math.isfinite, which whole numbers may overflow.
            if not -3.4e38 < value < 3.4e38 or (positive and value < 1.2e-38):
                self.fail(
                    where,
                    f"expected a finite{' positive' if positive else ''} number, "
                    f"found {clip(value)}",
                )
            return float(value)

        return self.read(name, "number", parse, default)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        def parse(where: str, value: Any) -> bool:
            if not isinstance(value, bool):
                self.fail(where, f"expected true or false, found {clip(value)}")
            return value

        if default and self.is_null(name):
            self.fail(
                self.where(name), "is null, which Python code takes for false; write true or false"
            )
        return self.read(name, "true or false", parse, default)

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> Any:
        """One of `allowed`, in any case of letters."""

        def parse(where: str, value: Any) -> str:
            lower = value.lower() if isinstance(value, str) else value
            if lower not in allowed:
                self.fail(where, f"{clip(value)} is not supported; known: {', '.join(allowed)}")
            return str(lower)

        return self.read(name, "string", parse, default)

    def a_list(self, name: str) -> list[Any]:
        """Empty where it is missing."""

        def parse(where: str, value: Any) -> list[Any]:
            if not isinstance(value, list):
                self.fail(where, f"expected a list, found {clip(value)}")
            return value

        return self.read(name, "list", parse, [])
