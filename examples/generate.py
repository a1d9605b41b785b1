#!/usr/bin/env python3
"""Streams an answer over gRPC, with types learnt by reflection: generate.py HOST:PORT PROMPT"""

import sys

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "shoal.inference.v1.Inference"

address, prompt = sys.argv[1:3]
with grpc.insecure_channel(address) as channel:
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    method = pool.FindServiceByName(SERVICE).FindMethodByName("GenerateStream")
    Request = message_factory.GetMessageClass(method.input_type)
    Chunk = message_factory.GetMessageClass(method.output_type)
    stream = channel.unary_stream(
        f"/{SERVICE}/GenerateStream",
        request_serializer=Request.SerializeToString,
        response_deserializer=Chunk.FromString,
    )
    request = Request(
        chat={"messages": [{"role": "user", "content": prompt}]},
        sampling={"temperature": 0.7},
        stopping={"max_tokens": 128},
    )
    for chunk in stream(request, timeout=60):
        print(chunk.text, end="", flush=True)
print()
