"""The process of a site's trainer: reads the kit, and serves; loads no more than that takes."""

import logging
import os
import sys

from fedfora.deployment.kit import read_site_kit
from fedfora.deployment.spare_imports import NOT_FOR_TRAINING, hide_packages


def main(directory: str) -> None:
    """Serve the site whose kit lies in a directory."""
    with hide_packages(*NOT_FOR_TRAINING):
        from fedfora.deployment.trainer import Trainer, serve
    from fedfora.federated.settings_scope import as_scalar

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    kit = read_site_kit(directory)
    os.chdir(kit.directory)  # a relative path in kit.yaml is one from there
    own = {name: as_scalar(value) for name, value in kit.settings.items()}
    keys = (kit.signing_key, kit.site_keys)
    serve(Trainer(kit.name, kit.index, own, kit.state, keys, kit.base_fingerprint))


if __name__ == "__main__":
    main(sys.argv[1])
