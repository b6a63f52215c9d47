"""fedfora check data FILE: what a file of rows holds, what is wrong, what training would take.

`fedfora check site --kit DIR` and `fedfora check federation --kit DIR` check a kit;
`fedfora check privacy --rows N --target_epsilon 8` says what a budget leaves to learn.

--test_file adds the rows that are in both files; --model adds token lengths, a rendered row, and
the memory and time that training would take, timed on two steps that are thrown away.
"""

import time
from collections.abc import Sequence
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfora.cli.console import print_results, runs_part, silence_libraries
from fedfora.config import ConfigParser
from fedfora.data.settings import DataArguments
from fedfora.models.resolve import checked_model_name
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.privacy.accounting import epsilon_of, replace_one_epsilon_of
from fedfora.privacy.outlook import OutlookArguments, expectation, noise_to_signal
from fedfora.privacy.settings import PrivacyArguments
from fedfora.registry import counted, printable
from fedfora.training.settings import TrainArguments, check_record_privacy, planned_release

if TYPE_CHECKING:
    from fedfora.data.checks import RowsReport
    from fedfora.data.encoding import Encoded


SHOWN = 10  # findings listed of each kind; all are counted
SECTIONS = (DataArguments, ModelArguments, AdapterArguments, TrainArguments)


def run(argv: Sequence[str]) -> None:
    """Run the check that the first word names; without one, that of a file of rows."""
    kits = {kind: partial(run_kit, kind) for kind in ("site", "federation")}
    parts: dict[str, Any] = {"data": run_data, **kits, "privacy": run_privacy}
    if Path(*argv[:1]).suffix or not runs_part(argv, parts):
        run_data(argv)


def run_data(words: Sequence[str]) -> None:
    """Parse, look, and print what was found.

    Raises:
        ValueError: If rows are broken, so that the exit status says so.
    """
    parser = ConfigParser(SECTIONS, description=__doc__, first="train_file")
    data, model, adapter, train = parser.parse(words)
    silence_libraries()
    if model.model_name_or_path is not None:
        checked_model_name(model)
    from fedfora.data.checks import read_rows, rows_in_common
    from fedfora.data.loading import check_columns
    from fedfora.data.sources import chosen_source

    source, data = chosen_source(data.train_file, data, flag="FILE")
    report = read_rows(source, data)
    if report.examples:
        check_columns(report.examples, data, source)
    _print_rows(report)
    if data.test_file is not None:
        test = read_rows(data.test_file, data)
        common = [f"{one} is {other}" for one, other in rows_in_common(report, test)]
        _print_findings(f"prompts that are in {test.source} too", common)
    if model.model_name_or_path is not None and report.examples:
        _print_cost(model, adapter, train, _print_lengths(report, data, model))
    if report.broken and not data.skip_bad_rows:
        raise ValueError(f"{source}: {counted(len(report.broken), 'broken row')} (--skip_bad_rows)")


def _print_rows(report: "RowsReport") -> None:
    rows = len(report.examples) + len(report.broken)
    print(f"{report.source}: {counted(rows, 'row')}")
    for column, count in report.columns.most_common():
        print(f"  column {column!r}: in {counted(count, 'row')}")
    _print_findings("broken rows", report.broken)
    _print_findings("empty answers", report.empty_answers())
    doubles = [f"{place} says the same as {first}" for place, first in report.duplicates()]
    _print_findings("duplicates", doubles)


def _print_findings(what: str, findings: list[str]) -> None:
    print(f"{what}: {len(findings)}")
    for finding in findings[:SHOWN]:
        print(f"  {printable(finding, 1000)}")
    if len(findings) > SHOWN:
        print(f"  ... and {len(findings) - SHOWN} more")


