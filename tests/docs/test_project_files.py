"""The project's outer files: changelog, workflow, issue forms."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from quantkit import __version__

ROOT = Path(__file__).parent.parent.parent
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_changelog_begins_with_this_version():
    versions = re.findall(
        r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert versions[0] == __version__ and versions == sorted(versions, reverse=True)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", ".github/workflows/ci.yml", ".ci/run"])
def test_make_targets_that_a_file_names_exist(name):
    text = (ROOT / name).read_text()
    targets = {
        target
        for call in re.findall(r"(?:^|[`:]|exec) ?\s*make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
        for target in call.split()
    }
    assert targets and targets <= make_targets()


def test_links_of_the_outer_files_lead_to_files():
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text()):
            assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_the_workflow_runs_lint_types_tests_docs_and_the_wheel_on_each_python():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    run = " ".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert all(f"make {target}" in run for target in ("lint types", "docs", "test", "wheel"))
    oldest = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert jobs["tests"]["strategy"]["matrix"]["python-version"][0] == oldest


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_is_complete_and_asks_for_the_doctor(path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert isinstance(form["blank_issues_enabled"], bool)
        return
    assert {"name", "description", "body"} <= set(form)
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    assert any(field["attributes"]["label"] == "quantkit doctor --json" for field in form["body"])


def test_no_file_of_the_repository_is_a_link():
    """A link to a build on one machine breaks the wheel on every other."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("these are the sources without their repository")
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []
