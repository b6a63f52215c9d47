"""A site's side."""

from fedfora.deployment.client_app import app

__all__ = ["app"]
