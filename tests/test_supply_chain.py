"""Version floors and exclusions: what is known to be broken or malicious must not be installable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REQUIREMENTS = {
    requirement.name: requirement
    for requirement in map(
        Requirement,
        re.findall(r'^  "([^"]+)",$', TEXT.split("dependencies = [")[1].split("\n]")[0], re.MULTILINE),
    )
}


@pytest.mark.parametrize(
    ("name", "bad", "why"),
    [
        ("lightning", "2.6.2", "malware, 2026-04-30"),
        ("lightning", "2.6.3", "malware, 2026-04-30"),
        ("lightning", "2.6.5", "CVE-2026-58659: _instantiator in load_from_checkpoint"),
        ("torch", "2.9.1", "CVE-2026-24747, weights_only"),
        ("torch", "2.5.1", "CVE-2025-32434, weights_only"),
        ("transformers", "5.4.0", "CVE-2026-5241"),
        ("transformers", "5.2.0", "CVE-2026-4372: code from config.json"),
        ("hydra-core", "1.3.7", "GHSA-2cp2-2r3c-7p7r"),
        ("hydra-core", "1.4.0", "needs omegaconf 2.4, untested"),
        ("omegaconf", "2.4.0", "cannot be installed beside hydra-core 1.3.8"),
    ],
)
def test_a_bad_version_is_refused(name: str, bad: str, why: str) -> None:
    assert not REQUIREMENTS[name].specifier.contains(bad, prereleases=True), why


def test_the_pinned_versions_are_allowed_and_complete() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([A-Za-z0-9_.-]+)==([^\s;#]+)", line):
            pinned[match[1].lower().replace("_", "-")] = match[2]
    for name, requirement in REQUIREMENTS.items():
        assert requirement.specifier.contains(Version(pinned[name]), prereleases=True), name


def test_nothing_is_taken_from_elsewhere_than_an_index() -> None:
    assert not [requirement for requirement in REQUIREMENTS.values() if requirement.url]
    assert "git+" not in TEXT
