"""Requests that schemathesis makes of the OpenAPI document, right and wrong ones: nothing fails, and every answer is
one that the document announces."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from skipkernels.engine import Engine
from skipkernels.server.http.app import create_app
from tests.server.http.fakes import echo_service
from tests.server.http.running import running
from tests.server.http.test_interface import engine, real_service  # noqa: F401  # a fixture

# a body that is right by the document may still name another model: that it is refused is no failure
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
# a wrong request needs a body: anything is a right path
OPERATIONS = [
    (path, method, mode)
    for path, methods in create_app(echo_service()).openapi()["paths"].items()
    for method in methods
    for mode in GenerationMode
    if method == "post" or mode is GenerationMode.POSITIVE
]


@pytest.fixture(scope="module")
def document(engine: Engine) -> Iterator[Any]:  # noqa: F811
    with running(real_service(engine)) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def try_out(document: Any, path: str, method: str, mode: GenerationMode, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def answers(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    answers()


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_answers_are_those_of_the_document(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    try_out(document, path, method, mode, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_many_answers_are_those_of_the_document(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    try_out(document, path, method, mode, 300)
