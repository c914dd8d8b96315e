"""Manifests of launch/ against the schemas that Kubernetes, JobSet and SkyPilot publish.

    pip install kubernetes-validate kubeflow-trainer-api skypilot; python tests/system/manifests.py

A field that a schema doesn't know is an error. What is not installed is said aloud, and makes exit status 2.
"""

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import yaml

LAUNCH = Path(__file__).parents[2] / "launch"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def refused(check: Any, manifest: dict, *path: Any) -> None:
    """The check must be able to fail: it refuses a misspelt field at `path`, and a number where text belongs."""
    for name, value in (("parallelismm", 2), ("metadata", 7)):
        wrong = copy.deepcopy(manifest)
        at: Any = wrong
        for key in path:
            at = at[key]
        at[name] = value
        try:
            check(wrong)
        except Exception:  # each checker has its own
            continue
        raise AssertionError(f"{name}: {value} was not refused")


def kubernetes() -> str:
    import kubernetes_validate

    def check(manifest: dict) -> None:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)

    service, job = documents("kubernetes_job.yaml")
    for manifest in (service, job):
        check(manifest)
        refused(check, manifest, "spec" if manifest is job else "metadata")
    pod = job["spec"]["template"]["spec"]
    env = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
    assert int(env["JAX_NUM_PROCESSES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
    assert pod["subdomain"] == subdomain and env["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-0.{subdomain}:")
    assert service["spec"]["selector"] == {"job-name": name}

    [jobset] = documents("gke_jobset.yaml")
    for replicated in jobset["spec"]["replicatedJobs"]:
        inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}} | replicated["template"]
        check(inner)
        refused(check, inner, "spec")
        assert inner["spec"]["completions"] == inner["spec"]["parallelism"]
    return (
        f"Service, Job and the Job of the JobSet, by the schemas of Kubernetes {kubernetes_validate.latest_version()}"
    )


def jobset() -> str:
    from importlib.metadata import version

    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    def check(manifest: dict) -> None:
        model = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest))
        assert model is not None
        # Its pods were checked above; these models read their quantities as objects without a text.
        unknown = [field for field in lost(manifest, model.to_dict()) if ".resources.limits." not in field]
        assert not unknown, unknown

    [manifest] = documents("gke_jobset.yaml")
    check(manifest)
    refused(check, manifest, "spec")
    refused(check, manifest, "spec", "replicatedJobs", 0)
    return f"JobSet, by the models of kubeflow-trainer-api {version('kubeflow-trainer-api')}"


def lost(there: Any, kept: Any, path: str = "") -> list[str]:
    """Fields that a model has no place for."""
    if isinstance(there, dict):
        if not isinstance(kept, dict):
            return [path]
        return [
            x for k, v in there.items() for x in (lost(v, kept[k], f"{path}.{k}") if k in kept else [f"{path}.{k}"])
        ]
    if isinstance(there, list):
        pairs = zip(there, kept, strict=True)
        return [x for i, (a, b) in enumerate(pairs) for x in lost(a, b, f"{path}[{i}]")]
    return [] if str(there) == str(kept) else [path]


def skypilot() -> str:
    import jsonschema
    from sky.utils import schemas

    def check(manifest: dict) -> None:
        jsonschema.validate(manifest, schemas.get_task_schema())
        jsonschema.validate(manifest["resources"], schemas.get_resources_schema())

    for name in ("skypilot.yaml", "skypilot_workers.yaml"):
        [manifest] = documents(name)
        check(manifest)
        refused(check, manifest, "resources")
    return "SkyPilot's tasks, by its own schema"


def main() -> int:
    missing = []
    for check, package, module in (
        (kubernetes, "kubernetes-validate", "kubernetes_validate"),
        (jobset, "kubeflow-trainer-api", "kubeflow_trainer_api"),
        (skypilot, "skypilot", "sky"),
    ):
        if importlib.util.find_spec(module) is None:
            missing.append(package)
        else:
            print(f"ok: {check()}", flush=True)
    if missing:
        print(f"MISSING: {', '.join(missing)} (pip install them): not all was checked", file=sys.stderr)
        return 2
    print("PASSED")
    return 0


if __name__ == "__main__":
    sys.exit(main())
