"""How a language model was taught to talk: its chat template.

What the template writes may be control tokens. What somebody says is text, whatever it looks like.
So the template is rendered with marks in the place of what is said.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

MARK = "\ue000{}\ue001"  # of the range for private use
MARKS = re.compile("\ue000([0-9]+)\ue001")


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

    def render(self, roles: Sequence[str]) -> list[str | int]:
        """What the template writes, up to where the model answers, and numbers of messages.

        It runs in Jinja's sandbox, with what transformers gives to it.

        Args:
            roles: of the messages: system, user or assistant.

        Raises:
            ValueError: with the reason, if the template refuses them.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(reason: str) -> NoReturn:
            raise TemplateError(reason)

        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.globals["raise_exception"] = refuse
        messages = [{"role": role, "content": MARK.format(n)} for n, role in enumerate(roles)]
        try:
            written = sandbox.from_string(self.template).render(
                messages=messages,
                add_generation_prompt=True,
                eos_token=self.end,
                bos_token=self.begin,
            )
        except Exception as error:  # a template may do anything that Jinja can
            raise ValueError(f"the chat template of the model refuses this: {error}") from error
        return [int(piece) if n % 2 else piece for n, piece in enumerate(MARKS.split(written))]
