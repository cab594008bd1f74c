# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments
import threading
import time
from uuid import uuid4

import pytest
from prefect._internal.concurrency.cancellation import CancelledError
from prefect.concurrency import _leases
from prefect.concurrency._leases import maintain_concurrency_lease

import flows.pipeline.optimize
from tests.flows.prefect_server import prefect_api


@pytest.mark.parametrize("ours", [True, False])
def test_run_whose_slot_was_lost_goes_on_and_says_so_where_prefect_alone_would_end_it(
    prefect_api, monkeypatch, caplog, ours
):
    lost, handler = threading.Event(), _leases._handle_lease_renewal_failure

    def handled(*given):
        (handler if ours else handler.__wrapped__)(*given)
        lost.set()

    monkeypatch.setattr(_leases, "_handle_lease_renewal_failure", handled)
    monkeypatch.setattr(_leases, "_RENEWAL_RETRY_BASE_DELAY", 0.05)

    def run():
        with maintain_concurrency_lease(uuid4(), 300, raise_on_lease_renewal_failure=True):
            for _ in range(300):
                time.sleep(0.1)
                if lost.is_set():
                    break
            time.sleep(0.5)
            return "done"

    if ours:
        assert run() == "done" and lost.is_set()
        assert "Execution will continue" in caplog.text
    else:
        with pytest.raises(CancelledError):
            run()
