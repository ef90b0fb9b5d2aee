# SPDX-License-Identifier: Apache-2.0
"""The routes. They exist where VLLM_LOG_MOE_API=1."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, FastAPI, Query, Request, Security
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from vllm.entrypoints.serve.expert_distribution import answers, guard, metrics, names
from vllm.entrypoints.serve.expert_distribution.engines import Engines, Reply, engines_of, refusal
from vllm.entrypoints.serve.expert_distribution.guard import ApiError, GuardedRoute
from vllm.moe_routes.config import RouteLogConfig, log_path
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.layers import parse_selection

PAGE = Path(__file__).with_name("page.html")
#: The page loads nothing and can't be framed; its own script and style stand in it.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class ErrorAnswer(BaseModel):
    """Any answer but success."""

    status: Literal["error"]
    message: str
    valid_modes: list[str] | None = None


class Answer(BaseModel):
    """Success."""

    model_config = ConfigDict(extra="allow")
    status: Literal["success"]


router = APIRouter(
    route_class=GuardedRoute,
    tags=["expert distribution"],
    dependencies=[Security(HTTPBearer(auto_error=False, description="the server's API key"))],
)


def _route(method: str, path: str, summary: str, conflicts: bool = False) -> Callable[..., Any]:
    """A route of the API; one that changes the recorder's state may conflict with it."""
    errors = (400, 401, 409, 503, 504) if conflicts else (400, 401, 503, 504)
    route: Callable[..., Any] = router.api_route(
        path,
        methods=[method],
        summary=summary,
        response_model=Answer,
        responses={code: {"model": ErrorAnswer} for code in errors},
    )
    return route


_change = partial(_route, "POST", conflicts=True)

Mode = Annotated[
    Literal["stat", "per_pass", "per_token"],
    Query(description="what is recorded: cumulative counts, a line a pass, or a line a token"),
]
Layers = Annotated[
    str, Query(max_length=200, description="`all`, or layer indices and ranges: `0,3-5`")
]
FileName = Annotated[
    str | None,
    Query(
        max_length=200,
        description="file to write, inside the recording directory; without it the name is made "
        "of the mode and the time",
    ),
]


@_change("/configure_expert_distribution", "Choose what the next recording is")
async def configure_expert_distribution(
    request: Request, mode: Mode = "stat", layers: Layers = "all", path: FileName = None
) -> Response:
    try:
        parse_selection(layers, "layers=")
        if path is not None:
            if mode == "stat":
                raise ApiError(400, "mode stat keeps counts and writes no file; drop path=")
            log_path(names.check(path), mode=mode)
    except RouteLogError as error:
        raise ApiError(400, str(error)) from None
    async with engines_of(request.app.state) as engines:
        replies = await engines.command("configure", mode=mode, layers=layers, path=path)
        if refused := refusal(replies):
            raise ApiError(409 if refused.code == 409 else 400, refused.message)
    return _json(
        {
            "status": "success",
            "mode": mode,
            "layers": layers,
            "path": path,
            "message": "next: POST /start_expert_distribution",
        }
    )


@_change("/start_expert_distribution", "Start recording, from zero, at the next step boundary")
async def start_expert_distribution(request: Request) -> Response:
    async with engines_of(request.app.state) as engines:
        replies = await engines.agreed("status")
        name = _file_name(replies[0])
        await _begin(engines, "start", name, replies[0])
        return _json(_state(await engines.agreed("status"), "recording from zero"))


@_change("/stop_expert_distribution", "Stop recording; files get their end record")
async def stop_expert_distribution(request: Request) -> Response:
    async with engines_of(request.app.state) as engines:
        await engines.agreed("stop", timeout=0)
        replies = await engines.written()
        if any(reply["closing"] for reply in replies):
            text = "stopped; files are still being written, GET /expert_distribution_status tells"
        else:
            text = "stopped; next: POST /dump_expert_distribution, or start again"
        return _json(_state(replies, text))


