# SPDX-License-Identifier: Apache-2.0
"""What every route has in common: the API key, known parameters, and errors as one JSON shape."""

from collections.abc import Callable, Coroutine
from typing import Any

import vllm.envs as envs
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from vllm.logger import init_logger
from vllm.moe_routes.config import MODES

logger = init_logger(__name__)


class ApiError(Exception):
    """An answer other than success.

    Args:
        code: HTTP status.
        message: one line for the client: the fact, the place and the next command.
        facts: further fields of the answer.
    """

    def __init__(self, code: int, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.facts = facts


def error_response(error: ApiError) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if error.code == 401 else None
    content = {"status": "error", "message": error.message, **error.facts}
    return JSONResponse(content, error.code, headers)


def install(app: FastAPI) -> None:
    """Prepare the check of keys: vLLM's own middleware guards ``/v1*`` only."""
    from vllm.entrypoints.openai.api_server import AuthenticationMiddleware

    # By vLLM's own rule: --api-key before VLLM_API_KEY.
    keys = [key for key in (app.state.args.api_key or [envs.VLLM_API_KEY]) if key]
    # Compares hashes in constant time.
    app.state.moe_routes_auth = AuthenticationMiddleware(app, keys) if keys else None


def authorise(request: Request) -> None:
    """Ask for the server's key, where it has one.

    Raises:
        ApiError: it is missing or wrong.
    """
    auth = request.app.state.moe_routes_auth
    if auth is not None and not auth.verify_token(request.headers):
        raise ApiError(401, "this server has an API key; send it as: Authorization: Bearer KEY")


class GuardedRoute(APIRoute):
    """A route that asks for the key, knows its parameters and answers every error as JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        known = {field.alias for field in self.dependant.query_params}

        async def guarded(request: Request) -> Response:
            try:
                authorise(request)
                _check_parameters(request, known)
                response: Response = await handle(request)
                return response
            except RequestValidationError as error:
                return error_response(_invalid(error))
            except ApiError as error:
                return error_response(error)
            except Exception:
                logger.exception("%s failed", request.url.path)
                return error_response(
                    ApiError(500, "the request failed inside the server; its log has the reason")
                )

        return guarded


def _check_parameters(request: Request, known: set[str]) -> None:
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in known:
            accepted = f"known are {', '.join(sorted(known))}" if known else "this route takes none"
            raise ApiError(400, f"unknown parameter {name[:80]!r}; {accepted}")
        if names.count(name) > 1:
            raise ApiError(400, f"parameter {name!r} is given {names.count(name)} times; give one")


def _invalid(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    name = str(first["loc"][-1])
    if name == "mode":
        message = f"unknown mode {str(first.get('input'))[:80]!r}; use one of {', '.join(MODES)}"
        return ApiError(400, message, valid_modes=list(MODES))
    return ApiError(400, f"parameter {name}: {first['msg']}")
