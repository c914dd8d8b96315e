"""A model answers over HTTP as clients of OpenAI's interface expect. Needs the extra `serve`: starlette and uvicorn."""
