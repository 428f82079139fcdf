"""Who may import whom: read from the source, and from what a fresh process really loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("serving/*.py")])
STAGES = {"pairs", "train", "encode", "index", "evaluate", "publish"}
TRAINING = {
    f"pipeline.{name}"
    for name in ("train", "trainer", "processes", "losses", "batches", "selection", "encoder", "throughput")
}
ALLOWED = {  # framework -> modules that may import it
    "apache_beam": {
        "pipeline.counts",
        "pipeline.encode_line",
        "pipeline.pairs",
        "pipeline.progress",
        "pipeline.runners",
        "pipeline.storage",
    },
    # index_backends: rows of one process are searched on the encoder's own GPU
    "torch": TRAINING | {"pipeline.encode_line", "serving.index_backends"},
    "sentence_transformers": TRAINING,
    "transformers": TRAINING,
    "tensorflow": {
        "pipeline.chatter",
        "pipeline.saved_index",
        "pipeline.scann_layer",
        "pipeline.served",
        "pipeline.stored_rows",
        "pipeline.warmup",
        "serving.predict_proto",
        "serving.searcher",
        "serving.warmup",
    },
    "tensorflow_recommenders": {"pipeline.scann_layer", "pipeline.tfrs_layer"},
    # its apis import TensorFlow, its config does not
    "tensorflow_serving": {"pipeline.warmup", "serving.model_config", "serving.rpc", "serving.warmup"},
    "grpc": {"serving.rpc"},
    "prometheus_client": {"serving.encoder_server", "serving.gateway_answers", "serving.monitoring"},
    "httptools": {"serving.http_limits"},
    "orjson": {
        "serving.encoder_server",
        "serving.gateway_answers",
        "serving.index_backends",
        "serving.rapidjson",
        "serving.remote_encoding",
    },
    "uvicorn": {
        "serving.accepting",
        "serving.encoder_server",
        "serving.gateway",
        "serving.http_limits",
        "serving.server",
    },
    "aiohttp": {"serving.index_backends", "serving.remote_encoding"},
    "fastapi": {"serving.encoder_server", "serving.gateway_answers", "serving.gateway_routes"},
    "uvloop": {"serving.gateway", "serving.rpc"},
    "scann": {
        "pipeline.saved_index",
        "pipeline.scann_assets",
        "pipeline.served",
        "pipeline.tfrs_layer",
        "serving.searcher",
    },
}
# Of the pipeline's own modules, what serving needs beside artefacts, errors and the encoder, and why.
SHARED_WITH = {
    "serving.finding": {"pipeline.bm25", "pipeline.hybrid"},  # words and fusion as the report measured them
    "serving.lexical": {"pipeline.bm25"},  # the same words and scores
    "serving.titles": {"pipeline.folding"},  # case and width folded as BM25 folds them
}
GROUND = {"pipeline.errors", "pipeline.config", "pipeline.artifacts"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Modules that a file imports, `from a import b` as both a and a.b; type checking left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checking_only = _type_checking(tree)
    nodes = [node for node in ast.walk(tree) if id(node) not in for_checking_only]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _type_checking(tree: ast.Module) -> set[int]:
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {id(node) for block in blocks for node in ast.walk(block)}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_frameworks_are_imported_only_where_they_belong(path):
    imported = imports(path)
    for framework, allowed in ALLOWED.items():
        users = {module for module in imported if module.split(".")[0] == framework}
        assert not users or name_of(path) in allowed, f"{name_of(path)} imports {users}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_stage_never_imports_another(path):
    if path.stem in STAGES and path.parent.name == "pipeline":
        others = {f"pipeline.{stage}" for stage in STAGES - {path.stem}}
        assert not imports(path) & others


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_packages_are_apart(path):
    foreign = {m for m in imports(path) if m.split(".")[0] in ("pipeline", "serving", "tests")}
    if name_of(path).startswith("pipeline"):
        assert all(m.startswith(("pipeline", "serving.client")) for m in foreign)
    else:
        shared = ("pipeline.artifacts", "pipeline.errors", "pipeline.encoder", "serving")
        own = SHARED_WITH.get(name_of(path), set())
        known = {m for m in foreign if m == "pipeline" or m.startswith(shared)}
        assert {m.split(".")[1] for m in foreign - known} <= {each.split(".")[1] for each in own}


@pytest.mark.parametrize("name", sorted(GROUND))
def test_the_ground_floor_imports_no_stage(name):
    path = ROOT / f"{name.replace('.', '/')}.py"
    assert {m for m in imports(path) if m.startswith("pipeline.") and m.count(".") == 1} <= GROUND


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    ["pipeline.__main__", "serving.__main__", "serving.probe", "serving.client", "serving.gateway_flags"],
)
def test_the_command_lines_load_no_framework(module):
    assert not loaded_by(f"import {module}") & {*ALLOWED, "pandas", "matplotlib"}


@pytest.mark.parametrize(
    "module",
    [
        "serving.flags",
        "serving.rpc",
        "serving.predict_proto",
        "serving.versions",
        "serving.coalescing",
        "serving.gateway_routes",
        "serving.encoder_server",
    ],
)
def test_the_server_s_parts_load_no_framework_before_a_version_is_opened(module):
    frameworks = {"tensorflow", "scann", "torch", "tensorflow_recommenders", "sentence_transformers"}
    assert not loaded_by(f"import {module}") & frameworks


def test_flags_are_read_without_a_framework(tmp_path):
    (tmp_path / "models.config").write_text(
        'model_config_list { config { name: "a" base_path: "/a" model_platform: "tensorflow" } }'
    )
    read = f"from serving.flags import parse; parse(['--model_config_file={tmp_path}/models.config'])"
    assert not loaded_by(read) & {"tensorflow", "scann", "grpc"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["pipeline.train", "pipeline.encode", "pipeline.index", "pipeline.tuning", "pipeline.evaluate"]
)
def test_importing_a_stage_loads_neither_framework(module):
    assert not loaded_by(f"import {module}") & {"torch", "tensorflow", "tensorflow_recommenders", "scann"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_file_says_in_its_first_line_what_it_owns(path):
    assert path.read_text(encoding="utf-8").startswith('"""')
