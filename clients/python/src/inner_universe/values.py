"""The server's JSON as Python values. Rows come as objects or as arrays, depending on the message; here both become dicts."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any, Mapping, Sequence

Type = Mapping[str, Any]
Row = dict[str, Any]

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_WIDE = {"U128", "I128", "U256", "I256"}


def _name(element: Mapping[str, Any], index: int) -> str:
    name = element.get("name") or {}
    return str(name["some"]) if "some" in name else f"_{index}"


def decode(ty: Type, value: Any, types: Sequence[Type] = ()) -> Any:
    """A value of an algebraic type. Identities are hex, timestamps aware datetimes, options None or the value, enums their
    names, other sums `{"tag": NAME, "value": VALUE}`, bytes bytes."""
    kind, inner = next(iter(ty.items()))
    if kind == "Ref":
        return decode(types[inner], value, types)
    if kind == "Product":
        return _product(inner["elements"], value, types)
    if kind == "Sum":
        return _sum(inner["variants"], value, types)
    if kind == "Array":
        if "U8" in inner:
            return bytes.fromhex(value.removeprefix("0x")) if isinstance(value, str) else bytes(value)
        return [decode(inner, item, types) for item in value]
    if kind in _WIDE and isinstance(value, str):
        return int(value, 16) if value.startswith("0x") else int(value)
    return value


def _product(elements: Sequence[Mapping[str, Any]], value: Any, types: Sequence[Type]) -> Any:
    names = [_name(element, index) for index, element in enumerate(elements)]
    parts = [value[name] for name in names] if isinstance(value, Mapping) else value
    if len(names) == 1 and names[0].startswith("__"):
        return _special(names[0], parts[0])
    return {
        name: decode(element["algebraic_type"], part, types)
        for name, element, part in zip(names, elements, parts)
    }


def _special(name: str, value: Any) -> Any:
    if name == "__timestamp_micros_since_unix_epoch__":
        return _EPOCH + timedelta(microseconds=int(value))
    if name == "__time_duration_micros__":
        return timedelta(microseconds=int(value))
    if name == "__connection_id__":
        return int(value, 16) if isinstance(value, str) else int(value)
    return value.removeprefix("0x") if isinstance(value, str) else value


def _sum(variants: Sequence[Mapping[str, Any]], value: Any, types: Sequence[Type]) -> Any:
    names = [_name(variant, index) for index, variant in enumerate(variants)]
    if isinstance(value, Mapping):
        name, payload = next(iter(value.items()))
        tag = names.index(name)
    else:
        tag, payload = int(value[0]), value[1]
    ty = variants[tag]["algebraic_type"]
    if names == ["some", "none"]:
        return None if tag == 1 else decode(ty, payload, types)
    if all(_is_unit(variant["algebraic_type"]) for variant in variants):
        return names[tag]
    return {"tag": names[tag], "value": None if _is_unit(ty) else decode(ty, payload, types)}


def _is_unit(ty: Type) -> bool:
    return "Product" in ty and not ty["Product"]["elements"]


class Tables:
    """The tables of a module, by the server's description of it."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._types: list[Type] = schema["typespace"]["types"]
        self._tables = {table["name"]: self._types[table["product_type_ref"]] for table in schema["tables"]}

    def row(self, table: str, value: Any) -> Row:
        """A row of `table`."""
        row: Row = decode(self._tables[table], value, self._types)
        return row


def sql_rows(answer: Mapping[str, Any]) -> list[Row]:
    """The rows of an answer to a statement."""
    return [_product(answer["schema"]["elements"], row, ()) for row in answer["rows"]]
