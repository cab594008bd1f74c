"""Secrets as blocks of the Prefect server: compared by value, told of by name alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.production.differences import NOTHING, Difference, Part
from flows.production.variables import Shell, block_name

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


def look_at_secret(client: SyncPrefectClient, shell: Shell, variable: str) -> Part:
    """The block of one secret. One that the shell does not have stays, unless the server has none either."""
    from prefect.blocks.system import Secret

    stands, given, block = _stored(client, block_name(variable)), shell.given.get(variable, ""), block_name(variable)
    differences = []
    if not given:
        (shell.kept if stands else shell.missing).add(variable)
    elif stands != given:
        differences = [Difference(now="set" if stands else NOTHING, wanted="changed" if stands else "set")]
    return Part(
        name=f"secret {block}",
        differences=differences,
        make=lambda: Secret(value=given).save(block, overwrite=True),
    )


def _stored(client: SyncPrefectClient, block: str) -> str:
    from prefect.exceptions import ObjectNotFound

    try:
        return str(client.read_block_document_by_name(block, "secret").data.get("value") or "")
    except ObjectNotFound:
        return ""
