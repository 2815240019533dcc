"""How a task is put to the model in words. Kept in the model folder: the same in training and use.

A caption has no prompt: it follows the image. The answer to a prompt is tokenised apart from it.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Templates:
    """Each holds ``{text}``, once: where the user's words go.

    question: before an answer; statement: before "true" or "false".
    """

    question: str = "Question: {text} Answer:"
    statement: str = "True or false? {text} Answer:"

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name).count("{text}") != 1:
                raise ValueError(f"template {item.name}: expected {{text}} in it, once")

    def ask(self, question: str) -> str:
        """The prompt of a question. Errors: ``ValueError`` for an empty one."""
        return self._fill(self.question, question, "question")

    def judge(self, statement: str) -> str:
        """The prompt of a statement, to be called true or false."""
        return self._fill(self.statement, statement, "statement")

    @staticmethod
    def _fill(template: str, text: str, what: str) -> str:
        if not text.strip():
            raise ValueError(f"the {what} is empty")
        return template.replace("{text}", text.strip())
