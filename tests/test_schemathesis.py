"""Schemathesis holds a service against its own OpenAPI document, with all of its checks."""

import re
import subprocess
import sys
from pathlib import Path

import httpx
from late_flights import Served
from openapi_spec_validator import validate


def test_the_document_is_valid_and_its_examples_work(late_flights: Served) -> None:
    document = httpx.get(f"{late_flights.url}/docs.json").json()
    validate(document)
    tried = 0
    for path, item in document["paths"].items():
        for method, operation in item.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            response = httpx.request(method.upper(), late_flights.url + path, json=content.get("example"))
            if path != "/notebook":  # a model that was logged by hand has none
                assert response.status_code == 200, (path, response.text)
                tried += 1
    assert tried == len(document["paths"]) - 1 >= 18


def test_forms_that_are_shown_by_examples_work(late_flights: Served) -> None:
    document = httpx.get(f"{late_flights.url}/docs.json").json()
    schemas = document["components"]["schemas"]
    shown = schemas["PredictColumns"]["properties"]["columns"]["enum"]
    for columns in shown:
        response = httpx.post(f"{late_flights.url}/predict", json={"columns": columns})
        assert response.status_code == 200, response.text
    for inputs in schemas["InferRequest"]["properties"]["inputs"]["enum"]:
        url = f"{late_flights.url}/v2/models/late_flights/infer"
        assert httpx.post(url, json={"inputs": inputs}).status_code == 200


def test_no_check_finds_anything(late_flights: Served, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("st")
    options = [
        "--checks",
        "all",
        "--max-examples",
        "100",
        "--seed",
        "1",
        "--continue-on-failure",
        "--no-color",
    ]
    done = subprocess.run(
        [program, "run", f"{late_flights.url}/docs.json", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    said = "\n".join(line[:500] for line in done.stdout.splitlines())
    assert done.returncode == 0, said + done.stderr
    assert "FAILURES" not in said and "ERRORS" not in said
    tested = re.search(r"Tested:\s+(\d+)", said)
    generated = re.search(r"(\d+) generated", said)
    assert tested and int(tested[1]) >= 19, said
    assert generated and int(generated[1]) > 1000, said
