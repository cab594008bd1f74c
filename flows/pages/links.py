"""Where a run's page in Prefect leads: its report, and its page in MLflow, whatever ports they have today."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route

_ASK_S = 10.0


def routes(scratch: Path, mlflow: str) -> list[Route]:
    """The two links.

    Args:
        scratch: of the store, with the records.
        mlflow: the address of MLflow's pages.
    """

    def folder(request: Request) -> Path:
        name = request.path_params["run"]
        found = scratch / "runs" / name
        if not re.fullmatch(r"[\w-]+", name) or not found.is_dir():
            raise HTTPException(404, f"there is no run {name} beside this store")
        return found

    async def report(request: Request) -> Response:
        page = folder(request) / "report.html"
        if not page.is_file():
            raise HTTPException(404, "this run ended before it wrote a report")
        return FileResponse(page, media_type="text/html")

    async def tracked(request: Request) -> Response:
        run = folder(request).name
        async with httpx.AsyncClient(base_url=mlflow, timeout=_ASK_S) as client:
            return RedirectResponse(f"{mlflow}/{await _page(client, run)}")

    return [Route("/runs/{run}/report.html", report), Route("/runs/{run}/mlflow", tracked)]


async def _page(client: httpx.AsyncClient, run: str) -> str:
    """The page of a run in MLflow; its first page where MLflow does not say."""
    try:
        known = await _ask(client, "experiments/search", {"max_results": 1000})
        ids = [one["experiment_id"] for one in known.get("experiments", ())]
        wanted = {"experiment_ids": ids, "filter": f"tags.`enginery.run` = '{run}'", "max_results": 1}
        found = (await _ask(client, "runs/search", wanted)).get("runs", ())
    except (httpx.HTTPError, ValueError, KeyError):
        return ""
    pages = [f"#/experiments/{one['info']['experiment_id']}/runs/{one['info']['run_id']}" for one in found]
    return as_training(pages[0]) if pages else ""


def as_training(page: str) -> str:
    """A page of MLflow in its pages for training: those for prompts and agents, its first choice, show no params."""
    return f"{page}?workflowType=machine_learning"


async def _ask(
    client: httpx.AsyncClient, what: str, wanted: dict[str, object]
) -> dict[str, list[dict[str, dict[str, str]]]]:
    answer = await client.post(f"/api/2.0/mlflow/{what}", json=wanted)
    answer.raise_for_status()
    found: dict[str, list[dict[str, dict[str, str]]]] = answer.json()
    return found
