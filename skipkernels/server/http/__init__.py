"""OpenAI's HTTP interface to a served model. FastAPI and uvicorn are the optional extra ``serve``.

The path of a request: ``app`` routes it, ``body`` reads it, ``schema`` and ``parts`` check and decode it, ``service``
admits it, ``pending_request`` waits for its answer, ``completion_response`` writes it. ``samples`` reads chats to
profile on.
"""
