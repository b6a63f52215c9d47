"""Protection of what lies on a disk: keys of this machine, encryption, signed provenance."""
