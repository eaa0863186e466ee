"""The HTTP APIs. The import loads FastAPI."""

from pydantic import BaseModel

# FastAPI brings models of all of OpenAPI, whose validators only /openapi.json needs. To build them during the import
# would take a fifteenth of the API process's start.
BaseModel.model_config["defer_build"] = True
import fastapi  # noqa: E402, F401

del BaseModel.model_config["defer_build"]
