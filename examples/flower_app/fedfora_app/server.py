"""The coordinator's side."""

from fedfora.deployment.server_app import app

__all__ = ["app"]