@_change("/reset_expert_distribution", "Go on from zero, or forget what was recorded")
async def reset_expert_distribution(request: Request) -> Response:
    async with engines_of(request.app.state) as engines:
        replies = await engines.agreed("status")
        first = replies[0]
        name = None
        if first["recording"] and first["mode"] != "stat":
            name = await run_in_threadpool(_next_name, first)
        await _begin(engines, "reset", name, first)
        replies = await engines.written()
        text = "recording goes on from zero" if first["recording"] else "forgotten"
        return _json(_state(replies, text))


@_route("POST", "/dump_expert_distribution", "What was counted so far; changes nothing")
async def dump_expert_distribution(
    request: Request,
    summary_only: Annotated[
        bool, Query(description="false adds every layer's and expert's counts")
    ] = True,
    max_records: Annotated[
        int,
        Query(
            ge=0,
            le=1000,
            description="with summary_only=false and mode per_pass: single passes to return, the "
            "latest; a server keeps 1,000 or 16 MiB of them",
        ),
    ] = 100,
) -> Response:
    async with engines_of(request.app.state) as engines:
        await engines.written()
        replies = await engines.agreed("dump", max_records=0 if summary_only else max_records)
    make = answers.summary if summary_only else answers.full
    return await run_in_threadpool(lambda: _json(make(replies)))


@_route("GET", "/expert_distribution_status", "The truth about every worker")
async def expert_distribution_status(request: Request) -> Response:
    async with engines_of(request.app.state) as engines:
        return _json(answers.status(await engines.agreed("status")))


async def expert_distribution_page() -> Response:
    """The live page. It holds no data: its script asks the routes above, with the key."""
    text = await run_in_threadpool(PAGE.read_bytes)
    return Response(text, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)


def attach_router(app: FastAPI) -> None:
    """Mount the routes where VLLM_LOG_MOE_API=1."""
    config = RouteLogConfig.from_env()
    if config is None or not config.api:
        return
    guard.install(app)
    app.include_router(router)
    app.add_api_route(
        "/expert_distribution", expert_distribution_page, methods=["GET"], include_in_schema=False
    )
    for route in router.routes:
        _answer_other_methods(app, route.path, route.methods)
    series = metrics.Series(config.layer_metrics)
    app.add_middleware(metrics.RefreshOnScrape, state=app.state, series=series)


def _answer_other_methods(app: FastAPI, path: str, methods: set[str]) -> None:
    """Wrong methods are answered in the routes' own shape."""
    others = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - methods
    allowed = ", ".join(sorted(methods))

    async def wrong_method(request: Request) -> Response:
        try:
            guard.authorise(request)
        except ApiError as error:
            return guard.error_response(error)
        wrong = ApiError(405, f"{request.method} {path} does not exist; use {allowed}")
        response = guard.error_response(wrong)
        response.headers["Allow"] = allowed
        return response

    app.add_api_route(path, wrong_method, methods=sorted(others), include_in_schema=False)


async def _begin(engines: Engines, command: str, name: str | None, status: Reply) -> None:
    """Start or reset on every worker, or on none."""
    path = None
    if name is not None:
        path = str(await run_in_threadpool(names.place, Path(status["directory"]), name))
    replies = await engines.command(command, path=path)
    refused = refusal(replies)
    if refused is None:
        return
    if any(reply["ok"] for reply in replies):
        await engines.command("stop", reason="another worker could not start", timeout=0)
        await engines.written()
    raise refused


def _file_name(status: Reply) -> str | None:
    """The file of a recording that starts now; None where the mode writes none."""
    if status["mode"] == "stat":
        return None
    chosen: str | None = status["next_path"]
    return chosen or names.fresh(status["mode"])


def _next_name(status: Reply) -> str:
    """The file in which a recording goes on after a reset. Looks at the disk."""
    chosen: str | None = status["next_path"]
    if chosen is None:
        return names.fresh(status["mode"])
    directory, number = Path(status["directory"]), 2
    while (directory / names.numbered(chosen, number)).exists():
        number += 1
    return names.numbered(chosen, number)


def _state(replies: list[Reply], message: str) -> dict[str, Any]:
    """What start, stop and reset answer."""
    full = answers.status(replies)
    return {
        "status": "success",
        "mode": full["mode"],
        "recording": full["recording"],
        "closing": full["closing"],
        "since": full["since"],
        "files": [name for item in full["workers"] for name in item["files"]],
        "message": message,
    }


def _json(content: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
