"""``bench/serving_loads.py`` asks a server nothing before it has measured itself."""

import sys

import httpx
import pytest

from bench.serving_loads import free_port, running

SERVER = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Handler.asked += self.path == "/v1/models"
        told = {"profiling": Handler.asked < int(sys.argv[2]), "asked": Handler.asked}
        body = json.dumps({"data": [{"id": "m", "skipkernels": told} if int(sys.argv[2]) else {"id": "m"}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

print("1 strategies are still to be measured", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("asked", [0, 4], ids=["llama.cpp's", "ours"])
def test_it_waits_until_the_server_says_that_profiling_is_over(asked: int) -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port), str(asked)]
    with running("a server", command, f"http://127.0.0.1:{port}", profiles_s=60.0):
        (model,) = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"]
        assert model.get("skipkernels", {}).get("asked", 1) == asked + 1


def test_what_was_waited_for_in_vain_is_said() -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port), "1000000"]
    url = f"http://127.0.0.1:{port}"
    with (
        pytest.raises(RuntimeError, match=r"still measures its strategies after 0.3 s \(--profiles-s\).*still to be"),
        running("a server", command, url, profiles_s=0.3),
    ):
        pass
