"""What a configuration file for `serve deploy` may say."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from ray.serve.schema import ServeDeploySchema

from engine.cluster.application import NAME, ClusterSettings, build
from engine.errors import InvalidRequestError

ROOT = Path(__file__).parents[2]
DEPLOY = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
CLUSTER_FIELDS = {"rayVersion", "enableInTreeAutoscaling", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
"""Of KubeRay's ray.io/v1 those that the documentation uses."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "m.gguf"}, r"unknown arguments \['model'\]; allowed: models, replicas, server"),
        ({"models": [{"name": "m", "path": "m.gguf"}]}, "models: .*'path'"),
        ({"models": [{"name": "m", "settings": {"n_ctx": 9}}]}, "settings of m: .*'n_ctx'"),
        ({"models": [{"name": "m", "settings": {"threads": 0}}]}, "threads is 0"),
        ({"models": [{"name": "m"}, {"name": "n", "aliases": ["m"]}]}, "two models have the name 'm'"),
        ({"server": {"max_wating": 3}}, "server: .*'max_wating'"),
        ({"server": {"grace": -1}}, "grace is -1"),
        ({"replicas": {"min_replicas": 3, "max_replicas": 2}}, "3 to 2 replicas; allowed"),
        ({"replicas": {"router": "random"}}, "router is 'random'; allowed: prefix, least-busy"),
        ({"replicas": {"cpus": -1}}, "cpus is -1; allowed: at least 0"),
        ({"replicas": {"gpus": 2}}, "gpus is 2 for each replica; allowed: at most 1"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    with pytest.raises(InvalidRequestError, match=message):
        build(arguments)


def test_a_number_that_is_none_is_refused():
    with pytest.raises(InvalidRequestError, match="target_requests is nan"):
        ClusterSettings(target_requests=float("nan"))


def test_an_application_is_made():
    assert build({"models": ["m.gguf"], "server": {"api_keys": ["k"]}, "replicas": {"max_replicas": 2}})


def test_the_documented_manifest():
    manifest = yaml.safe_load(re.search(r"```yaml\n(apiVersion: ray.io/v1\n.*?)```", DEPLOY, re.DOTALL)[1])
    assert (manifest["apiVersion"], manifest["kind"], set(manifest["spec"])) == (
        "ray.io/v1",
        "RayService",
        {"serveConfigV2", "rayClusterConfig"},
    )
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"])).applications
    module, function = application.import_path.split(":")
    assert (application.name, getattr(import_module(module), function)) == (NAME, build)
    assert build(application.args)
    cluster = manifest["spec"]["rayClusterConfig"]
    assert set(cluster) == CLUSTER_FIELDS
    (worker,) = cluster["workerGroupSpecs"]
    assert set(worker) == GROUP_FIELDS
    assert set(cluster["headGroupSpec"]) <= GROUP_FIELDS
    wanted, (container,) = application.args["replicas"], worker["template"]["spec"]["containers"]
    assert (worker["minReplicas"], worker["maxReplicas"]) == (wanted["min_replicas"], wanted["max_replicas"])
    assert float(container["resources"]["limits"]["nvidia.com/gpu"]) == wanted["gpus"]
    assert float(container["resources"]["limits"]["cpu"]) >= wanted["cpus"]


def test_the_documented_image_has_a_version_of_ray_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = map(Requirement, project["optional-dependencies"]["ray"])
    versions = {*re.findall(r"^FROM rayproject/ray:([\d.]+)-", DEPLOY, re.MULTILINE)}
    versions |= {*re.findall(r'rayVersion: "([\d.]+)"', DEPLOY)}
    assert len(versions) == 1
    assert requirement.specifier.contains(versions.pop())
