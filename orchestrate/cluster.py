"""A Ray cluster for the length of a command: the user's, or one started on this machine."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator

import psutil

from loda.errors import ConfigError
from orchestrate.executors import RAY_ENVIRONMENT, prepare_environment
from orchestrate.study import Study


def resource_problems(study: Study) -> list[str]:
    """What the study asks of this machine and can't get; nothing is asked of a remote cluster here."""
    resources = study.resources
    problems = []
    if resources.executor == "inline" and resources.workers > 1:
        problems.append("resources.executor: inline has one worker; set resources.workers to 1 or executor to train")
    if resources.address is None and resources.gpus_per_worker > 0:
        import torch

        if not torch.cuda.is_available():
            problems.append("resources.gpus_per_worker: this machine has no GPU; set it to 0 or give resources.address")
    return problems


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """While Ray starts here, it takes 127.0.0.1 for this machine's address, so that no port faces the network.

    Ray replaces a loopback ``_node_ip_address`` by the machine's own address, unless clusters are switched off, as it
    does itself on macOS and Windows. It reads the switch at its first import, so the value read is replaced too.
    """
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, read = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = read
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def ray_cluster(study: Study) -> Iterator[None]:
    """Connect to ``resources.address``, or start Ray here, with as many CPUs as the study can use.

    Raises:
        ConfigError: the address doesn't answer.
    """
    prepare_environment()
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    resources = study.resources
    if resources.address is not None:
        try:
            ray.init(address=resources.address, runtime_env={"env_vars": RAY_ENVIRONMENT}, log_to_driver=False)
        except ConnectionError as error:
            raise ConfigError(f"resources.address: no Ray cluster answers at {resources.address!r}: {error}") from error
    else:
        wanted = math.ceil(resources.concurrent_trials * resources.workers * resources.cpus_per_worker)
        with loopback_only():
            ray.init(
                address="local",
                num_cpus=max(wanted, psutil.cpu_count() or 1),
                object_store_memory=resources.object_store_mb * 1024**2,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    try:
        yield
    finally:
        ray.shutdown()
