"""The Kubernetes manifest, as it stands and as submit.sh fills it in, against what the API takes.

The schema below is ours, and strict: it knows what the manifest may use of PyTorchJob (Kubeflow's
training operator, v1) and of pods, and nothing else. To check against the published one, set
JDDIST_PYTORCHJOB_CRD to a copy of manifests/base/crds/kubeflow.org_pytorchjobs.yaml of
github.com/kubeflow/training-operator.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.launch._running import ROOT, run

jsonschema = pytest.importorskip("jsonschema")
yaml = pytest.importorskip("yaml")

MANIFEST = ROOT / "launch" / "kubernetes" / "pytorchjob.yaml"


def _map(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object with these keys alone; ``required`` names some of them."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
PORT_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 16}
POSITIVE = {"type": "integer", "minimum": 1}
COUNT = {"type": "integer", "minimum": 0}
QUANTITY = {"type": "string", "pattern": "^[0-9]+(Ki|Mi|Gi|Ti|m)?$"}

CONTAINER = _map(
    "name image command args",
    name={"const": "pytorch"},  # the operator's default name
    image=TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    command=_list(TEXT),
    args=_list({"type": "string"}),
    env=_list(_map("name value", name=TEXT, value={"type": "string"})),
    ports=_list(_map("containerPort", name=PORT_NAME, containerPort=POSITIVE)),
    resources=_map(limits={"type": "object", "additionalProperties": {"type": ["integer"]}}),
    volumeMounts=_list(_map("name mountPath", name=NAME, mountPath=TEXT)),
)
POD = _map(
    "containers",
    securityContext=_map(runAsNonRoot={"type": "boolean"}, runAsUser=POSITIVE, fsGroup=POSITIVE),
    containers=_list(CONTAINER),
    volumes=_list(
        _map(
            "name emptyDir",
            name=NAME,
            emptyDir=_map(medium={"const": "Memory"}, sizeLimit=QUANTITY),
        )
    ),
)
REPLICAS = _map(
    "replicas restartPolicy template",
    replicas=POSITIVE,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=_map(
        "spec",
        metadata=_map(annotations={"type": "object", "additionalProperties": {"type": "string"}}),
        spec=POD,
    ),
)
SCHEMA = _map(
    "apiVersion kind metadata spec",
    apiVersion={"const": "kubeflow.org/v1"},
    kind={"const": "PyTorchJob"},
    metadata={**_map(name=NAME, generateName=TEXT), "minProperties": 1},
    spec=_map(
        "pytorchReplicaSpecs",
        nprocPerNode={"type": "string", "pattern": "^([1-9][0-9]*|auto|gpu|cpu)$"},
        elasticPolicy=_map(
            rdzvBackend={"const": "c10d"},
            minReplicas=POSITIVE,
            maxReplicas=POSITIVE,
            maxRestarts=COUNT,
        ),
        runPolicy=_map(
            cleanPodPolicy={"enum": ["All", "Running", "None"]}, ttlSecondsAfterFinished=COUNT
        ),
        pytorchReplicaSpecs=_map("Worker", Master=REPLICAS, Worker=REPLICAS),
    ),
)


class _Strict(yaml.SafeLoader):
    """YAML in which a key may stand once only."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"a key stands twice among {keys}"
        return super().construct_mapping(node, deep)


def _parsed(text: str) -> dict[str, Any]:
    manifest = yaml.load(text, _Strict)
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    published = os.environ.get("JDDIST_PYTORCHJOB_CRD")
    if published:
        crd = yaml.safe_load(Path(published).read_text())
        (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
        jsonschema.Draft7Validator(_closed(version["schema"]["openAPIV3Schema"])).validate(manifest)
    spec = manifest["spec"]
    elastic, workers = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] <= workers["replicas"] <= elastic["maxReplicas"]
    pod = workers["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {m["name"] for c in pod["containers"] for m in c["volumeMounts"]} <= volumes
    return manifest


def _closed(schema: Any) -> Any:
    """An API server drops unknown keys without a word; here they are errors."""
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed["properties"] = {k: _closed(v) for k, v in schema["properties"].items()}
        # What has no properties of its own, as the job's metadata, is described elsewhere.
        closed.setdefault("additionalProperties", False)
    return closed


def _submitted(*words: str) -> dict[str, Any]:
    code, out, err = run("launch/kubernetes/submit.sh", "--dry-run", *words)
    assert code == 0, err
    assert out.splitlines()[-1].startswith("# kubectl create ")
    return _parsed(out)


def _worker(manifest: dict[str, Any]) -> dict[str, Any]:
    (container,) = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"][
        "containers"
    ]
    return container


