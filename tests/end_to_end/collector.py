"""A real OTLP collector for tests: gRPC on 127.0.0.1, which keeps every span that it is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

grpc = pytest.importorskip("grpc", reason="the extra `otel` is not installed")
service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
servicer = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")

Attributes = dict[str, Any]


class Collector:
    """`spans` has the attributes of each span that arrived, with its name and its parent."""

    def __init__(self) -> None:
        self.spans: list[Attributes] = []
        self._arrived = threading.Condition()
        own = self

        class Service(servicer.TraceServiceServicer):  # type: ignore[misc, name-defined]
            def Export(self, request: Any, context: Any) -> Any:
                own._take(request)
                return service.ExportTraceServiceResponse()

        self._server = grpc.server(ThreadPoolExecutor(4))
        servicer.add_TraceServiceServicer_to_server(Service(), self._server)
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _take(self, request: Any) -> None:
        told = [
            {
                "span": s.name,
                "id": s.span_id,
                "parent": s.parent_span_id,
                **{a.key: _value(a.value) for a in s.attributes},
            }
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for s in scope.spans
        ]
        with self._arrived:
            self.spans += told
            self._arrived.notify_all()

    def wait(self, enough: Callable[[list[Attributes]], bool], timeout: float = 60) -> list[Attributes]:
        """The spans, once there are enough."""
        end = time.monotonic() + timeout
        with self._arrived:
            while not enough(self.spans):
                assert self._arrived.wait(end - time.monotonic()), f"{len(self.spans)} spans arrived, not enough"
            return list(self.spans)

    def stop(self) -> None:
        self._server.stop(None).wait()


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))
