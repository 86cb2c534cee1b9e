"""Runs on a W&B server, `wandb://entity/project`, read with the W&B client and the user's own login.

    wandb://me/ladder                             every run of the project
    wandb://me/ladder?state=finished&group=d64    those that W&B's filters keep; config.x and summary_metrics.x are keys

Pages are fetched one by one. What the server or the network refuses for now (429, 5xx, a time-out) is asked again,
after waits that double; what it refuses for good (401, 403, 404) is an error at once. With a cache folder, the runs
of a project are kept there as JSON Lines, and are read from there the next time; remove the file to fetch them again.

Runs of lowprec carry their facts in the config, so they become the same rows as their run folders. Of others, the
config (`config.x`) and the last value of everything logged are a table, whose columns are recognised as those of a
CSV.
"""

import inspect
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from lowprec.scaling.sources.facts import ungrouped
from lowprec.scaling.sources.folders import Progress

T = TypeVar("T")
TRIES, FIRST_WAIT_S, PER_PAGE, TIMEOUT_S = 6, 2.0, 50, 60
CURVE_SAMPLES = 10_000
# W&B returns records that hold all the keys asked for; the second names are those of older versions of lowprec
CURVES = (("lr", "loss"), ("val_loss",), ("train/lr", "train/loss"), ("val/val_loss",))  # older names first


def fetch(url: str, cache: Path | None = None, progress: Progress | None = None) -> Path | list[dict[str, Any]]:
    """The runs of a project as records {name, id, state, source, curve, config, summary}; with `cache`, their file.

    Raises ValueError with one sentence.
    """
    project, filters = parse_url(url)
    kept = cache / (re.sub(r"[^\w.-]+", "_", url.removeprefix("wandb://")) + ".jsonl") if cache else None
    if kept and kept.is_file():
        return kept
    records = list(_runs(project, filters, progress))
    if not records:
        raise ValueError(f"{url}: there is no run in {project}" + (" that the filters keep" if filters else ""))
    if not kept:
        return records
    kept.parent.mkdir(parents=True, exist_ok=True)
    draft = kept.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    draft.replace(kept)
    return kept


def parse_url(url: str) -> tuple[str, dict[str, Any]]:
    """(entity/project, filters of W&B). Raises ValueError."""
    parts = urlsplit(url)
    project = f"{parts.netloc}{parts.path}".strip("/")
    if project.count("/") != 1:
        raise ValueError(f"{url}: write wandb://entity/project")
    filters: dict[str, Any] = {}
    for key, text in parse_qsl(parts.query, keep_blank_values=True):
        try:
            filters[key] = json.loads(text)
        except json.JSONDecodeError:
            filters[key] = text
    return project, filters


def _runs(project: str, filters: dict[str, Any], progress: Progress | None) -> Iterator[dict[str, Any]]:
    api = _login(project)
    eager = {"lazy": False} if "lazy" in inspect.signature(api.runs).parameters else {}
    runs = patiently(project, lambda: api.runs(project, filters=filters, per_page=PER_PAGE, **eager))
    total, count = patiently(project, lambda: len(runs)), 0
    pages = iter(runs)
    while True:
        place = runs.index
        try:
            run = patiently(project, partial(_next, pages, place))
        except StopIteration:
            return
        count += 1
        if progress:
            progress(count, total)
        url = f"wandb://{project}/{run.id}"
        about = {"name": run.name, "id": run.id, "state": run.state, "source": url, "curve": url}
        yield {**about, "config": dict(run.config), "summary": _plain(dict(run.summary))}


def _next(pages: Any, place: int) -> Any:
    pages.index = place  # a page that failed has moved it on
    return next(pages)


def _plain(summary: dict[str, Any]) -> dict[str, Any]:
    """What is a number or a text; media and internal values are not."""
    return {k: v for k, v in summary.items() if isinstance(v, (int, float, str)) and not k.startswith("_")}


def fetch_curve(ref: str) -> list[dict[str, Any]]:
    """What a run logged of its curve; at most `CURVE_SAMPLES` records, which W&B picks evenly. Raises ValueError."""
    project, _, run_id = ref.removeprefix("wandb://").rpartition("/")
    api = _login(project)
    run = patiently(project, lambda: api.run(f"{project}/{run_id}"))
    records: dict[float, dict[str, Any]] = {}
    for keys in CURVES:
        history = partial(run.history, samples=CURVE_SAMPLES, keys=["step", *keys], pandas=False)
        for record in patiently(project, history):
            named = {ungrouped(key): value for key, value in record.items()}
            records.setdefault(record["step"], {}).update(named)
    return [records[step] for step in sorted(records)]


def _login(project: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(f"wandb://{project} needs the W&B client: pip install wandb") from None
    try:
        return patiently(project, lambda: wandb.Api(timeout=TIMEOUT_S))
    except wandb.errors.UsageError:
        raise ValueError(f"wandb://{project}: you are not logged in to W&B: run `wandb login`") from None


def patiently(project: str, ask: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """`ask()`, again after a wait where it may help. Raises ValueError with one sentence."""
    import wandb

    for attempt in range(TRIES):
        try:
            return ask()
        except (StopIteration, wandb.errors.UsageError):
            raise
        except Exception as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            status = status_of(error)
            if sentence := refusal(project, status, why):
                raise ValueError(sentence) from None
            if attempt == TRIES - 1:
                code = f"{status}: " if status else ""
                raise ValueError(
                    f"wandb://{project}: W&B could not be asked, {TRIES} times in a row ({code}{why}); try again later"
                ) from None
            sleep(FIRST_WAIT_S * 2**attempt * (1 + random.random() / 4))
    raise AssertionError


def refusal(project: str, status: int, why: str) -> str:
    """What to tell the user if asking again cannot help; "" if it may."""
    why = why.lower()
    if status == 401 or (not status and "login" in why):
        return f"wandb://{project}: W&B does not accept your login ({why}): run `wandb login --relogin`"
    if status in (403, 404) or re.search("could not find|not found|permission|access denied", why):
        return f"wandb://{project}: there is no such project, or it is private and your login may not see it"
    if 400 <= status < 500 and status not in (408, 409, 429):
        return f"wandb://{project}: W&B refuses the request ({status}: {why})"
    return ""


def status_of(error: BaseException | None) -> int:
    """The HTTP status that an exception of the W&B client stands for; 0 if it does not say."""
    while error is not None:
        response = getattr(error, "response", None)
        for name in ("http_status", "status_code"):
            if status := getattr(response, name, 0):
                return int(status)
        error = getattr(error, "exc", None) or error.__cause__ or error.__context__
    return 0
