"""The count of what processes send each other."""

import pytest

from nepa_plugin.speed.communication import CommunicationCount, collectives


def event(name, shapes=None, kinds=None):
    return {"name": name, "args": {} if shapes is None else {"Input Dims": shapes, "Input type": kinds}}


def test_collectives_are_counted_by_operation_and_type():
    trace = {
        "traceEvents": [
            event("gloo:all_reduce", [[10, 3]], ["float"]),
            event("nccl:all_reduce", [[5]], ["float"]),
            event("nccl:all_reduce", [[5]], ["c10::BFloat16"]),
            event("nccl:all_reduce"),  # the kernel on the GPU, which has no shapes
            event("gloo:broadcast", [[]], ["long int"]),
            event("aten::add", [[10, 3]], ["float"]),
        ]
    }
    assert collectives(trace) == {
        "all_reduce float": {"calls": 2, "bytes": 140},
        "all_reduce c10::BFloat16": {"calls": 1, "bytes": 10},
        "broadcast long int": {"calls": 1, "bytes": 8},
    }


def test_a_type_of_unknown_size_is_an_error():
    with pytest.raises(ValueError, match="unknown type 'quint4'"):
        collectives({"traceEvents": [event("gloo:all_reduce", [[2]], ["quint4"])]})


def test_the_first_step_that_can_be_counted():
    with pytest.raises(ValueError, match="first step that can be counted is 1"):
        CommunicationCount(step=0)
