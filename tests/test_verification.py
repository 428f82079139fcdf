"""A version's files against its manifest: what was changed, lost or half copied is never opened."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from pipeline.artifacts import file_hashes
from serving.handles import LoadError
from serving.verification import verify_manifest
from serving.versions import Models
from serving.wanted import ModelConfig

FILES = {
    "saved_model.pb": b"a graph",
    "variables/variables.data-00000-of-00001": b"rows" * 1000,
    "assets.extra/documents.parquet": b"documents",
}


def write_version(folder: Path) -> Path:
    """A version as it is published: the manifest lists every file but itself and publication.json."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, {"format": 1, "files": file_hashes(folder)})
    (folder / "assets.extra" / "publication.json").write_text('{"version": 8}')
    return folder


def write_manifest(folder: Path, manifest: object) -> None:
    (folder / "assets.extra" / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def version(tmp_path) -> Path:
    return write_version(tmp_path / "8")


def refusal(folder: Path) -> LoadError:
    with pytest.raises(LoadError) as error:
        verify_manifest(folder)
    assert "\n" not in error.value.message
    assert error.value.message.endswith(
        ": copy or publish the version again, or start with --verify_manifest=false"
    )
    return error.value


def test_a_version_as_published_passes(version):
    verify_manifest(version)


def test_what_the_manifest_does_not_name_may_differ(version):
    (version / "assets.extra" / "publication.json").write_text("{}")
    (version / "note.txt").write_text("mine")
    verify_manifest(version)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named_with_both_checksums(version, name):
    (version / name).write_bytes(b"other")
    error = refusal(version)
    assert error.code == "DATA_LOSS"
    got, wanted = (hashlib.sha256(content).hexdigest() for content in (b"other", FILES[name]))
    assert error.message.startswith(f"{version / name} has sha256 {got}, wanted {wanted}: ")


def test_a_half_copied_file_is_refused(version):
    name = "variables/variables.data-00000-of-00001"
    (version / name).write_bytes(FILES[name][:1000])
    assert "variables.data-00000-of-00001 has sha256" in refusal(version).message


def test_a_missing_file_is_named(version):
    (version / "saved_model.pb").unlink()
    wanted = hashlib.sha256(b"a graph").hexdigest()
    assert refusal(version).message.startswith(
        f"{version / 'saved_model.pb'} is not there, wanted sha256 {wanted}: "
    )


def test_several_damaged_files_are_counted(version):
    for name in FILES:
        (version / name).unlink()
    assert refusal(version).message.startswith(f"{version}/assets.extra/documents.parquet is not there")
    assert " (and 2 more files): " in refusal(version).message


def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(version):
    (version / "saved_model.pb").unlink()
    os.mkfifo(version / "saved_model.pb")
    assert f"{version / 'saved_model.pb'} is no file, wanted sha256 " in refusal(version).message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_refused(version):
    (version / "saved_model.pb").chmod(0)
    assert "saved_model.pb cannot be read: Permission denied, wanted sha256 " in refusal(version).message


def test_a_pipe_in_the_manifests_place_is_refused_not_waited_for(version):
    (version / "assets.extra" / "manifest.json").unlink()
    os.mkfifo(version / "assets.extra" / "manifest.json")
    assert "manifest.json is no file, wanted " in refusal(version).message


def test_without_a_manifest_a_version_is_taken_as_it_is(version):
    (version / "assets.extra" / "manifest.json").unlink()
    verify_manifest(version)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is no JSON"),
        ('{"format": 1, "files": {"saved_mo', "is no JSON"),  # half copied
        ("[" * 100_000, "is no JSON"),
        ("[]", 'has no "files"'),
        ('{"format": 1}', 'has no "files"'),
        ('{"files": ["saved_model.pb"]}', 'has no "files"'),
        ('{"files": {"saved_model.pb": 7}}', 'has no "files"'),
    ],
)
def test_a_damaged_manifest_is_refused(version, text, what):
    (version / "assets.extra" / "manifest.json").write_text(text)
    assert f"{version / 'assets.extra' / 'manifest.json'} {what}" in refusal(version).message


@pytest.mark.parametrize("name", ["/etc/hostname", "../9/saved_model.pb", "assets.extra/../../own", "a\0b"])
def test_a_manifest_names_files_of_its_own_version_alone(version, name):
    write_manifest(version, {"files": {name: "0" * 64}})
    assert f"names {name!r}, wanted a file of the version itself" in refusal(version).message


def test_a_version_that_was_changed_is_not_opened_and_the_old_one_goes_on(tmp_path):
    opened = []

    class Opened:
        def __init__(self, folder: Path) -> None:
            opened.append(folder.name)
            self.signatures: dict = {}

        def run(self, signature_name, inputs):
            return {}

        def close(self) -> None:
            pass

    write_version(tmp_path / "7")
    config = ModelConfig("index", tmp_path)
    models = Models([config], Opened, verify=verify_manifest, max_num_load_retries=0)
    models.poll()
    write_version(tmp_path / "8")
    (tmp_path / "8" / "saved_model.pb").write_bytes(b"other")
    models.poll()
    assert opened == ["7"]
    assert models.available("index") == [7]
    newest = models.states()["index"][0]
    assert (newest.version, newest.state, newest.error_code) == (8, "END", "DATA_LOSS")
