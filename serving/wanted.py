"""Which versions of a model are wanted, and what to load or unload next; nothing here loads.

Follows tensorflow/serving r2.11: sources/storage_path/file_system_storage_path_source.cc (where a wanted
version is "aspired"), core/aspired_versions_manager.cc and core/availability_preserving_policy.cc.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serving.handles import Handle
from serving.protocol import VersionStatus

_NUMBER = re.compile(r"[ \t\n\v\f\r]*(-?)0*([0-9]{1,19})[ \t\n\v\f\r]*")  # TensorFlow's safe_strto64


@dataclass(frozen=True)
class Latest:
    """The highest numbers; less than one is one, as there."""

    num_versions: int = 1


@dataclass(frozen=True)
class All:
    """Every number."""


@dataclass(frozen=True)
class Specific:
    """These numbers, where their folders are there."""

    versions: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """One model of the server.

    Attributes:
        base_path: the folder that holds the numbered ones.
        labels: label -> version; whether that version may be unavailable is judged by who makes the config.
    """

    name: str
    base_path: Path
    policy: Latest | All | Specific = Latest()
    labels: Mapping[str, int] = field(default_factory=dict)


def parse_version(name: str) -> int | None:
    """The version a folder is named after; None where the real server would skip it.

    `007` is 7, `-1` and numbers with blanks around them count, `+1`, `1.0` and what passes int64 do not.
    """
    match = _NUMBER.fullmatch(name)
    if match is None:
        return None
    number = int(match[1] + match[2])
    return number if -(2**63) <= number < 2**63 else None


def wanted_folders(config: ModelConfig, children: Sequence[str]) -> dict[int, Path]:
    """{version: its folder} of those that a model's policy wants.

    Files count too, and then fail to load, as there. Of two names for one number the last in order is taken,
    with `All` the first, as there.

    Args:
        children: names in the base path.
    """
    numbered = [(parse_version(child), child) for child in sorted(children)]
    if isinstance(config.policy, All):
        numbered.reverse()
    found = {number: config.base_path / child for number, child in numbered if number is not None}
    if isinstance(config.policy, Specific):
        return {number: found[number] for number in sorted(found) if number in config.policy.versions}
    if isinstance(config.policy, Latest):
        newest = sorted(found, reverse=True)[: max(1, config.policy.num_versions)]
        return {number: found[number] for number in newest}
    return found


def missing(policy: Latest | All | Specific, folders: Mapping[int, Path]) -> str:
    """What a log should say of wanted versions that have no folder; empty where all have one."""
    wanted = policy.versions if isinstance(policy, Specific) else ()
    absent = [str(version) for version in wanted if version not in folders]
    return f"no folder for version {', '.join(absent)}, which is wanted: waiting for it" if absent else ""


@dataclass(eq=False)
class Version:
    """One managed version; `state`: new, loading, ready, unloading, ended."""

    model_name: str
    number: int
    folder: Path
    state: str = "new"
    is_wanted: bool = True
    is_announced: bool = False
    is_cancelled: bool = False
    handle: Handle | None = None

    def __str__(self) -> str:
        return f"model {self.model_name} version {self.number}"


@dataclass(eq=False)
class Model:
    """One model: its managed versions, the rows of its status, what was last seen in its folder.

    `rows` is replaced, never changed; rows are never dropped, as there.
    """

    config: ModelConfig
    versions: dict[int, Version] = field(default_factory=dict)
    rows: dict[int, VersionStatus] = field(default_factory=dict)
    pending: dict[int, Path] | None = None

    def flush(self) -> None:
        """Forget what is over and not wanted: only then can it be loaded again."""
        self.versions = {
            number: version
            for number, version in self.versions.items()
            if version.is_wanted or version.state not in ("new", "ended")
        }

    def take_pending(self) -> None:
        """Want what was last seen.

        A look that wants again what was given up and is not over yet is put off. So while an old version
        answers in the place of one that failed, taking the failed one's folder away changes nothing, and
        putting it back does not try it again: only a third version does.
        """
        wanted = self.pending
        if wanted is None or any(not v.is_wanted and number in wanted for number, v in self.versions.items()):
            return
        self.pending = None
        for number, version in self.versions.items():
            if number not in wanted:
                version.is_wanted = False
                version.is_cancelled = version.state in ("new", "loading")
        for number, folder in sorted(wanted.items()):
            if number not in self.versions:
                self.versions[number] = Version(self.config.name, number, folder)


def next_action(versions: Iterable[Version]) -> tuple[str, Version] | None:
    """What to do next with one model: ("load" or "unload", version), or None.

    An old version goes only when a wanted one is ready, none is wanted at all, or two old ones are there.
    """
    versions = list(versions)
    wanted = [version for version in versions if version.is_wanted]
    old = [version for version in versions if not version.is_wanted and version.state == "ready"]
    is_served = any(version.state == "ready" for version in wanted)
    if old and (not wanted or is_served or len(old) > 1):
        return "unload", min(old, key=lambda version: version.number)
    new = [version for version in wanted if version.state == "new"]
    return ("load", max(new, key=lambda version: version.number)) if new else None
