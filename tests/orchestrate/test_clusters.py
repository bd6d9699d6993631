"""Cluster files: found by name, accepted by Ray's own schema, Bash and Kubernetes' own models."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from jsonschema import Draft7Validator
from kubernetes import client as kubernetes

from loda.errors import ConfigError
from orchestrate.cluster import ray_cluster
from orchestrate.clusters import bundled_clusters, cluster_text
from orchestrate.study import load_study

NAMES = ("aws", "gcp", "kuberay-rayjob", "local", "skypilot", "slurm", "ssh")
RAY_UP = ("aws", "gcp", "local", "ssh")


def test_all_are_found_by_name() -> None:
    assert tuple(bundled_clusters()) == NAMES
    with pytest.raises(ConfigError, match=r"'azure'; there are aws, gcp"):
        cluster_text("azure")


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_accepts_the_file(name: str) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_bytes())
    values = yaml.safe_load(cluster_text(name))
    assert [error.message for error in Draft7Validator(schema).iter_errors(values)] == []
    assert list(Draft7Validator(schema).iter_errors({**values, "max_wokers": 2}))


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_head_of_a_cloud_trains_nothing_and_rented_machines_are_limited_spot_ones(name: str) -> None:
    from ray.autoscaler._private.util import fill_node_type_min_max_workers

    values = yaml.safe_load(cluster_text(name))
    fill_node_type_min_max_workers(values)  # raises for limits that contradict one another
    head, gpu = (values["available_node_types"][kind] for kind in ("head", "gpu"))
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert gpu["resources"]["GPU"] == 1
    assert 0 < gpu["max_workers"] <= values["max_workers"]
    assert "spot" in json.dumps(gpu["node_config"]).lower()


@pytest.mark.parametrize("name", NAMES)
def test_token_is_asked_for_and_no_server_faces_the_network(name: str) -> None:
    text = cluster_text(name)
    assert "RAY_AUTH_MODE=token" in text or "authOptions: {mode: token}" in text
    assert "0.0.0.0" not in text
    starts = [line for line in text.splitlines() if "ray start --head" in line and not line.startswith("#")]
    assert all("--dashboard-host=127.0.0.1" in line for line in starts)


def _known_fields(model: type, values: Any, where: str) -> Iterator[str]:
    """Fields that Kubernetes' model of a thing doesn't have, at any depth."""
    names = {key: attribute for attribute, key in model.attribute_map.items()}  # type: ignore[attr-defined]
    for key, value in values.items():
        if key not in names:
            yield f"{where}.{key}"
            continue
        kind = model.openapi_types[names[key]]  # type: ignore[attr-defined]
        inner = getattr(kubernetes, kind.removeprefix("list[").removesuffix("]"), None)
        for one in value if isinstance(value, list) else [value]:
            if inner is not None and isinstance(one, dict):
                yield from _known_fields(inner, one, f"{where}.{key}")


def test_pods_of_the_rayjob_have_only_fields_that_kubernetes_knows() -> None:
    job = yaml.safe_load(cluster_text("kuberay-rayjob"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], workers):
        assert list(_known_fields(kubernetes.V1PodTemplateSpec, group["template"], "template")) == []
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert 0 <= workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert list(_known_fields(kubernetes.V1PodTemplateSpec, {"spec": {"contaners": []}}, "t")) == ["t.spec.contaners"]


@pytest.mark.parametrize("name", ["slurm", "skypilot"])
def test_bash_reads_the_script(name: str) -> None:
    text = cluster_text(name)
    script = text if name == "slurm" else yaml.safe_load(text)["run"]
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=20)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.ray
def test_ray_started_here_listens_on_loopback_alone() -> None:
    import ray

    with ray_cluster(load_study("alphabets")):
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
        own = psutil.Process()
        sockets = [
            socket
            for process in (own, *own.children(recursive=True))
            for socket in process.net_connections(kind="inet")
            if socket.status == psutil.CONN_LISTEN
        ]
        assert len(sockets) > 3
        assert {socket.laddr.ip.removeprefix("::ffff:") for socket in sockets} <= {"127.0.0.1", "::1"}
