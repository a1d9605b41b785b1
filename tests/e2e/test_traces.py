"""Traces of a real cluster at a real OTLP receiver."""

import threading
from concurrent import futures

import grpc
import pytest
from conftest import Cluster, wait_until
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.spans, self.lock = [], threading.Lock()
        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def Export(self, request, context):
        with self.lock:
            for resource in request.resource_spans:
                service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
                for scope in resource.scope_spans:
                    self.spans += [(service, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id):
        """The spans of a trace, by name."""
        with self.lock:
            return {span.name: (service, span) for service, span in self.spans if span.trace_id.hex() == trace_id}


@pytest.fixture(scope="module")
def receiver():
    started = Receiver()
    yield started
    started.server.stop(0)


def ask(cluster, sampled):
    return cluster.client().chat.completions.create(
        model="",
        messages=[{"role": "user", "content": "Hello!"}],
        max_tokens=8,
        extra_headers={"traceparent": f"00-{TRACE if sampled else TRACE[::-1]}-{PARENT}-{'01' if sampled else '00'}"},
    )


def test_router_and_worker_are_one_trace(receiver):
    cluster = Cluster(env={
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}", "OTEL_BSP_SCHEDULE_DELAY": "100"
    })
    try:
        ask(cluster, sampled=False)
        ask(cluster, sampled=True)
        expected = {"request", "text", "admission", "generation", "placement", "sequence", "queue", "prefill", "decode"}
        wait_until(lambda: receiver.trace(TRACE).keys() == expected, 20, "every span")
        spans = receiver.trace(TRACE)
        parent = lambda name: spans[name][1].parent_span_id.hex()
        of = lambda name: spans[name][1].span_id.hex()
        assert parent("request") == PARENT
        for child, its in [
            ("text", "request"), ("admission", "request"), ("generation", "request"), ("placement", "generation"),
            ("sequence", "generation"), ("queue", "sequence"), ("prefill", "sequence"), ("decode", "sequence"),
        ]:
            assert parent(child) == of(its), child
        services = {name: service for name, (service, _) in spans.items()}
        assert services["request"] == services["placement"] == "shoal-router"
        assert services["sequence"] == services["decode"] == "shoal-worker"
        for name, (_, span) in spans.items():
            assert span.end_time_unix_nano >= span.start_time_unix_nano, name
        # Log lines lead to the trace; what the client does not sample is not exported.
        assert any(TRACE in line and "answered" in line for line in cluster.lines)
        assert not receiver.trace(TRACE[::-1])
    finally:
        cluster.stop()
