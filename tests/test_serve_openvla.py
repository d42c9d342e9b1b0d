"""OpenVLA's REST protocol: bodies as json_numpy writes them, both encodings, single actions and chunks, refusals."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Served

from rlrc.artifact import PolicySpec
from rlrc.runtime import cli
from rlrc.runtime.inference.policy import LocalPolicy


def encoded(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": data, "dtype": np.lib.format.dtype_to_descr(array.dtype), "shape": array.shape}


def decoded(value: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(value["__numpy__"]), value["dtype"]).reshape(value["shape"])


def post(served: Served, body: bytes, **headers: str) -> tuple[int, bytes, str]:
    """-> status, body and the header X-Error."""
    url = f"http://127.0.0.1:{served.ports['openvla']}/act"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read(), response.headers.get("X-Error", "")
    except urllib.error.HTTPError as error:
        return error.code, error.read(), ""


PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
STATE = np.array([0.1, 0.5, 1.0], np.float32)
OFT = {"full_image": encoded(PICTURE), "state": encoded(STATE), "instruction": "open the drawer"}


@pytest.fixture(scope="module")
def oft(toy_artifact: Path) -> Iterator[Served]:
    mapping = ("--mapping", "openvla", "openvla-oft")
    with Served(toy_artifact, *mapping, protocols=("openvla", "openpi")) as running:
        yield running


def test_a_chunk_is_a_list_of_actions_in_both_encodings(oft: Served, toy_artifact: Path) -> None:
    given = {"image.corner4": PICTURE, "state": STATE, "instruction": "open the drawer"}
    expected = LocalPolicy.load(toy_artifact).infer(given)["actions"]
    status, body, _ = post(oft, json.dumps(OFT).encode())
    assert status == 200
    np.testing.assert_allclose([decoded(row) for row in json.loads(body)], expected, rtol=0, atol=1e-6)
    status, body, _ = post(oft, json.dumps({"encoded": json.dumps(OFT)}).encode())
    inner = json.loads(body)
    assert isinstance(inner, str)
    np.testing.assert_allclose([decoded(row) for row in json.loads(inner)], expected, rtol=0, atol=1e-6)


def test_a_single_action_is_a_bare_array(make_toy: Callable[..., Path], tiny_manifest: Any, tmp_path: Path) -> None:
    spec: PolicySpec = tiny_manifest.policy
    spec = replace(spec, action=replace(spec.action, horizon=1))
    mapping = tmp_path / "mapping.toml"
    mapping.write_text(
        'state = [["state"]]\ninstruction = ["instruction"]\nchunks = false\n'
        '[[cameras]]\nkey = ["image"]\nlayout = "HWC"\n'
    )
    artifact = make_toy(tmp_path / "single", spec)
    body = {"image": encoded(PICTURE), "state": encoded(STATE), "instruction": "open the drawer", "unnorm_key": "x"}
    given = {"image.corner4": PICTURE, "state": STATE, "instruction": "open the drawer"}
    with Served(artifact, "--mapping", "openvla", str(mapping), "--token", "t", protocols=("openvla",)) as served:
        assert post(served, json.dumps(body).encode())[0] == 401
        status, answer, _ = post(served, json.dumps(body).encode(), Authorization="Bearer t")
    assert status == 200
    found = decoded(json.loads(answer))
    assert found.shape == (4,)
    np.testing.assert_allclose(found, LocalPolicy.load(artifact).infer(given)["actions"][0], rtol=0, atol=1e-6)


WRONG = {
    "no JSON": b"{",
    "empty": b"",
    "no map": b"[1]",
    "nested": b"[" * 900,
    "many": b"[" + b"[]," * 100_000 + b"[]]",
    "hidden": json.dumps({"encoded": "[" * 100_000}).replace("[", "\\u005b").encode(),
    "half a character": json.dumps(OFT | {"instruction": "\ud800"}).encode(),
    "half a body": json.dumps({"encoded": "\ud800"}).encode(),
    "many words": json.dumps(OFT | {"instruction": "open " * 1000}).encode(),
    "no state": json.dumps({"full_image": encoded(PICTURE), "instruction": "open"}).encode(),
    "4 GB": json.dumps(OFT | {"state": {"__numpy__": "", "dtype": "<f4", "shape": [2**30]}}).encode(),
    "objects": json.dumps(OFT | {"state": {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}}).encode(),
    "no base64": json.dumps(OFT | {"state": {"__numpy__": "!!!!", "dtype": "<f4", "shape": [3]}}).encode(),
    "transposed": json.dumps(OFT | {"full_image": encoded(PICTURE.transpose(2, 0, 1))}).encode(),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_the_protocols_error(oft: Served, name: str) -> None:
    status, body, why = post(oft, WRONG[name])
    assert (status, json.loads(body)) == (200, "error")
    assert why.startswith("expected ")
    assert "found" in why
    assert "fault" not in why


def test_a_page_in_a_browser_and_too_large_a_body_are_refused(oft: Served) -> None:
    assert post(oft, json.dumps(OFT).encode(), Origin="http://example.org")[0] == 403
    assert post(oft, b" " * (16 * 2**20 + 1))[0] == 413
    assert oft.get("/readyz", "openvla") == (200, "ready\n")
    assert oft.get("/elsewhere", "openvla")[0] == 404
    assert 'outcome="answered",protocol="openvla"' in oft.get("/metrics", "openpi")[1]


def test_chunks_are_not_cut_silently(toy_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mapping = ["--mapping", "openvla", "openvla"]
    assert cli.main(["serve", str(toy_artifact), "--port", "0", "--protocol", "openvla", *mapping]) == 2
    assert "expected keys of the state in the mapping openvla, found none" in capsys.readouterr().err
