"""The user's settings for data: files, columns, lengths, template."""

from dataclasses import dataclass
from typing import Literal

from fedfora.config import Options, flag
from fedfora.registry import Registry

# Named tasks: which columns a kind of data has, and what to do if the rows do not say it. A new
# task is one entry here; `--task` offers it.


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
        "List the triples of this text, one on a line, as head_relation_tail, in the order of the "
        "text.\n"
    ),
)
# The columns of the iCliniq consultations, and the original program's words for them.
TASKS.add(
    "medical-dialogue",
    Task(
        "If you are a doctor, please answer the medical questions based on the patient's "
        "description.",
        response_column="answer_icliniq",
    ),
)


@dataclass
class DataArguments(Options):
    """Data: files, columns, prompt format."""

    train_file: str | None = flag(
        None,
        "training rows: .json, .jsonl, .csv, .parquet, an id on the Hub, or 'clinic'",
        often=True,
    )
    test_file: str | None = flag(
        None, "held-out rows, never trained on; 'clinic:test' is bundled", "--test_path", often=True
    )
    dataset: str | None = flag(None, "a data set of dataset_info.json, instead of a file")
    dataset_dir: str = flag("data", "directory of dataset_info.json")
    task: str = flag(
        "instruction", "kind of task: column names and a default instruction", choices=sorted(TASKS)
    )
    instruction_column: str = flag("instruction", "column with the instruction; may be absent")
    prompt_column: str | None = flag(
        None, "column with the input text; may be empty; default: the task's, usually input"
    )
    response_column: str | None = flag(
        None, "column with the answer; default: the task's, usually output"
    )
    history_column: str | None = flag(
        None, "column with earlier [question, answer] pairs of a conversation"
    )
    source_prefix: str = flag("", "text put before every prompt")
    max_source_length: int = flag(
        512, "prompts are cut to this many tokens", "--max_src_len", least=1
    )
    max_target_length: int = flag(
        512, "answers are cut to this many tokens, end-of-sequence included", least=2
    )
    template: Literal["auto", "plain", "chat"] = flag(
        "auto", "prompt template; auto: the model's chat template if it has one"
    )
    preprocessing_num_workers: int = flag(
        1, "processes that tokenize; useful from about 100,000 rows", least=1
    )
    overwrite_cache: bool = flag(
        False, "tokenize again even if --cache_dir holds the rows of an earlier training"
    )
    skip_bad_rows: bool = flag(False, "skip broken rows and report their count instead of stopping")
    canaries: int = flag(
        0,
        "made-up secrets to add to the training rows; `fedfora audit` tests whether they leaked",
        least=0,
    )
    canary_site: int = flag(0, "index of the site that trains on the canaries", least=0)
    canary_copies: int = flag(1, "copies of each canary", least=1)