def _print_lengths(report: "RowsReport", data: DataArguments, model: ModelArguments) -> "Encoded":
    """Print percentiles and a row; return the rows as they would be trained."""
    from fedfora.data.checks import PERCENTILES, token_percentiles
    from fedfora.data.encoding import encode_and_count, prompt_format_of, spells_control_token
    from fedfora.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    prompt_format = prompt_format_of(data, tokenizer)
    limits = {"prompt": prompt_format.max_source_length, "answer": prompt_format.max_target_length}
    print("tokens          " + "".join(f"{f'{p} %':>8s}" for p in PERCENTILES) + "   limit")
    for name, values in token_percentiles(report.examples, tokenizer, prompt_format).items():
        numbers = "".join(f"{values[p]:8d}" for p in PERCENTILES)
        print(f"  {name:14s}{numbers}{limits[name]:8d}")
    rows = zip(report.places, report.examples, strict=True)
    spelled = [place for place, row in rows if spells_control_token(row, tokenizer)]
    _print_findings("rows that spell a control token (it stays text)", spelled)
    encoded, cut = encode_and_count(report.examples, tokenizer, prompt_format)
    print(f"rows truncated: {cut} ({100 * cut / len(encoded):.1f} %)")
    _print_row(encoded[0], tokenizer, report.places[0], prompt_format.template)
    return encoded


def _print_row(row: dict[str, list[int]], tokenizer: Any, where: str, template: str) -> None:
    """Print a row as the model reads it; on a terminal, tokens with a loss in green, others dim."""
    from rich.console import Console
    from rich.text import Text

    from fedfora.data.encoding import IGNORED

    size = sum(label == IGNORED for label in row["labels"])
    text = Text()
    for ids, style in ((row["input_ids"][:size], "dim"), (row["input_ids"][size:], "bold green")):
        text.append(printable(tokenizer.decode(ids), 10**6, "\n"), style=style)
    answer = len(row["labels"]) - size
    print(f"{where} ({template} template): no loss on {size} tokens, loss on the last {answer}")
    Console(soft_wrap=True, highlight=False, markup=False).print(text)


def _print_cost(
    model: ModelArguments, adapter: AdapterArguments, train: TrainArguments, encoded: "Encoded"
) -> None:
    """Print the memory that training takes, and its time at the pace of the second of two steps."""
    from fedfora.models.adapter_base import add_adapter
    from fedfora.models.loading import load_base
    from fedfora.models.memory_estimate import LIBRARIES_BYTES, free_memory
    from fedfora.reporting.view import clock
    from fedfora.training.local import train_locally, training_rows
    from fedfora.training.packing import estimate_step
    from fedfora.training.schedule import StepWindow, num_steps

    estimate, what = estimate_step(model, adapter, train, encoded)
    print(
        f"memory for training, {what}, --quantization {model.quantization}, rank "
        f"{adapter.lora_rank} ({estimate.adapter_parameters:,} trained):"
    )
    parts = {name: getattr(estimate, name) for name in ("base", "adapter", "activations")}
    for name, size in {**parts, "total": estimate.total}.items():
        print(f"  {name:12s}{size / 2**30:9.3f} GiB")
    print(f"  and on a CPU about {LIBRARIES_BYTES / 2**30:.1f} GiB for the libraries", flush=True)
    if estimate.total > (free := free_memory(model.device)):
        print(f"training time: not measured, only {free / 2**30:.1f} GiB are free")
        return
    ends: list[float] = []
    steps = num_steps(train, PrivacyArguments(), len(training_rows(encoded, train)))
    base = load_base(model)
    window = StepWindow(first_step=0, num_steps=2, total_steps=max(2, steps))
    trained = add_adapter(base, adapter, seed=train.seed)
    train_locally(
        trained,
        encoded,
        train,
        stretch=window,
        seed=train.seed,
        on_step=lambda _: ends.append(time.perf_counter()),
    )
    pace = ends[1] - ends[0]
    print(f"training time: {clock(steps * pace)}, {counted(steps, 'step')} of {pace:.2g} s")


CHECK_KIT_HELP = """\
fedfora check site --kit DIR, fedfora check federation --kit DIR: what still has to be fixed.

One line for each check; one that fails says what to do. The exit status is 2 if any fails.
"""


def run_kit(kind: str, words: Sequence[str]) -> None:
    """Check a kit, and print a line for each result as soon as it is there.

    Raises:
        ValueError: If there is no kit, it is broken, or something would keep it from running.
    """
    from fedfora.deployment.settings import KitArguments, OwnTrainerArguments

    sections = [KitArguments, *([OwnTrainerArguments] if kind == "site" else [])]
    arguments, *own = ConfigParser(
        sections, prog=f"fedfora check {kind}", description=CHECK_KIT_HELP
    ).parse(words)
    silence_libraries()
    from fedfora.deployment.kit import CoordinatorKit, SiteKit, read_kit

    if kind == "site":
        kit = read_kit(arguments.kit, SiteKit)
        print(f"site {kit.name} of {kit.federation}", flush=True)
        from fedfora.deployment.check_site import check_site

        with chdir(kit.directory):  # where relative paths in kit.yaml start for the trainer, too
            print_results(check_site(kit, own_trainer=own[0].own_trainer))
    else:
        coordinator = read_kit(arguments.kit, CoordinatorKit)
        print(f"coordinator of {coordinator.federation}", flush=True)
        from fedfora.deployment.checks import check_federation

        print_results(check_federation(coordinator))


