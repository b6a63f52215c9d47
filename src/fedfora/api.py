"""The commands as functions, `fedfora.train`, `predict`, `simulate` and `export`; and `federate`.

Every option of a command is a keyword of its function, by the same name and with the same checks:
see [Options](flags.md). `model` is short for `model_name_or_path`, `config` names a YAML file.
`progress=True` shows what the command shows; otherwise nothing is printed, and warnings go to the
logger "fedfora". A mistake is a `ValueError`, raised before any work.

`train_file`, `validation_file` and `test_file` take what the command line takes, a
`datasets.Dataset`, or a list of rows, each a dictionary of columns. Such rows are read from memory,
and no more of them is written than of a file's rows (`predict` writes the rows that it answers
beside its answers).

Results are in the run's directory, as after the command, and are read from there on request.
"""

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from html import escape
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedfora.cli.console import NOISY
from fedfora.cli.main import missing_extra
from fedfora.config import ConfigError, ConfigParser, to_mapping
from fedfora.data.sources import held_rows
from fedfora.models.settings import ModelArguments
from fedfora.reporting.history import Run, read_run
from fedfora.reporting.record import Event

if TYPE_CHECKING:
    from fedfora.reporting.view import View

SETTINGS = {  # of each command: the module that knows its sections
    "train": "fedfora.training.settings",
    "predict": "fedfora.evaluation.settings",
    "simulate": "fedfora.federated.settings",
    "export": "fedfora.exporting.settings",
}
ROWS = ("train_file", "validation_file", "test_file", "test_path")
BEST = "best"  # as fedfora.federated.coordinator.checkpoint names it

Function = TypeVar("Function", bound=Callable[..., Any])


class Table(list[Event]):
    """Lines of a run's record, each a dictionary."""

    def to_pandas(self) -> Any:
        """Return a DataFrame; nested values get columns such as `scores.f1`.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            from pandas import json_normalize  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return json_normalize(list(self))


@dataclass(frozen=True)
class Result:
    """The result of a training, a simulation or a prediction; a notebook shows its summary.

    Args:
        directory: The run directory.
        adapter: Directory of the adapter that was trained or that answered; None if the base
            answered alone.
    """

    directory: Path
    adapter: Path | None

    @property
    def events(self) -> Table:
        """All lines of the run's record."""
        return Table(self._run.events)

    @property
    def history(self) -> Table:
        """The course of the run: a simulation's rounds, a training's steps and validations."""
        kinds = ("round",) if self._run.of("round") else ("step", "validation")
        return Table(line for line in self._run.events if line["event"] in kinds)

    @property
    def sites(self) -> dict[str, Table]:
        """A simulation's sites, by name: what each contributed to the rounds it took part in."""
        sites: dict[str, Table] = {}
        for line in self._run.of("round"):
            for entry in line["sites"]:
                lines = sites.setdefault(str(entry["site"]), Table())
                lines.append({"round": line["round"], **entry})
        return sites

    @property
    def comparison(self) -> Table:
        """Results of the arms of `compare` and of the federation; empty without `compare`."""
        return Table(self._run.of("row"))

    @property
    def scores(self) -> dict[str, Any]:
        """A prediction's scores, or a simulation's after its last round; empty if none."""
        scored = [line["scores"] for line in self._run.of("round") if line.get("scores")]
        return dict(self._run.scores or (scored[-1] if scored else {}))

    @property
    def predictions(self) -> Table:
        """The answered rows: `input`, `reference`, `prediction` and more."""
        return Table(self._run.predictions)

    @property
    def report(self) -> Path:
        """The HTML report of the run."""
        return self.directory / "report.html"

    @property
    def best(self) -> "Result":
        """The same with the best round's adapter, if a simulation judged its rounds."""
        best = self.directory / BEST
        return replace(self, adapter=best) if best.is_dir() else self

    @cached_property
    def model(self) -> Any:
        """The base model with the adapter on it, loaded on first use and kept."""
        from fedfora.models.adapter_base import load_with_adapter

        with _silence():
            return load_with_adapter(self._base, self.adapter)[1]

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer, loaded on first use and kept."""
        from fedfora.models.loading import load_tokenizer

        with _silence():
            return load_tokenizer(self._base)

    def predict(self, test_file: Any, **options: Any) -> "Result":
        """Answer rows with this adapter; by default into `answers` in the run directory."""
        given = {"test_file": test_file, **options}
        return predict(**{**to_mapping(self._base), **self._place("answers"), **given})

    def export(self, format: str = "lora", **options: Any) -> "Export":
        """Write this adapter in another form; by default into FORMAT in the run directory."""
        given = {"format": format, **options}
        return export(**{**to_mapping(self._base), **self._place(format), **given})

    def _place(self, name: str) -> dict[str, Any]:
        """Where to read and write; the best round's adapter has a place of its own."""
        place = f"{name}-best" if self.adapter == self.directory / BEST else name
        return {"model_dir": self.adapter, "output_dir": self.directory / place}

    @property
    def _run(self) -> Run:
        return read_run(self.directory)

    @property
    def _base(self) -> ModelArguments:
        return ModelArguments(**self._run.config["model"])

    def _repr_html_(self) -> str:
        from fedfora.reporting.card import card_of
        from fedfora.reporting.sections import facts, summary

        run = self._run
        card = card_of(run)
        places = {"adapter": self.adapter, "report": self.report}
        rows = [*facts(run, card), *((name, str(path)) for name, path in places.items() if path)]
        return f"<p>{escape(summary(run, card))}</p>{_html_table(rows)}"


