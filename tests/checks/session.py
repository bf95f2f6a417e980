"""One pytest session that runs no test itself, but forks for each check taken out."""

from __future__ import annotations

import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from checks.find import Check
from checks.forks import Outcome, run_forked
from checks.notes import FileNotes, Notes, digest
from checks.tree import Tree

Say = Callable[[str], None]


@dataclass(slots=True)
class Verdict:
    """Of one check: *noticed* is the test that did, or empty; *tests* is how many could have."""

    check: Check
    noticed: str
    tests: int
    hung: bool = False


@dataclass(slots=True)
class Proof:
    """The pytest plugin: results are in ``verdicts``, tests that cannot be used in ``unfit``."""

    tree: Tree
    root: Path
    notes: Notes
    wanted: Callable[[Check], bool]
    say: Say
    examples: int = 20
    verdicts: list[Verdict] = field(default_factory=list)
    unfit: set[str] = field(default_factory=set)
    collected: int = 0
    _fit: set[str] = field(default_factory=set)

    def pytest_collection(self) -> None:
        """Before tests are imported: property tests are the same in every run, and short."""
        settings.register_profile(
            "checks",
            derandomize=True,
            max_examples=self.examples,
            deadline=None,
            database=None,
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=list(HealthCheck),
        )
        settings.load_profile("checks")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of running the tests."""
        if session.testsfailed:
            raise session.Interrupted("tests cannot be imported")
        self.collected = len(session.items)
        by_file: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in session.items:
            by_file[item.nodeid.partition("::")[0]].append(item)
        self._note(by_file)
        files = list(by_file)
        self.unfit |= set(self.notes.failing(files))
        items = {item.nodeid: item for item in session.items}
        order = {nodeid: position for position, nodeid in enumerate(items)}
        checks = [each for each in enumerate(self.tree.checks) if self.wanted(each[1])]
        for done, (number, check) in enumerate(checks):
            could = [
                (seconds, test)
                for seconds, test in self.notes.tests_of(check.key, files)
                if test in items
            ]
            verdict = self._try(number, check, could, items, order)
            self.verdicts.append(verdict)
            if not verdict.noticed:
                self.say(f"{done + 1}/{len(checks)} unnoticed: {location(self.tree, check)}")
            elif done % 25 == 24:
                self.say(f"{done + 1}/{len(checks)}")
        return True

    def _note(self, by_file: dict[str, list[pytest.Item]]) -> None:
        helpers = [
            path
            for path in (self.root / "tests").rglob("*.py")
            if not path.name.startswith("test_") and path.parent.name not in ("checks", "guest")
        ]
        sources = [*self.tree.package.rglob("*.py"), *helpers]
        common = digest(sources, str(self.examples), *(each.key for each in self.tree.checks))
        digests = {file: digest([self.root / file], common) for file in by_file}
        stale = [file for file in by_file if not self.notes.is_fresh(file, digests[file])]
        for number, file in enumerate(stale):
            self.say(f"noting what tests touch: {file} ({number + 1}/{len(stale)})")
            self.notes.put(file, self._note_file(by_file[file], digests[file]))
            self.notes.save()

    def _note_file(self, items: Sequence[pytest.Item], key: str) -> FileNotes:
        notes = FileNotes(key)
        with tempfile.NamedTemporaryFile(dir=self.tree.directory) as file:
            outcomes = run_forked(items, seconds=3600, notes=file.name, stop_early=False)
            touches = Counter(Path(file.name).read_text().splitlines())
        for outcome in outcomes:
            notes.seconds[outcome.test] = outcome.seconds
            if not outcome.passed:
                notes.failing.append(outcome.test)
        for line in touches:
            number, _, test = line.partition(" ")
            if test in notes.seconds and test not in notes.failing:
                notes.touched.setdefault(self.tree.checks[int(number)].key, []).append(test)
        return notes

    def _try(
        self,
        number: int,
        check: Check,
        could: list[tuple[float, str]],
        items: dict[str, pytest.Item],
        order: dict[str, int],
    ) -> Verdict:
        """Take one check out, and have those tests run that could notice."""
        while True:
            left = [(seconds, test) for seconds, test in could if test not in self.unfit]
            if not left:
                return Verdict(check, "", 0)
            seconds = sum(seconds for seconds, _ in left)
            outcomes = run_forked([items[test] for _, test in left], seconds=seconds, out=number)
            last = outcomes[-1] if outcomes else Outcome(left[0][1], None, 0)
            if last.passed and len(outcomes) == len(left):
                return Verdict(check, "", len(left))
            if last.passed:  # the process ended between two tests
                last = Outcome(left[len(outcomes)][1], None, 0)
            seconds = next(seconds for seconds, test in left if test == last.test)
            if self._is_fit(items[last.test], seconds):
                return Verdict(check, last.test, len(left), hung=last.passed is None)

    def _is_fit(self, item: pytest.Item, seconds: float) -> bool:
        """Whether a test passes alone, with all checks in their places."""
        test = item.nodeid
        if test not in self._fit | self.unfit:
            outcomes = run_forked([item], seconds=seconds)
            fit = bool(outcomes and outcomes[-1].passed)
            (self._fit if fit else self.unfit).add(test)
        return test in self._fit


def location(tree: Tree, check: Check) -> str:
    """For people: where it is, and what."""
    return f"{os.path.relpath(tree.package / check.file)}:{check.line}: {check}"
