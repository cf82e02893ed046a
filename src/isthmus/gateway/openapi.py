"""The OpenAPI 3.1 document, made from the table of operations and the msgspec types they name."""

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from isthmus.core.api import ErrorBody
from isthmus.core.model import ISTHMUS_VERSION, Record
from isthmus.gateway.operations import JSON, MSGPACK, Operation

_REFERENCE = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"{(\w+)}")


class Failure(Record, frozen=True):
    """What every answer of status 400 and above holds."""

    error: ErrorBody


def document(operations: Iterable[Operation]) -> dict[str, Any]:
    operations = list(operations)
    types = [
        kind for operation in operations for kind in (operation.body, operation.reply) if _has_schema(kind)
    ]
    queries = [operation.query for operation in operations]
    schemas, components = msgspec.json.schema_components([*types, Failure, *queries], ref_template=_REFERENCE)
    schema_of = {
        repr(kind): schema for kind, schema in zip([*types, Failure, *queries], schemas, strict=True)
    }
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described = _describe(operation, schema_of, components)
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "isthmus", "version": ISTHMUS_VERSION, "description": __doc__.strip()},
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe(operation: Operation, schema_of: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    reply_media = MSGPACK if operation.packed_reply else operation.media
    reply = schema_of[repr(operation.reply)] if _has_schema(operation.reply) else {"type": "string"}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": _operation_id(operation),
        "description": f"Roles: {', '.join(sorted(operation.roles))}.",
        "parameters": _parameters(operation, schema_of, components),
        "responses": {
            str(operation.status): {"description": "Done.", "content": {reply_media: {"schema": reply}}},
            "default": {
                "description": "Failed; `error.code` is a class name in isthmus.core.errors.",
                "content": {JSON: {"schema": schema_of[repr(Failure)]}},
            },
        },
    }
    if operation.body is not None:
        media = MSGPACK if operation.packed_body else JSON
        content = {media: {"schema": schema_of[repr(operation.body)]}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _parameters(
    operation: Operation, schema_of: dict[str, Any], components: dict[str, Any]
) -> list[dict[str, Any]]:
    path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(operation.path)
    ]
    component = components[schema_of[repr(operation.query)]["$ref"].rpartition("/")[2]]
    query = [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in component.get("properties", {}).items()
    ]
    return path + query


def _operation_id(operation: Operation) -> str:
    words = [_PARAMETER.sub(r"\1", part) for part in operation.path.split("/") if part not in ("", "v1")]
    return "_".join([operation.method.lower(), *words]).replace("-", "_").replace(".", "_")


def _has_schema(kind: Any) -> bool:
    return kind is not None and kind is not bytes