@dataclass(frozen=True)
class Export:
    """What an export wrote, and how it compares with its source, one sentence for each check."""

    directory: Path
    checks: list[str]

    def _repr_html_(self) -> str:
        return _html_table([("export", str(self.directory)), *(("", line) for line in self.checks)])


def _html_table(rows: Iterable[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{''.join(cells)}</table>"


def _with_signature(function: Function) -> Function:
    """Show `help` and a notebook's completion the options by name, kind and default."""
    try:
        known = import_module(SETTINGS[function.__name__])
    except ModuleNotFoundError:  # an extra is not installed; a call says which
        return function
    signature = inspect.signature(function)
    parameters = {n: own for n, own in signature.parameters.items() if n != "options"}
    items = [item for section in known.SECTIONS.values() for item in fields(section)]
    for item in (item for item in items if item.name not in getattr(known, "NO_EFFECT", ())):
        default = item.default_factory() if callable(item.default_factory) else item.default
        for name in (item.name, *(alias.lstrip("-") for alias in item.metadata["aliases"])):
            if name.isidentifier():
                parameters[name] = inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=item.type
                )
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(parameters.values())
    )
    return function


@_with_signature
def train(*, progress: bool = False, **options: Any) -> Result:
    """Train one adapter, as `fedfora train` does, to the same bits."""
    from fedfora.training.preflight import preflight
    from fedfora.training.settings import TrainSettings

    with _command("train", options) as (parser, values):
        settings = TrainSettings(*parser.build(values))
        rows = preflight(settings)
        with _view(progress) as view:
            from fedfora.training.run import train

            train(settings, view, rows)
    directory = Path(settings.run.output_dir)
    return Result(directory, directory)


@_with_signature
def simulate(
    *, progress: bool = False, trainer_factory: Callable[[int], Any] | None = None, **options: Any
) -> Result:
    """Run a whole federation in this process, as `fedfora simulate` does, to the same bits.

    `resume=DIRECTORY` resumes a stopped one; rows from memory must be passed again.

    With `trainer_factory` every site trains with a Trainer of its own: the function is called with
    the numbers of the sites, from 0 to `num_clients` - 1, and returns a `transformers.Trainer`, or
    one that inherits from it, whose model has a LoRA or FoRA adapter. Model, rows, loss, batches
    and learning rate are the Trainer's; a round takes `local_steps` of its steps. The function is
    called with the same random seed each time, so that all sites start with the same adapter. In
    the end the Trainers' models have the federation's adapter.
    """
    with _command("simulate", options) as (parser, values), ExitStack() as held:
        from fedfora.federated.preflight import preflight, resolve_settings, work_of

        own_rows = None
        if trainer_factory is None:
            settings = resolve_settings(values, parser)
        else:
            from fedfora.federated.own_trainer import open_sites, rows_of, take_home, taking_part

            settings, sites = open_sites(trainer_factory, values, parser)
            own_rows = rows_of(sites)
            held.enter_context(taking_part(sites))
        preflight(settings, own_rows)
        with _view(progress, work_of(settings, len(own_rows or ()))) as view:
            from fedfora.federated.comparison import compare
            from fedfora.federated.site_runtime import release

            try:
                compare(settings, view, own_rows)
            finally:
                release()
        if trainer_factory is not None:
            take_home(sites, settings.run.output_dir)
    directory = Path(settings.run.output_dir)
    return Result(directory, directory)


