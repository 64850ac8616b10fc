"""Judge: a strong model that scores answers, behind any endpoint with OpenAI's chat completions."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from skipkernels.errors import RequestError
from skipkernels.evaluation.task import Unfinished

KEY_VARIABLE = "OPENAI_API_KEY"
_ATTEMPTS = 4
_FIRST_PAUSE_S = 1.0  # doubled after every attempt
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_LOWEST, _HIGHEST = 1.0, 10.0

_INSTRUCTION = (
    "You grade the answers of an assistant. Judge how helpful, relevant, accurate, deep and detailed the answer to "
    "the user's last message is. Explain your judgement in a few sentences, then give a grade from 1 to 10 on a line "
    'of its own, written exactly like this: "Rating: [[5]]".'
)


class JudgeUnreachable(Unfinished):
    """The endpoint gave no usable answer after several attempts."""


@dataclass(frozen=True)
class Judgment:
    """The judge's reply. ``score`` is from 1 to 10."""

    score: float
    prompt: str
    text: str


@dataclass(frozen=True)
class Judge:
    """A model behind ``url``, the address without ``/chat/completions``.

    The key, where the endpoint wants one, is taken from the environment (``OPENAI_API_KEY``).
    """

    url: str
    model: str
    timeout_s: float = 120.0
    first_pause_s: float = _FIRST_PAUSE_S

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.url):
            raise RequestError(f"a judge's address must begin with http:// or https://, got {self.url!r}")

    def grade(self, conversation: list[dict[str, str]]) -> Judgment:
        """Grades the last message of a conversation, which is the assistant's.

        Raises:
            JudgeUnreachable: no usable reply after several attempts, or an HTTP error that is not worth a retry.
        """
        prompt = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in conversation)
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 2048,
        }
        problem = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(self.first_pause_s * 2 ** (attempt - 1))
            try:
                text = self._post(body)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):
                    break  # a retry would not help
            except (OSError, HTTPException) as error:  # refused, timed out, cut off
                problem = str(getattr(error, "reason", None) or error) or type(error).__name__
            except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
                problem = f"a reply that is not a chat completion ({type(error).__name__}: {error})"
            else:
                found = _RATING.search(text)
                if found and _LOWEST <= float(found[1]) <= _HIGHEST:
                    return Judgment(float(found[1]), prompt, text)
                problem = f"a reply without a rating from 1 to 10: {text[:80]!r}"
        raise JudgeUnreachable(
            f"the judge at {self.url} gave no grade ({problem}); the answers are kept, and the same command with "
            "--resume continues"
        )

    def _post(self, body: dict[str, Any]) -> str:
        """The text of the completion."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
            document = json.loads(reply.read())
        return str(document["choices"][0]["message"]["content"])
