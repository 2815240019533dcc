"""How a language model was taught to talk: its chat template.

What the template writes may be control tokens. What somebody says is text, whatever it looks like.
So the template is rendered twice: with what is said, and with marks in its place.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

MARK = "\ue000{}\ue001"  # of the range for private use
MARKS = re.compile("\ue000([0-9]+)\ue001")
ROLES = ("system", "user", "assistant")


class Piece(NamedTuple):
    """A part of a conversation as the model reads it. said: by somebody, not by the template."""

    text: str
    said: bool


@dataclass(frozen=True)
class ChatFormat:
    """How the language model that a tokenizer belongs to was taught to talk.

    Attributes:
        template: Jinja, as Hugging Face writes it.
        end: the token that ends a turn.
        begin: the token that begins a text, if there is one.
    """

    template: str
    end: str
    begin: str = ""

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
        """What the model reads, up to where it answers.

        The template runs in Jinja's sandbox, with what transformers gives to it. It may leave out
        white space around what is said, and what a model thought before it said it.

        Args:
            messages: ``role`` (one of ROLES) and ``content`` of each.

        Raises:
            ValueError: with the reason, if the template refuses them.
        """
        said = [dict(message) for message in messages]
        marked = [{**message, "content": MARK.format(n)} for n, message in enumerate(said)]
        parts, whole = MARKS.split(self._written(marked)), self._written(said)
        pieces, place = [Piece(parts[0], False)], len(parts[0])
        follows = whole.startswith(parts[0])
        for number, after in zip(parts[1::2], parts[2::2], strict=True):
            forms = _forms(said[int(number)]["content"])
            form = next((form for form in forms if whole.startswith(form + after, place)), None)
            follows, form = follows and form is not None, forms[0] if form is None else form
            pieces += [Piece(form, True), Piece(after, False)]
            place += len(form + after)
        if follows and place == len(whole):
            return pieces
        # The template does something else with it: each message as it is.
        numbers = iter(parts[1::2])
        return [Piece(said[int(next(numbers))]["content"], True) if p.said else p for p in pieces]

    def _written(self, messages: Sequence[Mapping[str, str]]) -> str:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %}: what an assistant says, for trainings. It is written as it is."""

            tags = {"generation"}

            def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
                next(parser.stream)
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return list[nodes.Node](body)

        def refuse(reason: str) -> NoReturn:
            raise TemplateError(reason)

        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", Generation],
        )
        sandbox.globals |= {
            "raise_exception": refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        sandbox.filters["tojson"] = _to_json
        try:
            return sandbox.from_string(self.template).render(
                messages=messages,
                add_generation_prompt=True,
                eos_token=self.end,
                bos_token=self.begin,
            )
        except Exception as error:  # a template may do anything that Jinja can
            raise ValueError(f"the chat template of the model refuses this: {error}") from error


def _forms(content: str) -> tuple[str, ...]:
    """What templates make of what is said: it is as it is, or stripped, or without thoughts."""
    said = content.rpartition("</think>")[2]
    forms = (content, content.strip(), content.lstrip(), content.rstrip())
    return (*forms, said, said.lstrip("\n"), said.strip())


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
