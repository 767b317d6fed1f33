"""The ensembles' wires, checked as Triton checks them at load, and one rule more."""

from __future__ import annotations

import pytest

from contract.configs import CONFIGS, ENSEMBLES, shape
from triptych.contract import MODELS, TENSORS

pytestmark = pytest.mark.parametrize("name", ENSEMBLES)


def tensors(model, side):
    config = CONFIGS[model]
    return {
        tensor.name: (tensor.data_type, shape(config, tensor.dims))
        for tensor in getattr(config, side)
    }


def wires(name):
    """Each wire: what is on it, and the step it comes from (None: the ensemble's input)."""
    found = {wire: (spec, None) for wire, spec in tensors(name, "input").items()}
    for step in ENSEMBLES[name].ensemble_scheduling.step:
        outputs = tensors(step.model_name, "output")
        for key, wire in step.output_map.items():
            assert wire not in found, f"{wire} has two sources"
            found[wire] = (outputs[key], step.model_name)
    return found


def test_steps_are_models_of_the_repository(name):
    steps = [step.model_name for step in ENSEMBLES[name].ensemble_scheduling.step]
    assert set(steps) <= set(CONFIGS)
    assert [step.partition("_")[0] for step in steps] == ["preprocess", "encoder", "decode"]


def test_maps_name_tensors_of_the_steps_model(name):
    for step in ENSEMBLES[name].ensemble_scheduling.step:
        assert set(step.input_map) <= set(tensors(step.model_name, "input"))
        assert set(step.output_map) <= set(tensors(step.model_name, "output"))


def test_what_the_contract_asks_for_is_wired(name):
    for step in ENSEMBLES[name].ensemble_scheduling.step:
        inputs, _ = MODELS[step.model_name.partition("_")[0]]
        needed = {tensor for tensor in inputs if not TENSORS[tensor].optional}
        assert needed <= set(step.input_map), step.model_name


def test_both_ends_of_a_wire_are_alike(name):
    sources = wires(name)
    for step in ENSEMBLES[name].ensemble_scheduling.step:
        inputs = tensors(step.model_name, "input")
        for key, wire in step.input_map.items():
            assert sources[wire][0] == inputs[key], (step.model_name, key)


def test_the_ensembles_outputs_come_from_decode(name):
    sources = wires(name)
    for output, spec in tensors(name, "output").items():
        assert sources[output][0] == spec
        assert sources[output][1].startswith("decode_")


def test_a_step_has_at_most_one_decoupled_ancestor(name):
    # Triton cannot match the responses of two decoupled models to each other; it also counts the
    # ensemble's own input as one that a decoupled step has consumed.
    sources = wires(name)
    inputs = {
        step.model_name: [sources[wire][1] for wire in step.input_map.values()]
        for step in ENSEMBLES[name].ensemble_scheduling.step
    }

    def decoupled_ancestors(model):
        if model is None:
            return {None}
        if CONFIGS[model].model_transaction_policy.decoupled:
            return {model}
        return set().union(*(decoupled_ancestors(parent) for parent in inputs[model]))

    for model, parents in inputs.items():
        ancestors = set().union(*(decoupled_ancestors(parent) for parent in parents))
        assert len(ancestors) == 1, (model, ancestors)
