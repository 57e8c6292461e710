"""What stands in the root for others: it says the same as the rest."""

import re
import tomllib

import yaml
from launching import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_is_that_of_the_readme():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = cited["preferred-citation"]
    entry = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert entry == {
        "title": paper["title"].replace("ToDi", "{ToDi}"),
        "author": " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"]),
        "booktitle": paper["collection-title"], "pages": f"{paper['start']}--{paper['end']}",
        "year": str(paper["year"])}
    assert (cited["version"], cited["license"]) == (PROJECT["version"], PROJECT["license"])


def test_the_changelog_has_this_version():
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[:2] == [
        "Unreleased", PROJECT["version"]]


def test_the_linter_before_a_commit_is_that_of_the_tests():
    hook, = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pin, = hook["additional_dependencies"]
    assert pin in (ROOT / "scripts" / "test.sh").read_text().split()


def test_the_site_is_built_by_the_locked_version():
    pin = re.search(r"mkdocs-material==(\S+)", (ROOT / "scripts" / "docs.sh").read_text())[1]
    versions = {package["name"]: package["version"]
                for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    assert versions["mkdocs-material"] == pin
