"""One party run by FATE-LLM's own Seq2SeqRunner, from the configuration that fedfora makes.

usage: runner_worker.py DUMP_DIR IGNORED FLAGS...

With today's libraries that runner needs two shims, both here and neither in fedfora, which does not
use the runner: FATE's components declare their models for pydantic 1, and FATE-LLM's trainer hands
over a `tokenizer`, which transformers 5 calls `processing_class`.
"""

import logging
import sys
from pathlib import Path

import pydantic
import pydantic.v1
import transformers

modern = sys.modules["pydantic"]
sys.modules["pydantic"] = pydantic.v1
from fate.components.core import ARBITER, GUEST, HOST  # noqa: E402

sys.modules["pydantic"] = modern

original = transformers.Trainer.__init__


def with_tokenizer(self, *args, tokenizer=None, **kwargs):
    original(self, *args, processing_class=tokenizer, **kwargs)


transformers.Trainer.__init__ = with_tokenizer

from fate_llm.runner.homo_seq2seq_runner import Seq2SeqRunner  # noqa: E402

from fedfora.config import ConfigParser  # noqa: E402
from fedfora.integrations.fate.connection import join  # noqa: E402
from fedfora.integrations.fate.runner_conf import runner_conf  # noqa: E402
from fedfora.integrations.fate.settings import SECTIONS, FateSettings  # noqa: E402


def main(dump_dir, words):
    logging.disable(logging.WARNING)
    settings = FateSettings(*ConfigParser(SECTIONS.values()).parse(words))
    party = settings.fate.own_party()
    ctx, _ = join(settings.fate, party)
    runner = Seq2SeqRunner(**runner_conf(settings, seed=7))
    runner.set_context(ctx)
    runner.set_role({"guest": GUEST, "host": HOST, "arbiter": ARBITER}[party[0]])
    Path(dump_dir).mkdir(parents=True)
    runner.train(settings.data.train_file, output_dir=str(dump_dir))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3:])
