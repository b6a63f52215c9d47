"""The federation: many sites learn one adapter, as a Flower app.

Flower sends telemetry and looks for updates unless told not to. Sites that keep their data to
themselves do not want that, so it is off; setting the variables before the import turns it on.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