@_with_signature
def predict(*, progress: bool = False, **options: Any) -> Result:
    """Answer the rows of `test_file` and score the answers, as `fedfora predict` does."""
    from fedfora.evaluation.output import preflight
    from fedfora.evaluation.settings import PredictSettings

    with _command("predict", options) as (parser, values):
        settings = PredictSettings(frozenset(values), *parser.build(values))
        checked = preflight(settings)
        with _view(progress) as view:
            from fedfora.evaluation.predict import predict

            predict(checked, view)
    return Result(Path(settings.predict.output_dir), checked.adapter_dir)


@_with_signature
def export(*, progress: bool = False, **options: Any) -> Export:
    """Write an adapter in another form and check it, as `fedfora export` does."""
    from fedfora.exporting.settings import ExportSettings, check_place

    with _command("export", options) as (parser, values):
        settings = ExportSettings(frozenset(values), *parser.build(values))
        check_place(settings)
        with _silence():
            from fedfora.exporting.run import export

            made = Export(Path(settings.export.output_dir), export(settings))
        if progress:
            print("\n".join([*made.checks, f"written: {made.directory}"]))
        return made


def federate(trainer: Any, *, kit: str | Path = ".") -> None:
    """Take part in a real federation with your own Trainer, until this process is stopped.

    It replaces `fedfora site --kit KIT`. The script that calls it is the site's own: the
    coordinator asks for rounds and gets adapters; it can neither choose nor change what the Trainer
    does. The adapter that the Trainer's model has now must be the same at all sites: call
    `transformers.set_seed` with the same number before it is made.

    Args:
        trainer: A `transformers.Trainer`, or one that inherits from it as TRL's do, whose model has
            a LoRA or FoRA adapter.
        kit: Directory of the site's kit, as `fedfora provision` made it.

    Raises:
        ValueError: If a federation cannot use the Trainer, or there is no site's kit.
    """
    from fedfora.cli.console import log_line
    from fedfora.deployment.kit import SiteKit, read_kit
    from fedfora.deployment.site import run_site
    from fedfora.deployment.trainer import serve_site
    from fedfora.federated.own_trainer import OwnSite, taking_part

    site_kit = read_kit(kit, SiteKit)
    with taking_part([OwnSite(trainer, "federate")]):
        run_site(site_kit, log_line, lambda: serve_site(site_kit))


@contextmanager
def _command(
    command: str, options: dict[str, Any]
) -> Iterator[tuple[ConfigParser, dict[str, Any]]]:
    """Give the command's parser and the options' values; hold rows from memory meanwhile."""
    named = dict(options)
    with ExitStack() as held:
        for name, value in options.items():
            # Importing `datasets` takes a second, so a Dataset is recognized by what it can do.
            is_dataset = hasattr(value, "features") and hasattr(value, "num_rows")
            if name in ROWS and (is_dataset or isinstance(value, list | tuple)):
                named[name] = held.enter_context(held_rows(name, value))
            elif value is None or isinstance(value, str | Path | Real):
                pass
            elif name not in ROWS and isinstance(value, list | tuple | dict):
                named[name] = list(value) if isinstance(value, tuple) else value
            else:
                remedy = "; save it and pass the directory" * hasattr(value, "save_pretrained")
                raise ConfigError(f"--{name} cannot be a {type(value).__name__}{remedy}")
        try:
            known = import_module(SETTINGS[command])
            parser = ConfigParser(
                known.SECTIONS.values(),
                prog=f"fedfora {command}",
                without=getattr(known, "NO_EFFECT", ()),
            )
            from_file = parser.read(named.pop("config")) if "config" in named else {}
            yield parser, {**from_file, **parser.typed(named)}
        except ModuleNotFoundError as error:
            if (message := missing_extra(command, error)) is None:
                raise
            raise ImportError(message) from error


@contextmanager
def _view(progress: bool, total: float = 1) -> Iterator["View"]:
    from rich.console import Console

    from fedfora.reporting.view import View

    console = None if progress else Console(file=io.StringIO(), markup=False)
    with _silence(), View(total, console) as view:
        yield view


@contextmanager
def _silence() -> Iterator[None]:
    """Silence libraries, as the commands do, and restore their output afterwards."""
    from transformers.utils import logging as hf

    levels = {name: logging.getLogger(name).level for name in NOISY}
    verbosity, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        hf.set_verbosity_error()
        hf.disable_progress_bar()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            hf.set_verbosity(verbosity)
            if bars:
                hf.enable_progress_bar()
