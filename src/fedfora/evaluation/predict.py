"""`fedfora predict`: adapter and rows to answers and scores; an interrupted run resumes."""

import errno
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedfora.data.encoding import (
    PromptFormat,
    answer_tokens,
    check_context,
    encode_examples,
    encode_prompts,
    prompt_format_of,
)
from fedfora.evaluation.generate import answer_batch, batches_by_length
from fedfora.evaluation.likelihood import answer_likelihoods, loss_scores, option_likelihoods
from fedfora.evaluation.output import (
    PARTIAL,
    PREDICTIONS,
    SCORES,
    Checked,
    Journal,
    finished_scores,
    write_predictions,
)
from fedfora.evaluation.scores import score
from fedfora.evaluation.settings import NO_EFFECT, PredictSettings
from fedfora.metrics import Answer
from fedfora.models.adapter_base import check_base, deviation, logits, merge_adapter, same_limit
from fedfora.models.loading import (
    Base,
    context_length,
    load_adapter,
    load_base,
    load_config,
    load_tokenizer,
)
from fedfora.reporting.record import RunRecord
from fedfora.reporting.report import finish_run
from fedfora.reporting.view import View

# What the adapter's training settled, and what applies at prediction too unless set again.
_PROMPT_SETTINGS = ("template", "source_prefix", "max_source_length", "max_target_length")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class PredictionPlan(Checked):
    """What is to be done, with the prompts."""

    prompts: list[list[int]]
    layout: PromptFormat


def predict(checked: Checked, view: View) -> dict[str, Any]:
    """Answer the rows of the test file, write predictions and scores, and return the scores.

    Base model, quantization and prompt format are those the adapter was trained with, unless the
    settings say otherwise. Rows without references are answered and not scored.

    Raises:
        ValueError: If rows, adapter, model or directory do not work; the message names the flag.
    """
    plan, asked = _prepare(checked), checked.settings.predict
    directory = Path(asked.output_dir)
    if not asked.overwrite_output_dir:
        scores = finished_scores(directory, plan.identity)
        if scores is not None:
            view.line(f"{directory} already holds the finished answers of this command")
            return scores
    base = load_base(plan.settings.model)
    base_fingerprint = check_base(base, plan.adapter_dir, plan.record)
    model = _model(plan, base, view)
    try:
        record = _open_record(plan, base_fingerprint)
        if asked.predict_with_generate:
            return _generate(plan, model, base.tokenizer, record, view)
        return _measure_loss(plan, model, base.tokenizer, record, view)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise ValueError(
            f"--output_dir {directory}: {error.strerror}; the answers so far are kept; run the "
            "same command again to resume"
        ) from error
    except KeyboardInterrupt:
        view.line("The answers so far are kept; run the same command again to resume.")
        raise


def _model(plan: PredictionPlan, base: Base, view: View) -> Any:
    if plan.adapter_dir is None:
        return base.model
    if not plan.settings.predict.merge:
        return load_adapter(base, plan.adapter_dir)
    limit = same_limit(base)
    merged, expected = merge_adapter(base, plan.adapter_dir)
    result = deviation(expected, logits(merged))
    result.check("the merged model", limit)
    view.line(f"merged: {result}")
    return merged


def _open_record(plan: PredictionPlan, base_fingerprint: str) -> RunRecord:
    """Make the run directory, or open that of the run that is continued."""
    if plan.settings.predict.overwrite_output_dir:
        for name in (PREDICTIONS, PARTIAL, SCORES):
            (Path(plan.settings.predict.output_dir) / name).unlink(missing_ok=True)
    record = RunRecord(plan.settings.predict.output_dir, overwrite=True)  # that was checked
    config = asdict(plan.settings)
    del config["given"]
    record.write_config(config, NO_EFFECT)
    record.write_environment(
        identity=plan.identity, base_fingerprint=base_fingerprint, rows=len(plan.examples)
    )
    return record


def _generate(
    plan: PredictionPlan, model: Any, tokenizer: Any, record: RunRecord, view: View
) -> dict[str, Any]:
    """Answer the rows that are not answered yet; when all are, score and write them."""
    started = time.monotonic()
    journal = Journal(record.directory / PARTIAL)
    answers = journal.read()
    pending = [i for i in range(len(plan.examples)) if i not in answers]
    if answers:
        view.line(f"rows answered before: {len(answers)} of {len(plan.examples)}")
    view.total = len(pending)
    evaluation = plan.settings.evaluation
    lengths = [len(plan.prompts[i]) + (evaluation.max_new_tokens or 1) for i in pending]
    for batch in batches_by_length(model, lengths, evaluation.per_device_eval_batch_size):
        rows = [pending[i] for i in batch]
        new = dict(zip(rows, _answer(plan, model, tokenizer, rows), strict=True))
        journal.append(new)
        answers |= new
        view.advance(len(rows), f"row {len(answers)}/{len(plan.examples)}")
    ordered = [answers[i] for i in range(len(plan.examples))]
    scores, row_scores = _score(plan, ordered)
    path = record.directory / PREDICTIONS
    write_predictions(path, plan.examples, ordered, row_scores, plan.kind)
    if scores:
        record.write_json(SCORES, scores)
    seconds = time.monotonic() - started
    record.log("predicted", rows=len(pending), rows_per_s=len(pending) / seconds, scores=scores)
    finish_run(record)
    journal.path.unlink(missing_ok=True)
    return scores


