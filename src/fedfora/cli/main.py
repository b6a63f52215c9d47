"""`fedfora COMMAND ...`: finds the command, runs it, and turns a user's mistake into one line."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

# Each command is a module of this package with `run(argv)`, loaded only when it is used.
COMMANDS = {
    "demo": "a federation of four clinics, results in a table",
    "train": "fine-tune on one device or many",
    "simulate": "a whole federation on this machine",
    "predict": "answer the rows of a file with an adapter",
    "evaluate": "score a predictions file",
    "chat": "try an adapter interactively",
    "export": "an adapter as LoRA, as GGUF, or merged with its base",
    "keys": "keys for signing, and for encryption at rest",
    "verify": "check and show where an adapter comes from",
    "audit": "attack a run's adapter and report what the attacks learned",
    "report": "one HTML page from run directories",
    "watch": "follow a run from another terminal",
    "check": "check a file of rows, a kit or a privacy budget before a run",
    "provision": "keys and kits for the coordinator and the sites of a real federation",
    "site": "run one site of a real federation",
    "coordinator": "run its coordinator; `coordinator run` takes one run to its end",
    "rehearse": "a real federation with all its processes, on this machine",
    "fate": "a party of a FATE federation",
    "info": "versions and hardware",
}

# Packages that only some commands need, and the extra that brings them.
EXTRAS = {
    **{"flwr": "federated", "flwr_datasets": "federated", "cryptography": "privacy"},
    **{"starlette": "web", "uvicorn": "web"},
}

# Commands whose extra brings all that they need, whichever package turns out to be missing.
FEDERATIONS = {"demo", "simulate", "provision", "site", "coordinator", "rehearse"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, or 2 after a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["-V"], ["--version"]):
        print(f"fedfora {version('fedfora')}")
        return 0
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0].startswith(("--local_rank=", "--local-rank=")) and len(words) > 1:
        words[:2] = reversed(words[:2])  # `deepspeed --module` puts it before the command
    command, *rest = words
    if command not in COMMANDS:
        from fedfora.registry import unknown

        print(f"fedfora: error: {unknown('command', command, COMMANDS)}", file=sys.stderr)
        return 2
    try:
        import_module(f"fedfora.cli.{command}").run(rest)
    except ModuleNotFoundError as error:
        if (message := missing_extra(command, error)) is None:
            raise
        print(f"fedfora {command}: error: {message}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `fedfora ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        sys.stdout.flush()  # so that earlier output comes before the error
        line = " ".join(part.strip() for part in str(error).splitlines() if part.strip())
        # A name may hold half a character, and a row terminal control codes.
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        print(f"fedfora {command}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        words = ["stopped", *filter(None, map(str, stop.args))]
        print(f"\nfedfora {command}: {' '.join(words)}", file=sys.stderr)
        return 130
    return 0


def missing_extra(command: str, error: ModuleNotFoundError) -> str | None:
    """Return which package a command lacks and how to install it; None where no extra brings it."""
    package = (error.name or "").split(".")[0]
    if package not in EXTRAS:
        return None
    extra = "federated" if command in FEDERATIONS else EXTRAS[package]
    return f'{package} is not installed: pip install "fedfora[{extra}]"'


def overview() -> str:
    """Return what `fedfora --help` prints."""
    lines = [
        "usage: fedfora COMMAND [--help | --help-all] [--config FILE.yaml] [OPTIONS]",
        "       fedfora help COMMAND, fedfora --version",
        "",
        "Fine-tunes language models where the data is, alone or as a federation.",
        "",
        "commands:",
        *(f"  {name:12s} {text}" for name, text in COMMANDS.items()),
    ]
    return "\n".join(lines)
