"""The words around questions and statements. They are stored in the model folder.

So they are the same in training and in use. A caption has no prompt: it follows the image. Prompt
and answer are tokenized separately.
"""

from dataclasses import dataclass, fields

from multimodal.schemas import check_fields


@dataclass(frozen=True)
class Templates:
    """Each template holds ``{text}`` once, in the place of the user's words.

    Args:
        question: what an answer follows.
        statement: what "true" or "false" follows.
    """

    question: str = "Question: {text} Answer:"
    statement: str = "True or false? {text} Answer:"

    def __post_init__(self) -> None:
        check_fields(self)
        for item in fields(self):
            if getattr(self, item.name).count("{text}") != 1:
                raise ValueError(f"template {item.name}: expected {{text}} in it, once")

    def ask(self, question: str) -> str:
        """The prompt of a question. Raises ``ValueError`` for an empty one."""
        return self._fill(self.question, question, "question")

    def judge(self, statement: str) -> str:
        """The prompt of a statement that is to be called true or false."""
        return self._fill(self.statement, statement, "statement")

    @staticmethod
    def _fill(template: str, text: str, what: str) -> str:
        if not text.strip():
            raise ValueError(f"the {what} is empty")
        return template.replace("{text}", text.strip())
