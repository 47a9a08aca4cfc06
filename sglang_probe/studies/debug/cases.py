"""Cases: a context, the token that came and was wrong, and the token that would have been right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.errors import ConfigError
from sglang_probe.studies.lens.study import token_of
from sglang_probe.studies.trace.setup import MOST_TOKENS, Setup, withheld

_KEYS = ({"rid", "right"}, {"rid", "right", "wrong"}, {"rid", "right", "step"}, {"rid", "right", "wrong", "step"})
_PAIR = {"wrong_rid", "right_rid"}


@dataclass(frozen=True)
class Case:
    """One wrong answer."""

    name: str
    """Request that it was recorded in."""
    family: str
    ids: Sequence[int]
    """Tokens before the answer."""
    wrong: int
    right: int


def answered(setup: Setup, right: str, wrong: str | None, step: int) -> list[Case]:
    """Every request whose token number `step` of the output, from 1, is `wrong` (None: anything but the right one).
    Requests with a withheld token up to there are passed over.

    Raises:
        ConfigError: no such request or token.
    """
    known = token_of(right, setup.vocabulary)
    asked = None if wrong is None else token_of(wrong, setup.vocabulary)
    if asked == known:
        raise ConfigError(f"the wrong and the right answer are the same token, `{setup.text(known)}`")
    under = set(setup.run.interventions()["rid"])
    found, passed_over = [], 0
    for r in setup.run.requests().itertuples():
        if r.rid in under or r.prompt_ids is None or r.output_ids is None or len(r.output_ids) < step:
            continue
        if withheld(r, step):
            passed_over += 1
            continue
        said = int(r.output_ids[step - 1])
        if said != known and asked in (None, said):
            ids = [*map(int, r.prompt_ids), *map(int, r.output_ids[: step - 1])]
            found.append(Case(r.rid, _family(r), ids, said, known))
    if not found:
        what = "answers otherwise" if asked is None else f"answers {setup.text(asked)!r}"
        raise ConfigError(
            f"no request of {setup.run.path} {what} at step {step}"
            + (f"; {passed_over} with withheld tokens were passed over" if passed_over else ""),
            fix="see `run.requests()` for what was answered; --step counts output tokens from 1",
        )
    return _short(found)


def read_cases(setup: Setup, path: Path) -> list[Case]:
    """Cases of a JSONL file, a line each: `{"rid": ..., "right": token, "wrong": token, "step": 1}` (`wrong`: by
    default what was recorded), or `{"wrong_rid": ..., "right_rid": ...}`: two recorded continuations of one prompt,
    which are compared where they part.

    Raises:
        ConfigError: a line that is neither, or that names what is not recorded; says which.
    """
    requests = setup.run.requests().set_index("rid", drop=False)
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            given = json.loads(line)
        except ValueError as e:
            raise ConfigError(f"{where} is not JSON: {e}") from e
        keys = set(given) if isinstance(given, dict) else set()
        if keys == _PAIR:
            found.append(_parted(setup, str(given["wrong_rid"]), str(given["right_rid"]), where))
        elif keys in _KEYS:
            found.append(_named(setup, requests, given, where))
        else:
            raise ConfigError(
                f"{where} has the keys {', '.join(sorted(keys)) or 'none'}",
                fix="`rid` and `right` (and `wrong`, `step`), or `wrong_rid` and `right_rid`",
            )
    if not found:
        raise ConfigError(f"{path} has no cases")
    return _short(found)


def _named(setup: Setup, requests: Any, given: dict[str, Any], where: str) -> Case:
    r = setup.recorded(str(given["rid"]))
    step = given.get("step", 1)
    if type(step) is not int or not 1 <= step <= len(r["output_ids"]):
        raise ConfigError(f"{where}: `{given['rid']}` has {len(r['output_ids'])} output tokens, not step {step!r}")
    right = _token(setup, given["right"], where)
    wrong = _token(setup, given["wrong"], where) if "wrong" in given else int(r["output_ids"][step - 1])
    if wrong == right:
        raise ConfigError(f"{where}: the wrong and the right answer are the same token, `{setup.text(right)}`")
    ids = [*map(int, r["prompt_ids"]), *map(int, r["output_ids"][: step - 1])]
    return Case(str(given["rid"]), _family(requests.loc[str(given["rid"])]), ids, wrong, right)


def _parted(setup: Setup, wrong: str, right: str, where: str) -> Case:
    a, b = setup.recorded(wrong), setup.recorded(right)
    if list(a["prompt_ids"]) != list(b["prompt_ids"]):
        raise ConfigError(f"{where}: `{wrong}` and `{right}` have different prompts, so that no token is to blame")
    both = zip(a["output_ids"], b["output_ids"], strict=False)
    at = next((i for i, (x, y) in enumerate(both) if x != y), None)
    if at is None:
        raise ConfigError(f"{where}: `{wrong}` and `{right}` say the same as far as both go")
    ids = [*map(int, a["prompt_ids"]), *map(int, a["output_ids"][:at])]
    return Case(wrong, str(a.get("family") or wrong), ids, int(a["output_ids"][at]), int(b["output_ids"][at]))


def _token(setup: Setup, text: Any, where: str) -> int:
    if not isinstance(text, str):
        raise ConfigError(f"{where}: a token is named by its text or `#ID`, not {text!r}")
    try:
        return token_of(text, setup.vocabulary)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from e


def _family(request: Any) -> str:
    named = getattr(request, "family", None)
    return str(named) if isinstance(named, str) else str(request.rid)


def _short(cases: list[Case]) -> list[Case]:
    longest = max(cases, key=lambda c: len(c.ids))
    if len(longest.ids) > MOST_TOKENS:
        raise ConfigError(
            f"`{longest.name}` has {len(longest.ids)} tokens before its answer, and gradients keep all of them in "
            "memory",
            fix=f"leave out cases of more than {MOST_TOKENS}",
        )
    return cases