def _answer(
    plan: PredictionPlan, model: Any, tokenizer: Any, rows: list[int]
) -> list[dict[str, Any]]:
    """Return what is kept of each row of a batch: its prediction, and a choice's likelihoods."""
    evaluation, decoding = plan.settings.evaluation, plan.settings.decoding
    prompts, length = [plan.prompts[i] for i in rows], evaluation.max_new_tokens or 1
    texts = answer_batch(model, tokenizer, prompts, decoding, max_new_tokens=length, first=rows[0])
    if plan.kind != "choice":
        return [{"prediction": text} for text in texts]
    examples, options = [plan.examples[i] for i in rows], [plan.options[i] for i in rows]
    size = evaluation.per_device_eval_batch_size
    likelihoods = option_likelihoods(
        model, tokenizer, examples, options, plan.layout, batch_size=size
    )
    return [
        {
            "prediction": text,
            "options": plan.options[i],
            "log_probabilities": likelihoods,
            "likeliest": likelihoods.index(max(likelihoods)),
        }
        for i, text, likelihoods in zip(rows, texts, likelihoods, strict=True)
    ]


def _score(
    plan: PredictionPlan, answers: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[int, dict[str, float]]]:
    """Return the scores of all rows that have references, and those of each."""
    known = [i for i, example in enumerate(plan.examples) if example.output is not None]
    if not known or plan.kind is None or not plan.settings.predict.do_eval:
        return {}, {}
    rows = [
        Answer(
            answers[i]["prediction"],
            str(plan.examples[i].output),
            prompt=plan.examples[i].prompt,
            options=plan.options[i],
            likeliest=answers[i].get("likeliest"),
        )
        for i in known
    ]
    scores = score(
        rows,
        plan.kind,
        seed=plan.settings.decoding.seed,
        original=plan.settings.predict.original_scores,
    )
    return scores.summary, dict(zip(known, scores.rows, strict=True))


def _measure_loss(
    plan: PredictionPlan, model: Any, tokenizer: Any, record: RunRecord, view: View
) -> dict[str, Any]:
    """Measure how likely the references are, without writing answers."""
    view.total = len(plan.examples)
    likelihoods = answer_likelihoods(
        model,
        encode_examples(plan.examples, tokenizer, plan.layout),
        batch_size=plan.settings.evaluation.per_device_eval_batch_size,
        on_batch=lambda rows: view.advance(rows, f"row {int(view.done) + rows}"),
    )
    scores = loss_scores(likelihoods)
    record.write_json(SCORES, scores)
    record.log("measured", **scores)
    finish_run(record)
    return scores


def _prepare(checked: Checked) -> PredictionPlan:
    """Make the prompts, and refuse what is too long; the model's weights are not read for it."""
    settings, examples = checked.settings, checked.examples
    tokenizer = load_tokenizer(settings.model)
    layout = _layout(settings, checked.record, tokenizer)
    prompts = encode_prompts(examples, tokenizer, layout)
    answers = [settings.evaluation.max_new_tokens or 0] * len(examples)
    if not settings.predict.predict_with_generate:  # the references are read instead
        most = layout.max_target_length
        answers = [min(answer_tokens(example, tokenizer), most) for example in examples]
    lengths = [len(ids) + answer for ids, answer in zip(prompts, answers, strict=True)]
    source = str(settings.data.test_file or settings.data.dataset)
    check_context(context_length(load_config(settings.model)), lengths, source)
    return PredictionPlan(**vars(checked), prompts=prompts, layout=layout)


def _layout(settings: PredictSettings, record: dict[str, Any], tokenizer: Any) -> PromptFormat:
    own = prompt_format_of(settings.data, tokenizer)
    if not record:
        return own
    explicit = [name for name in _PROMPT_SETTINGS if name in settings.given]
    if settings.data.template == "auto":
        explicit = [name for name in explicit if name != "template"]
    changes = {name: getattr(own, name) for name in explicit}
    layout = replace(PromptFormat(**record["prompts"]), **changes)
    if layout.template == "chat" and not tokenizer.chat_template:
        raise ValueError(
            f"--model_name_or_path {settings.model.model_name_or_path} has no chat template, and "
            "the adapter was trained with its base's: this is not its base (or --template plain)"
        )
    return layout