def test_the_manifest_stands_by_itself() -> None:
    manifest = _parsed(MANIFEST.read_text())
    container = _worker(manifest)
    assert container["command"] == ["python", "-m", "torch.distributed.run"]
    assert (ROOT / container["args"][0]).exists()  # in the image as in the clone


def test_the_user_is_that_of_the_images() -> None:
    pod = _parsed(MANIFEST.read_text())["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    for dockerfile in (ROOT / "docker").glob("*.Dockerfile"):
        users = re.findall(r"--uid (\d+)", dockerfile.read_text())
        assert users == [str(pod["securityContext"]["runAsUser"])], dockerfile


def test_submit_fills_in_everything() -> None:
    image = "registry.example.org:5000/team/jddist@sha256:0a1b"
    words = ["--image", image, "--nodes", "2:5", "--gpus", "8", "--max-restarts", "7"]
    manifest = _submitted(*words, "my train.py", "--lr", "0.1", 'a "quoted" \\n $HOME # word')
    spec = manifest["spec"]
    assert spec["nprocPerNode"] == "8"
    assert spec["elasticPolicy"]["minReplicas"] == 2 and spec["elasticPolicy"]["maxReplicas"] == 5
    assert spec["elasticPolicy"]["maxRestarts"] == 7
    assert spec["pytorchReplicaSpecs"]["Worker"]["replicas"] == 5
    container = _worker(manifest)
    assert container["image"] == image
    assert container["args"] == ["my train.py", "--lr", "0.1", 'a "quoted" \\n $HOME # word']
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    # Every line that is marked was filled in: with the defaults, the result is the file itself.
    plain = _submitted("--image", "jddist:cpu")
    assert plain == _parsed(MANIFEST.read_text())
    module = _submitted("--image", "jddist:cpu", "--nproc", "2", "-m", "jddist.selftest")
    assert _worker(module)["args"] == ["-m", "jddist.selftest"]
    assert module["spec"]["nprocPerNode"] == "2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found no image"),
        (["--image", "a b"], "found the image 'a b'"),
        (["--image", "x", "--nodes", "3:2"], "expected MIN to be at most MAX"),
        (["--image", "x", "--nodes", "0"], "expected a number, or MIN:MAX"),
        (["--image", "x", "--gpus", "-1"], "found --gpus '-1'"),
    ],
)
def test_submit_says_what_is_wrong(words: list[str], message: str) -> None:
    code, out, err = run("launch/kubernetes/submit.sh", *words)
    assert code == 1 and message in err and out == ""


def test_submit_hands_the_manifest_to_kubectl(tmp_path: Path) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words; cat > {tmp_path}/manifest\n')
    kubectl.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    words = ["--image", "jddist:cpu", "--namespace", "team"]
    code, _, err = run("launch/kubernetes/submit.sh", *words, PATH=path)
    assert code == 0, err
    assert (tmp_path / "words").read_text() == "create --namespace team -f -\n"
    _parsed((tmp_path / "manifest").read_text())


@pytest.mark.parametrize(
    "change",
    [
        ("replicas: 2", "replicas: two"),
        ("restartPolicy: OnFailure", "restartPolicy: Sometimes"),
        ("elasticPolicy:", "elasticPolicies:"),
        ("name: pytorch\n", "name: trainer\n"),
        ("      restartPolicy: OnFailure", "      replicas: 2\n      restartPolicy: OnFailure"),
        ("maxReplicas: 2", "maxReplicas: 1"),
        ("- name: shared-memory\n              emptyDir", "- name: x\n              emptyDir"),
    ],
)
def test_the_schema_can_fail(change: tuple[str, str]) -> None:
    text = MANIFEST.read_text()
    if change[0] not in text:
        change = (change[0].replace("              emptyDir", "              emptyDir"), change[1])
    broken = re.sub(re.escape(change[0]), change[1], text, count=1)
    if broken == text:
        pytest.fail("nothing was changed")
    with pytest.raises((AssertionError, jsonschema.ValidationError)):
        _parsed(broken)
