"""Whether a text is JSON that follows a schema, by the library jsonschema.

https://json-schema.org: ``$schema`` names its draft, by default 2020-12. A ``$ref`` leads to
another place of the same schema: nothing is fetched.
"""

import json
from collections.abc import Container, Mapping
from importlib import import_module
from typing import Any

NEEDS = "json_schema needs: pip install multimodal[filters]"
MAX_SHOWN = 100  # characters of what the schema expects, in a reason


class JsonSchema:
    """Checks texts.

    Raises:
        ValueError: for a schema that is not valid.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        try:
            library, referencing = import_module("jsonschema"), import_module("referencing")
        except ImportError as error:
            raise ValueError(f"{NEEDS} ({error})") from error
        self._unresolvable = referencing.exceptions.Unresolvable
        draft = library.Draft202012Validator
        if "$schema" in schema:
            draft = library.validators.validator_for(schema, default=None)
        if draft is None:
            raise ValueError(f"json_schema: $schema {schema['$schema']!r:.80} is unknown")
        try:
            plain = json.loads(json.dumps(schema, allow_nan=False))  # YAML has dates, too
            draft.check_schema(plain)
        except library.SchemaError as error:
            raise ValueError(f"json_schema: {error.json_path}: {error.message:.200}") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"json_schema: is not JSON ({error})") from error
        self._validator = draft(plain, registry=referencing.Registry())  # its own one fetches

    def problem(self, text: str) -> str | None:
        """What is wrong with a text: the first error, and where. None: it follows the schema.

        It quotes the schema and not the text, because reasons stay where texts are not kept.
        """
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return "is not JSON"
        try:
            error = next(self._validator.iter_errors(value), None)
        except self._unresolvable as wrong:
            return f"the schema cannot be followed: {wrong!s:.{MAX_SHOWN}}"
        except (RecursionError, ArithmeticError) as wrong:  # nested too deep, 1e999
            return f"the schema cannot be followed: {type(wrong).__name__}"
        if error is None:
            return None
        place = "$" + "".join(_step(s, error.absolute_schema_path) for s in error.absolute_path)
        if error.validator is None:  # the schema of a value in it is false
            return f"{place}: has what is never allowed"
        expected = json.dumps(error.validator_value, ensure_ascii=False)
        return f"{place}: expected {error.validator} {expected:.{MAX_SHOWN}}"


def _step(step: str | int, known: Container[object]) -> str:
    """A step of a path. Names that the schema does not have are a part of the text."""
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if step in known else ".*"


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