CHECK_PRIVACY_HELP = """\
fedfora check privacy --rows 600 --sites 4 --target_epsilon 8: what a budget leaves to learn.

From rows per site, sites and budget: the noise, the passes over the rows, and what to expect from
scratch or from a public start, where each site adds its own noise or sites share it under secure
aggregation. No data is read and no budget spent.

    fedfora check privacy --rows 600 --sites 4 --target_epsilon 8 --model_name_or_path MODEL
"""
PRIVACY_SECTIONS = (OutlookArguments, PrivacyArguments, *SECTIONS[1:])
NO_EFFECT = {"secure_aggregation", "secagg_min_sites", "secagg_range"}  # in check privacy


def run_privacy(words: Sequence[str]) -> None:
    """Print noise, passes and what to expect for rows, sites and a budget.

    Raises:
        ValueError: If rows or budget are missing, or the budget cannot be reached.
    """
    from fedfora.federated.secure_aggregation import messages
    from fedfora.federated.settings import SecureAggregationArguments

    parser = ConfigParser(
        (*PRIVACY_SECTIONS, SecureAggregationArguments),
        prog="fedfora check privacy",
        description=CHECK_PRIVACY_HELP,
        without=NO_EFFECT,
    )
    given = parser.parse(["--privacy_unit", "record", *words])
    chosen, privacy, model, adapter, train, secure = given
    if chosen.rows is None:
        raise ValueError("--rows is missing: fedfora check privacy --rows N --target_epsilon 8")
    check_record_privacy(privacy, train, model)
    run, delta = planned_release(train, privacy, chosen.rows), privacy.target_delta
    sizes = (chosen.trained,) * 2 if chosen.trained else _adapter_sizes(model, adapter)
    rows_and_sites = f"{counted(chosen.rows, 'row')}, {counted(chosen.sites, 'site')}"
    shared = f" ({sizes[1]:,} with --shared_noise)" if len({*sizes}) > 1 else ""
    print(f"{rows_and_sites}, {sizes[0]:,} trained parameters{shared}", flush=True)
    print(
        f"{counted(run.count, 'step')}, each row in a sample with probability "
        f"{run.sampling_rate:.3g}; passes over the rows: {run.count * run.sampling_rate:.3g}"
    )
    print(
        f"noise multiplier {run.noise_multiplier:.3g}: epsilon {epsilon_of([run], delta):.3g} at "
        f"delta {delta:g}; for a record replaced by another "
        f"{replace_one_epsilon_of([run], delta):.3g}"
    )
    kinds = {"each site adds all of the noise": 1}
    if chosen.sites >= messages.MIN_SITES:
        fewest = messages.fewest_survivors(chosen.sites, secure.secagg_threshold)
        kinds["sites share the noise (--shared_noise)"] = fewest - messages.NUM_CURIOUS_SITES
    for (kind, shares), trained in zip(kinds.items(), sizes, strict=False):
        nu = noise_to_signal(
            run, rows=chosen.rows, trained=trained, sites=chosen.sites, shares=shares
        )
        print(f"{kind}: nu {nu:.2g}")
        for start, public in (("a fresh adapter", False), ("a public start", True)):
            print(f"  from {start + ':':17}{expectation(nu, public_start=public)}")


def _adapter_sizes(model: ModelArguments, adapter: AdapterArguments) -> tuple[int, int]:
    if model.model_name_or_path is None:
        raise ValueError("give --trained N, or --model_name_or_path MODEL to count its adapter's")
    silence_libraries()
    checked_model_name(model)
    from fedfora.models.memory_estimate import estimate_memory

    estimate = estimate_memory(model, adapter, lengths=[8])
    return estimate.adapter_parameters, estimate.sum_parameters
