"""The manifest for Kubernetes: a job that its operator takes, of a run that the trainer takes."""

from __future__ import annotations

from pathlib import Path

import yaml

from beit3_dist.command_line import configured
from beit3_dist.config import RunConfig, is_auto
from beit3_dist.objectives import SECTIONS

MANIFEST = Path(__file__).parents[2] / "launchers" / "kubernetes" / "pretrain.yaml"


def test_all_pods_run_one_command_that_goes_on_from_the_newest_checkpoint() -> None:
    job = yaml.safe_load(MANIFEST.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: of["replicas"] for name, of in replicas.items()} == {"Master": 1, "Worker": 3}
    assert all(of["restartPolicy"] == "OnFailure" for of in replicas.values())
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    pod = replicas["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch", "the operator looks for this name"
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    *launcher, program = container["command"][:4]
    assert launcher == ["torchrun", "-m", "beit3_dist"] and program == "pretrain"
    config = configured(RunConfig, "pretrain", "", container["command"][4:], SECTIONS)
    assert config.checkpoint.resume == "auto" and is_auto(config.batch.accumulation)
