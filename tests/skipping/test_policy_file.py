"""Policy files: bound to their model, and readable or refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from skipkernels import Engine
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import FixedPolicy, NeuronPolicy, Policy, SkipPolicy, policy_from_dict
from skipkernels.skipping.policy_file import load_policy, read_policy_file, save_policy, shipped_policies
from tests.models import random_prompt, tiny_engine, tiny_module
from tests.real_models import smollm2_gguf

POLICY = SkipPolicy(threshold=0.5, span=2, first_dense_layers=0, warmup_tokens=0, layer_thresholds=(0.1, 0.2, 0.3, 0.4))


def with_scales(*scales: object) -> dict:
    return {"policy": {"kind": "neurons", "gate_thresholds": [0.1, 0.1], "up_scales": list(scales)}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "skip_policy.json"
    save_policy(file, POLICY, fingerprint="abc", measured={"skip_ratio": 0.25})
    return file


def change(path: Path, **values: object) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return path


def test_a_policy_survives_its_file(path: Path) -> None:
    assert load_policy(path) == load_policy(path, fingerprint="abc") == POLICY
    assert read_policy_file(path)["measured"] == {"skip_ratio": 0.25}


def test_a_file_of_an_earlier_release_is_read(path: Path) -> None:
    policy = json.loads(path.read_text())["policy"]
    old = {"cold_start": policy.pop("first_dense_layers"), "cold_end": policy.pop("last_dense_layers")}
    assert load_policy(change(path, policy=policy | old)) == POLICY
    assert load_policy(change(path, policy=policy | {"cold_start": 2})).first_dense_layers == 2


def test_a_file_of_version_1_is_read(path: Path) -> None:
    assert json.loads(path.read_text())["version"] == 2
    assert load_policy(change(path, version=1)) == POLICY


@pytest.mark.parametrize(
    "policy",
    [
        NeuronPolicy(gate_thresholds=(0.1, 0.0), product_thresholds=(1e-3, 2.5), warmup_tokens=3, target_ratio=0.3),
        SkipPolicy(threshold=0.5, product_thresholds=(0.25, 1 / 3)),
        FixedPolicy(layers=(1,), gate_thresholds=(0.0, 0.125)),
        NeuronPolicy(gate_thresholds=(0.1, 0.2), up_scales=((0.1, 6e-8, 65504.0), (1 / 3, 3.0, 1e-3))),
        SkipPolicy(gate_thresholds=(0.1, 0.2), up_scales=((0.1,), (1.0,))),
        FixedPolicy(layers=(1,), gate_thresholds=(0.1,), up_scales=((5,),)),
    ],
)
def test_thresholds_for_neurons_survive_their_file(tmp_path: Path, policy: Policy) -> None:
    save_policy(tmp_path / "p.json", policy, fingerprint="abc", measured={})
    assert load_policy(tmp_path / "p.json", fingerprint="abc") == policy


def test_a_file_is_of_the_first_version_that_holds_its_policy(tmp_path: Path) -> None:
    plain = NeuronPolicy(gate_thresholds=(0.1, 0.2))
    for policy, version in ((plain, 2), (replace(plain, up_scales=((0.5, 1.0), (2.0, 4.0))), 3)):
        save_policy(tmp_path / "p.json", policy, fingerprint="abc", measured={})
        document = read_policy_file(tmp_path / "p.json")
        assert document["version"] == version
        assert ("up_scales" in document["policy"]) == (version == 3)
    assert document["policy"]["up_scales"] == ["ADgAPA==", "AEAARA=="]  # 0x3800 0x3c00, 0x4000 0x4400


def test_a_file_that_cannot_be_written_is_named() -> None:
    with pytest.raises(PolicyError, match=r"/dev/full: cannot be written \(No space left"):
        save_policy("/dev/full", POLICY, fingerprint="abc", measured={})


@pytest.mark.parametrize("name", ["gate_thresholds", "product_thresholds", "up_scales"])
@pytest.mark.parametrize("value", [None, 1.0, "0.1"])
def test_thresholds_that_are_no_list_are_refused(name: str, value: object) -> None:
    given = {"kind": "neurons", "gate_thresholds": [0.1], name: value}
    with pytest.raises(PolicyError, match=f"{name} must be a list with an entry per layer, got {value!r}"):
        policy_from_dict(given)


def test_an_engine_takes_the_file_of_its_model(tmp_path: Path) -> None:
    module = tiny_module()
    save_policy(tmp_path / "p.json", POLICY, fingerprint=tiny_engine(module=module).fingerprint, measured={})
    engine = tiny_engine(module=module, policy=tmp_path / "p.json")
    assert engine.policy == POLICY
    expected = tiny_engine(module=module, policy=POLICY).generate(random_prompt(5), max_new_tokens=8)[0]
    answer = engine.generate(random_prompt(5), max_new_tokens=8)[0]
    assert answer.token_ids == expected.token_ids
    assert (answer.skip_map == expected.skip_map).all()


def test_a_file_for_another_model_is_refused(path: Path) -> None:
    engine = tiny_engine()
    message = rf"calibrated for another model \(fingerprint abc, this model's is {engine.fingerprint}\); run"
    with pytest.raises(PolicyError, match=message):
        tiny_engine(policy=path)
    with pytest.raises(PolicyError, match=r"calibrated for another model \(fingerprint None"):
        load_policy(change(path, model_fingerprint=None), fingerprint="abc")


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe\x00"])
def test_unreadable_json_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(PolicyError, match=r"skip_policy\.json: is not JSON"):
        load_policy(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"p\.json: cannot be read \(No such file"):
        load_policy(tmp_path / "p.json")
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 4}, "has version 4, this release reads version 1 and 2 and 3"),
        ({"version": None}, "has version None"),
        ({"format": "other"}, "is not a policy file"),
        ({"policy": None}, "holds no 'policy' object"),
        ({"policy": {"kind": "magic"}}, "unknown policy kind 'magic'"),
        ({"policy": {"kind": "similarity", "treshold": 0.5}}, "treshold"),
        ({"policy": {"kind": "neurons", "gate_thresholds": [0.1, -0.1]}}, r"gate_thresholds\[1\] must be .* got -0.1"),
        ({"policy": {"kind": "neurons", "gate_thresholds": [0.1, None]}}, r"gate_thresholds\[1\] must be .* got None"),
        ({"policy": {"kind": "neurons", "layers": [1]}}, "layers"),
        (with_scales("ADgAPA", "AEAARA=="), r"up_scales\[0\] must be base64 of little-endian float16 numbers"),
        (with_scales("AEAARA==", "AAA?"), r"up_scales\[1\] must be base64"),
        (with_scales("AEAARA==", "ADgA"), r"up_scales\[1\] must be base64"),
        (with_scales("AEAARA==", [1.0, 2.0]), r"up_scales\[1\] must be base64"),
        (with_scales("AEAARA==", ""), r"up_scales\[1\] must be numbers, one per neuron"),
        (with_scales("AEAARA==", "ADg="), r"up_scales\[1\] has 1 entries, up_scales\[0\] 2"),
        (with_scales("AEAARA==", "ADgAAA=="), r"up_scales\[1\]\[1\] must be above 0 in float16, .*, got 0.0"),
        (with_scales("AEAARA==", "ADgAvA=="), r"up_scales\[1\]\[1\] must be above 0 .* got -1.0"),
        (with_scales("AEAAfA==", "ADgAPA=="), r"up_scales\[0\]\[1\] must be above 0 .* got inf"),
        (with_scales("AEAAfg==", "ADgAPA=="), r"up_scales\[0\]\[1\] must be above 0 .* got nan"),
        (with_scales("AEAARA=="), "up_scales has 1 layers, gate_thresholds 2"),
        ({"policy": {"kind": "similarity", "threshold": 7}}, r"\[-1, 1\], got 7"),
    ],
)
def test_a_wrong_document_is_refused_with_its_path(path: Path, values: dict, message: str) -> None:
    with pytest.raises(PolicyError, match=f"skip_policy.json: .*{message}"):
        load_policy(change(path, **values))


@pytest.mark.parametrize("document", ["[]", "3", "null", '"text"'])
def test_a_document_that_is_no_object_is_refused(path: Path, document: str) -> None:
    path.write_text(document)
    with pytest.raises(PolicyError, match="is not a policy file"):
        load_policy(path)


@pytest.mark.parametrize("name", shipped_policies())
def test_policies_of_the_package_say_what_they_cost(name: str) -> None:
    policy = load_policy(name)
    assert isinstance(policy, NeuronPolicy)
    measured = read_policy_file(name)["measured"]
    assert all(margin["verdict"] == "beats" for margin in measured["margins"])
    assert 0.2 < measured["held_out"]["skip_ratio"] < 0.3
    assert measured["held_out"]["kl"] < 0.05


def test_the_policy_of_smollm2_fits_its_gguf_file() -> None:
    engine = Engine.from_pretrained(smollm2_gguf(), policy="smollm2-135m-instruct", num_threads=1, max_seq_len=128)
    (answer,) = engine.generate(
        [[{"role": "user", "content": "What is the capital of France, and what is it known for?"}]], max_new_tokens=24
    )
    assert "Paris" in answer.text
    assert 0.15 < answer.unread_ratio < 0.35


def test_a_file_goes_before_a_policy_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = shipped_policies()[0]
    monkeypatch.chdir(tmp_path)
    save_policy(name, SkipPolicy(threshold=0.5), fingerprint="f", measured={})
    assert load_policy(name) == SkipPolicy(threshold=0.5)


def test_a_folder_of_the_name_does_not_hide_a_policy_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = shipped_policies()[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert isinstance(load_policy(name), NeuronPolicy)


def test_a_name_that_is_none_is_answered_with_those_there_are() -> None:
    with pytest.raises(PolicyError, match=f"with the package come {', '.join(shipped_policies())}"):
        load_policy("smollm")
