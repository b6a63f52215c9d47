"""Named tasks: which columns a kind of data has, and what to do where the rows do not say it.

A new task is one entry here; `--task` offers it.
"""

from dataclasses import dataclass

from fedfora.registry import Registry


@dataclass(frozen=True)
class Task:
    """What `--task` stands for; flags for single columns win.

    Args:
        instruction: What to do, for rows that do not say it themselves.
        prompt_column: Column with the text to work on.
        response_column: Column with the answer.
    """

    instruction: str = ""
    prompt_column: str = "input"
    response_column: str = "output"


TASKS: Registry[Task] = Registry("task")
TASKS.add("instruction", Task())
TASKS.add(
    "triples",
    Task(
        instruction=(
            "List the triples of this text, one on a line, as head_relation_tail, in the order of "
            "the text.\n"
        )
    ),
)
# The columns of the iCliniq consultations, and the original program's words for them.
TASKS.add(
    "medical-dialogue",
    Task(
        instruction=(
            "If you are a doctor, please answer the medical questions based on the patient's "
            "description."
        ),
        response_column="answer_icliniq",
    ),
)
