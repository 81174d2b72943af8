"""The dashboard against a real HTTP server: traffic, and everything that may happen to a service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import nbformat
import pytest
from metrics_service import MetricsService, winter
from running import run_cells

from nbprod.errors import UsageError
from nbprod.widgets.dashboard import Dashboard


@pytest.fixture
def service() -> Iterator[MetricsService]:
    with MetricsService() as service:
        yield service


@pytest.fixture
def watch() -> Iterator[Callable[[str], Dashboard]]:
    """Makes dashboards that ask ten times a second, and ends them."""
    made: list[Dashboard] = []

    def start(url: str) -> Dashboard:
        made.append(Dashboard(url, interval=0.1))
        made[-1].start()
        return made[-1]

    yield start
    for dashboard in made:
        dashboard.stop()


def wait_for(condition: Callable[[], object], dashboard: Dashboard, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, dashboard.state["text"]
        time.sleep(0.02)


def is_live(dashboard: Dashboard) -> bool:
    return dashboard.state["status"] == "live"


def test_numbers_follow_the_traffic(service, watch):
    dashboard = watch(service.url)
    wait_for(lambda: is_live(dashboard) and dashboard.state["ages"], dashboard)
    assert dashboard.state["model"] == "arrival_delay:1" and dashboard.state["commit"] == "3f2a91c"
    assert dashboard.state["rate"][-1] == 0 and dashboard.state["p95"][-1] is None
    for _ in range(20):
        service.predict(winter(100, warmer=20))
    service.predict(winter(1), code=400)
    wait_for(lambda: dashboard.state["rows"] == 2000 and dashboard.state["client"][-1], dashboard)
    state = dashboard.state
    assert state["rate"][-1] > 0 and state["client"][-1] == pytest.approx(1 / 21, rel=0.01)
    assert 10 < state["p50"][-1] < 25 and state["server"][-1] == 0
    assert sum(state["predictions"]["service"]) == pytest.approx(1, abs=0.01)
    assert [each["name"] for each in state["drift"]["columns"] if each["drifted"]] == ["temperature"]
    assert "drifted: temperature" in state["text"]


def test_a_service_goes_away_and_comes_back_with_its_counters_at_zero(watch):
    with MetricsService() as service:
        for _ in range(5):
            service.predict(winter(100))
        dashboard = watch(service.url)
        wait_for(lambda: is_live(dashboard) and dashboard.state["rows"] == 500, dashboard)
    wait_for(lambda: dashboard.state["status"] == "down", dashboard)
    assert "connection refused" in dashboard.state["message"] and dashboard.state["rows"] == 500
    with MetricsService(port=service.port) as again:
        again.predict(winter(3))
        wait_for(lambda: is_live(dashboard), dashboard)
        assert dashboard.state["rows"] == 3 and dashboard.state["gaps"]
        assert dashboard.state["message"].startswith("connected for")
        assert all(rate is None or rate >= 0 for rate in dashboard.state["rate"])


def test_nobody_there_yet_is_shown_and_not_raised(watch):
    with MetricsService() as service:
        port = service.port
    dashboard = watch(f"http://127.0.0.1:{port}")
    wait_for(lambda: dashboard.state["status"] == "down", dashboard)
    assert dashboard.state["message"] == "connection refused"
    with MetricsService(port=port):
        wait_for(lambda: is_live(dashboard), dashboard)


@pytest.mark.parametrize("disturbance", ["delay", "drip"])
def test_a_slow_service_is_given_up_after_two_seconds(service, watch, disturbance):
    dashboard = watch(service.url)
    wait_for(lambda: is_live(dashboard), dashboard)
    setattr(service, disturbance, 3.0)
    wait_for(lambda: "timed out after 2 s" in dashboard.state["message"], dashboard)
    assert dashboard.state["status"] in ("stale", "down")
    setattr(service, disturbance, 0)
    wait_for(lambda: is_live(dashboard), dashboard)


@pytest.mark.parametrize("body", [b"<html>Bad Gateway</html>", b"\xff\xfe\x00", b'{"detail": "no"}'])
def test_what_is_not_metrics_is_said_to_be_none(service, watch, body):
    service.body = body
    dashboard = watch(service.url)
    wait_for(lambda: "not Prometheus text" in dashboard.state["message"], dashboard)


def test_other_models_and_values_that_are_no_numbers_do_no_harm(service, watch):
    service.predict(winter(10))
    service.predict(winter(90), tag="another_model:7")
    service.rows.labels("arrival_delay:0").inc(float("nan"))
    dashboard = watch(service.url)
    wait_for(lambda: is_live(dashboard) and dashboard.state["rows"], dashboard)
    assert dashboard.state["rows"] == 10 and dashboard.state["drift"]["period"].startswith("all 10 rows")


def test_a_new_version_at_the_same_address_is_noticed(service, watch):
    service.predict(winter(50))
    dashboard = watch(service.url)
    wait_for(lambda: dashboard.state["rows"] == 50, dashboard)
    service.deploy("arrival_delay:2")
    service.predict(winter(7))
    wait_for(
        lambda: dashboard.state["model"] == "arrival_delay:2" and dashboard.state["rows"] == 7, dashboard
    )


def test_it_pauses_without_a_page_and_goes_on_with_one(service, watch):
    dashboard = watch(service.url)
    dashboard._watch.lease.seconds = 0.5
    wait_for(lambda: dashboard.state["status"] == "paused", dashboard)
    asked = service.asked
    time.sleep(0.5)
    assert service.asked == asked
    dashboard._hear(dashboard, {"kind": "beat"}, [])
    wait_for(lambda: is_live(dashboard) and service.asked > asked, dashboard)


@pytest.mark.parametrize("url", ["localhost:3000", "", "ftp://localhost", "http://"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(UsageError, match="no address of a service"):
        Dashboard(url)


def test_in_a_kernel_it_goes_on_while_a_cell_runs_and_leaves_its_description(service, tmp_path):
    cells = [
        "from nbprod.widgets.dashboard import Dashboard",
        f"dashboard = Dashboard({service.url!r}, interval=0.1)\ndashboard",
        "import time\nbefore, deadline = len(dashboard.state['ages']), time.monotonic() + 30\n"
        "while len(dashboard.state['ages']) < before + 5:\n"
        "    assert time.monotonic() < deadline\n    time.sleep(0.05)",
        "dashboard.stop()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    run_cells(notebook, tmp_path)
    assert [len(cell.outputs) for cell in notebook.cells] == [0, 1, 0, 0], "nothing was printed elsewhere"
    left = notebook.cells[1].outputs[0].data
    assert list(left) == ["text/plain"] and "arrival_delay:1 is stopped" in left["text/plain"]
