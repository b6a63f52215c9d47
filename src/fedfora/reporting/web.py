"""Run directories as pages that follow them in a browser: read-only, from the record alone.

A page is the run's report, redrawn while the record grows; its script replaces what has changed.
Only names that a listing of the directory holds are looked up, no path comes from outside.
"""

import hashlib
import secrets
import socket
import time
from base64 import b64encode
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from fedfora.reporting.history import FILES, Run, read_run
from fedfora.reporting.record import PASSING
from fedfora.reporting.report import Live, report
from fedfora.reporting.watch import RunStatus

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_RUNS, MOST_COMPARED = 200, 8
_READ = (*FILES, "environment.json", PASSING)
_STATE_SECONDS = 15  # how long the words for "last line 3 min ago" may be old


def serve(directory: Path, *, host: str, port: int, with_token: bool) -> None:
    """Show a run, or the runs in a directory, until somebody stops it.

    Args:
        directory: A run directory, or one that holds some.
        host: The address to listen at.
        port: The port; 0 takes a free one.
        with_token: Whether to ask for a token at this machine's own address, too.

    Raises:
        ValueError: If there is no such directory, or a run alone that cannot be read.
        OSError: If the address cannot be taken.
    """
    import uvicorn

    if not directory.is_dir():
        raise ValueError(f"RUN {directory}: no such directory")
    if not find_runs(directory):
        read_run(directory)  # says what is missing
    token = secrets.token_urlsafe(24) if with_token or host not in LOOPBACK else None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        place = f"[{host}]" if ":" in host else host
        address = f"http://{place}:{listener.getsockname()[1]}/"
        query = f"?token={token}" if token else ""
        print(f"{directory}: {address}{query}   (Ctrl-C quits)", flush=True)
        if host not in LOOPBACK:
            print("not encrypted: over a network, ssh -L 8765:localhost:8765 is safer than --host")
        config = uvicorn.Config(
            web_app(directory, loopback=host in LOOPBACK, token=token),
            log_level="warning",
            log_config=None,  # its own would shut down every handler that this process has
            access_log=False,  # addresses may hold the token
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            limit_concurrency=64,
        )
        uvicorn.Server(config).run(sockets=[listener])


def find_runs(directory: Path) -> dict[str, Path]:
    """Return the run that a directory is, or those in it, the newest first, by name."""
    if any((directory / name).is_file() for name in FILES):
        return {directory.resolve().name: directory}
    runs = [
        (max(path.stat().st_mtime for path in found), child)
        for child in directory.iterdir()
        if child.name.isprintable()
        and (found := [child / n for n in FILES if (child / n).is_file()])
    ]
    return {child.name: child for _, child in sorted(runs, reverse=True)[:MOST_RUNS]}


def web_app(directory: Path, *, loopback: bool, token: str | None) -> Any:
    """Return the application (ASGI) that serves the pages.

    Args:
        directory: A run directory, or one that holds some.
        loopback: Whether it listens at this machine's own address: it answers only to its names, so
            that no website can reach it by giving its own name that address (DNS rebinding).
        token: What a browser must present once; None for nothing.
    """
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import RedirectResponse, Response
    from starlette.routing import Route

    script = files("fedfora.reporting").joinpath("report.js").read_text(encoding="utf-8")
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    headers = {
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }

    def page(request: Request) -> Response:
        names = [*request.path_params.values()] or request.query_params.getlist("run")
        try:
            runs = find_runs(directory)
            if request.url.path == "/" and len(runs) == 1:
                return RedirectResponse(_address(next(iter(runs))), headers=headers)
            if any(name not in runs for name in names) or len(names) > MOST_COMPARED:
                return Response("no such run here", 404, headers, "text/plain")
            marks = {name: _mark(path) for name, path in runs.items()}
            index = tuple((name, _address(name), _glance(mark)) for name, mark in marks.items())
            html = _page(tuple(marks[name] for name in names), index, script)
        except (ValueError, OSError) as error:  # half-written, or not a record: told, tried again
            return Response(f"cannot be read now: {error}", 503, headers, "text/plain")
        body = html.encode(errors="backslashreplace")
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, 200, {**headers, "ETag": tag}, "text/html")

    pages = Starlette(routes=[Route(path, page) for path in ("/", "/run/{name}", "/compare")])

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await (refusal(Request(scope)) or pages)(scope, receive, send)

    def refusal(request: Request) -> Response | None:
        """Return what to answer instead of a page; None where there is nothing to refuse."""
        if request.method not in ("GET", "HEAD"):
            return Response("read-only", 405, {**headers, "Allow": "GET, HEAD"}, "text/plain")
        try:
            host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        except ValueError:
            host = None
        if loopback and host not in LOOPBACK:
            return Response("not the name of this page", 403, headers, "text/plain")
        if token is None:
            return None
        cookie = f"fedfora-{request.scope['server'][1]}"  # browsers tell no ports apart
        if secrets.compare_digest(request.cookies.get(cookie, "").encode(), token.encode()):
            return None
        if secrets.compare_digest(request.query_params.get("token", "").encode(), token.encode()):
            answer = RedirectResponse("/", 303, headers)
            answer.set_cookie(cookie, token, httponly=True, samesite="strict")
            return answer
        remedy = "open the address with the token that fedfora watch printed"
        return Response(remedy, 403, headers, "text/plain")

    return guarded


def _address(name: str) -> str:
    return f"/run/{quote(name, safe='')}"


def _mark(path: Path) -> tuple[Any, ...]:
    """Return a run with what changes when its record does, and now and then."""
    stats = [(path / name).stat() for name in _READ if (path / name).is_file()]
    age = int(time.time() / _STATE_SECONDS)
    return path, age, *((found.st_mtime_ns, found.st_size) for found in stats)


@lru_cache(maxsize=16)
def _page(marks: tuple[Any, ...], index: tuple[tuple[str, str, str], ...], script: str) -> str:
    runs = [read_run(path) for path, *_ in marks]
    status = _status(runs[0]) if len(runs) == 1 else None
    state = status_words(status) if status else f"{len(runs)} runs side by side" if runs else ""
    board = status.board if status and not status.over else None
    return report(runs, Live(state, board, list(index), script))


@lru_cache(maxsize=2 * MOST_RUNS)
def _glance(mark: tuple[Any, ...]) -> str:
    try:
        return status_words(_status(read_run(mark[0])))
    except (ValueError, OSError) as error:
        return f"cannot be read: {error}"


def _status(run: Run) -> RunStatus:
    status = RunStatus(run)
    status.update()
    return status


def status_words(status: RunStatus) -> str:
    """Return where a run stands: "round 7 of 20, 12:03 left"."""
    if not status.board.round_number and not status.board.drawn_round and not status.position:
        return "finished" if status.over or not status.total else "starting"
    place = max(status.position, status.board.drawn_round)
    of = f" of {status.total}" if status.total else ""
    parts = [f"{status.axis} {place}{of}", *status.clock().split("  ")]
    return ", ".join(filter(None, parts))
