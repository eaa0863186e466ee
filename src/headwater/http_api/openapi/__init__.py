"""/openapi.json: what FastAPI derives from the routes, completed with the shapes of answers."""
