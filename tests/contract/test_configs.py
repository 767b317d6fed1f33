from __future__ import annotations

import pytest
from tritonclient.grpc.model_config_pb2 import DataType, ModelInstanceGroup

from contract.configs import CONFIGS, ENSEMBLES, REPOSITORY, STAGES, shape
from triptych.contract import MODELS, TENSORS

TYPES = {"BYTES": DataType.TYPE_STRING, "UINT8": DataType.TYPE_UINT8}


def test_the_repository_holds_every_kind_of_model():
    assert {name.partition("_")[0] for name in CONFIGS} == set(MODELS)


def test_every_folder_is_a_model():
    folders = {path.name for path in REPOSITORY.iterdir() if path.is_dir()}
    assert folders == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_name_is_the_folders(name):
    assert CONFIGS[name].name == name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["input", "output"])
def test_tensors_are_those_of_the_contract(name, side):
    config = CONFIGS[name]
    inputs, outputs = MODELS[name.partition("_")[0]]
    declared = {
        tensor.name: (tensor.data_type, shape(config, tensor.dims))
        for tensor in getattr(config, side)
    }
    expected = {
        tensor: (TYPES[TENSORS[tensor].datatype], TENSORS[tensor].shape)
        for tensor in (inputs if side == "input" else outputs)
    }
    assert declared == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_request_may_leave_out(name):
    # An abort is a request to decode with a parameter and no input at all.
    model = name.partition("_")[0]
    inputs = MODELS[model][0]
    expected = set(inputs) if model == "decode" else {n for n in inputs if TENSORS[n].optional}
    assert {tensor.name for tensor in CONFIGS[name].input if tensor.optional} == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_a_version_is_there(name):
    version = REPOSITORY / name / "1"
    wanted = ".gitkeep" if name in ENSEMBLES else "model.py"
    assert (version / wanted).is_file()


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_python_models_with_instances(name):
    config = STAGES[name]
    assert config.backend == "python"
    assert len(config.instance_group) == 1
    assert config.instance_group[0].count >= 1


def test_preprocess_and_decode_are_decoupled_and_the_encoders_are_not():
    for name, config in STAGES.items():
        assert config.model_transaction_policy.decoupled == (not name.endswith("encoder")), name


def test_preprocess_is_several_processes_on_the_cpu():
    group = STAGES["preprocess"].instance_group[0]
    assert group.kind == ModelInstanceGroup.KIND_CPU
    assert group.count > 1


def test_the_encoder_batches_requests_of_different_sizes():
    encoder = STAGES["encoder"]
    assert encoder.max_batch_size > 1
    assert encoder.HasField("dynamic_batching")
    ragged = {tensor.name for tensor in encoder.input if tensor.allow_ragged_batch}
    assert ragged == {"MEDIA"}


@pytest.mark.parametrize("name", [name for name in STAGES if name.startswith("decode_")])
def test_one_engine_a_model(name):
    group = STAGES[name].instance_group[0]
    assert (group.kind, group.count) == (ModelInstanceGroup.KIND_MODEL, 1)


def test_either_encoder_takes_the_others_place():
    encoder, remote = STAGES["encoder"], STAGES["remote_encoder"]
    assert list(remote.input) == list(encoder.input)
    assert list(remote.output) == list(encoder.output)
    assert remote.max_batch_size == encoder.max_batch_size


@pytest.mark.parametrize("name", ["encoder", *(n for n in STAGES if n.startswith("decode_"))])
def test_tensors_on_the_gpu_stay_there(name):
    parameters = STAGES[name].parameters
    assert parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no"
